// Products with quantized weights and what a layer does beside them: the contracts. How bytes lie: docs/formats.md; the
// plain definition: fewfire.formats and fewfire.kernels.reference.
//
// Activations are int8 with one float32 scale for each token and 128 columns; four columns that exceed the others by far
// have 15 bits (wide.hpp). Sums are exact in int32 within what shares a weight scale; those are scaled and added in rising
// order of columns, each by one fused multiply-add. What high parts add is added up apart and comes last.
// So a result depends on its token and its row alone: not on what else is in the batch, the tiling, the threads, or the
// instruction set.
#pragma once

#include <cstdint>

namespace fewfire {

constexpr std::int64_t kRows = 16;    // rows of a tile: the lanes of a result
constexpr std::int64_t kGroup = 128;  // columns of a tile: what shares an activation's scale
enum class WeightFormat : std::int32_t { kF32, kBf16, kQ8, kQ4, kMxfp4, kQ4_0, kQ4_1, kQ8_0, kQ4K, kQ6K };

constexpr bool is_plain(WeightFormat format) { return format == WeightFormat::kF32 || format == WeightFormat::kBf16; }

// One matrix (rows, columns) as a pack holds it. Rows of f32 and bf16 follow one another; scales is null for them.
struct Matrix {
    const std::uint8_t* codes = nullptr;
    const std::uint8_t* scales = nullptr;
    std::int64_t rows = 0, columns = 0;
    WeightFormat format = WeightFormat::kF32;

    std::int64_t blocks() const { return (rows + kRows - 1) / kRows; }
    std::int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
    bool is_plain() const { return fewfire::is_plain(format); }
    explicit operator bool() const { return codes != nullptr; }
};

// Bytes that one token's codes, scales, sums (of each group's 128 codes, of each 32, of each 16) and wide quads take.
constexpr std::int64_t token_bytes(std::int64_t groups) { return groups * (kGroup + 4 + 13 * 4 + 8); }

// Tokens as products walk them, some together in a tile; how they lie in it is the kernels' own affair. Tiles are nearly
// equal: the first `larger` of them hold small + 1 tokens, the others small.
struct Tiles {
    std::uint8_t* memory = nullptr;  // count * token_bytes(groups), aligned to 64
    std::int64_t count = 0, groups = 0, tiles = 0, small = 0, larger = 0;

    Tiles() = default;
    Tiles(std::uint8_t* room, std::int64_t tokens, std::int64_t num_groups, std::int64_t most)
        : memory(room), count(tokens), groups(num_groups), tiles((tokens + most - 1) / most) {
        if (tiles > 0) small = tokens / tiles, larger = tokens % tiles;
    }
    std::int64_t begin(std::int64_t i) const { return small * i + (i < larger ? i : larger); }
    std::int64_t size(std::int64_t i) const { return small + (i < larger ? 1 : 0); }
    std::int64_t tile_of(std::int64_t token) const {
        const std::int64_t in_larger = larger * (small + 1);
        return token < in_larger ? token / (small + 1) : larger + (token - in_larger) / small;
    }
};

// Tiles [first, last), and of each token the groups [first_group, last_group).
struct TilePart {
    std::int64_t first, last, first_group, last_group;
};

// The tokens of a product: values for plain weights, row i being row rows[i] (null: i) of those `stride` apart; tiles for
// quantized ones.
struct Activations {
    const float* values = nullptr;
    std::int64_t stride = 0, columns = 0;
    const std::int32_t* rows = nullptr;
    Tiles tiles;

    std::int64_t count() const { return tiles.count; }
};

constexpr std::int64_t groups_of(std::int64_t columns) { return (columns + kGroup - 1) / kGroup; }

constexpr std::int64_t kMostBlocks = 4;   // blocks of 16 rows that are multiplied together
constexpr std::int64_t kMostTokens = 6;   // tokens of a tile, on any instruction set
constexpr std::int64_t kPanelGroups = 2;  // groups that are unpacked together: 16 KiB of bytes
constexpr std::int64_t kTogether = 768;   // tokens that pass by what was unpacked
constexpr std::int64_t kRunsOfGroup = 8;  // the most runs of a group that are scaled apart

// Bytes of scratch that `linear` needs for a matrix of `columns` and `tokens` tokens; a multiple of 64.
constexpr std::int64_t linear_scratch(std::int64_t columns, std::int64_t tokens) {
    const std::int64_t groups = groups_of(columns), together = tokens < kTogether ? tokens : kTogether;
    const std::int64_t scales = (kMostBlocks * kPanelGroups + groups) * kRunsOfGroup * kRows * 4;
    const std::int64_t panels = kMostBlocks * kPanelGroups * kGroup * kRows + 2 * scales;
    const std::int64_t totals = 2 * together * kMostBlocks * kRows * 4;
    const std::int64_t starts = together * groups * kRunsOfGroup * 4, wide = together * (groups * 24 + kMostBlocks * kRows * 4 + 1);
    return (panels + totals + starts + wide + 1024) / 64 * 64;
}

using bf16 = std::uint16_t;

// ------------------------------------------------------------------------------------------------ feed-forward

enum class HiddenActivation : std::int32_t { kSilu, kGeluTanh, kRelu, kGelu, kSwigluClamped };

// What lies between a feed-forward's matrices. hidden = act(gate) * up, or act(up) where gate is null; swiglu_clamped as
// fewfire.config says. Biases (null: none) are added first; `weight` multiplies gate and up before them.
struct Gating {
    HiddenActivation activation = HiddenActivation::kSilu;
    float alpha = 0, limit = 0;  // of swiglu_clamped
    const float *gate_bias = nullptr, *up_bias = nullptr;
    float weight = 1;
};

// --------------------------------------------------------------------------------------------------- attention

constexpr std::int64_t kPageTokens = 64;  // tokens of one page of the cache
constexpr int kMostQueries = 24;  // of a job: as many sums as AVX-512 has registers for
constexpr int kQueryChunk = 64;   // numbers of a query that a job lays side by side

// Keys and values of 64 tokens: see docs/engine.md.
enum class CacheFormat : std::int32_t { kBf16, kQ8 };

// What a page holds of one layer, for each key-value head or, `is_latent`, for all heads together.
struct CacheShape {
    CacheFormat format = CacheFormat::kBf16;
    bool is_latent = false;
    std::int64_t key_width = 0, value_width = 0;  // latent: the value is the first part of the key

    std::int64_t element_bytes() const { return format == CacheFormat::kQ8 ? 1 : 2; }
    std::int64_t stored_width() const { return is_latent ? key_width : key_width + value_width; }
    // Of one head; q8 has two scales a token: of keys and values, or of a latent's value and the rest of its key.
    std::int64_t page_bytes() const {
        const std::int64_t scales = format == CacheFormat::kQ8 ? 2 * kPageTokens * 4 : 0;
        return kPageTokens * stored_width() * element_bytes() + scales;
    }
};

// One token's key and value (value null for a latent) into place `slot` of a page's head.
struct CacheWrite {
    std::uint8_t* page = nullptr;
    std::int64_t slot = 0;
    const float *key = nullptr, *value = nullptr;
};

// Floats of scratch that a job needs, whatever its number of queries: the queries, their sums and their scores of a page.
constexpr std::int64_t attention_room(const CacheShape& shape) {
    const std::int64_t chunks = shape.is_latent ? 0 : (shape.key_width + kQueryChunk - 1) / kQueryChunk;
    return kMostQueries * (chunks * kQueryChunk + shape.value_width + kPageTokens);
}

// Up to kMostQueries queries that share a head, each over pages of one sequence. Query q sees keys [first[q], last[q]),
// and of those only where its bit in selected[q] (null: all) is set. sink: one more score that takes probability and
// gives nothing (-inf: none). cap: scores become cap * tanh(score / cap) (0: none).
struct AttentionJob {
    CacheShape shape;
    const std::uint8_t* const* pages = nullptr;
    std::int64_t offset = 0;  // of the head within a page, in bytes
    float scale = 1, cap = 0;
    float* room = nullptr;  // attention_room floats, aligned to 64 bytes
    int num_queries = 0;
    const float* queries[kMostQueries] = {};
    float* out[kMostQueries] = {};  // value_width each
    std::int64_t first[kMostQueries] = {}, last[kMostQueries] = {};
    float sink[kMostQueries] = {};
    const std::uint64_t* selected[kMostQueries] = {};  // a bit a key, a word a page
};

struct QuantizedTable {
    std::int64_t tile_tokens;  // the most tokens of a tile

    // Part of the tiles of rows of values, of which each has `columns` from the part's first on, where `values` points. A
    // group of 128 whose largest magnitude is not finite gets a NaN scale; one of zeros gets zeros.
    void (*quantize)(const float* values, std::int64_t stride, std::int64_t columns, const Tiles& tiles, const TilePart& part);

    // `to`, tokens[i] of `from` being its token i.
    void (*gather)(const Tiles& from, const std::int32_t* tokens, const Tiles& to);

    // out[i * out_stride + r] = weight row r times token i, for the rows of blocks [first, last) of 16. Rows beyond the
    // matrix's own are not written. `scratch`: linear_scratch bytes, aligned to 64.
    void (*linear)(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts, float* out,
                   std::int64_t out_stride, std::uint8_t* scratch);

    // Row `row` of `weight` as float32.
    void (*read_row)(const Matrix& weight, std::int64_t row, float* out);

    // out (count, columns) = x (count, rows) times rows (rows, columns) of bf16 or f32, added in rising order of rows.
    void (*linear_transposed)(const Matrix& weight, const float* x, std::int64_t x_stride, std::int64_t count, float* out,
                              std::int64_t out_stride);

    // out = x over the root of its mean square, times weight (null: 1). May be in place.
    void (*rms_norm)(const float* x, const float* weight, std::int64_t width, float eps, float* out);

    // out = (x - mean) / sqrt(variance + eps) * weight (null: 1) + bias (null: 0). May be in place.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, std::int64_t width, float eps, float* out);

    // hidden may be written over gate or up.
    void (*activate)(const Gating& gating, const float* gate, const float* up, std::int64_t width, float* hidden);

    // In place; softmax needs room for a multiple of 16 numbers.
    void (*softmax)(float* x, std::int64_t count);
    void (*sigmoids)(float* x, std::int64_t count);

    // x *= sigmoid(gate).
    void (*gate_by)(float* x, const float* gate, std::int64_t count);

    // sum += (x + bias) * weight; bias may be null.
    void (*add_weighted)(float* sum, const float* x, const float* bias, float weight, std::int64_t count);

    // Rotates a head's first 2 * half numbers by `half` angles: pairs i, i + half, or 2 i, 2 i + 1.
    void (*rotate)(float* head, const float* cos, const float* sin, std::int64_t half, bool is_interleaved);

    // Widths are multiples of 16.
    void (*write_cache)(const CacheShape& shape, const CacheWrite& write);
    void (*attend)(const AttentionJob& job);

    // Probes: byte products from registers alone, their number (an addition counts) returned; the same in float32; and
    // one pass over memory.
    std::int64_t (*multiply_bytes_forever)(std::int64_t rounds, std::int32_t* result);
    std::int64_t (*multiply_floats_forever)(std::int64_t rounds, float* result);
    std::int32_t (*read_bytes)(const std::uint8_t* p, std::int64_t count);
};

}  // namespace fewfire
