// Quantized products, one source for every instruction set. See quantized.hpp for what they promise.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). `Ops` gives
// vectors of 64 bytes (Bytes), 16 int32 (Int) and 16 float (Float).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "quantized.hpp"

namespace fewfire {
namespace {

constexpr int kDirectTokens = 4;  // up to here weights are unpacked in registers, beyond once for all tokens
alignas(16) constexpr std::int8_t kQ4Book[16] = {-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16};
alignas(16) constexpr std::int8_t kMxBook[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int kQ4Offset = 18, kMxOffset = 12, kByteOffset = 128;

inline std::int32_t load_word(const void* p) {
    std::int32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

inline float bf16_to_float(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// ------------------------------------------------------------------------------------------------- activations

inline void quantize_row(const float* x, std::int64_t columns, std::int8_t* codes, float* scales, std::int32_t* sums) {
    const std::int64_t groups = (columns + kGroup - 1) / kGroup;
    std::int32_t* sums32 = sums + groups;
    std::int32_t* sums16 = sums32 + 4 * groups;
    for (std::int64_t g = 0; g < groups; ++g) {
        float part[kGroup] = {};
        std::memcpy(part, x + g * kGroup, static_cast<std::size_t>(std::min(kGroup, columns - g * kGroup)) * 4);
        std::uint32_t bits[kGroup];
        std::memcpy(bits, part, sizeof part);
        // Magnitudes compare as integers; what is not finite is the largest.
        std::uint32_t most = 0;
        for (int i = 0; i < kGroup; ++i) most = std::max(most, bits[i] & 0x7fffffffu);
        float largest;
        std::memcpy(&largest, &most, 4);
        const bool broken = most >= 0x7f800000u;
        const float inverse = broken || largest < 1e-30f ? 0.0f : 127.0f / largest;
        scales[g] = broken ? NAN : largest / 127.0f;
        std::int32_t integers[kGroup];
        constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: to nearest, ties to even
        for (int i = 0; i < kGroup; ++i) {
            const float scaled = inverse == 0.0f ? 0.0f : part[i] * inverse;
            integers[i] = static_cast<std::int32_t>((scaled + kRounder) - kRounder);
        }
        for (int i = 0; i < kGroup; ++i) codes[g * kGroup + i] = static_cast<std::int8_t>(integers[i]);
        std::int32_t total = 0;
        for (int s = 0; s < 8; ++s) {
            std::int32_t sum = 0;
            for (int i = 0; i < 16; ++i) sum += integers[16 * s + i];
            sums16[8 * g + s] = sum;
            total += sum;
        }
        for (int s = 0; s < 4; ++s) sums32[4 * g + s] = sums16[8 * g + 2 * s] + sums16[8 * g + 2 * s + 1];
        sums[g] = total;
    }
}

inline void quantize_rows(const Activations& acts, std::int64_t first, std::int64_t count) {
    const std::int64_t groups = acts.groups();
    for (std::int64_t t = first; t < first + count; ++t) {
        quantize_row(acts.values + t * acts.stride, acts.columns, acts.codes + t * groups * kGroup,
                     acts.scales + t * groups, acts.sums + t * groups * kSums);
    }
}

// Tokens side by side, so that one pointer walks all of them: word q * n + t is 4 codes of token t.
struct Tile {
    const std::int32_t* words;
    const float* scales;         // g * n + t
    const std::int32_t* sums;    // g * n + t
    const std::int32_t* sums32;  // (4 g + s) * n + t
    const std::int32_t* sums16;  // (8 g + s) * n + t
};

inline Tile make_tile(const Activations& acts, const std::int32_t* tokens, std::int64_t first, int n,
                      std::uint8_t*& scratch) {
    const std::int64_t groups = acts.groups(), words = groups * kGroup / 4;
    auto* to_words = reinterpret_cast<std::int32_t*>(scratch);
    auto* to_scales = reinterpret_cast<float*>(to_words + words * n);
    auto* to_sums = reinterpret_cast<std::int32_t*>(to_scales + groups * n);
    for (int t = 0; t < n; ++t) {
        const std::int64_t row = tokens == nullptr ? first + t : tokens[first + t];
        const std::int8_t* codes = acts.codes + row * groups * kGroup;
        for (std::int64_t q = 0; q < words; ++q) to_words[q * n + t] = load_word(codes + 4 * q);
        for (std::int64_t g = 0; g < groups; ++g) to_scales[g * n + t] = acts.scales[row * groups + g];
        const std::int32_t* sums = acts.sums + row * groups * kSums;
        for (std::int64_t g = 0; g < groups * kSums; ++g) to_sums[g * n + t] = sums[g];
    }
    scratch = reinterpret_cast<std::uint8_t*>(to_sums + groups * kSums * n);
    return {to_words, to_scales, to_sums, to_sums + groups * n, to_sums + 5 * groups * n};
}

// ---------------------------------------------------------------------------------------- whole bytes, many tokens

// `panel`: bytes + 128 in q8's order; `scales`: 16 floats for every 4 * kQuads columns. out: (n, 16).
template <class Ops, int kTokens, int kQuads>
void multiply_bytes(const std::uint8_t* panel, const float* scales, const Tile& tile, std::int64_t groups, float* out) {
    constexpr int kParts = 32 / kQuads;  // runs of columns that share a weight scale, in one activation group
    typename Ops::Float total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = Ops::zero_float();
    const std::int32_t* words = tile.words;
    const std::int32_t* sums = kParts == 1 ? tile.sums : tile.sums32;
    for (std::int64_t g = 0; g < groups; ++g) {
        for (int part = 0; part < kParts; ++part) {
            typename Ops::Int acc[kTokens];
            for (int t = 0; t < kTokens; ++t) acc[t] = Ops::start(sums[t]);
            sums += kTokens;
            for (int q = 0; q < kQuads; ++q) {
                const typename Ops::Bytes w = Ops::load_bytes(panel);
                panel += 64;
                for (int t = 0; t < kTokens; ++t) acc[t] = Ops::dot(acc[t], w, words[t]);
                words += kTokens;
            }
            const typename Ops::Float scale = Ops::load_floats(scales);
            scales += kRows;
            for (int t = 0; t < kTokens; ++t) {
                const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
                total[t] = Ops::add(total[t], Ops::mul(Ops::to_float(acc[t]), both));
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) Ops::store_floats(out + t * kRows, total[t]);
}

// ------------------------------------------------------------------------------------- nibbles, few tokens

template <class Ops, int kTokens>
void multiply_q4(const std::uint8_t* codes, const std::uint8_t* scales, const Tile& tile, std::int64_t groups,
                 float* out) {
    typename Ops::Float total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = Ops::zero_float();
    const std::int32_t* words = tile.words;
    const std::int32_t* sums = tile.sums16;
    for (std::int64_t g = 0; g < groups; ++g) {
        const typename Ops::Int steps = Ops::load_ints(scales + 2 * kRows);
        typename Ops::Int whole[kTokens];
        for (int t = 0; t < kTokens; ++t) whole[t] = Ops::set_int(0);
#pragma GCC unroll 8
        for (int s = 0; s < 8; ++s) {
            typename Ops::Int acc[kTokens];
            for (int t = 0; t < kTokens; ++t) acc[t] = Ops::set_int(-kQ4Offset * sums[t]);
            sums += kTokens;
            for (int line = 0; line < 2; ++line) {
                const typename Ops::Bytes x = Ops::load_bytes(codes);
                Ops::prefetch(codes + 4096);
                codes += 64;
                const typename Ops::Bytes low = Ops::look_up(kQ4Book, kQ4Offset, Ops::low_nibbles(x));
                const typename Ops::Bytes high = Ops::look_up(kQ4Book, kQ4Offset, Ops::high_nibbles(x));
                for (int t = 0; t < kTokens; ++t) acc[t] = Ops::dot_small(acc[t], low, words[t]);
                for (int t = 0; t < kTokens; ++t) acc[t] = Ops::dot_small(acc[t], high, words[kTokens + t]);
                words += 2 * kTokens;
            }
            const typename Ops::Int step = Ops::signed_nibble(steps, s);
            for (int t = 0; t < kTokens; ++t) whole[t] = Ops::multiply_add(whole[t], acc[t], step);
        }
        const typename Ops::Float scale = Ops::load_bf16(scales);
        scales += 6 * kRows;
        for (int t = 0; t < kTokens; ++t) {
            const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
            total[t] = Ops::add(total[t], Ops::mul(Ops::to_float(whole[t]), both));
        }
    }
    for (int t = 0; t < kTokens; ++t) Ops::store_floats(out + t * kRows, total[t]);
}

inline float mx_scale(std::uint8_t exponent) {
    return exponent == 255 ? NAN : std::ldexp(0.5f, static_cast<int>(exponent) - 127);  // the book is twice the values
}

template <class Ops, int kTokens>
void multiply_mxfp4(const std::uint8_t* codes, const float* scales, const Tile& tile, std::int64_t groups, float* out) {
    typename Ops::Float total[kTokens];
    for (int t = 0; t < kTokens; ++t) total[t] = Ops::zero_float();
    const std::int32_t* words = tile.words;
    const std::int32_t* sums = tile.sums32;
    for (std::int64_t g = 0; g < groups; ++g) {
        for (int part = 0; part < 4; ++part) {
            typename Ops::Int acc[kTokens];
            for (int t = 0; t < kTokens; ++t) acc[t] = Ops::set_int(-kMxOffset * sums[t]);
            sums += kTokens;
            for (int line = 0; line < 4; ++line) {
                const typename Ops::Bytes x = Ops::load_bytes(codes);
                Ops::prefetch(codes + 4096);
                codes += 64;
                const typename Ops::Bytes low = Ops::look_up(kMxBook, kMxOffset, Ops::low_nibbles(x));
                const typename Ops::Bytes high = Ops::look_up(kMxBook, kMxOffset, Ops::high_nibbles(x));
                for (int t = 0; t < kTokens; ++t) acc[t] = Ops::dot_small(acc[t], low, words[t]);
                for (int t = 0; t < kTokens; ++t) acc[t] = Ops::dot_small(acc[t], high, words[kTokens + t]);
                words += 2 * kTokens;
            }
            const typename Ops::Float scale = Ops::load_floats(scales);
            scales += kRows;
            for (int t = 0; t < kTokens; ++t) {
                const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
                total[t] = Ops::add(total[t], Ops::mul(Ops::to_float(acc[t]), both));
            }
        }
    }
    for (int t = 0; t < kTokens; ++t) Ops::store_floats(out + t * kRows, total[t]);
}

// ------------------------------------------------------------------------------------------------- unpacking

template <class Ops>
void unpack_q4(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t groups, std::uint8_t* panel,
               float* to_scales) {
    for (std::int64_t g = 0; g < groups; ++g) {
        const typename Ops::Int steps = Ops::load_ints(scales + 2 * kRows);
        Ops::store_floats(to_scales + g * kRows, Ops::load_bf16(scales));
        scales += 6 * kRows;
        for (int s = 0; s < 8; ++s) {
            const typename Ops::Int step = Ops::signed_nibble(steps, s);
            for (int line = 0; line < 2; ++line, codes += 64, panel += 128) {
                const typename Ops::Bytes x = Ops::load_bytes(codes);
                Ops::store_bytes(panel, Ops::stretch(Ops::look_up(kQ4Book, 0, Ops::low_nibbles(x)), step));
                Ops::store_bytes(panel + 64, Ops::stretch(Ops::look_up(kQ4Book, 0, Ops::high_nibbles(x)), step));
            }
        }
    }
}

template <class Ops>
void unpack_mxfp4(const std::uint8_t* codes, std::int64_t groups, std::uint8_t* panel) {
    for (std::int64_t line = 0; line < groups * 16; ++line, codes += 64, panel += 128) {
        const typename Ops::Bytes x = Ops::load_bytes(codes);
        Ops::store_bytes(panel, Ops::look_up(kMxBook, kByteOffset, Ops::low_nibbles(x)));
        Ops::store_bytes(panel + 64, Ops::look_up(kMxBook, kByteOffset, Ops::high_nibbles(x)));
    }
}

// ----------------------------------------------------------------------------------------------- plain weights

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
    typename Ops::Float chain[kTokens][4];
    for (int t = 0; t < kTokens; ++t) {
        for (int c = 0; c < 4; ++c) chain[t][c] = Ops::zero_float();
    }
    std::int64_t k = 0;
    for (; k + 64 <= columns; k += 64) {
        for (int c = 0; c < 4; ++c) {
            const typename Ops::Float w = load_plain<Ops>(row + k + 16 * c, 16);
            for (int t = 0; t < kTokens; ++t) {
                chain[t][c] = Ops::fused(chain[t][c], w, Ops::load_floats(tokens[t] + k + 16 * c));
            }
        }
    }
    for (int c = 0; k < columns; k += 16, ++c) {
        const std::int64_t count = std::min<std::int64_t>(16, columns - k);
        const typename Ops::Float w = load_plain<Ops>(row + k, count);
        for (int t = 0; t < kTokens; ++t) {
            chain[t][c] = Ops::fused(chain[t][c], w, load_plain<Ops>(tokens[t] + k, count));
        }
    }
    for (int t = 0; t < kTokens; ++t) {
        float lanes[16];
        Ops::store_floats(lanes, Ops::add(Ops::add(chain[t][0], chain[t][1]), Ops::add(chain[t][2], chain[t][3])));
        for (int width = 8; width > 0; width /= 2) {
            for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
        }
        out[t] = lanes[0];
    }
}

template <class Ops, class Element>
void linear_plain(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts,
                  const std::int32_t* tokens, std::int64_t count, float* out, std::int64_t out_stride) {
    const auto* rows = reinterpret_cast<const Element*>(weight.codes);
    const auto token = [&](std::int64_t i) { return acts.values + (tokens == nullptr ? i : tokens[i]) * acts.stride; };
    for (std::int64_t r = first * kRows; r < std::min(last * kRows, weight.rows); ++r) {
        const Element* row = rows + r * weight.columns;
        std::int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float* four[4] = {token(i), token(i + 1), token(i + 2), token(i + 3)};
            float sums[4];
            multiply_plain<Ops, Element, 4>(row, weight.columns, four, sums);
            for (int t = 0; t < 4; ++t) out[(i + t) * out_stride + r] = sums[t];
        }
        for (; i < count; ++i) {
            const float* one[1] = {token(i)};
            multiply_plain<Ops, Element, 1>(row, weight.columns, one, out + i * out_stride + r);
        }
    }
}

// ------------------------------------------------------------------------------------------------- all formats

template <template <class, int> class Call, class Ops, class... Args>
void for_tokens(int n, Args&&... args) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        ((n == kIndex + 1 ? Call<Ops, kIndex + 1>::run(args...) : void()), ...);
    }(std::make_integer_sequence<int, static_cast<int>(kTileTokens)>{});
}

template <class Ops, int kTokens>
struct CallBytes {
    template <class... Args>
    static void run(bool fine, Args&... args) {
        if (fine) return multiply_bytes<Ops, kTokens, 8>(args...);
        multiply_bytes<Ops, kTokens, 32>(args...);
    }
};

template <class Ops, int kTokens>
struct CallNibbles {
    static void run(const Matrix& weight, std::int64_t block, const float* scales, const Tile& tile, float* out) {
        if constexpr (kTokens <= kDirectTokens) {
            const std::int64_t groups = weight.groups();
            const std::uint8_t* codes = weight.codes + block * groups * kGroup * kRows / 2;
            if (weight.format == WeightFormat::kMxfp4) {
                return multiply_mxfp4<Ops, kTokens>(codes, scales, tile, groups, out);
            }
            multiply_q4<Ops, kTokens>(codes, weight.scales + block * groups * 6 * kRows, tile, groups, out);
        }
    }
};

// Float scales of one block of q8 (a group) or mxfp4 (a quarter group).
template <class Ops>
void read_scales(const Matrix& weight, std::int64_t block, float* scales) {
    const std::int64_t groups = weight.groups();
    if (weight.format == WeightFormat::kQ8) {
        const std::uint8_t* from = weight.scales + block * groups * 2 * kRows;
        for (std::int64_t g = 0; g < groups; ++g) {
            Ops::store_floats(scales + g * kRows, Ops::load_bf16(from + g * 2 * kRows));
        }
    } else if (weight.format == WeightFormat::kMxfp4) {
        const std::uint8_t* from = weight.scales + block * groups * 4 * kRows;
        for (std::int64_t i = 0; i < groups * 4 * kRows; ++i) scales[i] = mx_scale(from[i]);
    }
}

template <class Ops>
void linear(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts,
            const std::int32_t* tokens, std::int64_t count, float* out, std::int64_t out_stride,
            std::uint8_t* scratch) {
    if (count == 0 || first >= last) return;
    if (weight.format == WeightFormat::kF32) {
        return linear_plain<Ops, float>(weight, first, last, acts, tokens, count, out, out_stride);
    }
    if (weight.format == WeightFormat::kBf16) {
        return linear_plain<Ops, std::uint16_t>(weight, first, last, acts, tokens, count, out, out_stride);
    }
    const std::int64_t groups = weight.groups(), columns = groups * kGroup;
    std::uint8_t* unpacked = scratch;
    auto* scales = reinterpret_cast<float*>(unpacked + columns * kRows);
    auto* result = scales + groups * 4 * kRows;
    auto* tiles = reinterpret_cast<std::uint8_t*>(result + kTileTokens * kRows);
    const bool is_q8 = weight.format == WeightFormat::kQ8, is_mx = weight.format == WeightFormat::kMxfp4;
    const bool direct = !is_q8 && count <= kDirectTokens;
    // Tokens are laid side by side once for all blocks; tiles follow one another in scratch.
    std::uint8_t* cursor = tiles;
    const std::int64_t token_bytes = groups * (kGroup + 4 + 4 * kSums);
    for (std::int64_t i = 0; i < count; i += kTileTokens) {
        make_tile(acts, tokens, i, static_cast<int>(std::min(kTileTokens, count - i)), cursor);
    }
    for (std::int64_t block = first; block < last; ++block) {
        const std::uint8_t* panel = unpacked;
        read_scales<Ops>(weight, block, scales);
        if (is_q8) {
            panel = weight.codes + block * columns * kRows;
        } else if (!direct) {
            const std::uint8_t* codes = weight.codes + block * columns * kRows / 2;
            if (is_mx) {
                unpack_mxfp4<Ops>(codes, groups, unpacked);
            } else {
                unpack_q4<Ops>(codes, weight.scales + block * groups * 6 * kRows, groups, unpacked, scales);
            }
        }
        const std::int64_t valid = std::min(kRows, weight.rows - block * kRows);
        for (std::int64_t i = 0; i < count; i += kTileTokens) {
            const int n = static_cast<int>(std::min(kTileTokens, count - i));
            const auto* words = reinterpret_cast<const std::int32_t*>(tiles + i * token_bytes);
            const auto* token_scales = reinterpret_cast<const float*>(words + columns / 4 * n);
            const auto* sums = reinterpret_cast<const std::int32_t*>(token_scales + groups * n);
            const Tile tile{words, token_scales, sums, sums + groups * n, sums + 5 * groups * n};
            if (direct) {
                for_tokens<CallNibbles, Ops>(n, weight, block, scales, tile, result);
            } else {
                for_tokens<CallBytes, Ops>(n, is_mx, panel, scales, tile, groups, result);
            }
            for (int t = 0; t < n; ++t) {
                std::memcpy(out + (i + t) * out_stride + block * kRows, result + t * kRows,
                            static_cast<std::size_t>(valid) * 4);
            }
        }
    }
}

template <class Ops>
void fill_quantized(QuantizedTable& table) {
    table.quantize_rows = quantize_rows;
    table.linear = linear<Ops>;
}

}  // namespace
}  // namespace fewfire
