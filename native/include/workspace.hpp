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

// Rows of numbers with room for their codes.
class QuantizedRows {
public:
    Activations reserve(std::int64_t rows, std::int64_t columns) {
        const std::int64_t groups = (columns + kGroup - 1) / kGroup, stride = row_stride(columns);
        return {values_.reserve(rows * stride), codes_.reserve(rows * groups * kGroup), scales_.reserve(rows * groups),
                sums_.reserve(rows * groups * kSums), columns, stride};
    }
    std::int64_t bytes() const { return values_.bytes() + codes_.bytes() + scales_.bytes() + sums_.bytes(); }

private:
    Room<float> values_;
    Room<std::int8_t> codes_;
    Room<float> scales_;
    Room<std::int32_t> sums_;
};

struct ExpertWorkspace {
    QuantizedRows hidden;
    Room<float> outs;
    std::vector<std::int32_t> starts, order, tokens, busy;

    std::int64_t bytes() const { return hidden.bytes() + outs.bytes() + static_cast<std::int64_t>((order.capacity() + tokens.capacity()) * 4); }
};

// Quantizes all rows, several a thread where there are many.
void quantize_all(const Activations& acts, std::int64_t rows, std::int64_t num_threads);

// `linear` over blocks [begin, end) with the worker's own scratch, behind `extra` bytes of it (a multiple of 64).
void multiply(const Matrix& weight, std::int64_t begin, std::int64_t end, const Activations& acts,
              const std::int32_t* tokens, std::int64_t count, float* out, std::int64_t out_stride, int worker,
              std::size_t extra = 0);

// The first `extra` bytes of a worker's scratch, with room behind them for a product of `columns` and `tokens`.
std::uint8_t* worker_scratch(int worker, std::size_t extra, std::int64_t columns, std::int64_t tokens);

// Blocks a thread takes at a time: enough parts that no thread waits long for the last, few enough that the tokens, which
// each part lays out for itself, are not copied much oftener than needed; an even number, as blocks go in pairs.
std::int64_t block_grain(std::int64_t blocks, std::int64_t num_threads, std::int64_t tokens);

// Rows a thread takes at a time where each is small work.
inline std::int64_t row_grain(std::int64_t rows) { return std::max<std::int64_t>(1, (rows + 7) / 8); }

}  // namespace fewfire
