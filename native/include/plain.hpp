// Products with weights in float32 and bfloat16, and with the transpose of such weights.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#include "loops.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

template <class Ops, class Element>
typename Ops::Float load_plain(const Element* p, std::int64_t count) {
    if constexpr (sizeof(Element) == 4) {
        if (count >= 16) return Ops::load_floats(reinterpret_cast<const float*>(p));
        float part[16] = {};
        std::memcpy(part, p, static_cast<std::size_t>(count) * 4);
        return Ops::load_floats(part);
    } else {
        if (count >= 16) return Ops::load_bf16(reinterpret_cast<const std::uint8_t*>(p));
        std::uint16_t part[16] = {};
        std::memcpy(part, p, static_cast<std::size_t>(count) * 2);
        return Ops::load_bf16(reinterpret_cast<const std::uint8_t*>(part));
    }
}

// Lane l of chain c adds the products of columns 64 i + 16 c + l in rising order, fused; then chains, then lanes, in pairs.
template <class Ops, class Element, int kTokens>
void multiply_plain(const Element* row, std::int64_t columns, const float* const* tokens, float* out) {
    typename Ops::Float chain[4 * kTokens];
    unroll<4 * kTokens>([&](auto i) { chain[i] = Ops::zero_float(); });
    std::int64_t k = 0;
    for (; k + 64 <= columns; k += 64) {
        unroll<4>([&](auto c) {
            const typename Ops::Float w = load_plain<Ops>(row + k + 16 * c, 16);
            unroll<kTokens>([&](auto t) {
                chain[4 * t + c] = Ops::fused(chain[4 * t + c], w, Ops::load_floats(tokens[t] + k + 16 * c));
            });
        });
    }
    unroll<4>([&](auto c) {
        const std::int64_t at = k + 16 * c, count = std::min<std::int64_t>(16, columns - at);
        if (count <= 0) return;
        const typename Ops::Float w = load_plain<Ops>(row + at, count);
        unroll<kTokens>([&](auto t) {
            chain[4 * t + c] = Ops::fused(chain[4 * t + c], w, load_plain<Ops>(tokens[t] + at, count));
        });
    });
    for (int t = 0; t < kTokens; ++t) {
        float lanes[16];
        Ops::store_floats(lanes, Ops::add(Ops::add(chain[4 * t], chain[4 * t + 1]), Ops::add(chain[4 * t + 2], chain[4 * t + 3])));
        out[t] = fold_lanes(lanes, std::plus<>());
    }
}

template <class Ops, class Element>
void linear_plain(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts, float* out,
                  std::int64_t out_stride) {
    const auto* rows = reinterpret_cast<const Element*>(weight.codes);
    const std::int64_t count = acts.count();
    const auto token = [&](std::int64_t i) { return acts.values + (acts.rows == nullptr ? i : acts.rows[i]) * acts.stride; };
    // A block's rows pass by a few tokens, which stay in the processor's cache.
    for (std::int64_t block = first; block < last; ++block) {
        const std::int64_t begin = block * kRows, end = std::min(begin + kRows, weight.rows);
        std::int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float* four[4] = {token(i), token(i + 1), token(i + 2), token(i + 3)};
            for (std::int64_t r = begin; r < end; ++r) {
                float sums[4];
                multiply_plain<Ops, Element, 4>(rows + r * weight.columns, weight.columns, four, sums);
                for (int t = 0; t < 4; ++t) out[(i + t) * out_stride + r] = sums[t];
            }
        }
        for (; i < count; ++i) {
            const float* one[1] = {token(i)};
            for (std::int64_t r = begin; r < end; ++r) {
                multiply_plain<Ops, Element, 1>(rows + r * weight.columns, weight.columns, one, out + i * out_stride + r);
            }
        }
    }
}

// kTokens rows of out, columns [first, last) of 16 kChunks each: rows of the weight are added in rising order.
template <class Ops, class Element, int kTokens, int kChunks>
void add_rows(const Matrix& weight, const float* x, std::int64_t x_stride, float* out, std::int64_t out_stride,
              std::int64_t column) {
    const auto* at = reinterpret_cast<const Element*>(weight.codes) + column;
    typename Ops::Float sums[kTokens * kChunks];
    unroll<kTokens * kChunks>([&](auto i) { sums[i] = Ops::zero_float(); });
    for (std::int64_t r = 0; r < weight.rows; ++r, at += weight.columns) {
        typename Ops::Float w[kChunks];
        unroll<kChunks>([&](auto c) { w[c] = load_plain<Ops>(at + 16 * c, 16); });
        unroll<kTokens>([&](auto t) {
            const typename Ops::Float value = Ops::set_float(x[t * x_stride + r]);
            unroll<kChunks>([&](auto c) { sums[t * kChunks + c] = Ops::fused(sums[t * kChunks + c], w[c], value); });
        });
    }
    unroll<kTokens * kChunks>([&](auto i) {
        Ops::store_floats(out + i / kChunks * out_stride + column + 16 * (i % kChunks), sums[i]);
    });
}

template <class Ops, class Element>
void linear_transposed_of(const Matrix& weight, const float* x, std::int64_t x_stride, std::int64_t count, float* out,
                          std::int64_t out_stride) {
    for (std::int64_t t = 0; t < count; t += 4) {
        const float* rows = x + t * x_stride;
        float* to = out + t * out_stride;
        const int n = static_cast<int>(std::min<std::int64_t>(4, count - t));
        std::int64_t column = 0;
        for (; column + 64 <= weight.columns; column += 64) {
            if (n == 4) {
                add_rows<Ops, Element, 4, 4>(weight, rows, x_stride, to, out_stride, column);
                continue;
            }
            for (int i = 0; i < n; ++i) {
                add_rows<Ops, Element, 1, 4>(weight, rows + i * x_stride, x_stride, to + i * out_stride, out_stride, column);
            }
        }
        for (; column < weight.columns; column += 16) {
            for (int i = 0; i < n; ++i) {
                add_rows<Ops, Element, 1, 1>(weight, rows + i * x_stride, x_stride, to + i * out_stride, out_stride, column);
            }
        }
    }
}

template <class Ops>
void linear_transposed(const Matrix& weight, const float* x, std::int64_t x_stride, std::int64_t count, float* out,
                       std::int64_t out_stride) {
    if (weight.format == WeightFormat::kBf16) {
        return linear_transposed_of<Ops, std::uint16_t>(weight, x, x_stride, count, out, out_stride);
    }
    linear_transposed_of<Ops, float>(weight, x, x_stride, count, out, out_stride);
}

}  // namespace
}  // namespace fewfire
