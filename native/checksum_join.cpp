#include "checksum_join.hpp"

#include <array>

namespace fewfire {
namespace {

// A linear map of the register: the image of each bit.
using Map = std::array<std::uint32_t, 32>;

std::uint32_t apply(const Map& map, std::uint32_t crc) {
    std::uint32_t made = 0;
    for (std::size_t bit = 0; bit < 32; ++bit) {
        if ((crc >> bit & 1u) != 0) made ^= map[bit];
    }
    return made;
}

Map squared(const Map& map) {
    Map made;
    for (std::size_t bit = 0; bit < 32; ++bit) made[bit] = apply(map, map[bit]);
    return made;
}

// One zero bit through the register.
Map one_bit() {
    Map made;
    made[0] = 0x82f63b78u;
    for (std::size_t bit = 1; bit < 32; ++bit) made[bit] = 1u << (bit - 1);
    return made;
}

// 2^k zero bytes through the register, for every k that a count of bytes has.
std::array<Map, 63> zero_bytes() {
    std::array<Map, 63> made;
    made[0] = squared(squared(squared(one_bit())));
    for (std::size_t k = 1; k < made.size(); ++k) made[k] = squared(made[k - 1]);
    return made;
}

}  // namespace

// Final and first inversions cancel: crc(A B) = zeros(crc(A)) ^ crc(B).
std::uint32_t join_checksums(std::uint32_t first, std::uint32_t second, std::int64_t count) {
    static const std::array<Map, 63> zeros = zero_bytes();
    for (std::size_t k = 0; count >> k != 0; ++k) {
        if ((count >> k & 1) != 0) first = apply(zeros[k], first);
    }
    return first ^ second;
}

}  // namespace fewfire
