// Tokens made ready for products: int8 codes, and a few tokens laid out as a product walks them.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quantized.hpp"

namespace fewfire {
namespace {

using Words16 [[gnu::vector_size(64)]] = std::int32_t;
using Floats16 [[gnu::vector_size(64)]] = float;
using Bytes16 [[gnu::vector_size(16)]] = std::int8_t;

inline std::int32_t sum_words(Words16 x) {
    std::int32_t total = 0;
    for (int lane = 0; lane < 16; ++lane) total += x[lane];
    return total;
}

// 128 numbers of a row; `count` of them exist.
inline void quantize_group(const float* x, std::int64_t count, std::int8_t* codes, float* scale, std::int32_t* sums) {
    Floats16 part[8];
    if (count < kGroup) std::memset(part, 0, sizeof part);
    std::memcpy(part, x, static_cast<std::size_t>(count) * 4);
    // Magnitudes compare as integers; what is not finite is the largest.
    Words16 most{};
    for (int i = 0; i < 8; ++i) {
        const Words16 magnitude = reinterpret_cast<Words16>(part[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    std::int32_t bits = 0;
    for (int lane = 0; lane < 16; ++lane) bits = std::max(bits, most[lane]);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool broken = bits >= 0x7f800000;
    *scale = broken ? NAN : largest / 127.0f;
    if (broken || largest < 1e-30f) {
        std::memset(codes, 0, kGroup);
        std::memset(sums, 0, kSums * 4);
        return;
    }
    const float inverse = 127.0f / largest;
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: to nearest, ties to even
    for (int i = 0; i < 8; ++i) {
        const Floats16 rounded = (part[i] * inverse + kRounder) - kRounder;
        const Words16 integers = __builtin_convertvector(rounded, Words16);
        const Bytes16 bytes = __builtin_convertvector(integers, Bytes16);
        std::memcpy(codes + 16 * i, &bytes, 16);
        sums[5 + i] = sum_words(integers);
    }
    for (int i = 0; i < 4; ++i) sums[1 + i] = sums[5 + 2 * i] + sums[6 + 2 * i];
    sums[0] = sums[1] + sums[2] + sums[3] + sums[4];
}

inline void quantize_row(const float* x, std::int64_t columns, std::int8_t* codes, float* scales, std::int32_t* sums) {
    const std::int64_t groups = (columns + kGroup - 1) / kGroup;
    for (std::int64_t g = 0; g < groups; ++g) {
        quantize_group(x + g * kGroup, std::min(kGroup, columns - g * kGroup), codes + g * kGroup, scales + g,
                       sums + g * kSums);
    }
}

inline void quantize_rows(const Activations& acts, std::int64_t first, std::int64_t count) {
    for (std::int64_t t = first; t < first + count; ++t) {
        const Activations row = acts.from(t);
        quantize_row(row.values, acts.columns, row.codes, row.scales, row.sums);
    }
}

// n tokens as a product walks them: of each group all tokens' codes, 128 each; scales and starts likewise. `starts` is
// what the sum of a run begins with: minus what the run's codes add where all weights are `offset` too large.
struct Tile {
    const std::int8_t* codes;    // (g * n + t) * 128
    const float* scales;         // g * n + t
    const std::int32_t* starts;  // (run * n + t), runs over all groups
};

// Columns that share a start, and by how much the weights' bytes are too large.
struct Bias {
    int run;
    std::int32_t offset;
};

// Bytes of a tile of n tokens.
constexpr std::int64_t tile_bytes(std::int64_t groups, std::int64_t n) { return n * groups * (kGroup + 4 + 4 * kSums); }

inline Tile make_tile(const Activations& acts, const std::int32_t* tokens, std::int64_t first, int n, const Bias& bias,
                      std::uint8_t* room) {
    const std::int64_t groups = acts.groups();
    auto* codes = reinterpret_cast<std::int8_t*>(room);
    auto* scales = reinterpret_cast<float*>(room + groups * kGroup * n);
    auto* starts = reinterpret_cast<std::int32_t*>(scales + groups * n);
    const int runs = static_cast<int>(kGroup) / bias.run;
    const int first_sum = bias.run == 128 ? 0 : bias.run == 32 ? 1 : 5;
    for (int t = 0; t < n; ++t) {
        const Activations row = acts.from(tokens == nullptr ? first + t : tokens[first + t]);
        for (std::int64_t g = 0; g < groups; ++g) {
            if (n > 1) std::memcpy(codes + (g * n + t) * kGroup, row.codes + g * kGroup, kGroup);
            scales[g * n + t] = row.scales[g];
            const std::int32_t* sums = row.sums + g * kSums + first_sum;
            for (int r = 0; r < runs; ++r) starts[(g * runs + r) * n + t] = -bias.offset * sums[r];
        }
        if (n == 1) return {row.codes, scales, starts};  // one token's codes lie as they are walked
    }
    return {codes, scales, starts};
}

}  // namespace
}  // namespace fewfire
