// A decoder lowered to native steps: every pointer bound beforehand, one call for a whole step over some tokens.
//
// Owns scratch and the arithmetic's order, not the weights and not the cache's pages. Results of a token depend on the
// token, its position and the cache alone: not on the other tokens of the step, nor on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "quantized.hpp"

namespace fewfire {

enum class RouterScore : std::int32_t { kSoftmax, kSoftmaxSelected, kSigmoid, kSigmoidSelected };

struct AttentionSpec {
    Matrix query, key, value, out;
    const float *query_bias = nullptr, *key_bias = nullptr, *value_bias = nullptr, *out_bias = nullptr;
    const float *query_norm = nullptr, *key_norm = nullptr, *sinks = nullptr;
    bool norm_is_full = false;  // over the whole projection, not each head
    std::int64_t num_heads = 0, num_kv_heads = 0, head_dim = 0, window = 0, rope_dim = 0;
    bool rope_is_interleaved = false;
    float scale = 1, clip = 0;            // clip 0: none
    const float *cos = nullptr, *sin = nullptr;  // (positions, rope_dim / 2)
};

struct FeedForwardSpec {
    Matrix gate, up, down;  // gate without codes: not gated
    HiddenActivation activation = HiddenActivation::kSilu;
};

struct MoeSpec {
    Matrix router;
    const float *router_bias = nullptr, *select_bias = nullptr;
    std::int64_t num_experts = 0, top_k = 0;
    RouterScore score = RouterScore::kSoftmax;
    bool renormalize = false;
    float renormalize_eps = 0, scale = 1;
    std::vector<FeedForwardSpec> experts;
    bool has_shared = false;
    FeedForwardSpec shared;
    Matrix shared_gate;  // without codes: none
};

struct LayerSpec {
    const float *attention_norm = nullptr, *ffn_norm = nullptr;
    AttentionSpec attention;
    bool is_moe = false;
    FeedForwardSpec dense;
    MoeSpec moe;
};

struct ModelSpec {
    std::int64_t model_dim = 0, vocab_size = 0;
    float eps = 0, embed_scale = 1, logit_scale = 1, residual_scale = 1;
    Matrix embed, head;
    const float* norm = nullptr;
    std::vector<LayerSpec> layers;
};

// What routers decided, layer after layer; each may be null.
struct Routes {
    std::int32_t* ids = nullptr;  // (moe layers, count, top_k)
    float* weights = nullptr;     // the same
    float* logits = nullptr;      // (moe layers, count, num_experts)
};

class Engine {
public:
    explicit Engine(ModelSpec spec);

    // Elements (bf16) of one page: 64 tokens of one sequence in all layers.
    std::int64_t page_elements() const { return page_elements_; }

    // Runs `count` tokens through all layers. Token t has ids[t], positions[t], and its sequence's pages from
    // pages[page_starts[t]] on; all tokens of a sequence up to its position are in those pages afterwards. A sequence's
    // tokens come in rising order of position. hidden: (count, model_dim) after the final norm.
    void step(const std::int64_t* ids, const std::int64_t* positions, const std::int64_t* page_starts,
              bf16* const* pages, std::int64_t count, float* hidden, const Routes& routes, std::int64_t num_threads);

    // logits: (count, vocab_size) of `count` rows of what `step` gave.
    void head(float* hidden, std::int64_t count, float* logits, std::int64_t num_threads);

private:
    struct Step;
    void attend(const LayerSpec& layer, std::int64_t offset, Step& step);
    void project(const AttentionSpec& spec, Step& step);
    void place(const AttentionSpec& spec, std::int64_t offset, std::int64_t token, Step& step);
    void mix(const AttentionSpec& spec, std::int64_t offset, Step& step);
    void feed(const FeedForwardSpec& spec, const Matrix& gate, Step& step);
    void route(const MoeSpec& spec, std::int64_t token, Step& step);
    void run_experts(const MoeSpec& spec, Step& step);
    void expert_hidden(const MoeSpec& spec, Step& step);
    void expert_outputs(const MoeSpec& spec, Step& step);
    void normalise(const float* weight, Step& step);

    ModelSpec spec_;
    std::vector<std::int64_t> offsets_;  // of each layer within a page
    std::int64_t page_elements_ = 0;
};

// Row `row` of `weight` as float32.
void read_row(const Matrix& weight, std::int64_t row, float* out);

}  // namespace fewfire
