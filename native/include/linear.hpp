// Quantized products, one source for every instruction set. See quantized.hpp for what they promise.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). `Ops` gives
// vectors of 64 bytes (Bytes), 16 int32 (Int), 16 float (Float) and 4 bytes repeated (Word), and how many tokens
// (kTokens) times blocks of 16 rows (kBlocks) its registers hold the sums of. No result depends on those two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.hpp"
#include "linear_few.hpp"
#include "linear_many.hpp"
#include "loops.hpp"
#include "plain.hpp"
#include "quantized.hpp"
#include "weights.hpp"
#include "wide.hpp"

namespace fewfire {
namespace {

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
