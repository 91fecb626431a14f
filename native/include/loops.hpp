// Loops whose numbers are known to the compiler.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
#pragma once

#include <utility>

namespace fewfire {
namespace {

// body(integral_constant) for 0 .. kCount - 1. A loop would do, but GCC unrolls loops too late to keep an array of
// accumulators in registers: it then stores each one at every step.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) [[gnu::always_inline]] {
        (body(std::integral_constant<int, kIndex>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Calls body(integral_constant) of `n`, from 1 to kMost.
template <int kMost, class Body>
void for_number(int n, const Body& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        ((n == kIndex + 1 ? body(std::integral_constant<int, kIndex + 1>{}) : void()), ...);
    }(std::make_integer_sequence<int, kMost>{});
}

// Lanes made one, the upper half of them into the lower, in place.
template <class Both>
[[gnu::always_inline]] inline float fold_lanes(float (&lanes)[16], const Both& both) {
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] = both(lanes[lane], lanes[lane + width]);
    }
    return lanes[0];
}

}  // namespace
}  // namespace fewfire
