// What products of few and of many tokens have in common. See linear.hpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "activations.hpp"
#include "loops.hpp"
#include "quantized.hpp"
#include "weights.hpp"
#include "wide.hpp"

namespace fewfire {
namespace {

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

}  // namespace
}  // namespace fewfire
