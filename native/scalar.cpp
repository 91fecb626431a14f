// The baseline: what every processor runs, and the whole table where nothing better is built.
#include <algorithm>
#include <cstdint>

#include "dispatch.hpp"
#include "templates.hpp"

namespace fewfire {
namespace {

// Four lanes are what x86-64 and AArch64 have without asking.
struct Scalar {
    static constexpr int kWidth = 4;
    static std::uint32_t greater(const float* p, float bound) {
        return (p[0] > bound) | (p[1] > bound) << 1 | (p[2] > bound) << 2 | (p[3] > bound) << 3;
    }
};

// `offsets` serves as counts, then as cursors, so that nothing is allocated.
std::int64_t group_by_expert(const std::int64_t* ids, const std::uint8_t* kept, std::int64_t count,
                             std::int64_t num_experts, std::int64_t* order, std::int64_t* offsets) {
    std::fill(offsets, offsets + num_experts + 1, std::int64_t{0});
    for (std::int64_t a = 0; a < count; ++a) {
        if (kept != nullptr && kept[a] == 0) continue;
        if (ids[a] < 0 || ids[a] >= num_experts) return a;
        ++offsets[ids[a] + 1];
    }
    for (std::int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    for (std::int64_t a = 0; a < count; ++a) {
        if (kept == nullptr || kept[a] != 0) order[offsets[ids[a]]++] = a;
    }
    // Each cursor now stands where the next expert begins.
    std::copy_backward(offsets, offsets + num_experts, offsets + num_experts + 1);
    offsets[0] = 0;
    return count;
}

}  // namespace

void fill_scalar(Table& table) {
    fill_templates<Scalar>(table);
    table.group_by_expert = group_by_expert;
}

}  // namespace fewfire
