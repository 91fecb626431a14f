// Outliers of activations: where four columns of a group exceed all others by far, their codes have 15 bits, so that the
// scale is that of the others. Products take the low parts like any codes; what the high parts add comes here.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.hpp"
#include "loops.hpp"
#include "quantized.hpp"
#include "weights.hpp"

namespace fewfire {
namespace {

// Where the products of some blocks' rows with tokens go: token t's begin at first + t * stride; `rows` of them exist.
struct Target {
    float* first;
    std::int64_t stride, rows;

    // Of block `b` alone.
    Target block(std::int64_t b) const { return {first + b * kRows, stride, std::min(kRows, rows - b * kRows)}; }
};

// The high parts of one token's wide quad: four int8, their sum, and what they are multiples of. Codes are low + 128 high.
struct WideQuad {
    std::int32_t group, token, quad, word, sum;
    float scale;
};

// What a wide quad needs of a group's weights besides its codes.
template <class Ops, WeightFormat kFormat>
struct GroupScales {
    static constexpr int kRuns = kGroupBytes<kFormat>.runs;
    alignas(64) float scales[kRuns * kRows];
    alignas(64) float minima[kRuns * kRows];
    Place<kFormat> place;

    GroupScales(const Matrix& weight, std::int64_t block, std::int64_t g) : place(weight, block, g) {
        read_scales<Ops>(place, scales, minima, kRows);
    }
};

// The rows of a block times the four columns of a quad, exact.
template <class Ops, WeightFormat kFormat>
typename Ops::Int multiply_quad(const Place<kFormat>& place, const WideQuad& wide) {
    std::int8_t bytes[4];
    std::memcpy(bytes, &wide.word, 4);
    const typename Ops::Word word = Ops::word(bytes);
    const int line = wide.quad / 2, half = wide.quad % 2;
    if constexpr (kFormat == WeightFormat::kQ4) {
        const std::int32_t start = -kQ4Offset * wide.sum;
        const typename Ops::Bytes codes = look_up_line<Ops>(place.codes, line, kQ4Book, kQ4Offset)[static_cast<std::size_t>(half)];
        const typename Ops::Int steps = Ops::load_ints(place.scales + 2 * kRows), sum = Ops::dot_small(Ops::start_small(&start), codes, word);
        typename Ops::Int made = Ops::zero_int();
        const auto stretch = [&]<int... s>(std::integer_sequence<int, s...>) {
            ((s == line / 2 ? void(made = Ops::multiply_add(made, sum, Ops::template signed_nibble<s>(steps))) : void()), ...);
        };
        stretch(std::make_integer_sequence<int, 8>{});
        return made;
    } else {
        using Reader = Lines<Ops, kFormat>;
        const std::int32_t start = -Reader::kOffset * wide.sum;
        const typename Ops::Bytes codes = Reader::read(place.codes, line, Reader::kOffset)[static_cast<std::size_t>(half)];
        if constexpr (Reader::kOffset < 64) return Ops::dot_small(Ops::start_small(&start), codes, word);
        return Ops::dot(Ops::start(&start), codes, word);
    }
}

static_assert(sizeof(WideQuad) == 24, "linear_scratch counts it");

constexpr std::int64_t wide_bytes(std::int64_t groups, std::int64_t tokens) {
    return tokens * (groups * static_cast<std::int64_t>(sizeof(WideQuad)) + kMostBlocks * kRows * 4 + 1) + 64;
}

// Some groups of up to kMostBlocks blocks: bytes + 128 in q8's order, block b's at b * gap; and for every run of columns 16
// scales (and minima) of each block.
struct Panel {
    const std::uint8_t* bytes;
    std::int64_t gap;
    float *scales, *minima;  // ((group, run), kMostBlocks, 16)
};

// All wide quads of some tiles, added to the products of some blocks after another.
template <class Ops, WeightFormat kFormat>
class WideProduct {
public:
    // `room`: wide_bytes, aligned to 64.
    WideProduct(const Matrix& weight, const Tiles& tiles, std::uint8_t* room)
        : weight_(weight),
          tiles_(tiles),
          sums_(reinterpret_cast<float*>(room)),
          quads_(reinterpret_cast<WideQuad*>(sums_ + tiles.count * kMostBlocks * kRows)),
          has_(reinterpret_cast<std::uint8_t*>(quads_ + tiles.count * tiles.groups)) {
        std::memset(has_, 0, static_cast<std::size_t>(tiles.count));
        for (std::int64_t g = 0; g < tiles.groups; ++g) {
            WideQuad* to = quads_ + count_;
            for (std::int64_t i = 0; i < tiles.tiles; ++i) to = list(Tile(tiles, i), tiles.size(i), g, tiles.begin(i), to);
            count_ = to - quads_;
        }
        for (std::int64_t i = 0; i < count_; ++i) has_[quads_[i].token] = 1;
    }

    // target += scale times weights times high parts, added up apart in rising order of groups. For one tile.
    void add(std::int64_t block, const Target& target) {
        begin();
        while (at_ < count_) {
            const std::int32_t group = quads_[at_].group;
            const GroupScales<Ops, kFormat> of(weight_, block, group);
            for (; at_ < count_ && quads_[at_].group == group; ++at_) {
                const WideQuad& wide = quads_[at_];
                const std::int64_t run = run_of(wide) * kRows;
                add_quad(wide, 0, multiply_quad<Ops, kFormat>(of.place, wide), of.scales + run, of.minima + run);
            }
        }
        finish(target);
    }

    // The same in three parts for several blocks, whose groups come unpacked and in order, some at a time.
    void begin() {
        at_ = 0;
        for (std::int64_t t = 0; t < tiles_.count; ++t) {
            if (has_[t] != 0) std::memset(sums_of(t), 0, kMostBlocks * kRows * 4);
        }
    }

    void add_groups(std::int64_t first, std::int64_t some, const Panel& of) {
        for (; at_ < count_ && quads_[at_].group < first + some; ++at_) add_unpacked(quads_[at_], quads_[at_].group - first, of);
    }

    void finish(const Target& target) const {
        if (count_ == 0) return;
        for (std::int64_t t = 0; t < tiles_.count; ++t) {
            if (has_[t] == 0) continue;
            float* to = target.first + t * target.stride;
            const float* sums = sums_of(t);
            std::int64_t r = 0;
            for (; r + kRows <= target.rows; r += kRows) {
                Ops::store_floats(to + r, Ops::add(Ops::load_floats(to + r), Ops::load_floats(sums + r)));
            }
            for (; r < target.rows; ++r) to[r] += sums[r];
        }
    }

private:
    // `group`: which of the unpacked ones.
    void add_unpacked(const WideQuad& wide, std::int64_t group, const Panel& of) {
        std::int8_t bytes[4];
        std::memcpy(bytes, &wide.word, 4);
        const typename Ops::Word word = Ops::word(bytes);
        const std::int32_t start = -kByteOffset * wide.sum;
        const std::int64_t run = (group * kGroupBytes<kFormat>.runs + run_of(wide)) * kMostBlocks * kRows;
        unroll<Ops::kBlocks>([&](auto b) {
            const typename Ops::Bytes weights = Ops::load_bytes(of.bytes + b * of.gap + (group * kGroup / 4 + wide.quad) * 64);
            const std::int64_t row = run + b * kRows;
            add_quad(wide, b, Ops::dot(Ops::start(&start), weights, word), of.scales + row, of.minima + row);
        });
    }

    static std::int64_t run_of(const WideQuad& wide) { return wide.quad / (32 / GroupScales<Ops, kFormat>::kRuns); }
    float* sums_of(std::int64_t token) const { return sums_ + token * kMostBlocks * kRows; }

    // The wide quads of group g of a tile of n tokens, from `token` on. Each is written, and stays if it is one: which are
    // cannot be guessed.
    static WideQuad* list(const Tile& tile, std::int64_t n, std::int64_t g, std::int64_t token, WideQuad* to) {
        std::int32_t any = 0;
        for (std::int64_t at = g * n; at < (g + 1) * n; ++at) any |= tile.wide_words[at];
        if (any == 0) return to;
        for (std::int64_t at = g * n; at < (g + 1) * n; ++at, ++token) {
            const std::int32_t word = tile.wide_words[at];
            const auto high = [&](int j) { return word << 8 * (3 - j) >> 24; };
            *to = {static_cast<std::int32_t>(g), static_cast<std::int32_t>(token), tile.wide_quads[at], word,
                   high(0) + high(1) + high(2) + high(3), tile.scales[at] * kWideStep};
            to += word != 0;
        }
        return to;
    }

    // `exact`: the rows of block `b` times the quad's codes; scales and minima of those rows.
    void add_quad(const WideQuad& wide, std::int64_t b, const typename Ops::Int& exact, const float* scales, const float* minima) {
        const typename Ops::Float both = Ops::mul(Ops::load_floats(scales), Ops::set_float(wide.scale));
        float* at = sums_of(wide.token) + b * kRows;
        typename Ops::Float sum = Ops::fused(Ops::load_floats(at), Ops::to_float(exact), both);
        if constexpr (kGroupBytes<kFormat>.has_minimum) {
            const typename Ops::Float weight = Ops::set_float(static_cast<float>(wide.sum) * wide.scale);
            sum = Ops::fused(sum, Ops::load_floats(minima), weight);
        }
        Ops::store_floats(at, sum);
    }

    const Matrix& weight_;
    const Tiles& tiles_;
    float* sums_;         // (tokens, kMostBlocks, 16), of those that have wide quads
    WideQuad* quads_;     // by group
    std::uint8_t* has_;   // whether a token has any
    std::int64_t count_ = 0, at_ = 0;  // of quads: all, and which comes next
};

}  // namespace
}  // namespace fewfire
