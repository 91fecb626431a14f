// What this machine can do, measured by loops that do nothing else: the yardsticks of `bench` and `doctor`.
#pragma once

#include <cstdint>

#include "linear.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

// As many independent chains as products have, words and weights in registers.
template <class Ops>
std::int64_t multiply_bytes_forever(std::int64_t rounds, std::int32_t* result) {
    constexpr int kChains = 12;
    alignas(64) std::uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(i * 7 + 1);
    const typename Ops::Bytes w = Ops::load_bytes(bytes);
    const typename Ops::Word word = Ops::word(reinterpret_cast<const std::int8_t*>(bytes + 8));
    typename Ops::Int acc[kChains];
    unroll<kChains>([&](auto t) { acc[t] = Ops::set_int(t); });
    for (std::int64_t round = 0; round < rounds; ++round) {
        unroll<kChains>([&](auto t) { acc[t] = Ops::dot(acc[t], w, word); });
    }
    typename Ops::Int sum = acc[0];
    unroll<kChains>([&](auto t) { sum = Ops::multiply_add(acc[t], sum, Ops::set_int(3)); });
    Ops::store_bytes(bytes, Ops::as_bytes(sum));
    std::memcpy(result, bytes, 4);
    return rounds * kChains * 64 * 2;
}

template <class Ops>
std::int64_t multiply_floats_forever(std::int64_t rounds, float* result) {
    constexpr int kChains = 12;
    const typename Ops::Float factor = Ops::set_float(1.0001f), added = Ops::set_float(0.25f);
    typename Ops::Float acc[kChains];
    unroll<kChains>([&](auto t) { acc[t] = Ops::set_float(static_cast<float>(t)); });
    for (std::int64_t round = 0; round < rounds; ++round) {
        unroll<kChains>([&](auto t) { acc[t] = Ops::fused(acc[t], factor, added); });
    }
    typename Ops::Float sum = acc[0];
    unroll<kChains>([&](auto t) { sum = Ops::fused(acc[t], sum, factor); });
    float lanes[16];
    Ops::store_floats(lanes, sum);
    *result = lanes[0];
    return rounds * kChains * 16 * 2;
}

template <class Ops>
std::int32_t read_bytes(const std::uint8_t* p, std::int64_t count) {
    typename Ops::Int sums[4];
    for (int c = 0; c < 4; ++c) sums[c] = Ops::set_int(0);
    for (std::int64_t at = 0; at + 256 <= count; at += 256) {
        Ops::prefetch(p + at + 4096);
        Ops::prefetch(p + at + 4096 + 64);
        Ops::prefetch(p + at + 4096 + 128);
        Ops::prefetch(p + at + 4096 + 192);
        for (int c = 0; c < 4; ++c) sums[c] = Ops::add_ints(sums[c], Ops::load_ints(p + at + 64 * c));
    }
    alignas(64) std::uint8_t bytes[64];
    Ops::store_bytes(bytes, Ops::as_bytes(Ops::add_ints(Ops::add_ints(sums[0], sums[1]), Ops::add_ints(sums[2], sums[3]))));
    std::int32_t first;
    std::memcpy(&first, bytes, 4);
    return first;
}

template <class Ops>
void fill_probes(QuantizedTable& table) {
    table.multiply_bytes_forever = multiply_bytes_forever<Ops>;
    table.multiply_floats_forever = multiply_floats_forever<Ops>;
    table.read_bytes = read_bytes<Ops>;
}

}  // namespace
}  // namespace fewfire
