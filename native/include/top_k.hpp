// Top-k of rows: a short list is kept sorted by insertion, a long one as a heap; a whole vector of scores is skipped
// when none beats the k-th.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp).
// `Simd` gives kWidth and `greater(p, bound)`, a bit mask of which of p[0 .. kWidth) exceed `bound` (NaN: 0).
#pragma once

#include <cstdint>

namespace fewfire {
namespace {

constexpr std::int64_t kLongestList = 32;

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

// Lets (score, id) sink from `slot` of a heap of `length`, in which the entry that comes last is the root.
inline void sink_score(float score, std::int64_t id, std::int64_t slot, std::int64_t length, std::int64_t* ids,
                       float* values) {
    const auto comes_after = [&](std::int64_t a, float value, std::int64_t other) {
        return is_better(value, values[a]) || (!is_better(values[a], value) && ids[a] > other);
    };
    for (std::int64_t child = 2 * slot + 1; child < length; child = 2 * slot + 1) {
        if (child + 1 < length && comes_after(child + 1, values[child], ids[child])) ++child;
        if (!comes_after(child, score, id)) break;
        values[slot] = values[child];
        ids[slot] = ids[child];
        slot = child;
    }
    values[slot] = score;
    ids[slot] = id;
}

// Calls accept(id) for those of scores[first .. columns) that beat `worst`, which accept may raise. In order of id, so
// that of equal ones the lower is in first.
template <class Simd, class Accept>
void scan_scores(const float* scores, std::int64_t first, std::int64_t columns, const float& worst, Accept accept) {
    std::int64_t id = first;
    const auto offer = [&](std::int64_t candidate) {
        if (is_better(scores[candidate], worst)) accept(candidate);
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
void top_k_by_insertion(const float* scores, std::int64_t columns, std::int64_t k, std::int64_t* ids, float* values) {
    for (std::int64_t id = 0; id < k; ++id) insert_score(scores[id], id, id + 1, ids, values);
    scan_scores<Simd>(scores, k, columns, values[k - 1],
                      [&](std::int64_t id) { insert_score(scores[id], id, k, ids, values); });
}

template <class Simd>
void top_k_by_heap(const float* scores, std::int64_t columns, std::int64_t k, std::int64_t* ids, float* values) {
    for (std::int64_t id = 0; id < k; ++id) {
        values[id] = scores[id];
        ids[id] = id;
    }
    for (std::int64_t slot = k / 2; slot-- > 0;) sink_score(values[slot], ids[slot], slot, k, ids, values);
    scan_scores<Simd>(scores, k, columns, values[0],
                      [&](std::int64_t id) { sink_score(scores[id], id, 0, k, ids, values); });
    for (std::int64_t last = k - 1; last > 0; --last) {
        const float value = values[last];
        const std::int64_t id = ids[last];
        values[last] = values[0];
        ids[last] = ids[0];
        sink_score(value, id, 0, last, ids, values);
    }
}

template <class Simd>
void top_k_rows(const float* scores, std::int64_t rows, std::int64_t columns, std::int64_t k, std::int64_t* ids,
                float* values) {
    if (k == 0) return;
    const auto top_k_row = k <= kLongestList ? top_k_by_insertion<Simd> : top_k_by_heap<Simd>;
    for (std::int64_t row = 0; row < rows; ++row) {
        top_k_row(scores + row * columns, columns, k, ids + row * k, values + row * k);
    }
}

}  // namespace
}  // namespace fewfire
