#include "reading.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "dispatch.hpp"

namespace fewfire {

namespace {

constexpr std::int64_t kSector = 4096;  // O_DIRECT reads begin at multiples of this
constexpr int kMostStalls = 64;         // short reads in a row that brought nothing

// From now on the file is read through the system's cache, whoever reads it.
void leave_direct(int file) {
#ifdef O_DIRECT
    const int flags = ::fcntl(file, F_GETFL);
    if (flags >= 0) ::fcntl(file, F_SETFL, flags & ~O_DIRECT);
#endif
}

// `whole`: reads go on at multiples of kSector, whatever a short one brought.
ReadResult read_pieces(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, std::int64_t piece, bool whole,
                       bool verifies, std::uint32_t checksum) {
    ReadResult result;
    bool refused = false;
    result.checksum = checksum;
    for (int stalls = 0; result.done < count && stalls < kMostStalls;) {
        const auto wanted = static_cast<std::size_t>(std::min(piece, count - result.done));
        std::int64_t got = ::pread(file, to + result.done, wanted, offset + result.done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && errno == EINVAL && !refused) {  // a direct read, asked for as it is not served here
            refused = true;
            leave_direct(file);
            continue;
        }
        if (got < 0) result.error = errno;
        if (got <= 0) break;
        if (whole && result.done + got < count) got = got / kSector * kSector;
        stalls = got > 0 ? 0 : stalls + 1;
        if (verifies) result.checksum = table().crc32c(result.checksum, to + result.done, got);
        result.done += got;
    }
    return result;
}

}  // namespace

ReadResult read_checked(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, std::uint32_t checksum) {
    return read_pieces(file, offset, count, to, 1 << 18, false, true, checksum);
}

ReadResult read_record(int file, std::int64_t offset, std::int64_t count, std::uint8_t* to, bool verifies) {
    return read_pieces(file, offset, count, to, 1 << 20, true, verifies, 0);
}

FileStamp stamp_of(int file) {
    struct stat found {};
    if (::fstat(file, &found) != 0) return {};
    return {found.st_ctim.tv_sec, found.st_ctim.tv_nsec, found.st_size};
}

}  // namespace fewfire
