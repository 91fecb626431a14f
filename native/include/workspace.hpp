// The arrays that a step writes. They grow to the largest step and stay; the planner counts them (plan/memory.py).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "pool.hpp"
#include "quantized.hpp"

namespace fewfire {

// Distance between rows of `width` numbers: a multiple of 4096 bytes would put all rows of a column into one set of the
// processor's cache.
constexpr std::int64_t row_stride(std::int64_t width) {
    const std::int64_t rounded = (width + 15) / 16 * 16;
    return rounded % 512 == 0 ? rounded + 16 : rounded;
}

// Memory that grows without keeping its contents, aligned to 64 bytes, untouched until written.
template <class Element>
class Room {
public:
    Element* reserve(std::int64_t count) {
        if (count > count_) {
            memory_.reset();
            const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(Element) + 63) / 64 * 64;
            memory_.reset(static_cast<Element*>(::operator new(bytes, std::align_val_t{64})));
            count_ = count;
        }
        return memory_.get();
    }
    Element* data() const { return memory_.get(); }
    std::int64_t bytes() const { return count_ * static_cast<std::int64_t>(sizeof(Element)); }

private:
    struct Free {
        void operator()(Element* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<Element, Free> memory_;
    std::int64_t count_ = 0;
};

// Rows of numbers, `stride` apart, and what products take of them.
struct Rows {
    float* values = nullptr;
    std::int64_t stride = 0, columns = 0;
    Tiles tiles;

    operator Activations() const { return {values, stride, columns, nullptr, tiles}; }
    float* row(std::int64_t i) const { return values + i * stride; }
};

// Room for rows and their tiles.
class QuantizedRows {
public:
    Rows reserve(std::int64_t rows, std::int64_t columns) {
        const std::int64_t groups = groups_of(columns), stride = row_stride(columns);
        std::uint8_t* tiles = tiles_.reserve(rows * token_bytes(groups));
        return {values_.reserve(rows * stride), stride, columns, make_tiles(tiles, rows, groups)};
    }
    std::int64_t bytes() const { return values_.bytes() + tiles_.bytes(); }

    // Tiles of `count` tokens as this machine's kernels like them.
    static Tiles make_tiles(std::uint8_t* memory, std::int64_t count, std::int64_t groups);

private:
    Room<float> values_;
    Room<std::uint8_t> tiles_;
};

struct ExpertWorkspace {
    QuantizedRows hidden;
    Room<float> outs;
    std::vector<std::int32_t> starts, order, tokens, busy;

    std::int64_t bytes() const { return hidden.bytes() + outs.bytes() + static_cast<std::int64_t>((order.capacity() + tokens.capacity()) * 4); }
};

// Rows a thread takes at a time where each is small work.
inline std::int64_t row_grain(std::int64_t rows) { return std::max<std::int64_t>(1, (rows + 7) / 8); }

// Tiles [first, last) of `rows` from their values.
void quantize_tiles(const Rows& rows, std::int64_t first, std::int64_t last);

// All tiles, by all threads. `made` (row) makes a row's values first.
template <class Make>
void make_rows(const Rows& rows, std::int64_t num_threads, const Make& make) {
    Pool::shared().run(num_threads, rows.tiles.tiles, row_grain(rows.tiles.tiles), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = rows.tiles.begin(begin); t < rows.tiles.begin(end); ++t) make(t);
        quantize_tiles(rows, begin, end);
    });
}

// `linear` over blocks [begin, end) with the worker's own scratch, behind `extra` bytes of it (a multiple of 64).
void multiply(const Matrix& weight, std::int64_t begin, std::int64_t end, const Activations& acts, float* out,
              std::int64_t out_stride, int worker, std::size_t extra = 0);

// A worker's scratch: `extra` bytes, and room behind them for a product of `columns` and `tokens`.
std::uint8_t* worker_scratch(int worker, std::size_t extra, std::int64_t columns, std::int64_t tokens);

// Blocks a thread takes at a time: enough parts that no thread waits long for the last, few enough that the tokens, which
// each part lays out for itself, are not copied much oftener than needed; an even number, as blocks go in pairs.
std::int64_t block_grain(std::int64_t blocks, std::int64_t num_threads, std::int64_t tokens);

// Attention: how many jobs the queries of each of `heads` make, how many of all jobs a thread takes at a time, and a
// worker's room for one.
std::int64_t jobs_of(std::int64_t queries, std::int64_t heads, std::int64_t num_threads);
std::int64_t job_grain(std::int64_t jobs, std::int64_t num_threads);
float* job_room(const CacheShape& shape, int worker);

}  // namespace fewfire
