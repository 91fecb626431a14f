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

// A quad is wide where its largest magnitude is kWideFrom times that of all others, and reaches kWideMost times the limit
// at most; the high part of a code counts kWideStep.
constexpr float kWideFrom = 1.5f, kWideMost = 126.0f, kWideStep = 128.0f;

// Which four columns of a group have high parts, and those; word 0: none.
struct WideCodes {
    std::int32_t quad = 0, word = 0;
};

// The largest magnitude (as the bits of a float), and the largest of all quads but the one that has it.
struct Largest {
    std::int32_t first = 0, second = 0;

    void add(std::int32_t bits) {
        second = std::max(second, std::min(first, bits));
        first = std::max(first, bits);
    }
};

inline Words16 most_of_quads(Words16 x) {
    const Words16 pairs = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    x = x > pairs ? x : pairs;
    const Words16 fours = __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    return x > fours ? x : fours;
}

// Magnitudes compare as integers; what is not finite is the largest.
inline Largest find_largest(const Floats16* part) {
    Words16 first{}, second{};
    for (int i = 0; i < 8; ++i) {
        const Words16 most = most_of_quads(reinterpret_cast<Words16>(part[i]) & 0x7fffffff), less = first < most ? first : most;
        second = second > less ? second : less;
        first = first > most ? first : most;
    }
    Largest found;
    for (int lane = 0; lane < 16; lane += 4) found.add(first[lane]), found.add(second[lane]);
    return found;
}

inline float as_float(std::int32_t bits) {
    float made;
    std::memcpy(&made, &bits, 4);
    return made;
}

inline Floats16 round_codes(Floats16 x, float inverse) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: to nearest, ties to even
    return (x * inverse + kRounder) - kRounder;
}

// The quad that holds the largest magnitude, in two parts: low ones into codes.
inline WideCodes split_quad(const Floats16* part, float largest, float inverse, std::int8_t* codes) {
    float x[kGroup];
    std::memcpy(x, part, sizeof x);
    const auto* at = std::find_if(x, x + kGroup, [&](float value) { return std::fabs(value) == largest; });
    WideCodes made{static_cast<std::int32_t>((at - x) / 4), 0};
    std::int8_t high[4];
    for (int j = 0; j < 4; ++j) {
        const Floats16 rounded = round_codes(Floats16{} + x[4 * made.quad + j], inverse);
        const auto code = static_cast<std::int32_t>(rounded[0]);
        high[j] = static_cast<std::int8_t>((code + 64) >> 7);
        codes[4 * made.quad + j] = static_cast<std::int8_t>(code - 128 * high[j]);
    }
    std::memcpy(&made.word, high, 4);
    return made;
}

// Of `count` (at most 128) numbers: codes, the rest 0; their scale; the sum of each 16 codes.
template <class Ops>
float quantize_group(const float* x, std::int64_t count, std::int8_t* codes, std::int32_t* sums, WideCodes& wide) {
    float padded[kGroup];
    if (count < kGroup) {
        std::memset(padded, 0, sizeof padded);
        std::memcpy(padded, x, static_cast<std::size_t>(count) * 4);
        x = padded;
    }
    Floats16 part[8];
    std::memcpy(part, x, sizeof part);
    const Largest found = find_largest(part);
    const float largest = as_float(found.first), second = as_float(found.second);
    const bool broken = found.first >= 0x7f800000;
    wide = {};
    if (broken || largest < 1e-30f) {
        std::memset(codes, 0, kGroup);
        std::memset(sums, 0, 8 * 4);
        return broken ? NAN : largest / 127.0f;
    }
    const bool is_wide = largest > kWideFrom * second;
    const float limit = is_wide ? std::max(second, largest / kWideMost) : largest, inverse = 127.0f / limit;
    for (int i = 0; i < 8; ++i) {
        const Words16 whole = __builtin_convertvector(round_codes(part[i], inverse), Words16);
        const Bytes16 bytes = __builtin_convertvector(whole, Bytes16);
        std::memcpy(codes + 16 * i, &bytes, 16);
    }
    if (is_wide) wide = split_quad(part, largest, inverse, codes);
    for (int half = 0; half < 2; ++half) {
        std::int32_t fours[16];
        Ops::store_sums_of_fours(codes + 64 * half, fours);
        for (int i = 0; i < 4; ++i) {
            sums[4 * half + i] = fours[4 * i] + fours[4 * i + 1] + fours[4 * i + 2] + fours[4 * i + 3];
        }
    }
    return limit / 127.0f;
}

// One tile: `tokens` tokens, of each group all tokens' codes, 128 each; scales and sums likewise. Sums are of codes, high
// parts left out.
struct Tile {
    std::int8_t* codes;                    // (g * tokens + t) * 128
    float* scales;                         // g * tokens + t
    std::int32_t *sums, *sums32, *sums16;  // of all 128 codes, of each 32, of each 16: run * tokens + t
    std::int32_t *wide_words, *wide_quads; // g * tokens + t

    Tile(const Tiles& tiles, std::int64_t i) {
        const std::int64_t tokens = tiles.size(i), groups = tiles.groups;
        std::uint8_t* memory = tiles.memory + tiles.begin(i) * token_bytes(groups);
        codes = reinterpret_cast<std::int8_t*>(memory);
        scales = reinterpret_cast<float*>(memory + tokens * groups * kGroup);
        sums = reinterpret_cast<std::int32_t*>(scales + tokens * groups);
        sums32 = sums + tokens * groups;
        sums16 = sums32 + 4 * tokens * groups;
        wide_words = sums16 + 8 * tokens * groups;
        wide_quads = wide_words + tokens * groups;
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
                WideCodes wide;
                const std::int64_t at = (g - part.first_group) * kGroup, count = std::min(kGroup, columns - at);
                tile.scales[g * n + t] = quantize_group<Ops>(row + at, count, tile.codes + (g * n + t) * kGroup, sums, wide);
                set_sums(tile, n, g, t, sums);
                tile.wide_words[g * n + t] = wide.word;
                tile.wide_quads[g * n + t] = wide.quad;
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
                target.wide_words[g * n + t] = source.wide_words[g * m + s];
                target.wide_quads[g * n + t] = source.wide_quads[g * m + s];
            }
            for (std::int64_t run = 0; run < to.groups; ++run) target.sums[run * n + t] = source.sums[run * m + s];
            for (std::int64_t run = 0; run < 4 * to.groups; ++run) target.sums32[run * n + t] = source.sums32[run * m + s];
            for (std::int64_t run = 0; run < 8 * to.groups; ++run) target.sums16[run * n + t] = source.sums16[run * m + s];
        }
    }
}

}  // namespace
}  // namespace fewfire
