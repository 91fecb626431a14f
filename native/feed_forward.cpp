// The dense feed-forward of a layer, and shared experts.
#include <algorithm>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {

void feed(const FeedForwardSpec& spec, const Matrix& gate, Step& step) {
    const std::int64_t width = spec.up.rows, count = step.count(), stride = step.stride();
    const Rows hidden = step.room.hidden.reserve(count, width);
    float* gates = spec.gate ? step.room.gates.reserve(count * hidden.stride) : nullptr;
    const std::int64_t blocks = spec.up.blocks();
    step.parallel(blocks, block_grain(blocks, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        const std::int64_t first = begin * kRows, last = std::min(end * kRows, width);
        multiply(spec.up, begin, end, step.normed, hidden.values, hidden.stride, worker);
        if (spec.gate) multiply(spec.gate, begin, end, step.normed, gates, hidden.stride, worker);
        Gating gating{spec.activation, spec.alpha, spec.limit};
        if (spec.gate_bias != nullptr) gating.gate_bias = spec.gate_bias + first;
        if (spec.up_bias != nullptr) gating.up_bias = spec.up_bias + first;
        for (std::int64_t t = 0; t < count; ++t) {
            float* up = hidden.row(t) + first;
            table().quantized.activate(gating, spec.gate ? gates + t * hidden.stride + first : nullptr, up, last - first, up);
        }
    });
    make_rows(hidden, step.num_threads, [](std::int64_t) {});
    float* sums = step.room.sums.reserve(count * stride);
    step.linear(spec.down, hidden, sums, stride);
    if (spec.down_bias == nullptr && !gate) return;
    float* factors = nullptr;
    if (gate) {
        factors = step.room.logits.reserve(count);
        step.linear(gate, step.normed, factors, 1);
        table().quantized.sigmoids(factors, count);
    }
    step.for_tokens([&](std::int64_t t) {
        float* row = sums + t * stride;
        for (std::int64_t i = 0; spec.down_bias != nullptr && i < step.model.model_dim; ++i) row[i] += spec.down_bias[i];
        for (std::int64_t i = 0; factors != nullptr && i < step.model.model_dim; ++i) row[i] *= factors[t];
    });
}

}  // namespace fewfire
