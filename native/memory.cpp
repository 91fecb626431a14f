#include "memory.hpp"

#include <cstdlib>

#ifdef __GLIBC__
#include <limits.h>
#include <malloc.h>
#endif

namespace fewfire {

bool keep_freed_memory() {
#ifdef __GLIBC__
    return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, INT_MAX) == 1;
#else
    return false;
#endif
}

bool return_freed_memory() {
#ifdef __GLIBC__
    constexpr int kLarge = 1 << 20, kBlocks = 65536;  // as many blocks as the library allows by itself
    const bool done = mallopt(M_MMAP_MAX, kBlocks) == 1 && mallopt(M_MMAP_THRESHOLD, kLarge) == 1 && mallopt(M_TRIM_THRESHOLD, kLarge) == 1;
    malloc_trim(0);
    return done;
#else
    return false;
#endif
}

}  // namespace fewfire
