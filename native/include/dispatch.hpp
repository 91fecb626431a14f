// The one table of kernels: scalar versions always, overwritten by what the processor and the OS allow.
//
// Owns the contracts of all kernels and the choice of instruction set. Knows no Python.
// How to add a kernel: a pointer with its contract here, a template or function under include/, one line in each
// fill_*. How to add an instruction set: one file with its fill_*, one row in dispatch.cpp, one in CMakeLists.txt.
//
// An object compiled for AVX must export nothing but its fill_*: a shared inline function (std::sort, a template
// outside an anonymous namespace) could be the copy that the linker keeps for everyone, and an older processor would
// die of it. tools/symbols.py checks the built objects.
#pragma once

#include <cstdint>

#include "quantized.hpp"

namespace fewfire {

enum class Isa { kScalar, kAvx2, kAvx512 };

// All arrays are contiguous, row-major, owned by the caller, and do not overlap unless said. Sizes are in elements and
// may be 0. No kernel allocates, throws, or keeps a pointer; all may run on many threads at once over distinct outputs.
struct Table {
    // The k best of each of `rows` rows of `columns` scores, best first: ids and values, (rows, k) each.
    // Ties go to the lower id; NaN comes after every number. Requires 0 <= k <= columns.
    void (*top_k_rows)(const float* scores, std::int64_t rows, std::int64_t columns, std::int64_t k,
                       std::int64_t* ids, float* values);

    // Stable counting sort of `count` assignments by expert: `order` (count) receives positions, `offsets`
    // (num_experts + 1) where each expert's begin. `kept` (count, 0 or 1) may be null; what is not kept goes nowhere.
    // Returns the position of the first kept id outside [0, num_experts), or `count` when there is none; only then
    // are the outputs meaningful, and only order[0 .. offsets[num_experts]) is written.
    std::int64_t (*group_by_expert)(const std::int64_t* ids, const std::uint8_t* kept, std::int64_t count,
                                    std::int64_t num_experts, std::int64_t* order, std::int64_t* offsets);

    // hidden (rows, width) = silu(gate) * up * weight, where a row of `pre` (rows, 2 * width) is gate, then up, and
    // `weights` (rows) may be null for 1. bfloat16 is computed in float32 and rounded once, to nearest even.
    void (*swiglu_forward_f32)(const float* pre, const float* weights, std::int64_t rows, std::int64_t width,
                               float* hidden);
    void (*swiglu_forward_bf16)(const bf16* pre, const float* weights, std::int64_t rows, std::int64_t width,
                                bf16* hidden);

    // Given the gradient by hidden: grad_pre (rows, 2 * width), hidden again, and grad_weights (rows), which may be
    // null. A row's grad_weights is summed in a fixed order that depends on width and vector length only.
    void (*swiglu_backward_f32)(const float* grad_hidden, const float* pre, const float* weights, std::int64_t rows,
                                std::int64_t width, float* grad_pre, float* hidden, float* grad_weights);
    void (*swiglu_backward_bf16)(const bf16* grad_hidden, const bf16* pre, const float* weights, std::int64_t rows,
                                 std::int64_t width, bf16* grad_pre, bf16* hidden, float* grad_weights);

    // sums (count, width): row t is the sum of the `slots` rows that positions (count, slots) names, in slot order;
    // a negative position adds nothing. Sums are float32.
    void (*sum_rows_f32)(const float* rows, const std::int64_t* positions, std::int64_t count, std::int64_t slots,
                         std::int64_t width, float* sums);
    void (*sum_rows_bf16)(const bf16* rows, const std::int64_t* positions, std::int64_t count, std::int64_t slots,
                          std::int64_t width, float* sums);

    // CRC-32C of `count` bytes on top of `before` (0 at first).
    std::uint32_t (*crc32c)(std::uint32_t before, const std::uint8_t* bytes, std::int64_t count);

    QuantizedTable quantized;
};

void fill_scalar(Table& table);
void fill_avx2(Table& table);
void fill_avx512(Table& table);

// Whether this build has the instruction set and this processor and OS can run it.
bool is_supported(Isa isa);

// The kernels in use: the best supported set, until `set_isa` chooses another. Both may be called from any thread.
const Table& table();
Isa current_isa();

// Returns false, and changes nothing, if the set is not supported.
bool set_isa(Isa isa);

}  // namespace fewfire
