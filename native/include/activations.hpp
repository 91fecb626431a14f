// Tokens made ready for products: int8 codes, laid out as a product walks them.
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

// Of `count` (at most 128) numbers: codes, the rest 0; their scale; the sum of each 16 codes.
template <class Ops>
float quantize_group(const float* x, std::int64_t count, std::int8_t* codes, std::int32_t* sums) {
    float padded[kGroup];
    if (count < kGroup) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, x, static_cast<std::size_t>(count) * 4);
        x = padded;
    }
    Floats16 part[8];
    std::memcpy(part, x, sizeof part);
    // Magnitudes compare as integers; what is not finite is the largest.
    Words16 most{};
    for (int i = 0; i < 8; ++i) {
        const Words16 magnitude = reinterpret_cast<Words16>(part[i]) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    std::int32_t lanes[16], bits = 0;
    std::memcpy(lanes, &most, sizeof lanes);
    for (int lane = 0; lane < 16; ++lane) bits = std::max(bits, lanes[lane]);
    float largest;
    std::memcpy(&largest, &bits, 4);
    const bool broken = bits >= 0x7f800000;
    if (broken || largest < 1e-30f) {
        std::memset(codes, 0, kGroup);
        std::memset(sums, 0, 8 * 4);
        return broken ? NAN : largest / 127.0f;
    }
    const float inverse = 127.0f / largest;
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: to nearest, ties to even
    for (int i = 0; i < 8; ++i) {
        const Floats16 rounded = (part[i] * inverse + kRounder) - kRounder;
        const Bytes16 bytes = __builtin_convertvector(__builtin_convertvector(rounded, Words16), Bytes16);
        std::memcpy(codes + 16 * i, &bytes, 16);
    }
    for (int half = 0; half < 2; ++half) {
        std::int32_t fours[16];
        Ops::store_sums_of_fours(codes + 64 * half, fours);
        for (int i = 0; i < 4; ++i) {
            sums[4 * half + i] = fours[4 * i] + fours[4 * i + 1] + fours[4 * i + 2] + fours[4 * i + 3];
        }
    }
    return largest / 127.0f;
}

// One tile: `tokens` tokens, of each group all tokens' codes, 128 each; scales and sums likewise.
struct Tile {
    std::int8_t* codes;                     // (g * tokens + t) * 128
    float* scales;                          // g * tokens + t
    std::int32_t *sums, *sums32, *sums16;  // of all 128 codes, of each 32, of each 16: run * tokens + t

    Tile(const Tiles& tiles, std::int64_t i) {
        const std::int64_t tokens = tiles.size(i), groups = tiles.groups;
        std::uint8_t* memory = tiles.memory + tiles.begin(i) * token_bytes(groups);
        codes = reinterpret_cast<std::int8_t*>(memory);
        scales = reinterpret_cast<float*>(memory + tokens * groups * kGroup);
        sums = reinterpret_cast<std::int32_t*>(scales + tokens * groups);
        sums32 = sums + tokens * groups;
        sums16 = sums32 + 4 * tokens * groups;
    }
};

// The group of one token: where it lies in a tile of n.
inline void set_sums(const Tile& tile, std::int64_t n, std::int64_t g, std::int64_t t, const std::int32_t* of16) {
    std::int32_t whole = 0;
    for (std::int64_t i = 0; i < 4; ++i) {
        const std::int32_t both = of16[2 * i] + of16[2 * i + 1];
        tile.sums16[(8 * g + 2 * i) * n + t] = of16[2 * i];
        tile.sums16[(8 * g + 2 * i + 1) * n + t] = of16[2 * i + 1];
        tile.sums32[(4 * g + i) * n + t] = both;
        whole += both;
    }
    tile.sums[g * n + t] = whole;
}

template <class Ops>
void quantize(const float* values, std::int64_t stride, std::int64_t columns, const Tiles& tiles, const TilePart& part) {
    for (std::int64_t i = part.first; i < part.last; ++i) {
        const Tile tile(tiles, i);
        const std::int64_t n = tiles.size(i), begin = tiles.begin(i);
        for (std::int64_t t = 0; t < n; ++t) {
            const float* row = values + (begin + t) * stride;
            for (std::int64_t g = part.first_group; g < part.last_group; ++g) {
                std::int32_t sums[8];
                const std::int64_t at = (g - part.first_group) * kGroup, count = std::min(kGroup, columns - at);
                tile.scales[g * n + t] = quantize_group<Ops>(row + at, count, tile.codes + (g * n + t) * kGroup, sums);
                set_sums(tile, n, g, t, sums);
            }
        }
    }
}

inline void gather(const Tiles& from, const std::int32_t* tokens, const Tiles& to) {
    for (std::int64_t i = 0; i < to.tiles; ++i) {
        const Tile target(to, i);
        const std::int64_t n = to.size(i), begin = to.begin(i);
        for (std::int64_t t = 0; t < n; ++t) {
            const std::int64_t token = tokens[begin + t], at = from.tile_of(token);
            const Tile source(from, at);
            const std::int64_t m = from.size(at), s = token - from.begin(at);
            for (std::int64_t g = 0; g < to.groups; ++g) {
                std::memcpy(target.codes + (g * n + t) * kGroup, source.codes + (g * m + s) * kGroup, kGroup);
                target.scales[g * n + t] = source.scales[g * m + s];
            }
            for (std::int64_t run = 0; run < to.groups; ++run) target.sums[run * n + t] = source.sums[run * m + s];
            for (std::int64_t run = 0; run < 4 * to.groups; ++run) target.sums32[run * n + t] = source.sums32[run * m + s];
            for (std::int64_t run = 0; run < 8 * to.groups; ++run) target.sums16[run * n + t] = source.sums16[run * m + s];
        }
    }
}

}  // namespace
}  // namespace fewfire
