// How results may leave what is exact, to wait less for the disk. None of it is on unless asked for.
#pragma once

#include <cstdint>

namespace fewfire {

struct LossyModes {
    float prefer_cached = 0;   // what experts in memory gain in selection, as a share of the values' mean range
    float top_p = 1;           // the share of a token's routing weight that the experts it keeps reach
    bool substitutes = false;  // a record that is not here is replaced by its low-precision copy
};

// The mean over the tokens that a layer decoded of how far its selection values lie apart.
struct MeanRange {
    double sum = 0;
    std::int64_t count = 0;

    float add(float range) {
        sum += static_cast<double>(range);
        return static_cast<float>(sum / static_cast<double>(++count));
    }
};

// What applies to the router of one layer in one step.
struct RouterModes {
    float top_p = 1;
    const std::uint8_t* cached = nullptr;  // of each expert, whether it is in memory; null: no preference
    float prefer_cached = 0;
    MeanRange* range = nullptr;
};

}  // namespace fewfire
