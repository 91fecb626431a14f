// What a layer does besides products and attention: norms, rotation, what lies between a feed-forward's matrices.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). All sums have
// an order that depends on the row alone, and 16 lanes on every instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "lanes.hpp"
#include "linear.hpp"
#include "loops.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

using Wide = Lanes<16>;

// ------------------------------------------------------------------------------------------------------ norms

template <class Ops>
void rms_norm(const float* x, const float* weight, std::int64_t width, float eps, float* out) {
    float squares = 0;
    const float* rows[1] = {x};
    multiply_plain<Ops, float, 1>(x, width, rows, &squares);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
    for (std::int64_t i = 0; i < width; ++i) out[i] = weight == nullptr ? x[i] * scale : x[i] * scale * weight[i];
}

inline float sum_lanes(Wide::Floats x) {
    float lanes[16];
    std::memcpy(lanes, &x, sizeof lanes);
    return fold_lanes(lanes, std::plus<>());
}

inline void layer_norm(const float* x, const float* weight, const float* bias, std::int64_t width, float eps, float* out) {
    Wide::Floats sums{}, squares{};
    for (std::int64_t i = 0; i < width; i += 16) sums += Wide::load(x + i, std::min<std::int64_t>(16, width - i));
    const float mean = sum_lanes(sums) / static_cast<float>(width);
    for (std::int64_t i = 0; i < width; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, width - i);
        Wide::Floats centred = Wide::load(x + i, n) - mean;
        for (std::int64_t lane = n; lane < 16; ++lane) centred[lane] = 0;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(width) + eps);
    for (std::int64_t i = 0; i < width; ++i) {
        const float normed = (x[i] - mean) * scale, weighted = weight == nullptr ? normed : normed * weight[i];
        out[i] = bias == nullptr ? weighted : weighted + bias[i];
    }
}

// --------------------------------------------------------------------------------------------------- rotation

inline void rotate(float* head, const float* cos, const float* sin, std::int64_t half, bool is_interleaved) {
    if (is_interleaved) {
        for (std::int64_t i = 0; i < half; ++i) {
            const float a = head[2 * i], b = head[2 * i + 1];
            head[2 * i] = a * cos[i] - b * sin[i];
            head[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    for (std::int64_t i = 0; i < half; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, half - i);
        const Wide::Floats a = Wide::load(head + i, n), b = Wide::load(head + half + i, n);
        const Wide::Floats c = Wide::load(cos + i, n), s = Wide::load(sin + i, n);
        Wide::store(head + i, a * c - b * s, n);
        Wide::store(head + half + i, b * c + a * s, n);
    }
}

// ------------------------------------------------------------------------------------------------- activation

// Within 2e-7 of erf(x): Abramowitz and Stegun, 7.1.26.
inline Wide::Floats error_function(Wide::Floats x) {
    const Wide::Floats magnitude = x < 0.0f ? -x : x;
    const Wide::Floats t = 1.0f / (magnitude * 0.3275911f + 1.0f);
    Wide::Floats p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const Wide::Floats made = 1.0f - p * t * Wide::exponential(-magnitude * magnitude);
    return x < 0.0f ? -made : made;
}

// silu; gelu, by tanh through a sigmoid (tanh(u) = 2 sigmoid(2u) - 1); relu.
inline Wide::Floats activated(Wide::Floats x, HiddenActivation activation) {
    switch (activation) {
        case HiddenActivation::kSilu: return x * Wide::sigmoid(x);
        case HiddenActivation::kGeluTanh: return x * Wide::sigmoid((x + x * x * x * 0.044715f) * 1.5957691216f);
        case HiddenActivation::kGelu: return x * 0.5f * (error_function(x * 0.70710678f) + 1.0f);
        case HiddenActivation::kRelu: return x > 0.0f ? x : Wide::Floats{};
        case HiddenActivation::kSwigluClamped: break;
    }
    return x;
}

inline Wide::Floats clamped(Wide::Floats x, float low, float high) {
    x = x < low ? Wide::Floats{} + low : x;
    return x > high ? Wide::Floats{} + high : x;
}

inline void activate(const Gating& gating, const float* gate, const float* up, std::int64_t width, float* hidden) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (std::int64_t i = 0; i < width; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, width - i);
        const auto read = [&](const float* x, const float* bias) {
            Wide::Floats value = Wide::load(x + i, n);
            if (gating.weight != 1.0f) value = value * gating.weight;
            return bias == nullptr ? value : value + Wide::load(bias + i, n);
        };
        Wide::Floats u = read(up, gating.up_bias);
        if (gate == nullptr) {
            Wide::store(hidden + i, activated(u, gating.activation), n);
            continue;
        }
        Wide::Floats g = read(gate, gating.gate_bias);
        if (gating.activation == HiddenActivation::kSwigluClamped) {
            g = clamped(g, -kInfinity, gating.limit);
            u = clamped(u, -gating.limit, gating.limit);
            Wide::store(hidden + i, (u + 1.0f) * (g * Wide::sigmoid(g * gating.alpha)), n);
        } else {
            Wide::store(hidden + i, activated(g, gating.activation) * u, n);
        }
    }
}

// ---------------------------------------------------------------------------------------------- sums and scores

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

inline void gate_by(float* x, const float* gate, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, count - i);
        Wide::store(x + i, Wide::load(x + i, n) * Wide::sigmoid(Wide::load(gate + i, n)), n);
    }
}

inline void add_weighted(float* sum, const float* x, const float* bias, float weight, std::int64_t count) {
    if (bias == nullptr) {
        for (std::int64_t i = 0; i < count; ++i) sum[i] += x[i] * weight;
    } else {
        for (std::int64_t i = 0; i < count; ++i) sum[i] += (x[i] + bias[i]) * weight;
    }
}

template <class Ops>
void fill_steps(QuantizedTable& table) {
    table.rms_norm = rms_norm<Ops>;
    table.layer_norm = layer_norm;
    table.activate = activate;
    table.softmax = softmax;
    table.sigmoids = sigmoids;
    table.gate_by = gate_by;
    table.add_weighted = add_weighted;
    table.rotate = rotate;
}

}  // namespace
}  // namespace fewfire
