// Products of more tokens: a panel of weights is unpacked once for all of them. See linear.hpp.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear_parts.hpp"

namespace fewfire {
namespace {

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

}  // namespace
}  // namespace fewfire
