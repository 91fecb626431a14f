// What this machine can do, measured by loops that do nothing else: the yardsticks of `bench` and `doctor`.
#pragma once

#include <cstdint>

#include "linear.hpp"
#include "quantized.hpp"

namespace fewfire {
namespace {

// Twelve independent chains, as many as a product of 12 tokens has.
template <class Ops>
std::int64_t multiply_bytes_forever(std::int64_t rounds, std::int32_t* result) {
    alignas(64) std::uint8_t bytes[64];
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<std::uint8_t>(i * 7 + 1);
    const typename Ops::Bytes w = Ops::load_bytes(bytes);
    typename Ops::Int acc[12];
    for (int t = 0; t < 12; ++t) acc[t] = Ops::set_int(t);
    const std::int32_t words[12] = {0x01020304, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x08, 0x19, 0x2a, 0x3b};
    for (std::int64_t round = 0; round < rounds; ++round) {
        for (int t = 0; t < 12; ++t) acc[t] = Ops::dot(acc[t], w, words[t]);
    }
    typename Ops::Int sum = acc[0];
    for (int t = 1; t < 12; ++t) sum = Ops::multiply_add(sum, acc[t], Ops::set_int(1));
    Ops::store_bytes(bytes, Ops::as_bytes(sum));
    *result = load_word(bytes);
    return rounds * 12 * 64 * 2;
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
    return load_word(bytes);
}

template <class Ops>
void fill_probes(QuantizedTable& table) {
    table.multiply_bytes_forever = multiply_bytes_forever<Ops>;
    table.read_bytes = read_bytes<Ops>;
}

}  // namespace
}  // namespace fewfire
