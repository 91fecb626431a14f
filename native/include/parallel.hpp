// Work over independent rows on several threads. The split never changes a result: each row is computed alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace fewfire {

// Calls body(begin, end) over disjoint parts of [0, rows), the last on this thread; fewer than `min_rows` a thread
// are not worth one (starting it takes some 30 us).
template <class Body>
void parallel_rows(std::int64_t rows, std::int64_t num_threads, std::int64_t min_rows, const Body& body) {
    const std::int64_t parts = std::clamp(rows / std::max<std::int64_t>(min_rows, 1), std::int64_t{1},
                                          std::max<std::int64_t>(num_threads, 1));
    std::vector<std::jthread> workers;
    workers.reserve(static_cast<std::size_t>(parts - 1));
    for (std::int64_t part = 0; part + 1 < parts; ++part) {
        workers.emplace_back([&body, rows, parts, part] { body(rows * part / parts, rows * (part + 1) / parts); });
    }
    body(rows * (parts - 1) / parts, rows);
}

}  // namespace fewfire
