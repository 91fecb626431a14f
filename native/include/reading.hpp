// Bytes of files, read and checked. Knows no Python.
#pragma once

#include <cstdint>

namespace fewfire {

// What came of a read: `error` is errno, or 0; `done` less than asked without an error: the file ends there.
struct ReadResult {
    std::int64_t done = 0;
    int error = 0;
    std::uint32_t checksum = 0;  // CRC-32C of what was read, on top of the one given
};

// Reads `count` bytes from `offset` of a file to `to`, a piece at a time, so that each is checked while it is in the cache.
ReadResult read_checked(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, std::uint32_t checksum);

}  // namespace fewfire
