// Quantized products, one source for every instruction set. See quantized.hpp for what they promise.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). `Ops` gives
// vectors of 64 bytes (Bytes), 16 int32 (Int), 16 float (Float) and 4 bytes repeated (Word), and how many tokens
// (kTokens) times blocks of 16 rows (kBlocks) its registers hold the sums of. No result depends on those two.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "activations.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

constexpr int kDirectTokens = 4;  // up to here weights are unpacked in registers, beyond once for all tokens
alignas(16) constexpr std::int8_t kQ4Book[16] = {-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16};
alignas(16) constexpr std::int8_t kMxBook[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int kQ4Offset = 18, kMxOffset = 12, kByteOffset = 128;

inline float bf16_to_float(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

// body(integral_constant) for 0 .. kCount - 1. A loop would do, but GCC unrolls loops too late to keep an array of
// accumulators in registers: it then stores each one at every step.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) [[gnu::always_inline]] {
        (body(std::integral_constant<int, kIndex>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Where the products of a block's 16 rows with tokens go: token t's begin at first + t * stride; `rows` of them exist.
struct Target {
    float* first;
    std::int64_t stride, rows;
};

template <class Ops>
void put(const Target& target, int t, typename Ops::Float x) {
    float* to = target.first + t * target.stride;
    if (target.rows == kRows) return Ops::store_floats(to, x);
    float lanes[kRows];
    Ops::store_floats(lanes, x);
    std::memcpy(to, lanes, static_cast<std::size_t>(target.rows) * 4);
}

// ---------------------------------------------------------------------------------------- whole bytes, many tokens

// Some groups of one block's weights: bytes + 128 in q8's order, and 16 scales for every run of columns that shares them.
struct Panel {
    const std::uint8_t* bytes;
    const float* scales;
};

// Stores before it are done, loads after it not yet.
[[gnu::always_inline]] inline void settle() { __asm__ volatile("" ::: "memory"); }

// Where totals come from, and go: those of block b and token t lie at b * block + t * token. Null: they begin with zeros.
struct Totals {
    const float* from;
    float* to;
    std::int64_t from_block, from_token, to_block, to_token;
};

// Totals += `groups` groups of the panels times those of the tile.
template <class Ops, int kTokens, int kBlocks, int kQuads>
void multiply_bytes(const Panel* panels, const Tile& tile, std::int64_t groups, Totals totals) {
    constexpr int kRuns = 32 / kQuads;  // in one activation group
    alignas(64) std::int32_t sums[kBlocks * kTokens][kRows];
    const std::uint8_t* bytes[kBlocks];
    for (int b = 0; b < kBlocks; ++b) bytes[b] = panels[b].bytes;
    const std::int32_t* starts = tile.starts;
    const std::int8_t* codes = tile.codes;
    for (std::int64_t g = 0; g < groups; ++g, codes += kTokens * kGroup) {
        for (int run = 0; run < kRuns; ++run, starts += kTokens) {
            typename Ops::Int acc[kBlocks * kTokens];
            unroll<kBlocks * kTokens>([&](auto i) { acc[i] = Ops::start(starts + i % kTokens); });
            const std::int8_t* at = codes + run * kQuads * 4;
            const std::int8_t* next = codes + kTokens * kGroup + run * kQuads * 64;
            for (int q = 0; q < kQuads; ++q, at += 4) {
                typename Ops::Bytes w[kBlocks];
                unroll<kBlocks>([&](auto b) { w[b] = Ops::load_bytes(bytes[b] + 64 * q); });
                Ops::prefetch(next + 64 * q);
                unroll<kTokens>([&](auto t) {
                    const typename Ops::Word word = Ops::word(at + t * kGroup);
                    unroll<kBlocks>([&](auto b) {
                        acc[b * kTokens + t] = Ops::dot(acc[b * kTokens + t], w[b], word);
                    });
                });
            }
            // Through memory: what scales the sums would otherwise take the registers that hold them.
            unroll<kBlocks * kTokens>([&](auto i) {
                Ops::store_bytes(reinterpret_cast<std::uint8_t*>(sums[i]), Ops::as_bytes(acc[i]));
            });
            settle();
            for (int b = 0; b < kBlocks; ++b) {
                bytes[b] += 64 * kQuads;
                const typename Ops::Float scale = Ops::load_floats(panels[b].scales + (g * kRuns + run) * kRows);
                const float* token_scales = tile.scales + g * kTokens;
                const float* from = totals.from + b * totals.from_block;
                float* to = totals.to + b * totals.to_block;
#pragma GCC unroll 4
                for (int t = 0; t < kTokens; ++t) {
                    const auto* sum = reinterpret_cast<const std::uint8_t*>(sums[b * kTokens + t]);
                    const typename Ops::Float both = Ops::mul(scale, Ops::set_float(token_scales[t]));
                    const typename Ops::Float added = Ops::mul(Ops::to_float(Ops::load_ints(sum)), both);
                    const bool begins = totals.from == nullptr;
                    const typename Ops::Float total = begins ? Ops::zero_float() : Ops::load_floats(from + t * totals.from_token);
                    Ops::store_floats(to + t * totals.to_token, Ops::add(total, added));
                }
            }
            totals.from = totals.to, totals.from_block = totals.to_block, totals.from_token = totals.to_token;
        }
    }
}

// ------------------------------------------------------------------------------------- nibbles, few tokens

// acc += the products of one line of nibbles, 8 columns, whose codes are at `at`.
template <class Ops, int kTokens>
[[gnu::always_inline]] inline void add_line(typename Ops::Int* acc, const std::uint8_t* line, const std::int8_t* book,
                                            int offset, const std::int8_t* at) {
    const typename Ops::Bytes x = Ops::load_bytes(line);
    Ops::prefetch(line + 4096);
    const typename Ops::Bytes low = Ops::look_up(book, offset, Ops::low_nibbles(x));
    const typename Ops::Bytes high = Ops::look_up(book, offset, Ops::high_nibbles(x));
    unroll<kTokens>([&](auto t) { acc[t] = Ops::dot_small(acc[t], low, Ops::word(at + t * kGroup)); });
    unroll<kTokens>([&](auto t) { acc[t] = Ops::dot_small(acc[t], high, Ops::word(at + t * kGroup + 4)); });
}

template <class Ops, int kTokens>
void multiply_q4(const std::uint8_t* codes, const std::uint8_t* scales, const Tile& tile, std::int64_t groups,
                 const Target& target) {
    typename Ops::Float total[kTokens];
    unroll<kTokens>([&](auto t) { total[t] = Ops::zero_float(); });
    const std::int8_t* at = tile.codes;
    const std::int32_t* starts = tile.starts;
    for (std::int64_t g = 0; g < groups; ++g, at += kTokens * kGroup) {
        const typename Ops::Int steps = Ops::load_ints(scales + 2 * kRows);
        typename Ops::Int whole[kTokens];
        unroll<kTokens>([&](auto t) { whole[t] = Ops::zero_int(); });
        unroll<8>([&](auto s) {
            typename Ops::Int acc[kTokens];
            unroll<kTokens>([&](auto t) { acc[t] = Ops::start_small(starts + s * kTokens + t); });
            unroll<2>([&](auto line) {
                add_line<Ops, kTokens>(acc, codes + 64 * (2 * s + line), kQ4Book, kQ4Offset, at + 8 * (2 * s + line));
            });
            const typename Ops::Int step = Ops::template signed_nibble<s()>(steps);
            unroll<kTokens>([&](auto t) { whole[t] = Ops::multiply_add(whole[t], acc[t], step); });
        });
        starts += 8 * kTokens;
        codes += 64 * 16;
        const typename Ops::Float scale = Ops::load_bf16(scales);
        scales += 6 * kRows;
        unroll<kTokens>([&](auto t) {
            const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
            total[t] = Ops::add(total[t], Ops::mul(Ops::to_float(whole[t]), both));
        });
    }
    unroll<kTokens>([&](auto t) { put<Ops>(target, t, total[t]); });
}

inline float mx_scale(std::uint8_t exponent) {
    return exponent == 255 ? NAN : std::ldexp(0.5f, static_cast<int>(exponent) - 127);  // the book is twice the values
}

template <class Ops, int kTokens>
void multiply_mxfp4(const std::uint8_t* codes, const float* scales, const Tile& tile, std::int64_t groups,
                    const Target& target) {
    typename Ops::Float total[kTokens];
    unroll<kTokens>([&](auto t) { total[t] = Ops::zero_float(); });
    const std::int8_t* at = tile.codes;
    const std::int32_t* starts = tile.starts;
    for (std::int64_t g = 0; g < groups; ++g, at += kTokens * kGroup) {
        unroll<4>([&](auto run) {
            typename Ops::Int acc[kTokens];
            unroll<kTokens>([&](auto t) { acc[t] = Ops::start_small(starts + run * kTokens + t); });
            unroll<4>([&](auto line) {
                add_line<Ops, kTokens>(acc, codes + 64 * (4 * run + line), kMxBook, kMxOffset, at + 8 * (4 * run + line));
            });
            const typename Ops::Float scale = Ops::load_floats(scales + run * kRows);
            unroll<kTokens>([&](auto t) {
                const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
                total[t] = Ops::add(total[t], Ops::mul(Ops::to_float(acc[t]), both));
            });
        });
        starts += 4 * kTokens;
        codes += 64 * 16;
        scales += 4 * kRows;
    }
    unroll<kTokens>([&](auto t) { put<Ops>(target, t, total[t]); });
}

// ------------------------------------------------------------------------------------------------- unpacking

template <class Ops>
void unpack_q4(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t groups, std::uint8_t* panel,
               float* to_scales) {
    for (std::int64_t g = 0; g < groups; ++g) {
        const typename Ops::Int steps = Ops::load_ints(scales + 2 * kRows);
        Ops::store_floats(to_scales + g * kRows, Ops::load_bf16(scales));
        scales += 6 * kRows;
        unroll<8>([&](auto s) {
            const typename Ops::Int step = Ops::template signed_nibble<s()>(steps);
            unroll<2>([&](auto) {
                const typename Ops::Bytes x = Ops::load_bytes(codes);
                Ops::store_bytes(panel, Ops::stretch(Ops::look_up(kQ4Book, 0, Ops::low_nibbles(x)), step));
                Ops::store_bytes(panel + 64, Ops::stretch(Ops::look_up(kQ4Book, 0, Ops::high_nibbles(x)), step));
                codes += 64;
                panel += 128;
            });
        });
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

// 16 float scales a group of q8, or a quarter group of mxfp4, for `groups` groups from `at` (counted over all blocks).
template <class Ops>
void read_scales(const Matrix& weight, std::int64_t at, std::int64_t groups, float* scales) {
    if (weight.format == WeightFormat::kQ8) {
        const std::uint8_t* from = weight.scales + at * 2 * kRows;
        for (std::int64_t g = 0; g < groups; ++g) {
            Ops::store_floats(scales + g * kRows, Ops::load_bf16(from + g * 2 * kRows));
        }
    } else if (weight.format == WeightFormat::kMxfp4) {
        const std::uint8_t* from = weight.scales + at * 4 * kRows;
        for (std::int64_t i = 0; i < groups * 4 * kRows; ++i) scales[i] = mx_scale(from[i]);
    }
}

// Groups [first, first + groups) of one block, unpacked into `bytes` and `scales` unless they lie so already.
template <class Ops>
Panel unpack(const Matrix& weight, std::int64_t block, std::int64_t first, std::int64_t groups, std::uint8_t* bytes,
             float* scales) {
    const std::int64_t at = block * weight.groups() + first;
    read_scales<Ops>(weight, at, groups, scales);
    switch (weight.format) {
        case WeightFormat::kQ4:
            unpack_q4<Ops>(weight.codes + at * kGroup * kRows / 2, weight.scales + at * 6 * kRows, groups, bytes, scales);
            return {bytes, scales};
        case WeightFormat::kMxfp4:
            unpack_mxfp4<Ops>(weight.codes + at * kGroup * kRows / 2, groups, bytes);
            return {bytes, scales};
        default: return {weight.codes + at * kGroup * kRows, scales};
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

// ------------------------------------------------------------------------------------------------- all formats

// Calls body(integral_constant) of `n`, from 1 to kMost.
template <int kMost, class Body>
void for_number(int n, const Body& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        ((n == kIndex + 1 ? body(std::integral_constant<int, kIndex + 1>{}) : void()), ...);
    }(std::make_integer_sequence<int, kMost>{});
}

inline Bias bias_of(WeightFormat format, bool direct) {
    switch (format) {
        case WeightFormat::kQ4: return direct ? Bias{16, kQ4Offset} : Bias{128, kByteOffset};
        case WeightFormat::kMxfp4: return {32, direct ? kMxOffset : kByteOffset};
        default: return {128, kByteOffset};
    }
}

// Tiles of `count` tokens, nearly equal and none larger than `most`.
struct Tiling {
    std::int64_t count, tiles, small, larger;  // the first `larger` tiles have small + 1 tokens, the others small

    Tiling(std::int64_t tokens, std::int64_t most)
        : count(tokens), tiles((tokens + most - 1) / most), small(tokens / tiles), larger(tokens % tiles) {}
    std::int64_t begin(std::int64_t i) const { return small * i + std::min(i, larger); }
    int size(std::int64_t i) const { return static_cast<int>(small) + (i < larger ? 1 : 0); }
};

// Where linear_panels keeps what it unpacks, and the totals of up to kTogether tokens.
struct PanelRoom {
    std::uint8_t* bytes;
    float *scales, *totals;

    static PanelRoom in(std::uint8_t* scratch) {
        auto* scales = reinterpret_cast<float*>(scratch + kMostBlocks * kPanelGroups * kGroup * kRows);
        return {scratch, scales, scales + kMostBlocks * kPanelGroups * 4 * kRows};
    }
};

template <class Ops>
void linear_direct(const Matrix& weight, std::int64_t first, std::int64_t last, const Tile& tile, int n, float* out,
                   std::int64_t out_stride, float* scales) {
    const std::int64_t groups = weight.groups();
    for (std::int64_t block = first; block < last; ++block) {
        const std::uint8_t* codes = weight.codes + block * groups * kGroup * kRows / 2;
        const Target target{out + block * kRows, out_stride, std::min(kRows, weight.rows - block * kRows)};
        read_scales<Ops>(weight, block * groups, groups, scales);
        for_number<kDirectTokens>(n, [&](auto tokens) {
            if (weight.format == WeightFormat::kMxfp4) {
                return multiply_mxfp4<Ops, tokens()>(codes, scales, tile, groups, target);
            }
            multiply_q4<Ops, tokens()>(codes, weight.scales + block * groups * 6 * kRows, tile, groups, target);
        });
    }
}

// Some groups of some blocks are unpacked at a time, as many as the first-level cache holds, and all tokens pass by.
// Two blocks at a time where registers allow it, so that a word of activations serves both.
template <class Ops>
void linear_panels(const Matrix& weight, std::int64_t first, std::int64_t last, const Tile* tiles, const Tiling& tiling,
                   float* out, std::int64_t out_stride, const PanelRoom& room) {
    const std::int64_t groups = weight.groups();
    const bool fine = weight.format == WeightFormat::kMxfp4;
    const int runs = fine ? 4 : 1;
    for (std::int64_t block = first; block < last;) {
        const int blocks = static_cast<int>(std::min<std::int64_t>(Ops::kBlocks, last - block));
        const bool whole = (block + blocks) * kRows <= weight.rows;  // else through totals, 16 rows a block
        for (std::int64_t g = 0; g < groups; g += kPanelGroups) {
            const std::int64_t some = std::min(kPanelGroups, groups - g);
            Panel panels[kMostBlocks];
            for (int b = 0; b < blocks; ++b) {
                panels[b] = unpack<Ops>(weight, block + b, g, some, room.bytes + b * kPanelGroups * kGroup * kRows,
                                        room.scales + b * kPanelGroups * 4 * kRows);
            }
            for (std::int64_t i = 0; i < tiling.tiles; ++i) {
                const int n = tiling.size(i);
                const Tile part{tiles[i].codes + g * n * kGroup, tiles[i].scales + g * n, tiles[i].starts + g * runs * n};
                float* kept = room.totals + tiling.begin(i) * blocks * kRows;
                Totals totals{g == 0 ? nullptr : kept, kept, n * kRows, kRows, n * kRows, kRows};
                if (whole && g + some == groups) {
                    totals.to = out + tiling.begin(i) * out_stride + block * kRows;
                    totals.to_block = kRows, totals.to_token = out_stride;
                }
                for_number<Ops::kTokens>(n, [&](auto tokens) {
                    for_number<Ops::kBlocks>(blocks, [&](auto both) {
                        if (fine) return multiply_bytes<Ops, tokens(), both(), 8>(panels, part, some, totals);
                        multiply_bytes<Ops, tokens(), both(), 32>(panels, part, some, totals);
                    });
                });
            }
        }
        for (std::int64_t i = 0; !whole && i < tiling.tiles; ++i) {
            const float* totals = room.totals + tiling.begin(i) * blocks * kRows;
            for (int b = 0; b < blocks; ++b) {
                const std::int64_t row = (block + b) * kRows;
                const Target target{out + tiling.begin(i) * out_stride + row, out_stride, std::min(kRows, weight.rows - row)};
                for (int t = 0; t < tiling.size(i); ++t, totals += kRows) put<Ops>(target, t, Ops::load_floats(totals));
            }
        }
        block += blocks;
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
    const std::int64_t groups = weight.groups();
    const bool direct = weight.format != WeightFormat::kQ8 && count <= kDirectTokens;
    const Bias bias = bias_of(weight.format, direct);
    if (direct) {
        const int n = static_cast<int>(count);
        auto* scales = reinterpret_cast<float*>(scratch);
        const Tile tile = make_tile(acts, tokens, 0, n, bias, scratch + groups * 4 * kRows * 4);
        return linear_direct<Ops>(weight, first, last, tile, n, out, out_stride, scales);
    }
    const PanelRoom room = PanelRoom::in(scratch);
    std::uint8_t* tile_room = scratch + kPanelRoomBytes;
    for (std::int64_t begin = 0; begin < count; begin += kTogether) {
        const Tiling tiling(std::min(kTogether, count - begin), Ops::kTokens);
        std::array<Tile, kTogether> tiles;
        for (std::int64_t i = 0; i < tiling.tiles; ++i) {
            const std::int64_t at = tiling.begin(i);
            tiles[static_cast<std::size_t>(i)] =
                make_tile(acts, tokens, begin + at, tiling.size(i), bias, tile_room + tile_bytes(groups, at));
        }
        linear_panels<Ops>(weight, first, last, tiles.data(), tiling, out + begin * out_stride, out_stride, room);
    }
}

template <class Ops>
void fill_quantized(QuantizedTable& table) {
    table.quantize_rows = quantize_rows;
    table.linear = linear<Ops>;
    table.linear_transposed = linear_transposed<Ops>;
}

}  // namespace
}  // namespace fewfire
