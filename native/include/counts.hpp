// What happened to the experts that were wanted.
#pragma once

#include <cstdint>
#include <vector>

namespace fewfire {

struct LayerCounts {
    std::int64_t hits = 0, misses = 0, prefetch_useful = 0, prefetch_wasted = 0;
};

struct SourceCounts {
    std::vector<LayerCounts> layers;
    std::int64_t bytes_read = 0, evictions = 0, late = 0;  // late: prefetches that were still on their way when wanted
    double stall_s = 0;
    bool looks_ahead = false;  // whether looking ahead is on now
    std::int64_t slots_used = 0;
};

}  // namespace fewfire
