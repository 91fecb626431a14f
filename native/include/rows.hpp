// Rows that belong together, added up: experts' outputs back to their tokens.
#pragma once

#include <cstdint>

#include "dispatch.hpp"
#include "lanes.hpp"

namespace fewfire {
namespace {

template <class Simd, class Element>
void sum_rows(const Element* rows, const std::int64_t* positions, std::int64_t count, std::int64_t slots,
              std::int64_t width, float* sums) {
    using L = Lanes<Simd::kWidth>;
    for (std::int64_t t = 0; t < count; ++t) {
        for (std::int64_t d = 0; d < width; d += Simd::kWidth) {
            const std::int64_t n = width - d < Simd::kWidth ? width - d : Simd::kWidth;
            typename L::Floats sum{};
            for (std::int64_t k = 0; k < slots; ++k) {
                const std::int64_t row = positions[slots * t + k];
                if (row >= 0) sum += L::load(rows + width * row + d, n);
            }
            L::store(sums + width * t + d, sum, n);
        }
    }
}

}  // namespace
}  // namespace fewfire
