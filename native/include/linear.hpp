// Quantized products, one source for every instruction set. See quantized.hpp for what they promise.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). `Ops` gives
// vectors of 64 bytes (Bytes), 16 int32 (Int), 16 float (Float) and 4 bytes repeated (Word), and how many tokens
// (kTokens) times blocks of 16 rows (kBlocks) its registers hold the sums of. No result depends on those two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "activations.hpp"
#include "loops.hpp"
#include "plain.hpp"
#include "quantized.hpp"
#include "weights.hpp"
#include "wide.hpp"

namespace fewfire {
namespace {

constexpr std::int64_t kFetched = 4096;  // bytes of codes, ahead of those that are multiplied
constexpr int kDirectTokens = 4;  // up to here weights are unpacked in registers, beyond once for all tokens

// Calls body(integral_constant) of a quantized format.
template <class Body>
void for_format(WeightFormat format, const Body& body) {
    using Format = WeightFormat;
    const auto offer = [&]<Format... kFormats>(std::integer_sequence<Format, kFormats...>) {
        ((format == kFormats ? body(std::integral_constant<Format, kFormats>{}) : void()), ...);
    };
    offer(std::integer_sequence<Format, Format::kQ8, Format::kQ4, Format::kMxfp4, Format::kQ4_0, Format::kQ4_1, Format::kQ8_0,
                                Format::kQ4K, Format::kQ6K>{});
}

template <class Ops>
void put(const Target& target, std::int64_t t, typename Ops::Float x) {
    float* to = target.first + t * target.stride;
    if (target.rows == kRows) return Ops::store_floats(to, x);
    float lanes[kRows];
    Ops::store_floats(lanes, x);
    std::memcpy(to, lanes, static_cast<std::size_t>(target.rows) * 4);
}

// The sums of a tile's codes in runs of which a group has `runs` (1, 4 or 8).
inline const std::int32_t* run_sums(const Tile& tile, int runs) {
    return runs == 1 ? tile.sums : runs == 4 ? tile.sums32 : tile.sums16;
}

// What each run's sum begins with: minus what the codes add where all weights are `offset` too large.
inline void make_starts(const Tile& tile, int runs, std::int64_t count, int offset, std::int32_t* starts) {
    const std::int32_t* sums = run_sums(tile, runs);
    for (std::int64_t i = 0; i < count; ++i) starts[i] = -offset * sums[i];
}

// total += the minima of a group times the sums of a token's codes, run after run.
template <class Ops>
typename Ops::Float add_minima(typename Ops::Float total, const float* minima, std::int64_t step, int runs,
                               const std::int32_t* sums, std::int64_t tokens, float token_scale) {
    for (int run = 0; run < runs; ++run) {
        const float weight = static_cast<float>(sums[run * tokens]) * token_scale;
        total = Ops::fused(total, Ops::load_floats(minima + run * step), Ops::set_float(weight));
    }
    return total;
}

// --------------------------------------------------------------------------------------------------- few tokens

// Room for the scales and minima of one block, (groups, runs, 16) each.
struct BlockScales {
    float *scales, *minima;
};

template <class Ops, WeightFormat kFormat, int kTokens>
void multiply_direct(const Matrix& weight, std::int64_t block, const Tile& tile, const std::int32_t* starts,
                     const BlockScales& room, const Target& target) {
    constexpr int kRuns = kGroupBytes<kFormat>.runs, kLines = 16 / kRuns;
    using Reader = Lines<Ops, kFormat>;
    constexpr bool kSmall = Reader::kOffset < 64;  // bytes of at most 127
    typename Ops::Float total[kTokens], below[kTokens];
    unroll<kTokens>([&](auto t) { total[t] = Ops::zero_float(), below[t] = Ops::zero_float(); });
    const std::int64_t groups = weight.groups();
    const std::int8_t* at = tile.codes;
    const std::uint8_t* codes = Place<kFormat>(weight, block, 0).codes;
    for (std::int64_t g = 0; g < groups; ++g, at += kTokens * kGroup, codes += kGroupBytes<kFormat>.codes) {
        float* scales = room.scales + g * kRuns * kRows;
        float* minima = room.minima + g * kRuns * kRows;
        unroll<kRuns>([&](auto run) {
            typename Ops::Int acc[kTokens];
            unroll<kTokens>([&](auto t) {
                const std::int32_t* start = starts + (g * kRuns + run) * kTokens + t;
                acc[t] = kSmall ? Ops::start_small(start) : Ops::start(start);
            });
            unroll<kLines>([&](auto step) {
                constexpr int line = run * kLines + step;
                const std::uint8_t* ahead = codes + kGroupBytes<kFormat>.codes / 16 * line + kFetched;
                acc[0] = Ops::prefetch_beside(acc[0], ahead);
                if constexpr (kGroupBytes<kFormat>.codes == 2048) acc[0] = Ops::prefetch_beside(acc[0], ahead + 64);
                const Pair<Ops> pair = Reader::read(codes, line, Reader::kOffset);
                unroll<2 * kTokens>([&](auto i) {
                    constexpr int t = i % kTokens, quad = i / kTokens;
                    const typename Ops::Word word = Ops::word(at + t * kGroup + 8 * line + 4 * quad);
                    acc[t] = kSmall ? Ops::dot_small(acc[t], pair[quad], word) : Ops::dot(acc[t], pair[quad], word);
                });
            });
            const typename Ops::Float scale = Ops::load_floats(scales + run * kRows);
            unroll<kTokens>([&](auto t) {
                const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
                total[t] = Ops::fused(total[t], Ops::to_float(acc[t]), both);
            });
        });
        if constexpr (kGroupBytes<kFormat>.has_minimum) {
            const std::int32_t* sums = run_sums(tile, kRuns) + g * kRuns * kTokens;
            unroll<kTokens>([&](auto t) {
                below[t] = add_minima<Ops>(below[t], minima, kRows, kRuns, sums + t, kTokens, tile.scales[g * kTokens + t]);
            });
        }
    }
    unroll<kTokens>([&](auto t) { put<Ops>(target, t, kGroupBytes<kFormat>.has_minimum ? Ops::add(total[t], below[t]) : total[t]); });
}

// q4: sub-scales are integers, so that a group is one exact sum. kBlocks blocks that follow one another, at once.
template <class Ops, int kTokens, int kBlocks>
void multiply_q4(const Matrix& weight, std::int64_t block, const Tile& tile, const std::int32_t* starts,
                 const Target& target) {
    typename Ops::Float total[kBlocks * kTokens];
    unroll<kBlocks * kTokens>([&](auto i) { total[i] = Ops::zero_float(); });
    const std::int8_t* at = tile.codes;
    const Place<WeightFormat::kQ4> place(weight, block, 0);
    const std::uint8_t *codes = place.codes, *scales = place.scales;
    constexpr GroupBytes kBytes = kGroupBytes<WeightFormat::kQ4>;
    const std::int64_t groups = weight.groups(), gap = groups * kBytes.codes, scale_gap = groups * kBytes.scales;
    for (std::int64_t g = 0; g < groups; ++g, at += kTokens * kGroup) {
        // What follows a block's last codes are codes of the block beside it, which is multiplied now.
        const std::uint8_t* ahead = codes + kFetched + (g + kFetched / kBytes.codes < groups ? 0 : (kBlocks - 1) * gap);
        typename Ops::Int whole[kBlocks * kTokens], steps[kBlocks];
        unroll<kBlocks * kTokens>([&](auto i) { whole[i] = Ops::zero_int(); });
        unroll<kBlocks>([&](auto b) {
            const std::uint8_t* next = scales + (b + kBlocks) * scale_gap;
            steps[b] = Ops::load_ints(scales + b * scale_gap + 2 * kRows);
            steps[b] = Ops::prefetch_beside(Ops::prefetch_beside(steps[b], next), next + 64);
        });
        unroll<8>([&](auto s) {
            typename Ops::Int acc[kBlocks * kTokens];
            unroll<kBlocks * kTokens>([&](auto i) { acc[i] = Ops::start_small(starts + s * kTokens + i % kTokens); });
            unroll<2>([&](auto half) {
                constexpr int line = 2 * s + half;
                Pair<Ops> pair[kBlocks];
                unroll<kBlocks>([&](auto b) {
                    acc[b * kTokens] = Ops::prefetch_beside(acc[b * kTokens], ahead + b * gap + 64 * line);
                    pair[b] = look_up_line<Ops>(codes + b * gap, line, kQ4Book, kQ4Offset);
                });
                unroll<2 * kTokens>([&](auto i) {
                    constexpr int t = i % kTokens, quad = i / kTokens;
                    const typename Ops::Word word = Ops::word(at + t * kGroup + 8 * line + 4 * quad);
                    unroll<kBlocks>([&](auto b) {
                        acc[b * kTokens + t] = Ops::dot_small(acc[b * kTokens + t], pair[b][quad], word);
                    });
                });
            });
            unroll<kBlocks * kTokens>([&](auto i) {
                whole[i] = Ops::multiply_add(whole[i], acc[i], Ops::template signed_nibble<s()>(steps[i / kTokens]));
            });
        });
        starts += 8 * kTokens;
        codes += kBytes.codes;
        unroll<kBlocks>([&](auto b) {
            const typename Ops::Float scale = Ops::load_bf16(scales + b * scale_gap);
            unroll<kTokens>([&](auto t) {
                const typename Ops::Float both = Ops::mul(scale, Ops::set_float(tile.scales[g * kTokens + t]));
                total[b * kTokens + t] = Ops::fused(total[b * kTokens + t], Ops::to_float(whole[b * kTokens + t]), both);
            });
        });
        scales += kBytes.scales;
    }
    unroll<kBlocks * kTokens>([&](auto i) { put<Ops>(target.block(i / kTokens), i % kTokens, total[i]); });
}

// Blocks that are multiplied at once: two streams of codes come from memory faster than one.
template <class Ops, WeightFormat kFormat>
constexpr int direct_blocks(int tokens) {
    return kFormat == WeightFormat::kQ4 && tokens <= 2 && Ops::kSums >= 24 ? 2 : 1;
}

// kBlocks blocks from `block` on; what high parts of codes add comes last.
template <class Ops, WeightFormat kFormat, int kTokens, int kBlocks>
void add_blocks(const Matrix& weight, std::int64_t block, const Tile& tile, const std::int32_t* starts,
                const BlockScales& room, WideProduct<Ops, kFormat>& wide, const Target& target) {
    if constexpr (kFormat == WeightFormat::kQ4) {
        multiply_q4<Ops, kTokens, kBlocks>(weight, block, tile, starts, target);
    } else {
        static_assert(kBlocks == 1);
        constexpr int kRuns = kGroupBytes<kFormat>.runs;
        for (std::int64_t g = 0; g < weight.groups(); ++g) {
            const std::int64_t at = g * kRuns * kRows;
            read_scales<Ops>(Place<kFormat>(weight, block, g), room.scales + at, room.minima + at, kRows);
        }
        multiply_direct<Ops, kFormat, kTokens>(weight, block, tile, starts, room, target.block(0));
    }
    for (int b = 0; b < kBlocks; ++b) wide.add(block + b, target.block(b));
}

template <class Ops, WeightFormat kFormat>
void linear_direct(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts, float* out,
                   std::int64_t out_stride, std::uint8_t* scratch) {
    constexpr bool kIsQ4 = kFormat == WeightFormat::kQ4;
    constexpr int kRuns = kIsQ4 ? 8 : kGroupBytes<kFormat>.runs;
    const std::int64_t groups = weight.groups(), scales = groups * kRuns * kRows;
    const int n = static_cast<int>(acts.count());
    const Tile tile(acts.tiles, 0);
    auto* starts = reinterpret_cast<std::int32_t*>(scratch);
    auto* floats = reinterpret_cast<float*>(starts + (groups * kRuns * n + 15) / 16 * 16);
    const BlockScales room{floats, floats + (kGroupBytes<kFormat>.has_minimum ? scales : 0)};
    WideProduct<Ops, kFormat> wide(weight, acts.tiles, reinterpret_cast<std::uint8_t*>(room.minima + scales));
    if constexpr (kIsQ4) {
        make_starts(tile, 8, groups * 8 * n, kQ4Offset, starts);
    } else {
        make_starts(tile, kRuns, groups * kRuns * n, Lines<Ops, kFormat>::kOffset, starts);
    }
    for_number<kDirectTokens>(n, [&](auto tokens) {
        constexpr int kBlocks = direct_blocks<Ops, kFormat>(tokens());
        std::int64_t block = first;
        const auto target = [&] { return Target{out + block * kRows, out_stride, weight.rows - block * kRows}; };
        for (; block + kBlocks <= last; block += kBlocks) {
            add_blocks<Ops, kFormat, tokens(), kBlocks>(weight, block, tile, starts, room, wide, target());
        }
        for (; block < last; ++block) {
            add_blocks<Ops, kFormat, tokens(), 1>(weight, block, tile, starts, room, wide, target());
        }
    });
}

// -------------------------------------------------------------------------------------------------- many tokens

// What is unpacked next: the codes of up to kMostBlocks blocks, each in parts that are fetched one at a time.
struct Ahead {
    const std::uint8_t* codes[kMostBlocks] = {};
    std::int64_t parts = 1, part_bytes = 0, blocks = 0;  // parts of a block
    std::int64_t block = 0, part = 0;                    // what is fetched next

    // The next part; where none is left, one that was fetched.
    const std::uint8_t* next() {
        if (block == blocks) return codes[0];
        const std::uint8_t* found = codes[block] + part * part_bytes;
        if (++part == parts) part = 0, ++block;
        return found;
    }
};

constexpr std::int64_t kPanelGap = kPanelGroups * kGroup * kRows;  // of what was unpacked

template <WeightFormat kFormat>
constexpr bool kIsBytes = kFormat == WeightFormat::kQ8 || kFormat == WeightFormat::kQ8_0;

// Groups [first, first + some) of a block as bytes.
template <class Ops, WeightFormat kFormat>
void unpack_bytes(const Matrix& weight, std::int64_t block, std::int64_t first, std::int64_t some, std::uint8_t* to) {
    for (std::int64_t g = first; g < first + some; ++g) {
        const Place<kFormat> place(weight, block, g);
        if constexpr (kIsBytes<kFormat>) {
            std::memcpy(to, place.codes, kGroup * kRows);
            to += kGroup * kRows;
        } else if constexpr (kFormat == WeightFormat::kQ4) {
            const typename Ops::Int steps = Ops::load_ints(place.scales + 2 * kRows);
            unroll<8>([&](auto s) {
                const auto step = Ops::stretch_by(Ops::template signed_nibble<s()>(steps));
                unroll<2>([&](auto half) {
                    const Pair<Ops> pair = look_up_line<Ops>(place.codes, 2 * s + half, kQ4Book, kQ4Offset);
                    Ops::store_bytes(to, Ops::stretch(pair[0], step));
                    Ops::store_bytes(to + 64, Ops::stretch(pair[1], step));
                    to += 128;
                });
            });
        } else {
            unroll<16>([&](auto line) {
                const Pair<Ops> pair = Lines<Ops, kFormat>::read(place.codes, line, kByteOffset);
                Ops::store_bytes(to, pair[0]);
                Ops::store_bytes(to + 64, pair[1]);
                to += 128;
            });
        }
    }
}

// Stores before it are done, loads after it not yet.
[[gnu::always_inline]] inline void settle() { __asm__ volatile("" ::: "memory"); }

// Where sums are added up: token t's of block b are 16 numbers at first + t * stride + b * 16, which the first run of
// columns writes without reading them.
struct Totals {
    float* first;
    std::int64_t stride;
};

// One run's sums of kTokens tokens and kBlocks blocks, then added to totals with their scales (`begins`: to zeros).
template <class Ops, int kTokens, int kBlocks, int kQuads>
void multiply_run(const std::uint8_t* const* bytes, const float* scales, const std::int8_t* codes,
                  const std::int32_t* starts, const float* token_scales, const Totals& totals, bool begins) {
    alignas(64) std::int32_t sums[kBlocks * kTokens][kRows];
    typename Ops::Int acc[kBlocks * kTokens];
    unroll<kBlocks * kTokens>([&](auto i) { acc[i] = Ops::start(starts + i % kTokens); });
    for (int q = 0; q < kQuads; ++q) {
        typename Ops::Bytes w[kBlocks];
        unroll<kBlocks>([&](auto b) { w[b] = Ops::load_bytes(bytes[b] + 64 * q); });
        Ops::prefetch(codes + kTokens * kGroup + 64 * q);
        unroll<kTokens>([&](auto t) {
            const typename Ops::Word word = Ops::word(codes + t * kGroup + 4 * q);
            unroll<kBlocks>([&](auto b) { acc[b * kTokens + t] = Ops::dot(acc[b * kTokens + t], w[b], word); });
        });
    }
    // Through memory: what scales the sums would otherwise take the registers that hold them.
    unroll<kBlocks * kTokens>([&](auto i) {
        Ops::store_bytes(reinterpret_cast<std::uint8_t*>(sums[i]), Ops::as_bytes(acc[i]));
    });
    settle();
    for (int b = 0; b < kBlocks; ++b) {
        const typename Ops::Float scale = Ops::load_floats(scales + b * kRows);
#pragma GCC unroll 4
        for (int t = 0; t < kTokens; ++t) {
            float* total = totals.first + t * totals.stride + b * kRows;
            const auto* sum = reinterpret_cast<const std::uint8_t*>(sums[b * kTokens + t]);
            const typename Ops::Float both = Ops::mul(scale, Ops::set_float(token_scales[t]));
            const typename Ops::Float before = begins ? Ops::zero_float() : Ops::load_floats(total);
            Ops::store_floats(total, Ops::fused(before, Ops::to_float(Ops::load_ints(sum)), both));
        }
    }
}

// Groups of a tile through the panel, whose first group is `first` of the tile's, added to totals.
template <class Ops, int kTokens, int kRuns>
void multiply_tile(const Panel& panel, std::int64_t first, std::int64_t some, const Tile& tile, const std::int32_t* starts,
                   const Totals& totals, Ahead& ahead) {
    if constexpr (requires { Ops::template multiply_tile<kTokens, kRuns>(panel, first, some, tile, starts, totals, ahead); }) {
        Ops::template multiply_tile<kTokens, kRuns>(panel, first, some, tile, starts, totals, ahead);
    } else {
        constexpr int kQuads = 32 / kRuns;
        for (std::int64_t at = 0; at < some * kRuns; ++at) {
            const std::int64_t g = first + at / kRuns, run = at % kRuns;
            const std::uint8_t* fetched = ahead.next();
            for (std::int64_t i = 0; i < ahead.part_bytes; i += 64) Ops::prefetch(fetched + i);
            const std::uint8_t* bytes[Ops::kBlocks];
            for (int b = 0; b < Ops::kBlocks; ++b) bytes[b] = panel.bytes + b * panel.gap + at * kQuads * 64;
            multiply_run<Ops, kTokens, Ops::kBlocks, kQuads>(
                bytes, panel.scales + at * kMostBlocks * kRows, tile.codes + g * kTokens * kGroup + run * kQuads * 4,
                starts + (g * kRuns + run) * kTokens, tile.scales + g * kTokens, totals, g == 0 && run == 0);
        }
    }
}

// All tiles through the products of some blocks.
template <class Ops, WeightFormat kFormat>
class PanelProduct {
public:
    PanelProduct(const Matrix& weight, const Tiles& tiles, float* out, std::int64_t out_stride, std::uint8_t* scratch)
        : weight_(weight), tiles_(tiles), out_(out), out_stride_(out_stride), wide_(weight, tiles, scratch) {
        scratch += (wide_bytes(tiles.groups, tiles.count) + 63) / 64 * 64;
        const std::int64_t panel = kMostBlocks * kPanelGroups * kGroup * kRows;
        const std::int64_t scales = kPanelGroups * kRuns * kMostBlocks * kRows;
        bytes_ = scratch;
        scales_ = reinterpret_cast<float*>(scratch + panel);
        minima_ = scales_ + scales;
        totals_ = minima_ + (kHasMinimum ? scales : 0);
        below_ = totals_ + tiles.count * kMostBlocks * kRows;
        starts_ = reinterpret_cast<std::int32_t*>(below_ + (kHasMinimum ? tiles.count * kMostBlocks * kRows : 0));
        for (std::int64_t i = 0; i < tiles.tiles; ++i) {
            const std::int64_t runs = tiles.groups * kRuns;
            make_starts(Tile(tiles, i), kRuns, runs * tiles.size(i), kByteOffset, starts_ + tiles.begin(i) * runs);
        }
    }

    void run(std::int64_t first, std::int64_t last) {
        if ((last - first) % Ops::kBlocks != 0) {  // what is not there must be numbers
            std::memset(bytes_, 0, kMostBlocks * kPanelGap);
            std::memset(scales_, 0, kPanelGroups * kRuns * kMostBlocks * kRows * 4);
        }
        for (std::int64_t block = first; block < last;) {
            const int blocks = static_cast<int>(std::min<std::int64_t>(Ops::kBlocks, last - block));
            const Target target{out_ + block * kRows, out_stride_, std::min(blocks * kRows, weight_.rows - block * kRows)};
            const bool is_whole = !kHasMinimum && target.rows == Ops::kBlocks * kRows;
            const Totals totals = is_whole ? Totals{target.first, target.stride} : Totals{totals_, kMostBlocks * kRows};
            if constexpr (kHasMinimum) std::memset(below_, 0, static_cast<std::size_t>(tiles_.count * kMostBlocks * kRows) * 4);
            wide_.begin();
            for (std::int64_t g = 0; g < tiles_.groups; g += kPanelGroups) {
                const std::int64_t some = std::min(kPanelGroups, tiles_.groups - g);
                const Panel panel = unpack(block, blocks, g, some);
                look_ahead(block, g + some, last);
                add_groups(panel, blocks, g, some, totals);
            }
            if (!is_whole) put_totals(target, blocks);
            wide_.finish(target);
            block += blocks;
        }
    }

private:
    static constexpr int kRuns = kGroupBytes<kFormat>.runs;
    static constexpr bool kHasMinimum = kGroupBytes<kFormat>.has_minimum;

    Panel unpack(std::int64_t block, int blocks, std::int64_t first, std::int64_t some) {
        for (int b = 0; b < blocks; ++b) {
            for (std::int64_t g = 0; g < some; ++g) {
                const std::int64_t at = (g * kRuns * kMostBlocks + b) * kRows;
                read_scales<Ops>(Place<kFormat>(weight_, block + b, first + g), scales_ + at, minima_ + at, kMostBlocks * kRows);
            }
        }
        if (kIsBytes<kFormat> && blocks == Ops::kBlocks) {  // they lie as they are multiplied
            const std::int64_t gap = stored_groups<kFormat>(weight_) * kGroup * kRows;
            return {Place<kFormat>(weight_, block, first).codes, gap, scales_, minima_};
        }
        for (int b = 0; b < blocks; ++b) unpack_bytes<Ops, kFormat>(weight_, block + b, first, some, bytes_ + b * kPanelGap);
        return {bytes_, kPanelGap, scales_, minima_};
    }

    // What is unpacked next, to be fetched while products are made: it comes from memory, and would be waited for.
    void look_ahead(std::int64_t block, std::int64_t group, std::int64_t last) {
        if (group >= tiles_.groups) block += Ops::kBlocks, group = 0;
        const std::int64_t blocks = std::clamp<std::int64_t>(last - block, 0, Ops::kBlocks);
        const std::int64_t some = std::min(kPanelGroups, tiles_.groups - group);
        const std::int64_t bytes = some * kGroupBytes<kFormat>.codes, scale_bytes = some * kGroupBytes<kFormat>.scales / kGroupBytes<kFormat>.scale_groups;
        const std::int64_t parts = std::max<std::int64_t>(1, tiles_.tiles * kPanelGroups * kRuns / std::max<std::int64_t>(1, blocks));
        ahead_ = {.codes = {bytes_}, .parts = parts, .part_bytes = blocks > 0 ? (bytes / parts + 63) / 64 * 64 : 0, .blocks = blocks};
        for (std::int64_t b = 0; b < blocks; ++b) {
            const Place<kFormat> place(weight_, block + b, group);
            ahead_.codes[b] = place.codes;
            for (std::int64_t at = 0; at < scale_bytes; at += 64) Ops::prefetch(place.scales + at);
        }
    }

    // Sums that were not added up in their place.
    void put_totals(const Target& target, int blocks) {
        for (std::int64_t t = 0; t < tiles_.count; ++t) {
            for (int b = 0; b < blocks; ++b) {
                const std::int64_t at = (t * kMostBlocks + b) * kRows;
                typename Ops::Float total = Ops::load_floats(totals_ + at);
                if constexpr (kHasMinimum) total = Ops::add(total, Ops::load_floats(below_ + at));
                put<Ops>(target.block(b), t, total);
            }
        }
    }

    // Blocks that are not there are multiplied too, and their totals not looked at.
    void add_groups(const Panel& panel, int blocks, std::int64_t first, std::int64_t some, const Totals& totals) {
        std::int64_t i = 0;
        const auto add_tiles = [&](std::int64_t end) {
            if (i == end) return;
            for_number<Ops::kTokens>(static_cast<int>(tiles_.size(i)), [&](auto tokens) {
                for (; i < end; ++i) {
                    const std::int32_t* starts = starts_ + tiles_.begin(i) * tiles_.groups * kRuns;
                    const Totals own{totals.first + tiles_.begin(i) * totals.stride, totals.stride};
                    multiply_tile<Ops, tokens(), kRuns>(panel, first, some, Tile(tiles_, i), starts, own, ahead_);
                }
            });
        };
        add_tiles(tiles_.larger);
        add_tiles(tiles_.tiles);
        wide_.add_groups(first, some, panel);
        if constexpr (kHasMinimum) add_panel_minima(panel, blocks, first, some);
    }

    void add_panel_minima(const Panel& panel, int blocks, std::int64_t first, std::int64_t some) {
        for (std::int64_t i = 0; i < tiles_.tiles; ++i) {
            const Tile tile(tiles_, i);
            const std::int64_t n = tiles_.size(i);
            for (std::int64_t t = 0; t < n; ++t) {
                for (int b = 0; b < blocks; ++b) {
                    float* at = below_ + ((tiles_.begin(i) + t) * kMostBlocks + b) * kRows;
                    typename Ops::Float below = Ops::load_floats(at);
                    for (std::int64_t g = 0; g < some; ++g) {
                        const float* minima = panel.minima + (g * kRuns * kMostBlocks + b) * kRows;
                        const std::int32_t* sums = run_sums(tile, kRuns) + (first + g) * kRuns * n + t;
                        below = add_minima<Ops>(below, minima, kMostBlocks * kRows, kRuns, sums, n, tile.scales[(first + g) * n + t]);
                    }
                    Ops::store_floats(at, below);
                }
            }
        }
    }

    const Matrix& weight_;
    const Tiles& tiles_;
    float* out_;
    std::int64_t out_stride_;
    WideProduct<Ops, kFormat> wide_;
    std::uint8_t* bytes_;
    float *scales_, *minima_, *totals_, *below_;
    std::int32_t* starts_;
    Ahead ahead_;
};

// ------------------------------------------------------------------------------------------------- one row

// Row `row` through the same readers as products: what an embedding gives.
template <class Ops, WeightFormat kFormat>
void read_quantized_row(const Matrix& weight, std::int64_t row, float* out) {
    constexpr std::int64_t kColumns = kGroup / kGroupBytes<kFormat>.runs;
    const std::int64_t block = row / kRows, r = row % kRows;
    alignas(64) std::uint8_t room[kGroup * kRows];
    alignas(64) float scales[kRunsOfGroup * kRows], minima[kRunsOfGroup * kRows];
    for (std::int64_t g = 0; g < weight.groups(); ++g) {
        read_scales<Ops>(Place<kFormat>(weight, block, g), scales, minima, kRows);
        unpack_bytes<Ops, kFormat>(weight, block, g, 1, room);
        for (std::int64_t c = 0; c < std::min(kGroup, weight.columns - g * kGroup); ++c) {
            const std::int64_t run = c / kColumns;
            const float value = static_cast<float>(room[c / 4 * 64 + r * 4 + c % 4] - kByteOffset) * scales[run * kRows + r];
            out[g * kGroup + c] = kGroupBytes<kFormat>.has_minimum ? value + minima[run * kRows + r] : value;
        }
    }
}

template <class Ops>
void read_row(const Matrix& weight, std::int64_t row, float* out) {
    if (weight.format == WeightFormat::kF32) {
        std::memcpy(out, weight.codes + row * weight.columns * 4, static_cast<std::size_t>(weight.columns) * 4);
        return;
    }
    if (weight.format == WeightFormat::kBf16) {
        for (std::int64_t i = 0; i < weight.columns; ++i) {
            std::uint16_t bits;
            std::memcpy(&bits, weight.codes + (row * weight.columns + i) * 2, 2);
            out[i] = bf16_to_float(bits);
        }
        return;
    }
    for_format(weight.format, [&](auto format) { read_quantized_row<Ops, format()>(weight, row, out); });
}

// ------------------------------------------------------------------------------------------------- all formats

template <class Ops, WeightFormat kFormat>
void linear_quantized(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts, float* out,
                      std::int64_t out_stride, std::uint8_t* scratch) {
    if (acts.count() <= kDirectTokens && acts.tiles.tiles == 1) {
        return linear_direct<Ops, kFormat>(weight, first, last, acts, out, out_stride, scratch);
    }
    // Some tiles at a time, so that they stay in the processor's cache while all blocks pass by.
    const Tiles& all = acts.tiles;
    for (std::int64_t i = 0; i < all.tiles;) {
        Tiles some = all;
        const std::int64_t tiles = std::min<std::int64_t>(all.tiles - i, kTogether / kMostTokens);
        some.memory += all.begin(i) * token_bytes(all.groups);
        some.tiles = tiles;
        some.larger = std::clamp<std::int64_t>(all.larger - i, 0, tiles);
        some.count = some.small * tiles + some.larger;
        PanelProduct<Ops, kFormat>(weight, some, out + all.begin(i) * out_stride, out_stride, scratch).run(first, last);
        i += tiles;
    }
}

template <class Ops>
void linear(const Matrix& weight, std::int64_t first, std::int64_t last, const Activations& acts, float* out,
            std::int64_t out_stride, std::uint8_t* scratch) {
    if (acts.count() == 0 || first >= last) return;
    if (weight.format == WeightFormat::kF32) return linear_plain<Ops, float>(weight, first, last, acts, out, out_stride);
    if (weight.format == WeightFormat::kBf16) {
        return linear_plain<Ops, std::uint16_t>(weight, first, last, acts, out, out_stride);
    }
    for_format(weight.format, [&](auto format) {
        linear_quantized<Ops, format()>(weight, first, last, acts, out, out_stride, scratch);
    });
}

template <class Ops>
void fill_quantized(QuantizedTable& table) {
    table.tile_tokens = Ops::kTokens;
    table.quantize = quantize<Ops>;
    table.gather = gather;
    table.linear = linear<Ops>;
    table.read_row = read_row<Ops>;
    table.linear_transposed = linear_transposed<Ops>;
}

}  // namespace
}  // namespace fewfire
