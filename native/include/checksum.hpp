// CRC-32C (Castagnoli): what packs are checked with. One step of 8 bytes is `Step`; several runs go side by side, since
// each step waits for the one before.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace fewfire {
namespace {

constexpr std::uint32_t kPolynomial = 0x82f63b78u;  // reflected

using CrcTable = std::array<std::array<std::uint32_t, 256>, 8>;

// Row k: the register after a byte and k zero bytes more.
constexpr CrcTable make_crc_table() {
    CrcTable table{};
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
        std::uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1u) != 0 ? kPolynomial : 0u);
        table[0][byte] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k) {
        for (std::size_t byte = 0; byte < 256; ++byte) {
            const std::uint32_t before = table[k - 1][byte];
            table[k][byte] = table[0][before & 255u] ^ before >> 8;
        }
    }
    return table;
}

constexpr CrcTable kCrcTable = make_crc_table();

struct TableStep {
    static std::uint32_t byte(std::uint32_t crc, std::uint8_t value) { return kCrcTable[0][(crc ^ value) & 255u] ^ crc >> 8; }
    static std::uint32_t word(std::uint32_t crc, std::uint64_t value) {
        value ^= crc;
        std::uint32_t made = 0;
        for (std::size_t i = 0; i < 8; ++i) made ^= kCrcTable[7 - i][value >> 8 * i & 255u];
        return made;
    }
};

constexpr std::int64_t kRunBytes = 4096;

// The register after kRunBytes zero bytes, for each byte of it: register -> register is linear.
using ShiftTable = std::array<std::array<std::uint32_t, 256>, 4>;

inline ShiftTable make_shift_table() {
    ShiftTable table;
    for (std::size_t place = 0; place < 4; ++place) {
        for (std::uint32_t byte = 0; byte < 256; ++byte) {
            std::uint32_t crc = byte << 8 * place;
            for (std::int64_t i = 0; i < kRunBytes; ++i) crc = TableStep::byte(crc, 0);
            table[place][byte] = crc;
        }
    }
    return table;
}

inline std::uint32_t shifted(const ShiftTable& table, std::uint32_t crc) {
    return table[0][crc & 255u] ^ table[1][crc >> 8 & 255u] ^ table[2][crc >> 16 & 255u] ^ table[3][crc >> 24];
}

inline std::uint64_t load_word64(const std::uint8_t* p) {
    std::uint64_t word;
    std::memcpy(&word, p, 8);
    return word;
}

template <class Step>
std::uint32_t crc32c(std::uint32_t before, const std::uint8_t* p, std::int64_t count) {
    static const ShiftTable table = make_shift_table();
    std::uint32_t crc = ~before;
    for (; count >= 3 * kRunBytes; count -= 3 * kRunBytes, p += 3 * kRunBytes) {
        std::uint32_t second = 0, third = 0;
        for (std::int64_t i = 0; i < kRunBytes; i += 8) {
            crc = Step::word(crc, load_word64(p + i));
            second = Step::word(second, load_word64(p + kRunBytes + i));
            third = Step::word(third, load_word64(p + 2 * kRunBytes + i));
        }
        crc = shifted(table, shifted(table, crc) ^ second) ^ third;
    }
    for (; count >= 8; count -= 8, p += 8) crc = Step::word(crc, load_word64(p));
    for (; count > 0; --count, ++p) crc = Step::byte(crc, *p);
    return ~crc;
}

}  // namespace
}  // namespace fewfire
