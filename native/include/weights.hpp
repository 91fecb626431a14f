// How each format's bytes become factors of a product: whole bytes and float scales (docs/formats.md).
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). A group of
// 128 columns is walked as 16 lines of 8 columns, or as runs of columns that share a float scale. What a line gives are
// two vectors of 16 rows x 4 columns, as bytes that are `offset` too large.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "activations.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

constexpr int kByteOffset = 128, kQ4Offset = 18;

alignas(16) constexpr std::int8_t kQ4Book[16] = {-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16};
alignas(16) constexpr std::int8_t kMxBook[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
alignas(16) constexpr std::int8_t kSignedBook[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(16) constexpr std::int8_t kPlainBook[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline float bf16_to_float(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// Bytes of a group of 128 columns of a block, in codes; and of scales, which K formats have for two groups.
struct GroupBytes {
    std::int64_t codes, scales;
    int scale_groups, runs;  // groups that share a piece of scales; runs of a group that are scaled apart
    bool has_minimum;
};

constexpr GroupBytes group_bytes(WeightFormat format) {
    switch (format) {
        case WeightFormat::kQ8: return {2048, 32, 1, 1, false};
        case WeightFormat::kQ4: return {1024, 96, 1, 1, false};
        case WeightFormat::kMxfp4: return {1024, 64, 1, 4, false};
        case WeightFormat::kQ4_0: return {1024, 128, 1, 4, false};
        case WeightFormat::kQ4_1: return {1024, 256, 1, 4, true};
        case WeightFormat::kQ8_0: return {2048, 128, 1, 4, false};
        case WeightFormat::kQ4K: return {1024, 256, 2, 4, true};
        case WeightFormat::kQ6K: return {1536, 288, 2, 8, false};
        case WeightFormat::kF32:
        case WeightFormat::kBf16: break;
    }
    return {};
}

template <WeightFormat kFormat>
constexpr GroupBytes kGroupBytes = group_bytes(kFormat);

// Groups of a block as stored: K formats come in pairs.
template <WeightFormat kFormat>
std::int64_t stored_groups(const Matrix& weight) {
    constexpr std::int64_t kPair = kGroupBytes<kFormat>.scale_groups;
    return (weight.groups() + kPair - 1) / kPair * kPair;
}

// Where group g of a block lies. The format is known beforehand: divisions cost more than what is found by them.
template <WeightFormat kFormat>
struct Place {
    const std::uint8_t *codes, *scales;
    int half;  // which of the groups that share scales

    Place(const Matrix& weight, std::int64_t block, std::int64_t g) {
        constexpr GroupBytes kBytes = kGroupBytes<kFormat>;
        const std::int64_t at = block * stored_groups<kFormat>(weight) + g;
        codes = weight.codes + at * kBytes.codes;
        scales = weight.scales + at / kBytes.scale_groups * kBytes.scales;
        half = static_cast<int>(at % kBytes.scale_groups);
    }
};

// ------------------------------------------------------------------------------------------------------- scales

inline Floats16 mx_scales(const std::uint8_t* exponents) {
    Words16 e;
    for (int r = 0; r < 16; ++r) e[r] = exponents[r];
    const Floats16 half = reinterpret_cast<Floats16>(e << 23) * 0.5f;  // the book holds twice the values
    const Floats16 small = e == 0 ? Floats16{} + 0x1p-128f : half;
    return e == 255 ? Floats16{} + NAN : small;
}

// The 6-bit number j of q4_k's words: scales (first) or minima (second), low bits in `own`, high ones of j >= 4 in both.
inline Words16 k_number(int j, Words16 own, Words16 third, bool minimum) {
    if (j < 4) return own >> 8 * j & 63;
    const Words16 low = third >> (8 * (j - 4) + (minimum ? 4 : 0)) & 15;
    return low | (own >> (8 * (j - 4) + 6) & 3) << 4;
}

// The scales of one group, (runs, 16) at `scales`, each run `step` floats apart; minima likewise where there are any.
template <class Ops, WeightFormat kFormat>
void read_scales(const Place<kFormat>& place, float* scales, float* minima, std::int64_t step) {
    const auto half = [&](std::int64_t at) { return Ops::load_half(place.scales + at); };
    switch (kFormat) {
        case WeightFormat::kQ8:
        case WeightFormat::kQ4: return Ops::store_floats(scales, Ops::load_bf16(place.scales));
        case WeightFormat::kMxfp4:
            for (int run = 0; run < 4; ++run) {
                const Floats16 made = mx_scales(place.scales + 16 * run);
                std::memcpy(scales + run * step, &made, sizeof made);
            }
            return;
        case WeightFormat::kQ4_0:
        case WeightFormat::kQ8_0:
        case WeightFormat::kQ4_1:
            for (int run = 0; run < 4; ++run) {
                Ops::store_floats(scales + run * step, half(32 * run));
                if (kFormat == WeightFormat::kQ4_1) Ops::store_floats(minima + run * step, half(128 + 32 * run));
            }
            return;
        case WeightFormat::kQ4K: {
            Words16 words[3];
            std::memcpy(words, place.scales + 64, sizeof words);
            float d[16], low[16];
            Ops::store_floats(d, half(0));
            Ops::store_floats(low, half(32));
            Floats16 d16, low16;
            std::memcpy(&d16, d, 64);
            std::memcpy(&low16, low, 64);
            for (int run = 0; run < 4; ++run) {
                const int j = 4 * place.half + run;
                const Floats16 scale = d16 * __builtin_convertvector(k_number(j, words[0], words[2], false), Floats16);
                const Floats16 minimum = -low16 * __builtin_convertvector(k_number(j, words[1], words[2], true), Floats16);
                std::memcpy(scales + run * step, &scale, 64);
                std::memcpy(minima + run * step, &minimum, 64);
            }
            return;
        }
        case WeightFormat::kQ6K:
            for (int run = 0; run < 8; ++run) {
                const auto* of = reinterpret_cast<const std::int8_t*>(place.scales + 32 + 16 * (8 * place.half + run));
                Ops::store_floats(scales + run * step, Ops::mul(half(0), Ops::load_int8(of)));
            }
            return;
        case WeightFormat::kF32:
        case WeightFormat::kBf16: return;
    }
}

// ------------------------------------------------------------------------------------------------------- lines

// The two vectors of line `line` of a group.
template <class Ops, WeightFormat kFormat>
struct Lines;

template <class Ops>
using Pair = std::array<typename Ops::Bytes, 2>;

template <class Ops>
struct ByteLines {
    static constexpr int kOffset = kByteOffset;
    static Pair<Ops> read(const std::uint8_t* codes, int line, int) {
        return {Ops::load_bytes(codes + 128 * line), Ops::load_bytes(codes + 128 * line + 64)};
    }
};

template <class Ops>
Pair<Ops> look_up_line(const std::uint8_t* codes, int line, const std::int8_t* book, int offset) {
    const typename Ops::Bytes x = Ops::load_bytes(codes + 64 * line);
    return {Ops::look_up(book, offset, Ops::low_nibbles(x)), Ops::look_up(book, offset, Ops::high_nibbles(x))};
}

template <class Ops>
struct Lines<Ops, WeightFormat::kQ8> : ByteLines<Ops> {};
template <class Ops>
struct Lines<Ops, WeightFormat::kQ8_0> : ByteLines<Ops> {};

template <class Ops>
struct Lines<Ops, WeightFormat::kMxfp4> {
    static constexpr int kOffset = 12;
    static Pair<Ops> read(const std::uint8_t* codes, int line, int offset) {
        return look_up_line<Ops>(codes, line, kMxBook, offset);
    }
};

template <class Ops>
struct Lines<Ops, WeightFormat::kQ4_0> {
    static constexpr int kOffset = 8;
    static Pair<Ops> read(const std::uint8_t* codes, int line, int offset) {
        return look_up_line<Ops>(codes, line, kSignedBook, offset);
    }
};

template <class Ops>
struct PlainLines {
    static constexpr int kOffset = 0;
    static Pair<Ops> read(const std::uint8_t* codes, int line, int offset) {
        return look_up_line<Ops>(codes, line, kPlainBook, offset);
    }
};

template <class Ops>
struct Lines<Ops, WeightFormat::kQ4_1> : PlainLines<Ops> {};
template <class Ops>
struct Lines<Ops, WeightFormat::kQ4K> : PlainLines<Ops> {};

// Low nibbles as any, then lines of two more bits for 16 columns: quad j of four in bits 2 j and 2 j + 1.
template <class Ops>
struct Lines<Ops, WeightFormat::kQ6K> {
    static constexpr int kOffset = 32;
    static Pair<Ops> read(const std::uint8_t* codes, int line, int offset) {
        const typename Ops::Bytes x = Ops::load_bytes(codes + 64 * line), top = Ops::load_bytes(codes + 1024 + line / 2 * 64);
        const typename Ops::Bytes first = line % 2 == 0 ? Ops::template top_bits<0>(top) : Ops::template top_bits<2>(top);
        const typename Ops::Bytes second = line % 2 == 0 ? Ops::template top_bits<1>(top) : Ops::template top_bits<3>(top);
        return {Ops::add_bytes(Ops::or_bytes(Ops::low_nibbles(x), first), offset - 32),
                Ops::add_bytes(Ops::or_bytes(Ops::high_nibbles(x), second), offset - 32)};
    }
};

}  // namespace
}  // namespace fewfire
