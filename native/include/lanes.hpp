// A vector of floats that reads and writes float32 or bfloat16, one source for every vector width.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
// Vectors are the compiler's extension, so that the same operators become SSE, NEON, AVX2 or AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "dispatch.hpp"

namespace fewfire {
namespace {

// Apart from Lanes because GCC drops the attribute within the class that declares it.
template <int kWidth>
struct Vectors {
    using Floats [[gnu::vector_size(kWidth * 4)]] = float;
    using Words [[gnu::vector_size(kWidth * 4)]] = std::uint32_t;
    using Halves [[gnu::vector_size(kWidth * 2)]] = std::uint16_t;
};

template <int kWidth>
struct Lanes {
    using Floats = typename Vectors<kWidth>::Floats;
    using Words = typename Vectors<kWidth>::Words;
    using Halves = typename Vectors<kWidth>::Halves;

    // The first `count` of kWidth lanes; the others are 0.
    [[gnu::always_inline]] static Floats load(const float* source, std::int64_t count) {
        return load_raw<Floats>(source, count);
    }
    [[gnu::always_inline]] static Floats load(const bf16* source, std::int64_t count) {
        const Words words = __builtin_convertvector(load_raw<Halves>(source, count), Words) << 16;
        return reinterpret_cast<Floats>(words);
    }
    [[gnu::always_inline]] static void store(float* target, Floats x, std::int64_t count) {
        store_raw(target, x, count);
    }
    // Rounds to nearest even; a NaN stays one whatever its payload.
    [[gnu::always_inline]] static void store(bf16* target, Floats x, std::int64_t count) {
        const Words words = reinterpret_cast<Words>(x);
        const Words rounded = (words + 0x7fffu + (words >> 16 & 1u)) >> 16;
        const Words quiet = words >> 16 | 0x40u;
        store_raw(target, __builtin_convertvector(x == x ? rounded : quiet, Halves), count);
    }

    // Within 4e-7 relative of 1 / (1 + e^-x) for |x| <= 87; beyond, as at 87.
    [[gnu::always_inline]] static Floats sigmoid(Floats x) { return 1.0f / (exponential(-x) + 1.0f); }

    [[gnu::always_inline]] static float sum(Floats x) {
        float total = 0;
        for (int lane = 0; lane < kWidth; ++lane) total += x[lane];
        return total;
    }

    // 2^n times a polynomial over |r| <= ln(2) / 2 (Cephes expf). Clamped so that 1 + e^x is finite; NaN passes.
    [[gnu::always_inline]] static Floats exponential(Floats x) {
        constexpr float kLimit = 87.0f, kLog2e = 1.44269504f;
        constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
        constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
        x = x > kLimit ? Floats{} + kLimit : x;
        x = x < -kLimit ? Floats{} - kLimit : x;
        const Floats shifted = x * kLog2e + kRounder;
        const Floats n = shifted - kRounder;
        const Floats r = x - n * kLn2High - n * kLn2Low;
        Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * r * r + r + 1.0f;
        const Words scale = (reinterpret_cast<Words>(shifted) << 23) + 0x3f800000u;
        return p * reinterpret_cast<Floats>(scale);
    }

private:
    template <class Vector, class Element>
    [[gnu::always_inline]] static Vector load_raw(const Element* source, std::int64_t count) {
        Vector x{};
        if (count == kWidth) {
            std::memcpy(&x, source, sizeof x);
        } else {
            std::memcpy(&x, source, static_cast<std::size_t>(count) * sizeof(Element));
        }
        return x;
    }
    template <class Element, class Vector>
    [[gnu::always_inline]] static void store_raw(Element* target, const Vector& x, std::int64_t count) {
        if (count == kWidth) {
            std::memcpy(target, &x, sizeof x);
        } else {
            std::memcpy(target, &x, static_cast<std::size_t>(count) * sizeof(Element));
        }
    }
};

}  // namespace
}  // namespace fewfire
