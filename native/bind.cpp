// The only file that knows Python. Arrays arrive as plain addresses: fewfire.kernels has validated shapes, dtypes and
// strides, and an integer argument costs a hundredth of a tensor. Nothing here checks them again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using fewfire::bf16;
using fewfire::Isa;
using fewfire::table;

constexpr std::array<std::pair<Isa, const char*>, 3> kIsaNames{
    {{Isa::kScalar, "scalar"}, {Isa::kAvx2, "avx2"}, {Isa::kAvx512, "avx512"}}};

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (const auto& [isa, name] : kIsaNames) {
        if (fewfire::is_supported(isa)) names.emplace_back(name);
    }
    return names;
}

std::string current_isa() { return kIsaNames[static_cast<std::size_t>(fewfire::current_isa())].second; }

void set_isa(const std::string& wanted) {
    for (const auto& [isa, name] : kIsaNames) {
        if (wanted == name && fewfire::set_isa(isa)) return;
    }
    throw nb::value_error(("isa (" + wanted + ") is not one this build and this processor support").c_str());
}

void top_k_rows(std::uintptr_t scores, std::int64_t rows, std::int64_t columns, std::int64_t k, std::uintptr_t ids,
                std::uintptr_t values) {
    table().top_k_rows(pointer<const float>(scores), rows, columns, k, pointer<std::int64_t>(ids),
                       pointer<float>(values));
}

std::int64_t group_by_expert(std::uintptr_t ids, std::uintptr_t kept, std::int64_t count, std::int64_t num_experts,
                             std::uintptr_t order, std::uintptr_t offsets) {
    return table().group_by_expert(pointer<const std::int64_t>(ids), pointer<const std::uint8_t>(kept), count,
                                   num_experts, pointer<std::int64_t>(order), pointer<std::int64_t>(offsets));
}

// A row of 512 elements takes about a microsecond.
constexpr std::int64_t kElementsPerThread = 1 << 18;

template <class T>
T* offset(T* base, std::int64_t count) {
    return base == nullptr ? nullptr : base + count;
}

void swiglu_forward(bool is_bf16, std::uintptr_t pre, std::uintptr_t weights, std::int64_t rows, std::int64_t width,
                    std::uintptr_t hidden, std::int64_t num_threads) {
    const auto call = [&]<class Element>(auto* kernel, Element*) {
        const auto part = [&](std::int64_t begin, std::int64_t end) {
            kernel(pointer<const Element>(pre) + begin * 2 * width, offset(pointer<const float>(weights), begin),
                   end - begin, width, pointer<Element>(hidden) + begin * width);
        };
        fewfire::parallel_rows(rows, num_threads, kElementsPerThread / std::max<std::int64_t>(width, 1), part);
    };
    if (is_bf16) return call(table().swiglu_forward_bf16, pointer<bf16>(0));
    call(table().swiglu_forward_f32, pointer<float>(0));
}

void swiglu_backward(bool is_bf16, std::uintptr_t grad_hidden, std::uintptr_t pre, std::uintptr_t weights,
                     std::int64_t rows, std::int64_t width, std::uintptr_t grad_pre, std::uintptr_t hidden,
                     std::uintptr_t grad_weights, std::int64_t num_threads) {
    const auto call = [&]<class Element>(auto* kernel, Element*) {
        const auto part = [&](std::int64_t begin, std::int64_t end) {
            kernel(pointer<const Element>(grad_hidden) + begin * width, pointer<const Element>(pre) + begin * 2 * width,
                   offset(pointer<const float>(weights), begin), end - begin, width,
                   pointer<Element>(grad_pre) + begin * 2 * width, pointer<Element>(hidden) + begin * width,
                   offset(pointer<float>(grad_weights), begin));
        };
        fewfire::parallel_rows(rows, num_threads, kElementsPerThread / std::max<std::int64_t>(width, 1), part);
    };
    if (is_bf16) return call(table().swiglu_backward_bf16, pointer<bf16>(0));
    call(table().swiglu_backward_f32, pointer<float>(0));
}

void sum_rows(bool is_bf16, std::uintptr_t rows, std::uintptr_t positions, std::int64_t count, std::int64_t slots,
              std::int64_t width, std::uintptr_t sums, std::int64_t num_threads) {
    const auto call = [&]<class Element>(auto* kernel, Element*) {
        const auto part = [&](std::int64_t begin, std::int64_t end) {
            kernel(pointer<const Element>(rows), pointer<const std::int64_t>(positions) + begin * slots, end - begin,
                   slots, width, pointer<float>(sums) + begin * width);
        };
        fewfire::parallel_rows(count, num_threads, kElementsPerThread / std::max<std::int64_t>(width * slots, 1), part);
    };
    if (is_bf16) return call(table().sum_rows_bf16, pointer<bf16>(0));
    call(table().sum_rows_f32, pointer<float>(0));
}

}  // namespace

NB_MODULE(_native, m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("supported_isas", &supported_isas);
    m.def("current_isa", &current_isa);
    m.def("set_isa", &set_isa, "name"_a);
    m.def("keep_freed_memory", &fewfire::keep_freed_memory);
    m.def("top_k_rows", &top_k_rows, unlocked);
    m.def("group_by_expert", &group_by_expert, unlocked);
    m.def("swiglu_forward", &swiglu_forward, unlocked);
    m.def("swiglu_backward", &swiglu_backward, unlocked);
    m.def("sum_rows", &sum_rows, unlocked);
}
