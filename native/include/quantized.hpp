// Products with quantized weights: the contracts. How bytes lie: docs/formats.md; the plain definition: fewfire.formats.
//
// Activations are int8 with one float32 scale for each token and 128 columns. Sums are exact in int32 within what shares
// a weight scale; those are scaled and added in rising order of columns, each by one multiplication and one addition.
// So a result depends on its token and its row alone: not on what else is in the batch, the tiling, the threads, or the
// instruction set.
#pragma once

#include <cstdint>

namespace fewfire {

constexpr std::int64_t kRows = 16;    // rows of a tile: the lanes of a result
constexpr std::int64_t kGroup = 128;  // columns of a tile: what shares an activation's scale
constexpr std::int64_t kSums = 13;    // sums of a group's codes: of all 128, of each 32, of each 16

enum class WeightFormat : std::int32_t { kF32, kBf16, kQ8, kQ4, kMxfp4 };

// One matrix (rows, columns) as a pack holds it. Rows of f32 and bf16 follow one another; scales is null for them.
struct Matrix {
    const std::uint8_t* codes = nullptr;
    const std::uint8_t* scales = nullptr;
    std::int64_t rows = 0, columns = 0;
    WeightFormat format = WeightFormat::kF32;

    std::int64_t blocks() const { return (rows + kRows - 1) / kRows; }
    std::int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
};

// Tokens as products read them, each in its own rows: values (columns), codes (groups * 128, the padding 0),
// scales (groups), sums (groups * 13). Rows of values are `stride` apart.
struct Activations {
    float* values = nullptr;
    std::int8_t* codes = nullptr;
    float* scales = nullptr;
    std::int32_t* sums = nullptr;
    std::int64_t columns = 0, stride = 0;

    std::int64_t groups() const { return (columns + kGroup - 1) / kGroup; }

    // The same from row `first` on.
    Activations from(std::int64_t first) const {
        const std::int64_t rows = first * groups();
        return {values + first * stride, codes + rows * kGroup, scales + rows, sums + rows * kSums, columns, stride};
    }
};

constexpr std::int64_t kMostBlocks = 2;    // blocks of 16 rows that are multiplied together
constexpr std::int64_t kPanelGroups = 4;   // groups that are unpacked together: 16 KiB of bytes
constexpr std::int64_t kTogether = 768;    // tokens that pass by what was unpacked
constexpr std::int64_t kPanelRoomBytes =
    kMostBlocks * (kPanelGroups * kGroup * kRows + kPanelGroups * 4 * kRows * 4 + kTogether * kRows * 4);

// Bytes of scratch that `linear` needs for a matrix of `columns` and `tokens` tokens.
constexpr std::int64_t linear_scratch(std::int64_t columns, std::int64_t tokens) {
    const std::int64_t groups = (columns + kGroup - 1) / kGroup, together = tokens < kTogether ? tokens : kTogether;
    return kPanelRoomBytes + groups * 4 * kRows * 4 + together * groups * (kGroup + 4 + 4 * kSums) + 1024;
}

enum class HiddenActivation : std::int32_t { kSilu, kGeluTanh, kRelu };

using bf16 = std::uint16_t;

constexpr std::int64_t kPageTokens = 64;  // tokens of one page of the cache

// Up to 4 queries that share a key-value head. A page holds, for that head at `offset`, the keys of 64 tokens in four
// blocks of (width, 16 tokens), then their values (64, width). Query q sees keys up to its position, the last `window`
// of them (0: all). sink: one more score that takes probability and gives nothing (-inf: none).
struct AttentionJob {
    const bf16* const* pages = nullptr;
    std::int64_t offset = 0, width = 0, window = 0;
    float scale = 1;
    int num_queries = 0;
    const float* queries[4] = {};
    float* out[4] = {};
    std::int64_t positions[4] = {};
    float sink[4] = {};
    float* scratch = nullptr;  // num_queries times the context, rounded up to 16, and 16 more

    const bf16* keys(std::int64_t key) const {
        return pages[key / kPageTokens] + offset + key % kPageTokens / 16 * 16 * width;
    }
    const bf16* values(std::int64_t key) const {
        return pages[key / kPageTokens] + offset + (kPageTokens + key % kPageTokens) * width;
    }
};

struct QuantizedTable {
    // codes, scales and sums of `count` rows of values from `first` on. A row whose largest magnitude is not finite gets
    // NaN scales; one of zeros gets zeros.
    void (*quantize_rows)(const Activations& acts, std::int64_t first, std::int64_t count);

    // out[i * out_stride + r] = weight row r times token tokens[i] (null: i), for `count` tokens and the rows of blocks
    // [first, last) of 16. Rows beyond the matrix's own are not written. `scratch`: linear_scratch bytes, aligned to 64.
    void (*linear)(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts,
                   const std::int32_t* tokens, std::int64_t count, float* out, std::int64_t out_stride,
                   std::uint8_t* scratch);

    // out = x over the root of its mean square, times weight (null: 1). May be in place.
    void (*rms_norm)(const float* x, const float* weight, std::int64_t width, float eps, float* out);

    // hidden = act(gate) * up, or act(up) where gate is null; may be written over either.
    void (*activate)(const float* gate, const float* up, std::int64_t width, HiddenActivation activation, float* hidden);

    // In place; softmax needs room for a multiple of 16 numbers.
    void (*softmax)(float* x, std::int64_t count);
    void (*sigmoids)(float* x, std::int64_t count);

    // The width is a multiple of 16.
    void (*attend)(const AttentionJob& job);

    // Probes: byte products from registers alone, their number (an addition counts) returned; and one pass over memory.
    std::int64_t (*multiply_bytes_forever)(std::int64_t rounds, std::int32_t* result);
    std::int32_t (*read_bytes)(const std::uint8_t* p, std::int64_t count);
};

}  // namespace fewfire
