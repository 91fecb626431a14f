// Products of up to four tokens, whose weights are unpacked in registers: bound by reading them. See linear.hpp.
#pragma once

#include <cstdint>

#include "linear_parts.hpp"

namespace fewfire {
namespace {

constexpr std::int64_t kFetched = 4096;  // bytes of codes, ahead of those that are multiplied
constexpr int kDirectTokens = 4;  // up to here weights are unpacked in registers, beyond once for all tokens

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

}  // namespace
}  // namespace fewfire
