// Top-k of rows by insertion into a short sorted list; a whole vector is skipped when none beats the k-th.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
// `Simd` gives kWidth and `greater(p, bound)`, a bit mask of which of p[0 .. kWidth) exceed `bound` (NaN: 0).
#pragma once

#include <cstdint>

namespace fewfire {
namespace {

inline bool is_better(float a, float b) { return a > b || (b != b && a == a); }

// Puts (score, id) where it belongs in the sorted list of `length`, whose last entry may fall off. Equal scores stay
// before it: they have lower ids.
inline void insert_score(float score, std::int64_t id, std::int64_t length, std::int64_t* ids, float* values) {
    std::int64_t slot = length - 1;
    for (; slot > 0 && is_better(score, values[slot - 1]); --slot) {
        values[slot] = values[slot - 1];
        ids[slot] = ids[slot - 1];
    }
    values[slot] = score;
    ids[slot] = id;
}

template <class Simd>
void top_k_row(const float* scores, std::int64_t columns, std::int64_t k, std::int64_t* ids, float* values) {
    std::int64_t id = 0;
    for (; id < k; ++id) insert_score(scores[id], id, id + 1, ids, values);
    const float& worst = values[k - 1];
    const auto offer = [&](std::int64_t candidate) {
        if (is_better(scores[candidate], worst)) insert_score(scores[candidate], candidate, k, ids, values);
    };
    // A NaN among the k best makes every comparison with it false: go one by one until it has been displaced.
    for (; id < columns && worst != worst; ++id) offer(id);
    for (; id + Simd::kWidth <= columns; id += Simd::kWidth) {
        for (std::uint32_t mask = Simd::greater(scores + id, worst); mask != 0; mask &= mask - 1) {
            offer(id + __builtin_ctz(mask));
        }
    }
    for (; id < columns; ++id) offer(id);
}

template <class Simd>
void top_k_rows(const float* scores, std::int64_t rows, std::int64_t columns, std::int64_t k, std::int64_t* ids,
                float* values) {
    if (k == 0) return;
    for (std::int64_t row = 0; row < rows; ++row) {
        top_k_row<Simd>(scores + row * columns, columns, k, ids + row * k, values + row * k);
    }
}

}  // namespace
}  // namespace fewfire
