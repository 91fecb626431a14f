// A decoder lowered to native steps: every pointer bound beforehand, one call for a whole step over some tokens.
//
// Owns scratch and the arithmetic's order, not the weights and not the cache's pages. Results of a token depend on the
// token, its position and the cache alone: not on the other tokens of the step, nor on the number of threads, nor on
// where experts come from.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "experts.hpp"
#include "model.hpp"

namespace fewfire {

// What routers decided, layer after layer; each may be null.
struct Routes {
    std::int32_t* ids = nullptr;  // (moe layers, count, top_k)
    float* weights = nullptr;     // the same
    float* logits = nullptr;      // (moe layers, count, num_experts)
    const std::int32_t* replay_ids = nullptr;  // (moe layers, count, top_k): taken instead of the router's own choice
    const float* replay_weights = nullptr;     // theirs
};

// Token t has ids[t], positions[t], and its sequence's pages from pages[page_starts[t]] on; all tokens of a sequence up to
// its position are in those pages after the step. A sequence's tokens come in rising order of position.
struct Tokens {
    const std::int64_t *ids, *positions, *page_starts;
    std::uint8_t* const* pages;
    std::int64_t count;
};

enum class Phase { kNorm, kProject, kAttend, kOut, kRoute, kExperts, kWait, kDense, kHead };
constexpr int kPhases = 9;

// Seconds spent in each phase, the caller's clock.
struct Timings {
    std::array<double, kPhases> seconds{};
};

struct Workspace;

class Engine {
public:
    // `experts` may be null where no layer routes. Both must outlive the engine.
    Engine(ModelSpec spec, ExpertSource* experts);
    ~Engine();

    // Bytes of one page: 64 tokens of one sequence in all layers. A multiple of 64, as pages' addresses must be.
    std::int64_t page_bytes() const { return page_bytes_; }

    // Runs the tokens through all layers. hidden: (count, model_dim) after the final norm. One step at a time.
    void step(const Tokens& tokens, float* hidden, const Routes& routes, std::int64_t num_threads);

    // logits: (count, vocab_size) of `count` rows of what `step` gave.
    void head(float* hidden, std::int64_t count, float* logits, std::int64_t num_threads);

    // Since the last call of this.
    Timings take_timings();

    // Bytes of scratch that steps have needed so far, each thread's own not counted.
    std::int64_t workspace_bytes() const;

private:
    const LayerSpec* next_moe(std::size_t number) const;

    ModelSpec spec_;
    ExpertSource* experts_;
    std::vector<CacheShape> shapes_;
    std::vector<std::int64_t> offsets_;  // of each layer within a page
    std::int64_t page_bytes_ = 0;
    std::unique_ptr<Workspace> room_;
    Timings timings_;
};

}  // namespace fewfire
