// One step over some tokens, as the parts of a layer see it. Internal to the engine.
#pragma once

#include <chrono>
#include <cstdint>
#include <vector>

#include "engine.hpp"
#include "experts.hpp"
#include "lossy.hpp"
#include "model.hpp"
#include "pool.hpp"
#include "workspace.hpp"

namespace fewfire {

struct Workspace {
    Room<float> x, sums, projected, absorbed, index_scores;
    QuantizedRows normed, mixed, latent, hidden, guess;
    Room<float> gates, logits, weights, weighted, guess_logits;
    Room<std::int32_t> chosen;
    Room<std::uint64_t> selected;
    Room<std::uint8_t> cached;
    ExpertWorkspace experts;

    std::int64_t bytes() const {
        return x.bytes() + sums.bytes() + projected.bytes() + absorbed.bytes() + index_scores.bytes() + normed.bytes() +
               mixed.bytes() + latent.bytes() + hidden.bytes() + gates.bytes() + logits.bytes() + weights.bytes() +
               guess.bytes() + guess_logits.bytes() + cached.bytes() + weighted.bytes() + chosen.bytes() + selected.bytes() + experts.bytes();
    }
};

struct Step {
    const Tokens& tokens;
    const ModelSpec& model;
    Workspace& room;
    Timings& timings;
    Routes routes;
    std::int64_t num_threads;
    LossyModes lossy{};
    MeanRange* ranges = nullptr;          // of each MoE layer
    const ExpertLayout* lows = nullptr;   // of each MoE layer: low-precision copies
    Rows normed{};         // of the current half of the layer
    bool selects = false;  // whether the last indexer left anything out
    std::chrono::steady_clock::time_point since = std::chrono::steady_clock::now();

    std::int64_t count() const { return tokens.count; }
    std::int64_t stride() const { return row_stride(model.model_dim); }

    template <class Body>
    void parallel(std::int64_t items, std::int64_t grain, const Body& body) const {
        Pool::shared().run(num_threads, items, grain, body);
    }

    // body(token) for all tokens.
    template <class Body>
    void for_tokens(const Body& body) const {
        parallel(count(), row_grain(count()), [&](std::int64_t begin, std::int64_t end, int) {
            for (std::int64_t t = begin; t < end; ++t) body(t);
        });
    }

    // out (acts.count(), rows) = weight times acts; `out_stride` apart.
    void linear(const Matrix& weight, const Activations& acts, float* out, std::int64_t out_stride) const {
        const std::int64_t blocks = weight.blocks();
        parallel(blocks, block_grain(blocks, num_threads, acts.count()), [&](std::int64_t begin, std::int64_t end, int worker) {
            multiply(weight, begin, end, acts, out, out_stride, worker);
        });
    }

    // Adds the time since the last mark to `phase`.
    void mark(Phase phase) {
        const auto now = std::chrono::steady_clock::now();
        timings.seconds[static_cast<int>(phase)] += std::chrono::duration<double>(now - since).count();
        since = now;
    }
};

// step.room.x = the rows of the step's tokens. Throws ReadError where they are on disk and cannot be had.
void embed(Step& step);

void normalise_row(const NormSpec& spec, const float* x, std::int64_t width, float* out);

// step.normed = norm(x), with its codes.
void normalise(const NormSpec& spec, Step& step);

// x += post_norm(sums + bias) * residual_scale.
void add_to_residual(const NormSpec& post_norm, const float* bias, Step& step);

void attend(const AttentionSpec& spec, const CacheShape& shape, std::int64_t offset, Step& step);
void attend_latent(const LatentSpec& spec, const CacheShape& shape, std::int64_t offset, Step& step);

// The bytes that an indexer's keys take in a page.
std::int64_t index_page_bytes(const IndexerSpec& spec);

// Which keys each token sees, into step.room.selected; false where every token sees all. `latent`: the normed query
// latents. Keys of the indexer lie at `offset` of a page.
bool select_keys(const LatentSpec& spec, const Rows& latent, std::int64_t offset, Step& step);

// Words of `selected` a token: a bit a key, a word a page, for the longest text of the step.
std::int64_t selected_words(const Step& step);

// sums = the feed-forward of step.normed; times sigmoid(gate row) where a shared expert has a gate.
void feed(const FeedForwardSpec& spec, const Matrix& gate, Step& step);

// Chosen experts and weights (tokens, top_k) of all tokens of `rows`; logits (tokens, num_experts) are made on the way.
// An expert that a token does not keep is ~id there.
void choose(const RouterSpec& spec, const Rows& rows, float* logits, std::int32_t* chosen, float* weights, Step& step,
            const RouterModes& modes = {});

// The same of step.normed, into step.room; recorded, or replayed.
void route(const RouterSpec& spec, Step& step, const RouterModes& modes = {});

}  // namespace fewfire
