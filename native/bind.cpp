// The only file that knows Python. Arrays arrive as plain addresses: fewfire.kernels has validated shapes, dtypes and
// strides, and an integer argument costs a hundredth of a tensor. Nothing here checks them again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "dispatch.hpp"
#include "engine.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pool.hpp"

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

fewfire::Matrix matrix(int format, std::uintptr_t codes, std::uintptr_t scales, std::int64_t rows, std::int64_t columns) {
    return {pointer<const std::uint8_t>(codes), pointer<const std::uint8_t>(scales), rows, columns,
            static_cast<fewfire::WeightFormat>(format)};
}

void quantize_rows(std::uintptr_t values, std::int64_t rows, std::int64_t columns, std::uintptr_t codes,
                   std::uintptr_t scales, std::uintptr_t sums) {
    const fewfire::Activations acts{pointer<float>(values), pointer<std::int8_t>(codes), pointer<float>(scales),
                                    pointer<std::int32_t>(sums), columns, columns};
    table().quantized.quantize_rows(acts, 0, rows);
}

void linear(int format, std::uintptr_t codes, std::uintptr_t scales, std::int64_t rows, std::int64_t columns,
            std::uintptr_t values, std::uintptr_t act_codes, std::uintptr_t act_scales, std::uintptr_t sums,
            std::int64_t tokens, std::uintptr_t out, std::int64_t num_threads) {
    const fewfire::Activations acts{pointer<float>(values), pointer<std::int8_t>(act_codes), pointer<float>(act_scales),
                                    pointer<std::int32_t>(sums), columns, columns};
    const fewfire::Matrix weight = matrix(format, codes, scales, rows, columns);
    const auto scratch_bytes = static_cast<std::size_t>(fewfire::linear_scratch(columns, tokens));
    const std::int64_t parts = 4 * (num_threads > 0 ? num_threads : fewfire::Pool::shared().size());
    const std::int64_t grain = (weight.blocks() + parts - 1) / parts;
    fewfire::Pool::shared().run(num_threads, weight.blocks(), grain, [&](std::int64_t begin, std::int64_t end, int worker) {
        table().quantized.linear(weight, begin, end, acts, nullptr, tokens, pointer<float>(out), rows,
                                 fewfire::Pool::shared().scratch(worker, scratch_bytes));
    });
}

// Operations of `num_threads` threads that multiply bytes, `rounds` of 12 vectors of 64 each.
std::int64_t probe_int8(std::int64_t rounds, std::int64_t num_threads) {
    std::atomic<std::int64_t> total{0};
    std::atomic<std::int32_t> used{0};
    fewfire::Pool::shared().run(num_threads, num_threads, 1, [&](std::int64_t, std::int64_t, int) {
        std::int32_t result = 0;
        total += table().quantized.multiply_bytes_forever(rounds, &result);
        used += result;
    });
    return total;
}

// Reads `count` bytes once, each thread a part of its own; the sum only keeps the reads.
std::int64_t probe_read(std::uintptr_t bytes, std::int64_t count, std::int64_t num_threads) {
    std::atomic<std::int64_t> sum{0};
    const std::int64_t part = count / (num_threads * 4) / 256 * 256;
    fewfire::Pool::shared().run(num_threads, num_threads * 4, 1, [&](std::int64_t begin, std::int64_t, int) {
        sum += table().quantized.read_bytes(pointer<const std::uint8_t>(bytes) + begin * part, part);
    });
    return sum;
}

// A matrix is (format, codes, scales, rows, columns), or None.
fewfire::Matrix matrix_of(nb::handle made) {
    if (made.is_none()) return {};
    const auto [format, codes, scales, rows, columns] =
        nb::cast<std::tuple<int, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>>(made);
    return matrix(format, codes, scales, rows, columns);
}

const float* floats(const nb::dict& from, const char* name) {
    return pointer<const float>(nb::cast<std::uintptr_t>(from[name]));
}

template <class T>
T value(const nb::dict& from, const char* name) {
    return nb::cast<T>(from[name]);
}

fewfire::FeedForwardSpec feed_forward_of(const nb::dict& from) {
    return {matrix_of(from["gate"]), matrix_of(from["up"]), matrix_of(from["down"]),
            static_cast<fewfire::HiddenActivation>(value<int>(from, "activation"))};
}

fewfire::AttentionSpec attention_of(const nb::dict& from) {
    fewfire::AttentionSpec spec;
    spec.query = matrix_of(from["query"]), spec.key = matrix_of(from["key"]);
    spec.value = matrix_of(from["value"]), spec.out = matrix_of(from["out"]);
    spec.query_bias = floats(from, "query_bias"), spec.key_bias = floats(from, "key_bias");
    spec.value_bias = floats(from, "value_bias"), spec.out_bias = floats(from, "out_bias");
    spec.query_norm = floats(from, "query_norm"), spec.key_norm = floats(from, "key_norm");
    spec.sinks = floats(from, "sinks"), spec.cos = floats(from, "cos"), spec.sin = floats(from, "sin");
    spec.norm_is_full = value<bool>(from, "norm_is_full");
    spec.num_heads = value<std::int64_t>(from, "num_heads");
    spec.num_kv_heads = value<std::int64_t>(from, "num_kv_heads");
    spec.head_dim = value<std::int64_t>(from, "head_dim"), spec.window = value<std::int64_t>(from, "window");
    spec.rope_dim = value<std::int64_t>(from, "rope_dim");
    spec.rope_is_interleaved = value<bool>(from, "rope_is_interleaved");
    spec.scale = value<float>(from, "scale"), spec.clip = value<float>(from, "clip");
    return spec;
}

fewfire::MoeSpec moe_of(const nb::dict& from) {
    fewfire::MoeSpec spec;
    spec.router = matrix_of(from["router"]);
    spec.router_bias = floats(from, "router_bias"), spec.select_bias = floats(from, "select_bias");
    spec.top_k = value<std::int64_t>(from, "top_k");
    spec.score = static_cast<fewfire::RouterScore>(value<int>(from, "score"));
    spec.renormalize = value<bool>(from, "renormalize");
    spec.renormalize_eps = value<float>(from, "renormalize_eps"), spec.scale = value<float>(from, "scale");
    for (nb::handle expert : nb::cast<nb::list>(from["experts"])) {
        spec.experts.push_back(feed_forward_of(nb::cast<nb::dict>(expert)));
    }
    spec.num_experts = static_cast<std::int64_t>(spec.experts.size());
    spec.has_shared = !from["shared"].is_none();
    if (spec.has_shared) spec.shared = feed_forward_of(nb::cast<nb::dict>(from["shared"]));
    spec.shared_gate = matrix_of(from["shared_gate"]);
    return spec;
}

fewfire::ModelSpec model_of(const nb::dict& from) {
    fewfire::ModelSpec spec;
    spec.model_dim = value<std::int64_t>(from, "model_dim"), spec.vocab_size = value<std::int64_t>(from, "vocab_size");
    spec.eps = value<float>(from, "eps"), spec.embed_scale = value<float>(from, "embed_scale");
    spec.logit_scale = value<float>(from, "logit_scale"), spec.residual_scale = value<float>(from, "residual_scale");
    spec.embed = matrix_of(from["embed"]), spec.head = matrix_of(from["head"]), spec.norm = floats(from, "norm");
    for (nb::handle each : nb::cast<nb::list>(from["layers"])) {
        const auto layer = nb::cast<nb::dict>(each);
        fewfire::LayerSpec made;
        made.attention_norm = floats(layer, "attention_norm"), made.ffn_norm = floats(layer, "ffn_norm");
        made.attention = attention_of(nb::cast<nb::dict>(layer["attention"]));
        made.is_moe = layer["dense"].is_none();
        if (made.is_moe) {
            made.moe = moe_of(nb::cast<nb::dict>(layer["moe"]));
        } else {
            made.dense = feed_forward_of(nb::cast<nb::dict>(layer["dense"]));
        }
        spec.layers.push_back(std::move(made));
    }
    return spec;
}

void step(fewfire::Engine& engine, std::uintptr_t ids, std::uintptr_t positions, std::uintptr_t page_starts,
          std::uintptr_t pages, std::int64_t count, std::uintptr_t hidden, std::uintptr_t routes,
          std::uintptr_t route_weights, std::uintptr_t route_logits, std::int64_t num_threads) {
    const fewfire::Routes made{pointer<std::int32_t>(routes), pointer<float>(route_weights),
                               pointer<float>(route_logits)};
    engine.step(pointer<const std::int64_t>(ids), pointer<const std::int64_t>(positions),
                pointer<const std::int64_t>(page_starts), pointer<bf16* const>(pages), count, pointer<float>(hidden),
                made, num_threads);
}

void head(fewfire::Engine& engine, std::uintptr_t hidden, std::int64_t count, std::uintptr_t logits,
          std::int64_t num_threads) {
    engine.head(pointer<float>(hidden), count, pointer<float>(logits), num_threads);
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
    m.def("quantize_rows", &quantize_rows, unlocked);
    m.def("linear", &linear, unlocked);
    m.def("probe_int8", &probe_int8, unlocked);
    m.def("probe_read", &probe_read, unlocked);
    nb::class_<fewfire::Engine>(m, "Engine")
        .def("__init__", [](fewfire::Engine* self, const nb::dict& spec) { new (self) fewfire::Engine(model_of(spec)); })
        .def_prop_ro("page_elements", &fewfire::Engine::page_elements)
        .def("step", &step, unlocked)
        .def("head", &head, unlocked);
}
