// The CRC-32C of two runs of bytes from those of each.
#pragma once

#include <cstdint>

namespace fewfire {

// `first` is that of what comes before, `second` that of the `count` bytes behind it.
std::uint32_t join_checksums(std::uint32_t first, std::uint32_t second, std::int64_t count);

}  // namespace fewfire
