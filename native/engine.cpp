#include "engine.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

constexpr std::int64_t kLookaheadTokens = 16;  // beyond, a layer wants most experts anyway

CacheShape cache_shape(const LayerSpec& layer, CacheFormat format) {
    if (layer.is_latent) return {format, true, layer.latent.kv_rank + layer.latent.rope_dim, layer.latent.kv_rank};
    return {format, false, layer.attention.head_dim, layer.attention.head_dim};
}

std::int64_t layer_page_bytes(const LayerSpec& layer, const CacheShape& shape) {
    if (!layer.is_latent) return layer.attention.num_kv_heads * shape.page_bytes();
    return shape.page_bytes() + index_page_bytes(layer.latent.indexer);
}

// The experts of the next MoE layer, as its router would choose for what this layer starts from: what it will probably
// want. The choice of this layer is not touched.
void look_ahead(const LayerSpec& next, int number, ExpertSource& source, Step& step) {
    const std::int64_t dim = step.model.model_dim, count = step.count(), k = next.moe.router.top_k;
    Rows rows = step.room.guess.reserve(count, dim);
    for (std::int64_t t = 0; t < count; ++t) normalise_row(next.ffn_norm, step.room.x.data() + t * step.stride(), dim, rows.row(t));
    if (!next.moe.router.weight.is_plain()) make_rows(rows, step.num_threads, [](std::int64_t) {});
    std::vector<std::int32_t> chosen(static_cast<std::size_t>(count * k));
    std::vector<float> weights(static_cast<std::size_t>(count * k));
    choose(next.moe.router, rows, step.room.guess_logits.reserve(count * next.moe.router.num_experts), chosen.data(),
           weights.data(), step, {.top_p = step.lossy.top_p});
    std::erase_if(chosen, [](std::int32_t expert) { return expert < 0; });
    std::sort(chosen.begin(), chosen.end());
    chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
    source.prefetch(number, chosen.data(), static_cast<int>(chosen.size()));
}

RouterModes router_modes(const RouterSpec& router, int layer, const ExpertSource& source, Step& step) {
    RouterModes modes{.top_p = step.lossy.top_p};
    if (step.lossy.prefer_cached <= 0) return modes;
    std::uint8_t* cached = step.room.cached.reserve(router.num_experts);
    if (!source.find_cached(layer, cached)) return modes;
    modes.cached = cached, modes.prefer_cached = step.lossy.prefer_cached, modes.range = step.ranges + layer;
    return modes;
}

void run_moe(const LayerSpec& layer_spec, const LayerSpec* next, int layer, ExpertSource& source, Step& step) {
    const MoeSpec& spec = layer_spec.moe;
    route(spec.router, step, router_modes(spec.router, layer, source, step));
    step.mark(Phase::kRoute);
    const Assignment assignment{step.room.chosen.data(), step.room.weights.data(), step.count(), spec.router.top_k,
                                spec.router.is_input_weighted};
    const ExpertLayout* low = step.lossy.substitutes ? step.lows + layer : nullptr;
    ExpertRun run(spec.experts, step.normed, assignment, step.room.experts, step.num_threads, low);
    run.want(layer, source);
    if (next != nullptr && source.lookahead() > 0 && step.count() <= kLookaheadTokens) {
        look_ahead(*next, layer + 1, source, step);
        step.mark(Phase::kRoute);
    }
    float* sums = step.room.sums.reserve(step.count() * step.stride());
    if (spec.has_shared) {  // while experts arrive from disk
        feed(spec.shared, spec.shared_gate, step);
        float* kept = step.room.weighted.reserve(step.count() * step.stride());
        std::memcpy(kept, sums, static_cast<std::size_t>(step.count() * step.stride()) * 4);
        step.mark(Phase::kDense);
    }
    run.finish(source, sums, step.stride());
    const double waited = source.waited_s();
    step.timings.seconds[static_cast<int>(Phase::kWait)] += waited;
    step.timings.seconds[static_cast<int>(Phase::kExperts)] -= waited;
    if (spec.has_shared) {
        step.for_tokens([&](std::int64_t t) {
            table().quantized.add_weighted(sums + t * step.stride(), step.room.weighted.data() + t * step.stride(), nullptr,
                                           1.0f, step.model.model_dim);
        });
    }
    add_to_residual(layer_spec.ffn_post_norm, nullptr, step);
    step.mark(Phase::kExperts);
}

}  // namespace

void normalise_row(const NormSpec& spec, const float* x, std::int64_t width, float* out) {
    if (spec.is_layer) return table().quantized.layer_norm(x, spec.weight, spec.bias, width, spec.eps, out);
    table().quantized.rms_norm(x, spec.weight, width, spec.eps, out);
}

void normalise(const NormSpec& spec, Step& step) {
    step.normed = step.room.normed.reserve(step.count(), step.model.model_dim);
    make_rows(step.normed, step.num_threads, [&](std::int64_t t) {
        normalise_row(spec, step.room.x.data() + t * step.stride(), step.model.model_dim, step.normed.row(t));
    });
    step.mark(Phase::kNorm);
}

void add_to_residual(const NormSpec& post_norm, const float* bias, Step& step) {
    const std::int64_t dim = step.model.model_dim;
    step.for_tokens([&](std::int64_t t) {
        float* sums = step.room.sums.data() + t * step.stride();
        for (std::int64_t i = 0; bias != nullptr && i < dim; ++i) sums[i] += bias[i];
        if (post_norm.is_present) normalise_row(post_norm, sums, dim, sums);
        table().quantized.add_weighted(step.room.x.data() + t * step.stride(), sums, nullptr, step.model.residual_scale, dim);
    });
}

Engine::Engine(ModelSpec spec, ExpertSource* experts)
    : spec_(std::move(spec)), experts_(experts), room_(std::make_unique<Workspace>()) {
    for (const LayerSpec& layer : spec_.layers) {
        shapes_.push_back(cache_shape(layer, spec_.cache));
        offsets_.push_back(page_bytes_);
        page_bytes_ += (layer_page_bytes(layer, shapes_.back()) + 63) / 64 * 64;
    }
}

Engine::~Engine() = default;

void Engine::step(const Tokens& tokens, float* hidden, const Routes& routes, std::int64_t num_threads) {
    const auto start = std::chrono::steady_clock::now();
    std::optional<OffWorkers> keeps_off;
    if (experts_ != nullptr && experts_->may_wait()) keeps_off.emplace(num_threads);
    Step step{tokens, spec_, *room_, timings_, routes, num_threads, modes_of(tokens), ranges_.data(), lows_.data()};
    int moe = 0;
    embed(step);
    for (std::size_t number = 0; number < spec_.layers.size(); ++number) {
        const LayerSpec& layer = spec_.layers[number];
        normalise(layer.attention_norm, step);
        if (layer.is_latent) {
            attend_latent(layer.latent, shapes_[number], offsets_[number], step);
        } else {
            attend(layer.attention, shapes_[number], offsets_[number], step);
        }
        add_to_residual(layer.attention_post_norm, layer.is_latent ? layer.latent.out_bias : layer.attention.out_bias, step);
        step.mark(Phase::kOut);
        normalise(layer.ffn_norm, step);
        if (layer.is_moe) {
            run_moe(layer, next_moe(number), moe++, *experts_, step);
        } else {
            feed(layer.dense, Matrix{}, step);
            add_to_residual(layer.ffn_post_norm, nullptr, step);
            step.mark(Phase::kDense);
        }
    }
    step.for_tokens([&](std::int64_t t) {
        normalise_row(spec_.norm, room_->x.data() + t * step.stride(), spec_.model_dim, hidden + t * spec_.model_dim);
    });
    step.mark(Phase::kNorm);
    if (experts_ != nullptr) {
        experts_->end_step(tokens.count, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
}

void Engine::set_lossy(const LossyModes& modes, std::vector<ExpertLayout> lows) {
    lossy_ = modes;
    is_exact_ = false;
    lows_ = std::move(lows);
    ranges_.assign(spec_.layers.size(), {});
}

// What applies to a step: beyond top-p, only where each text goes on by one token.
LossyModes Engine::modes_of(const Tokens& tokens) const {
    if (is_exact_) return {};
    LossyModes modes = lossy_;
    for (std::int64_t t = 1; t < tokens.count; ++t) {
        if (tokens.page_starts[t] != tokens.page_starts[t - 1]) continue;
        modes.prefer_cached = 0, modes.substitutes = false;
        break;
    }
    return modes;
}

const LayerSpec* Engine::next_moe(std::size_t number) const {
    for (std::size_t at = number + 1; at < spec_.layers.size(); ++at) {
        if (spec_.layers[at].is_moe) return &spec_.layers[at];
    }
    return nullptr;
}

void Engine::head(float* hidden, std::int64_t count, float* logits, std::int64_t num_threads) {
    const Tokens tokens{nullptr, nullptr, nullptr, nullptr, count};
    Step step{tokens, spec_, *room_, timings_, {}, num_threads};
    Rows rows = room_->normed.reserve(count, spec_.model_dim);
    rows.values = hidden, rows.stride = spec_.model_dim;
    make_rows(rows, num_threads, [](std::int64_t) {});
    step.linear(spec_.head, rows, logits, spec_.vocab_size);
    step.for_tokens([&](std::int64_t t) {
        float* row = logits + t * spec_.vocab_size;
        for (std::int64_t i = 0; spec_.head_bias != nullptr && i < spec_.vocab_size; ++i) row[i] += spec_.head_bias[i];
        for (std::int64_t i = 0; spec_.logit_scale != 1.0f && i < spec_.vocab_size; ++i) row[i] *= spec_.logit_scale;
    });
    step.mark(Phase::kHead);
}

Timings Engine::take_timings() {
    const Timings taken = timings_;
    timings_ = {};
    return taken;
}

std::int64_t Engine::workspace_bytes() const { return room_->bytes(); }

}  // namespace fewfire
