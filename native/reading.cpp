#include "reading.hpp"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "dispatch.hpp"

namespace fewfire {

ReadResult read_checked(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, std::uint32_t checksum) {
    constexpr std::int64_t kPiece = 1 << 18;
    ReadResult result;
    result.checksum = checksum;
    while (result.done < count) {
        const auto wanted = static_cast<std::size_t>(std::min(kPiece, count - result.done));
        const ssize_t got = ::pread(file, to + result.done, wanted, offset + result.done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) result.error = errno;
        if (got <= 0) break;
        result.checksum = table().crc32c(result.checksum, to + result.done, got);
        result.done += got;
    }
    return result;
}

}  // namespace fewfire
