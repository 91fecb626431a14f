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

// When a file was last changed, and its size: equal as long as nobody writes to it.
struct FileStamp {
    std::int64_t seconds = 0, nanoseconds = 0, size = 0;
    bool operator==(const FileStamp&) const = default;
};

FileStamp stamp_of(int file);

// Reads `count` bytes from `offset` of a file to `to`, a piece at a time, so that each is checked while it is in the cache.
ReadResult read_checked(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, std::uint32_t checksum);

// The same into memory aligned for O_DIRECT, in pieces as large as the system takes; with the checksum only if asked.
ReadResult read_record(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, bool verifies);

}  // namespace fewfire
