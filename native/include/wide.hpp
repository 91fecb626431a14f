// Outliers of activations: where four columns of a group exceed all others by far, their codes have 15 bits, so that the
// scale is that of the others. Products take the low parts like any codes; what the high parts add comes here.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.hpp"
#include "quantized.hpp"
#include "weights.hpp"

namespace fewfire {
namespace {

// Where the products of a block's 16 rows with tokens go: token t's begin at first + t * stride; `rows` of them exist.
struct Target {
    float* first;
    std::int64_t stride, rows;
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
    Place place;

    GroupScales(const Matrix& weight, std::int64_t block, std::int64_t g) : place(weight, block, g) {
        read_scales<Ops>(kFormat, place, scales, minima, kRows);
    }
};

// The rows of a block times the four columns of a quad, exact.
template <class Ops, WeightFormat kFormat>
typename Ops::Int multiply_quad(const Place& place, const WideQuad& wide) {
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
    return tokens * (groups * static_cast<std::int64_t>(sizeof(WideQuad)) + kRows * 4 + 4);
}

// All wide quads of some tiles, added to the products of one block after another.
template <class Ops, WeightFormat kFormat>
class WideProduct {
public:
    // `room`: wide_bytes, aligned to 64.
    WideProduct(const Matrix& weight, const Tiles& tiles, std::uint8_t* room)
        : weight_(weight),
          sums_(reinterpret_cast<float*>(room)),
          tokens_(reinterpret_cast<std::int32_t*>(sums_ + tiles.count * kRows)),
          quads_(reinterpret_cast<WideQuad*>(tokens_ + tiles.count)) {
        for (std::int64_t i = 0; i < tiles.tiles; ++i) {
            const std::int64_t n = tiles.size(i);
            const std::int32_t* words = Tile(tiles, i).wide_words;
            for (std::int64_t t = 0; t < n; ++t) {
                for (std::int64_t g = 0; g < tiles.groups; ++g) {
                    if (words[g * n + t] == 0) continue;
                    tokens_[num_tokens_++] = static_cast<std::int32_t>(tiles.begin(i) + t);
                    break;
                }
            }
        }
        for (std::int64_t g = 0; num_tokens_ > 0 && g < tiles.groups; ++g) {
            for (std::int64_t i = 0; i < tiles.tiles; ++i) list(Tile(tiles, i), g, tiles.size(i), tiles.begin(i));
        }
    }

    // target += scale times weights times high parts, added up apart in rising order of groups.
    void add(std::int64_t block, const Target& target) const {
        if (num_quads_ == 0) return;
        for (std::int64_t i = 0; i < num_tokens_; ++i) Ops::store_floats(sums_ + tokens_[i] * kRows, Ops::zero_float());
        for (std::int64_t at = 0; at < num_quads_;) {
            const std::int32_t group = quads_[at].group;
            const GroupScales<Ops, kFormat> scales(weight_, block, group);
            for (; at < num_quads_ && quads_[at].group == group; ++at) add_quad(scales, quads_[at]);
        }
        for (std::int64_t i = 0; i < num_tokens_; ++i) {
            float* to = target.first + tokens_[i] * target.stride;
            const float* sum = sums_ + tokens_[i] * kRows;
            for (std::int64_t r = 0; r < target.rows; ++r) to[r] += sum[r];
        }
    }

private:
    void list(const Tile& tile, std::int64_t g, std::int64_t n, std::int64_t begin) {
        for (std::int64_t t = 0; t < n; ++t) {
            const std::int64_t at = g * n + t;
            const std::int32_t word = tile.wide_words[at];
            if (word == 0) continue;
            std::int8_t bytes[4];
            std::memcpy(bytes, &word, 4);
            quads_[num_quads_++] = {static_cast<std::int32_t>(g), static_cast<std::int32_t>(begin + t), tile.wide_quads[at], word,
                                    bytes[0] + bytes[1] + bytes[2] + bytes[3], tile.scales[at] * kWideStep};
        }
    }

    void add_quad(const GroupScales<Ops, kFormat>& of, const WideQuad& wide) const {
        const std::int64_t run = wide.quad / (32 / GroupScales<Ops, kFormat>::kRuns);
        const typename Ops::Float both = Ops::mul(Ops::load_floats(of.scales + run * kRows), Ops::set_float(wide.scale));
        const typename Ops::Float exact = Ops::to_float(multiply_quad<Ops, kFormat>(of.place, wide));
        float* at = sums_ + wide.token * kRows;
        typename Ops::Float sum = Ops::add(Ops::load_floats(at), Ops::mul(exact, both));
        if constexpr (kGroupBytes<kFormat>.has_minimum) {
            const typename Ops::Float weight = Ops::set_float(static_cast<float>(wide.sum) * wide.scale);
            sum = Ops::add(sum, Ops::mul(Ops::load_floats(of.minima + run * kRows), weight));
        }
        Ops::store_floats(at, sum);
    }

    const Matrix& weight_;
    float* sums_;           // (tokens, 16), of those in tokens_
    std::int32_t* tokens_;  // that have a wide quad
    WideQuad* quads_;       // by group
    std::int64_t num_tokens_ = 0, num_quads_ = 0;
};

}  // namespace
}  // namespace fewfire
