// A decoder as the engine runs it: every matrix and vector bound to its address, every rule a number.
//
// Owns nothing: whoever makes a specification keeps the memory behind it. Widths and rules: fewfire.config.
#pragma once

#include <cstdint>
#include <vector>

#include "quantized.hpp"

namespace fewfire {

struct NormSpec {
    const float *weight = nullptr, *bias = nullptr;
    bool is_layer = false, is_present = false;
    float eps = 0;
};

struct RopeSpec {
    const float *cos = nullptr, *sin = nullptr;  // (positions, dim / 2)
    std::int64_t dim = 0;                        // 0: no rotation
    bool is_interleaved = false;
};

enum class HeadNorm : std::int32_t { kNone, kHead, kFull, kL2 };

struct AttentionSpec {
    Matrix query, key, value, out;
    const float *query_bias = nullptr, *key_bias = nullptr, *value_bias = nullptr, *out_bias = nullptr;
    HeadNorm head_norm = HeadNorm::kNone;
    NormSpec query_norm, key_norm;
    const float* sinks = nullptr;
    RopeSpec rope;
    std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0;
    std::int64_t window = 0, chunk = 0;  // 0: none
    bool has_output_gate = false;        // a head's query row is the query, then the gate
    float scale = 1, clip = 0, cap = 0;  // 0: none
    float temperature = 0, temperature_floor = 1;

    std::int64_t query_width() const { return head_dim * (has_output_gate ? 2 : 1); }
};

// DeepSeek sparse attention: which keys a query sees. Without matrices and `is_shared`: those of the layer before.
struct IndexerSpec {
    Matrix query_up, key, head_weights;
    NormSpec key_norm;
    bool is_present = false, is_shared = false;
    std::int64_t num_heads = 0, head_dim = 0, top_k = 0;
    bool is_interleaved = false;
};

struct LatentSpec {
    Matrix query, query_down, query_up, kv_down, kv_up, out;  // either query, or query_down and query_up
    NormSpec query_norm, kv_norm;
    const float *query_down_bias = nullptr, *kv_down_bias = nullptr, *out_bias = nullptr;
    RopeSpec rope;
    IndexerSpec indexer;
    std::int64_t num_heads = 0, kv_rank = 0, nope_dim = 0, rope_dim = 0, value_dim = 0;
    float scale = 1;
};

struct FeedForwardSpec {
    Matrix gate, up, down;  // gate without codes: not gated
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
    HiddenActivation activation = HiddenActivation::kSilu;
    float alpha = 0, limit = 0;
};

enum class RouterScore : std::int32_t { kSoftmax, kSoftmaxSelected, kSigmoid, kSigmoidSelected, kSparsemixer };

struct RouterSpec {
    Matrix weight;
    const float *bias = nullptr, *select_bias = nullptr;
    std::int64_t num_experts = 0, top_k = 0;
    RouterScore score = RouterScore::kSoftmax;
    bool renormalize = false, is_input_weighted = false;
    float renormalize_eps = 0, scale = 1, jitter = 0;
    std::int64_t num_groups = 0, top_groups = 0;  // 0: no groups
    bool groups_by_max = false;                   // else by the sum of their best two
};

// A vector within an expert's record, in f32 or bf16; bytes 0: none.
struct RecordVector {
    std::int64_t offset = 0, size = 0;
    WeightFormat format = WeightFormat::kF32;
};

// The experts of one layer, all of one shape: where in a record each part lies. Codes and scales are offsets.
struct ExpertLayout {
    struct Part {
        std::int64_t codes = 0, scales = 0, rows = 0, columns = 0;
        WeightFormat format = WeightFormat::kF32;
    };
    Part gate, up, down;  // gate without rows: not gated
    RecordVector gate_bias, up_bias, down_bias;
    HiddenActivation activation = HiddenActivation::kSilu;
    float alpha = 0, limit = 0;
    std::int64_t record_bytes = 0, num_experts = 0;

    static Matrix matrix(const Part& part, const std::uint8_t* record) {
        if (part.rows == 0) return {};
        return {record + part.codes, record + part.scales, part.rows, part.columns, part.format};
    }
};

struct MoeSpec {
    RouterSpec router;
    ExpertLayout experts;
    bool has_shared = false;
    FeedForwardSpec shared;
    Matrix shared_gate;  // without codes: none
};

struct LayerSpec {
    NormSpec attention_norm, attention_post_norm, ffn_norm, ffn_post_norm;
    bool is_latent = false, is_moe = false;
    AttentionSpec attention;
    LatentSpec latent;
    FeedForwardSpec dense;
    MoeSpec moe;
};

// A matrix that stays in its file, of which `file` >= 0 reads blocks of `block_rows` rows as they are needed: block b's codes
// at codes + b * code_bytes, its scales likewise, with a checksum of each.
struct RowFile {
    int file = -1;
    std::int64_t codes = 0, code_bytes = 0, scales = 0, scale_bytes = 0, block_rows = 1;
    const std::uint32_t* checksums = nullptr;  // (blocks, 2)
};

struct ModelSpec {
    std::int64_t model_dim = 0, vocab_size = 0;
    float embed_scale = 1, logit_scale = 1, residual_scale = 1;
    Matrix embed, positions, head;  // positions without codes: none are learned
    RowFile embed_file;             // instead of what is at `embed`
    const float* head_bias = nullptr;
    NormSpec norm;
    CacheFormat cache = CacheFormat::kBf16;
    std::vector<LayerSpec> layers;
};

}  // namespace fewfire
