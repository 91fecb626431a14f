// What a layer does besides products: norms, attention over the cache, what lies between an expert's matrices.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). All sums have
// an order that depends on the token and its position alone, and 16 lanes on every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "lanes.hpp"
#include "linear.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

using Wide = Lanes<16>;

template <class Ops>
void rms_norm(const float* x, const float* weight, std::int64_t width, float eps, float* out) {
    float squares = 0;
    const float* rows[1] = {x};
    multiply_plain<Ops, float, 1>(x, width, rows, &squares);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (std::int64_t i = 0; i < width; ++i) out[i] = weight == nullptr ? x[i] * scale : x[i] * scale * weight[i];
}

inline Wide::Floats clamp(Wide::Floats x, float low, float high) {
    x = x < low ? Wide::Floats{} + low : x;
    return x > high ? Wide::Floats{} + high : x;
}

// x to the power of itself in each activation: silu; gelu by tanh through a sigmoid (tanh(u) = 2 sigmoid(2u) - 1); relu.
inline Wide::Floats activated(Wide::Floats x, HiddenActivation activation) {
    switch (activation) {
        case HiddenActivation::kSilu: return x * Wide::sigmoid(x);
        case HiddenActivation::kGeluTanh: return x * Wide::sigmoid((x + x * x * x * 0.044715f) * 1.5957691216f);
        case HiddenActivation::kRelu: return x > 0.0f ? x : Wide::Floats{};
    }
    return x;
}

// hidden = act(gate) * up, or act(up) where gate is null; may be written over either.
inline void activate(const float* gate, const float* up, std::int64_t width, HiddenActivation activation, float* hidden) {
    for (std::int64_t i = 0; i < width; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, width - i);
        const Wide::Floats u = Wide::load(up + i, n);
        const Wide::Floats made = gate == nullptr ? activated(u, activation)
                                                  : activated(Wide::load(gate + i, n), activation) * u;
        Wide::store(hidden + i, made, n);
    }
}

inline float sum_lanes(Wide::Floats x) {
    float lanes[16];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// e^(x - largest) of each of `count` scores, `padded` to 16 with zeros; returns their sum. -inf gives exactly 0.
inline float exponentiate(float* x, std::int64_t padded, float largest) {
    Wide::Floats total{};
    for (std::int64_t i = 0; i < padded; i += 16) {
        const Wide::Floats score = Wide::load(x + i, 16);
        const Wide::Floats made = Wide::exponential(score - largest);
        const Wide::Floats kept = score > -std::numeric_limits<float>::max() ? made : Wide::Floats{};
        Wide::store(x + i, kept, 16);
        total += kept;
    }
    return sum_lanes(total);
}

// Softmax in place over `count` numbers; x has room for a multiple of 16.
inline void softmax(float* x, std::int64_t count) {
    const std::int64_t padded = (count + 15) / 16 * 16;
    float largest = -std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < count; ++i) largest = std::max(largest, x[i]);
    for (std::int64_t i = count; i < padded; ++i) x[i] = -std::numeric_limits<float>::infinity();
    const float total = exponentiate(x, padded, largest);
    for (std::int64_t i = 0; i < count; ++i) x[i] /= total;
}

inline void sigmoids(float* x, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, count - i);
        Wide::store(x + i, Wide::sigmoid(Wide::load(x + i, n)), n);
    }
}

// ------------------------------------------------------------------------------------------------- attention

// Scores of 16 keys, lanes = keys: products over the head's width are added in rising order.
template <class Ops, int kQueries>
void score_block(const bf16* keys, const float* const* queries, std::int64_t width, float* const* scores,
                 std::int64_t at) {
    typename Ops::Float sums[kQueries];
    for (int q = 0; q < kQueries; ++q) sums[q] = Ops::zero_float();
    for (std::int64_t d = 0; d < width; ++d) {
        const typename Ops::Float key = Ops::load_bf16(reinterpret_cast<const std::uint8_t*>(keys + d * 16));
        for (int q = 0; q < kQueries; ++q) sums[q] = Ops::fused(sums[q], key, Ops::set_float(queries[q][d]));
    }
    for (int q = 0; q < kQueries; ++q) Ops::store_floats(scores[q] + at, sums[q]);
}

// Adds probability times value over the keys of the visible pages, lanes = 4 x 16 of the head's width.
template <class Ops, int kQueries, int kChunks>
void mix_values(const AttentionJob& job, std::int64_t first, std::int64_t last, const float* const* probabilities,
                std::int64_t column, float* const* out) {
    typename Ops::Float sums[kQueries][kChunks];
    for (int q = 0; q < kQueries; ++q) {
        for (int c = 0; c < kChunks; ++c) sums[q][c] = Ops::zero_float();
    }
    for (std::int64_t key = first; key < last; ++key) {
        const bf16* row = job.values(key) + column;
        typename Ops::Float p[kQueries];
        for (int q = 0; q < kQueries; ++q) p[q] = Ops::set_float(probabilities[q][key - first]);
        for (int c = 0; c < kChunks; ++c) {
            const typename Ops::Float value = Ops::load_bf16(reinterpret_cast<const std::uint8_t*>(row + 16 * c));
            for (int q = 0; q < kQueries; ++q) sums[q][c] = Ops::fused(sums[q][c], value, p[q]);
        }
    }
    for (int q = 0; q < kQueries; ++q) {
        for (int c = 0; c < kChunks; ++c) Ops::store_floats(out[q] + column + 16 * c, sums[q][c]);
    }
}

template <class Ops, int kQueries>
void attend_queries(const AttentionJob& job) {
    std::int64_t last = 0, first = std::numeric_limits<std::int64_t>::max();
    for (int q = 0; q < kQueries; ++q) {
        last = std::max(last, job.positions[q] + 1);
        first = std::min(first, job.window > 0 ? std::max<std::int64_t>(0, job.positions[q] + 1 - job.window) : 0);
    }
    first = first / 16 * 16;
    const std::int64_t padded = (last - first + 15) / 16 * 16;
    float* scores[kQueries];
    float factor[kQueries];
    for (int q = 0; q < kQueries; ++q) scores[q] = job.scratch + q * padded;
    for (std::int64_t key = first; key < last; key += 16) {
        score_block<Ops, kQueries>(job.keys(key), job.queries, job.width, scores, key - first);
    }
    for (int q = 0; q < kQueries; ++q) {
        const std::int64_t end = job.positions[q] + 1;
        const std::int64_t begin = job.window > 0 ? std::max<std::int64_t>(0, end - job.window) : 0;
        float largest = job.sink[q];
        for (std::int64_t i = 0; i < padded; ++i) {
            const bool visible = first + i >= begin && first + i < end;
            scores[q][i] = visible ? scores[q][i] * job.scale : -std::numeric_limits<float>::infinity();
            largest = std::max(largest, scores[q][i]);
        }
        float total = exponentiate(scores[q], padded, largest);
        if (job.sink[q] > -std::numeric_limits<float>::max()) {
            total += Wide::exponential(Wide::Floats{} + (job.sink[q] - largest))[0];
        }
        factor[q] = 1.0f / total;
    }
    std::int64_t column = 0;
    for (; column + 64 <= job.width; column += 64) mix_values<Ops, kQueries, 4>(job, first, last, scores, column, job.out);
    for (; column < job.width; column += 16) mix_values<Ops, kQueries, 1>(job, first, last, scores, column, job.out);
    for (int q = 0; q < kQueries; ++q) {
        for (std::int64_t d = 0; d < job.width; ++d) job.out[q][d] *= factor[q];
    }
}

template <class Ops>
void attend(const AttentionJob& job) {
    switch (job.num_queries) {
        case 1: return attend_queries<Ops, 1>(job);
        case 2: return attend_queries<Ops, 2>(job);
        case 3: return attend_queries<Ops, 3>(job);
        case 4: return attend_queries<Ops, 4>(job);
    }
}

template <class Ops>
void fill_steps(QuantizedTable& table) {
    table.rms_norm = rms_norm<Ops>;
    table.activate = activate;
    table.softmax = softmax;
    table.sigmoids = sigmoids;
    table.attend = attend<Ops>;
}

}  // namespace
}  // namespace fewfire
