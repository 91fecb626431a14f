// SwiGLU and its gradients over rows, one source for every vector width and for float32 and bfloat16.
#pragma once

#include <cstdint>

#include "dispatch.hpp"
#include "lanes.hpp"

namespace fewfire {
namespace {

template <class Simd, class Element>
void swiglu_forward(const Element* pre, const float* weights, std::int64_t rows, std::int64_t width, Element* hidden) {
    using L = Lanes<Simd::kWidth>;
    for (std::int64_t row = 0; row < rows; ++row) {
        const Element *gate = pre + 2 * width * row, *up = gate + width;
        const float weight = weights == nullptr ? 1.0f : weights[row];
        for (std::int64_t f = 0; f < width; f += Simd::kWidth) {
            const std::int64_t n = width - f < Simd::kWidth ? width - f : Simd::kWidth;
            const auto g = L::load(gate + f, n), u = L::load(up + f, n);
            L::store(hidden + width * row + f, g * L::sigmoid(g) * u * weight, n);
        }
    }
}

template <class Simd, class Element>
void swiglu_backward(const Element* grad_hidden, const Element* pre, const float* weights, std::int64_t rows,
                     std::int64_t width, Element* grad_pre, Element* hidden, float* grad_weights) {
    using L = Lanes<Simd::kWidth>;
    for (std::int64_t row = 0; row < rows; ++row) {
        const Element *gate = pre + 2 * width * row, *up = gate + width;
        Element *grad_gate = grad_pre + 2 * width * row, *grad_up = grad_gate + width;
        const float weight = weights == nullptr ? 1.0f : weights[row];
        typename L::Floats grad_weight{};
        for (std::int64_t f = 0; f < width; f += Simd::kWidth) {
            const std::int64_t n = width - f < Simd::kWidth ? width - f : Simd::kWidth;
            const auto d = L::load(grad_hidden + width * row + f, n);
            const auto g = L::load(gate + f, n), u = L::load(up + f, n);
            const auto s = L::sigmoid(g), a = g * s, h = a * u, dw = d * weight;
            L::store(grad_up + f, dw * a, n);
            L::store(grad_gate + f, dw * u * (s + a * (1.0f - s)), n);
            L::store(hidden + width * row + f, h * weight, n);
            grad_weight += d * h;
        }
        if (grad_weights != nullptr) grad_weights[row] = L::sum(grad_weight);
    }
}

}  // namespace
}  // namespace fewfire
