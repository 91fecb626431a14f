// The kernels that every instruction set builds from the same source, entered into its table.
#pragma once

#include "dispatch.hpp"
#include "rows.hpp"
#include "swiglu.hpp"
#include "top_k.hpp"

namespace fewfire {
namespace {

template <class Simd>
void fill_templates(Table& table) {
    table.top_k_rows = top_k_rows<Simd>;
    table.swiglu_forward_f32 = swiglu_forward<Simd, float>;
    table.swiglu_forward_bf16 = swiglu_forward<Simd, bf16>;
    table.swiglu_backward_f32 = swiglu_backward<Simd, float>;
    table.swiglu_backward_bf16 = swiglu_backward<Simd, bf16>;
    table.sum_rows_f32 = sum_rows<Simd, float>;
    table.sum_rows_bf16 = sum_rows<Simd, bf16>;
}

}  // namespace
}  // namespace fewfire
