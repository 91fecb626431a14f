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

// Neighbours of each lane: in its pair, its four, its eight, all.
inline Words16 swap_ones(Words16 x) { return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
inline Words16 swap_twos(Words16 x) { return __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13); }
inline Words16 swap_fours(Words16 x) { return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11); }
inline Words16 swap_eights(Words16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7); }

inline Words16 larger(Words16 a, Words16 b) { return a > b ? a : b; }
inline Words16 smaller(Words16 a, Words16 b) { return a < b ? a : b; }

inline Words16 most_of_quads(Words16 x) {
    x = larger(x, swap_ones(x));
    return larger(x, swap_twos(x));
}

// Of some quads a lane: the largest magnitude (as the bits of a float), which quad has it, and the largest of the others.
struct Largest {
    Words16 first{}, second{}, quad{};

    void add(const Largest& other) {
        second = larger(larger(second, other.second), smaller(first, other.first));
        quad = other.first > first ? other.quad : quad;
        first = larger(first, other.first);
    }
};

// Of all 32 quads, in every lane. Magnitudes compare as integers; what is not finite is the largest.
inline Largest find_largest(const Floats16* part) {
    constexpr Words16 kOwn = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    Largest found;
    for (int i = 0; i < 8; ++i) found.add({most_of_quads(reinterpret_cast<Words16>(part[i]) & 0x7fffffff), Words16{}, kOwn + 4 * i});
    found.add({swap_fours(found.first), swap_fours(found.second), swap_fours(found.quad)});
    found.add({swap_eights(found.first), swap_eights(found.second), swap_eights(found.quad)});
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

// Four columns, `x`, in two parts: low ones into codes.
inline WideCodes split_quad(const float* x, std::int32_t quad, float inverse, std::int8_t* codes) {
    Floats16 four{};
    std::memcpy(&four, x, 4 * sizeof *x);
    const Floats16 rounded = round_codes(four, inverse);
    WideCodes made{quad, 0};
    std::int8_t high[4];
    for (int j = 0; j < 4; ++j) {
        const auto code = static_cast<std::int32_t>(rounded[j]);
        high[j] = static_cast<std::int8_t>((code + 64) >> 7);
        codes[4 * quad + j] = static_cast<std::int8_t>(code - 128 * high[j]);
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
    const float largest = as_float(found.first[0]), second = as_float(found.second[0]);
    const bool broken = found.first[0] >= 0x7f800000;
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
    if (is_wide) wide = split_quad(x + 4 * found.quad[0], found.quad[0], inverse, codes);
    for (int half = 0; half < 2; ++half) {
        Words16 fours;
        Ops::store_sums_of_fours(codes + 64 * half, reinterpret_cast<std::int32_t*>(&fours));
        fours += swap_ones(fours);
        fours += swap_twos(fours);
        for (int i = 0; i < 4; ++i) sums[4 * half + i] = fours[4 * i];
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

// A token within its tile.
struct TilePlace {
    Tile tile;
    std::int64_t tokens, token;

    TilePlace(const Tiles& tiles, std::int64_t token_of_all, std::int64_t at)
        : tile(tiles, at), tokens(tiles.size(at)), token(token_of_all - tiles.begin(at)) {}
    TilePlace(const Tiles& tiles, std::int64_t token_of_all) : TilePlace(tiles, token_of_all, tiles.tile_of(token_of_all)) {}

    std::int8_t* codes(std::int64_t g) const { return tile.codes + (g * tokens + token) * kGroup; }
};

inline void copy_numbers(const std::int32_t* from, std::int64_t from_step, std::int32_t* to, std::int64_t to_step, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) to[i * to_step] = from[i * from_step];
}

inline void copy_token(const TilePlace& from, const TilePlace& to, const TilePlace& next, std::int64_t groups) {
    const std::int64_t n = to.tokens, t = to.token, m = from.tokens, s = from.token;
    for (std::int64_t g = 0; g < groups; ++g) {
        __builtin_prefetch(next.codes(g));
        __builtin_prefetch(next.codes(g) + 64);
        std::memcpy(to.codes(g), from.codes(g), kGroup);
        to.tile.scales[g * n + t] = from.tile.scales[g * m + s];
    }
    copy_numbers(from.tile.sums + s, m, to.tile.sums + t, n, groups);
    copy_numbers(from.tile.sums32 + s, m, to.tile.sums32 + t, n, 4 * groups);
    copy_numbers(from.tile.sums16 + s, m, to.tile.sums16 + t, n, 8 * groups);
    copy_numbers(from.tile.wide_words + s, m, to.tile.wide_words + t, n, groups);
    copy_numbers(from.tile.wide_quads + s, m, to.tile.wide_quads + t, n, groups);
}

// Tokens lie far apart: the next one is fetched meanwhile.
inline void gather(const Tiles& from, const std::int32_t* tokens, const Tiles& to) {
    if (to.count == 0) return;
    TilePlace next(from, tokens[0]);
    for (std::int64_t i = 0, at = 0; i < to.tiles; ++i) {
        for (std::int64_t t = 0; t < to.size(i); ++t, ++at) {
            const TilePlace source = next;
            next = TilePlace(from, tokens[std::min(at + 1, to.count - 1)]);
            copy_token(source, TilePlace(to, at, i), next, to.groups);
        }
    }
}

}  // namespace
}  // namespace fewfire
