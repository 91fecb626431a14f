// The only file that knows Python. Arrays arrive as plain addresses: fewfire.kernels has validated shapes, dtypes and
// strides, and an integer argument costs a hundredth of a tensor. Nothing here checks them again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "checksum_join.hpp"
#include "dispatch.hpp"
#include "engine.hpp"
#include "experts.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "pool.hpp"
#include "reading.hpp"
#include "store.hpp"
#include "workspace.hpp"

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

// Row after row: codes (rows, groups * 128), scales (rows, groups) and, of each row, the sums of each 128 codes, each 32,
// each 16 (rows, groups * 13); `high` (rows, groups * 128), of zeros, gets the high parts of wide codes.
void quantize_rows(std::uintptr_t values, std::int64_t rows, std::int64_t columns, std::uintptr_t codes,
                   std::uintptr_t high, std::uintptr_t scales, std::uintptr_t sums) {
    const std::int64_t groups = fewfire::groups_of(columns);
    std::vector<std::uint8_t> room(static_cast<std::size_t>(fewfire::token_bytes(groups)));
    for (std::int64_t r = 0; r < rows; ++r) {
        const fewfire::Tiles tile(room.data(), 1, groups, 1);
        table().quantized.quantize(pointer<const float>(values) + r * columns, columns, columns, tile, {0, 1, 0, groups});
        const std::uint8_t* from = room.data();
        std::memcpy(pointer<std::int8_t>(codes) + r * groups * fewfire::kGroup, from, static_cast<std::size_t>(groups * fewfire::kGroup));
        from += groups * fewfire::kGroup;
        std::memcpy(pointer<float>(scales) + r * groups, from, static_cast<std::size_t>(groups * 4));
        std::memcpy(pointer<std::int32_t>(sums) + r * groups * 13, from + groups * 4, static_cast<std::size_t>(groups * 13 * 4));
        from += groups * 14 * 4;
        for (std::int64_t g = 0; g < groups; ++g) {
            std::int32_t quad;
            std::memcpy(&quad, from + (groups + g) * 4, 4);
            std::memcpy(pointer<std::int8_t>(high) + (r * groups + g) * fewfire::kGroup + 4 * quad, from + g * 4, 4);
        }
    }
}

// out (tokens, rows) = the weight times rows of values.
void linear(int format, std::uintptr_t codes, std::uintptr_t scales, std::int64_t rows, std::int64_t columns,
            std::uintptr_t values, std::int64_t tokens, std::uintptr_t out, std::int64_t num_threads) {
    const fewfire::Matrix weight = matrix(format, codes, scales, rows, columns);
    fewfire::Room<std::uint8_t> room;
    const std::int64_t groups = fewfire::groups_of(columns);
    std::uint8_t* memory = room.reserve(std::max<std::int64_t>(1, tokens * fewfire::token_bytes(groups)));
    const fewfire::Rows acts{pointer<float>(values), columns, columns,
                             fewfire::QuantizedRows::make_tiles(memory, tokens, groups)};
    fewfire::make_rows(acts, num_threads, [](std::int64_t) {});
    const std::int64_t grain = fewfire::block_grain(weight.blocks(), num_threads, tokens);
    fewfire::Pool::shared().run(num_threads, weight.blocks(), grain, [&](std::int64_t begin, std::int64_t end, int worker) {
        fewfire::multiply(weight, begin, end, acts, pointer<float>(out), rows, worker);
    });
}

// Row `row` of a weight as float32.
void read_row(int format, std::uintptr_t codes, std::uintptr_t scales, std::int64_t rows, std::int64_t columns,
              std::int64_t row, std::uintptr_t out) {
    table().quantized.read_row(matrix(format, codes, scales, rows, columns), row, pointer<float>(out));
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

// The same in float32: multiplications and additions.
std::int64_t probe_float(std::int64_t rounds, std::int64_t num_threads) {
    std::atomic<std::int64_t> total{0};
    fewfire::Pool::shared().run(num_threads, num_threads, 1, [&](std::int64_t, std::int64_t, int) {
        float result = 0;
        total += table().quantized.multiply_floats_forever(rounds, &result);
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

std::uint32_t crc32c(std::uint32_t before, std::uintptr_t bytes, std::int64_t count) {
    return table().crc32c(before, pointer<const std::uint8_t>(bytes), count);
}

// (bytes read, errno).
std::tuple<std::int64_t, int> read_plain(int file, std::int64_t offset, std::int64_t count, std::uintptr_t to) {
    const fewfire::ReadResult made = fewfire::read_record(file, offset, count, pointer<std::uint8_t>(to), false);
    return {made.done, made.error};
}

// (bytes read, errno, checksum).
std::tuple<std::int64_t, int, std::uint32_t> read_checked(int file, std::int64_t offset, std::int64_t count,
                                                          std::uintptr_t to, std::uint32_t checksum) {
    const fewfire::ReadResult made = fewfire::read_checked(file, offset, count, pointer<std::uint8_t>(to), checksum);
    return {made.done, made.error, made.checksum};
}

// ------------------------------------------------------------------------------------------------ specifications
// A matrix is (format, codes, scales, rows, columns), or None; a vector an address; what a layer has not is None.

fewfire::Matrix matrix_of(nb::handle made) {
    if (made.is_none()) return {};
    const auto [format, codes, scales, rows, columns] =
        nb::cast<std::tuple<int, std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t>>(made);
    return matrix(format, codes, scales, rows, columns);
}

// What a dict says under a name.
class Fields {
public:
    explicit Fields(nb::handle from) : from_(nb::cast<nb::dict>(from)) {}

    bool has(const char* name) const { return !from_[name].is_none(); }
    nb::object at(const char* name) const { return nb::object(from_[name]); }
    Fields fields(const char* name) const { return Fields(at(name)); }
    template <class T>
    T value(const char* name) const {
        return nb::cast<T>(from_[name]);
    }
    std::int64_t count(const char* name) const { return value<std::int64_t>(name); }
    float number(const char* name) const { return value<float>(name); }
    bool flag(const char* name) const { return value<bool>(name); }
    fewfire::Matrix matrix(const char* name) const { return matrix_of(at(name)); }
    const float* floats(const char* name) const { return pointer<const float>(value<std::uintptr_t>(name)); }

private:
    nb::dict from_;
};

fewfire::NormSpec norm_of(nb::handle made) {
    if (made.is_none()) return {};
    const Fields from(made);
    return {from.floats("weight"), from.floats("bias"), from.flag("is_layer"), true, from.number("eps")};
}

fewfire::RopeSpec rope_of(const Fields& from) {
    return {from.floats("cos"), from.floats("sin"), from.count("dim"), from.flag("is_interleaved")};
}

fewfire::FeedForwardSpec feed_forward_of(const Fields& from) {
    return {from.matrix("gate"), from.matrix("up"), from.matrix("down"), from.floats("gate_bias"),
            from.floats("up_bias"), from.floats("down_bias"),
            static_cast<fewfire::HiddenActivation>(from.value<int>("activation")), from.number("alpha"), from.number("limit")};
}

fewfire::AttentionSpec attention_of(const Fields& from) {
    fewfire::AttentionSpec spec;
    spec.query = from.matrix("query"), spec.key = from.matrix("key");
    spec.value = from.matrix("value"), spec.out = from.matrix("out");
    spec.query_bias = from.floats("query_bias"), spec.key_bias = from.floats("key_bias");
    spec.value_bias = from.floats("value_bias"), spec.out_bias = from.floats("out_bias");
    spec.head_norm = static_cast<fewfire::HeadNorm>(from.value<int>("head_norm"));
    spec.query_norm = norm_of(from.at("query_norm")), spec.key_norm = norm_of(from.at("key_norm"));
    spec.sinks = from.floats("sinks");
    spec.rope = rope_of(from.fields("rope"));
    spec.num_heads = from.count("num_heads"), spec.num_kv_heads = from.count("num_kv_heads");
    spec.head_dim = from.count("head_dim");
    spec.window = from.count("window"), spec.chunk = from.count("chunk");
    spec.has_output_gate = from.flag("has_output_gate");
    spec.scale = from.number("scale"), spec.clip = from.number("clip"), spec.cap = from.number("cap");
    spec.temperature = from.number("temperature"), spec.temperature_floor = from.number("temperature_floor");
    return spec;
}

fewfire::IndexerSpec indexer_of(const Fields& from) {
    fewfire::IndexerSpec spec;
    spec.is_present = true, spec.is_shared = from.flag("is_shared");
    spec.query_up = from.matrix("query_up"), spec.key = from.matrix("key");
    spec.head_weights = from.matrix("head_weights"), spec.key_norm = norm_of(from.at("key_norm"));
    spec.num_heads = from.count("num_heads"), spec.head_dim = from.count("head_dim"), spec.top_k = from.count("top_k");
    spec.is_interleaved = from.flag("is_interleaved");
    return spec;
}

fewfire::LatentSpec latent_of(const Fields& from) {
    fewfire::LatentSpec spec;
    spec.query = from.matrix("query"), spec.query_down = from.matrix("query_down");
    spec.query_up = from.matrix("query_up"), spec.kv_down = from.matrix("kv_down");
    spec.kv_up = from.matrix("kv_up"), spec.out = from.matrix("out");
    spec.query_norm = norm_of(from.at("query_norm")), spec.kv_norm = norm_of(from.at("kv_norm"));
    spec.query_down_bias = from.floats("query_down_bias"), spec.kv_down_bias = from.floats("kv_down_bias");
    spec.out_bias = from.floats("out_bias");
    spec.rope = rope_of(from.fields("rope"));
    if (from.has("indexer")) spec.indexer = indexer_of(from.fields("indexer"));
    spec.num_heads = from.count("num_heads"), spec.kv_rank = from.count("kv_rank");
    spec.nope_dim = from.count("nope_dim"), spec.rope_dim = from.count("rope_dim");
    spec.value_dim = from.count("value_dim"), spec.scale = from.number("scale");
    return spec;
}

fewfire::RouterSpec router_of(const Fields& from) {
    fewfire::RouterSpec spec;
    spec.weight = from.matrix("weight");
    spec.bias = from.floats("bias"), spec.select_bias = from.floats("select_bias");
    spec.num_experts = from.count("num_experts"), spec.top_k = from.count("top_k");
    spec.score = static_cast<fewfire::RouterScore>(from.value<int>("score"));
    spec.renormalize = from.flag("renormalize"), spec.is_input_weighted = from.flag("is_input_weighted");
    spec.renormalize_eps = from.number("renormalize_eps");
    spec.scale = from.number("scale"), spec.jitter = from.number("jitter");
    spec.num_groups = from.count("num_groups"), spec.top_groups = from.count("top_groups");
    spec.groups_by_max = from.flag("groups_by_max");
    return spec;
}

// (format, codes offset, scales offset, rows, columns), or None.
fewfire::ExpertLayout::Part part_of(nb::handle made) {
    if (made.is_none()) return {};
    const auto [format, codes, scales, rows, columns] =
        nb::cast<std::tuple<int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>>(made);
    return {codes, scales, rows, columns, static_cast<fewfire::WeightFormat>(format)};
}

// (format, offset, size), or None.
fewfire::RecordVector record_vector_of(nb::handle made) {
    if (made.is_none()) return {};
    const auto [format, offset, size] = nb::cast<std::tuple<int, std::int64_t, std::int64_t>>(made);
    return {offset, size, static_cast<fewfire::WeightFormat>(format)};
}

fewfire::ExpertLayout layout_of(const Fields& from) {
    fewfire::ExpertLayout layout;
    layout.gate = part_of(from.at("gate")), layout.up = part_of(from.at("up")), layout.down = part_of(from.at("down"));
    layout.gate_bias = record_vector_of(from.at("gate_bias")), layout.up_bias = record_vector_of(from.at("up_bias"));
    layout.down_bias = record_vector_of(from.at("down_bias"));
    layout.activation = static_cast<fewfire::HiddenActivation>(from.value<int>("activation"));
    layout.alpha = from.number("alpha"), layout.limit = from.number("limit");
    layout.record_bytes = from.count("record_bytes"), layout.num_experts = from.count("num_experts");
    return layout;
}

fewfire::MoeSpec moe_of(const Fields& from) {
    fewfire::MoeSpec spec;
    spec.router = router_of(from.fields("router"));
    spec.experts = layout_of(from.fields("experts"));
    spec.has_shared = from.has("shared");
    if (spec.has_shared) spec.shared = feed_forward_of(from.fields("shared"));
    spec.shared_gate = from.matrix("shared_gate");
    return spec;
}

fewfire::LayerSpec layer_of(const Fields& from) {
    fewfire::LayerSpec spec;
    spec.attention_norm = norm_of(from.at("attention_norm")), spec.ffn_norm = norm_of(from.at("ffn_norm"));
    spec.attention_post_norm = norm_of(from.at("attention_post_norm"));
    spec.ffn_post_norm = norm_of(from.at("ffn_post_norm"));
    spec.is_latent = from.has("latent"), spec.is_moe = from.has("moe");
    if (spec.is_latent) {
        spec.latent = latent_of(from.fields("latent"));
    } else {
        spec.attention = attention_of(from.fields("attention"));
    }
    if (spec.is_moe) {
        spec.moe = moe_of(from.fields("moe"));
    } else {
        spec.dense = feed_forward_of(from.fields("dense"));
    }
    return spec;
}

fewfire::RowFile row_file_of(nb::handle made) {
    if (made.is_none()) return {};
    const Fields from(made);
    return {from.value<int>("file"), from.count("codes"), from.count("code_bytes"), from.count("scales"), from.count("scale_bytes"),
            from.count("block_rows"), pointer<const std::uint32_t>(from.value<std::uintptr_t>("checksums"))};
}

fewfire::ModelSpec model_of(const Fields& from) {
    fewfire::ModelSpec spec;
    spec.model_dim = from.count("model_dim"), spec.vocab_size = from.count("vocab_size");
    spec.embed_scale = from.number("embed_scale"), spec.logit_scale = from.number("logit_scale");
    spec.residual_scale = from.number("residual_scale");
    spec.embed = from.matrix("embed"), spec.positions = from.matrix("positions"), spec.head = from.matrix("head");
    spec.embed_file = row_file_of(from.at("embed_file"));
    spec.head_bias = from.floats("head_bias"), spec.norm = norm_of(from.at("norm"));
    spec.cache = static_cast<fewfire::CacheFormat>(from.value<int>("cache"));
    for (nb::handle layer : nb::cast<nb::list>(from.at("layers"))) spec.layers.push_back(layer_of(Fields(layer)));
    return spec;
}

void step(fewfire::Engine& engine, std::uintptr_t ids, std::uintptr_t positions, std::uintptr_t page_starts,
          std::uintptr_t pages, std::int64_t count, std::uintptr_t hidden, const std::array<std::uintptr_t, 5>& routes,
          std::int64_t num_threads) {
    const fewfire::Tokens tokens{pointer<const std::int64_t>(ids), pointer<const std::int64_t>(positions),
                                 pointer<const std::int64_t>(page_starts), pointer<std::uint8_t* const>(pages), count};
    const fewfire::Routes made{pointer<std::int32_t>(routes[0]), pointer<float>(routes[1]), pointer<float>(routes[2]),
                               pointer<const std::int32_t>(routes[3]), pointer<const float>(routes[4])};
    engine.step(tokens, pointer<float>(hidden), made, num_threads);
}

// offset, record bytes, experts, late offset, late bytes
using RecordLayers = std::vector<std::array<std::int64_t, 5>>;

std::vector<fewfire::RecordLayer> layers_of(const RecordLayers& layers) {
    std::vector<fewfire::RecordLayer> made;
    for (const auto& [offset, bytes, count, late, late_bytes] : layers) made.push_back({offset, bytes, count, late, late_bytes});
    return made;
}

void head(fewfire::Engine& engine, std::uintptr_t hidden, std::int64_t count, std::uintptr_t logits,
          std::int64_t num_threads) {
    engine.head(pointer<float>(hidden), count, pointer<float>(logits), num_threads);
}

// `lows`: the layouts of the copies in low precision, or nothing.
void set_lossy(fewfire::Engine& engine, float prefer_cached, float top_p, const std::vector<nb::dict>& lows) {
    std::vector<fewfire::ExpertLayout> layouts;
    for (const nb::dict& low : lows) layouts.push_back(layout_of(Fields(low)));
    const fewfire::LossyModes modes{prefer_cached, top_p, !layouts.empty()};
    engine.set_lossy(modes, std::move(layouts));
}

// ------------------------------------------------------------------------------------------------------ the store

fewfire::StoreSettings settings_of(const Fields& from) {
    fewfire::StoreSettings to;
    to.file = from.value<int>("file");
    to.drops_cache = from.flag("drops_cache");
    to.always_verifies = from.flag("always_verifies"), to.num_readers = from.value<int>("num_readers");
    to.capacity = from.count("capacity");
    to.memory = pointer<std::uint8_t>(from.value<std::uintptr_t>("memory")), to.slot_bytes = from.count("slot_bytes");
    to.touched_bytes = from.count("touched_bytes");
    to.policy = static_cast<fewfire::CachePolicy>(from.value<int>("policy")), to.looks_ahead = from.flag("looks_ahead");
    return to;
}

using Counts = std::array<std::int64_t, 4>;  // hits, misses, useful and wasted prefetches

std::vector<Counts> layer_counts(const std::vector<fewfire::LayerCounts>& layers) {
    std::vector<Counts> made;
    for (const fewfire::LayerCounts& each : layers) {
        made.push_back({each.hits, each.misses, each.prefetch_useful, each.prefetch_wasted});
    }
    return made;
}

// (of each layer, bytes read, evictions, late prefetches, stall seconds, whether it looks ahead, experts that ran from
// their low-precision copies, slots that were used).
auto source_counts(fewfire::ExpertSource& source) {
    const fewfire::SourceCounts made = source.counts();
    return std::tuple{layer_counts(made.layers), made.bytes_read, made.evictions, made.late, made.stall_s, made.looks_ahead,
                      made.substituted, made.slots_used};
}

// Events are (layer, first, count, in order, reads ahead); returns (of each layer, evictions).
auto simulate(int policy, const std::vector<std::int64_t>& first_ids, std::int64_t capacity,
              const std::vector<std::tuple<int, std::int64_t, std::int64_t, bool, bool>>& events,
              const std::vector<std::int32_t>& experts) {
    std::vector<fewfire::TraceEvent> made;
    for (const auto& [layer, first, count, in_order, ahead] : events) made.push_back({layer, first, count, in_order, ahead});
    const fewfire::Simulated result =
        fewfire::simulate(static_cast<fewfire::CachePolicy>(policy), first_ids, capacity, made, experts);
    return std::pair{layer_counts(result.layers), result.evictions};
}

// One layer's experts for whoever runs the rest: values (tokens, model_dim), chosen int32 and weights (tokens, top_k), out.
class ExpertBank {
public:
    ExpertBank(const nb::dict& layout, int layer, fewfire::ExpertSource* source)
        : layout_(layout_of(Fields(layout))), layer_(layer), source_(source) {}

    void run(std::uintptr_t values, std::uintptr_t chosen, std::uintptr_t weights, std::int64_t tokens, std::int64_t top_k,
             bool is_input_weighted, std::uintptr_t out, std::int64_t num_threads) {
        const std::int64_t dim = layout_.up.columns;
        fewfire::Rows rows = rows_.reserve(tokens, dim);
        rows.values = pointer<float>(values), rows.stride = dim;
        fewfire::make_rows(rows, num_threads, [](std::int64_t) {});
        const fewfire::Assignment assignment{pointer<const std::int32_t>(chosen), pointer<const float>(weights), tokens,
                                             top_k, is_input_weighted};
        fewfire::ExpertRun run(layout_, rows, assignment, room_, num_threads);
        run.want(layer_, *source_);
        run.finish(*source_, pointer<float>(out), dim);
    }

private:
    fewfire::ExpertLayout layout_;
    int layer_;
    fewfire::ExpertSource* source_;
    fewfire::QuantizedRows rows_;
    fewfire::ExpertWorkspace room_;
};

}  // namespace

NB_MODULE(_native, m) {
    const auto unlocked = nb::call_guard<nb::gil_scoped_release>();
    m.def("supported_isas", &supported_isas);
    m.def("current_isa", &current_isa);
    m.def("set_isa", &set_isa, "name"_a);
    m.def("keep_freed_memory", &fewfire::keep_freed_memory);
    m.def("return_freed_memory", &fewfire::return_freed_memory);
    m.def("top_k_rows", &top_k_rows, unlocked);
    m.def("group_by_expert", &group_by_expert, unlocked);
    m.def("swiglu_forward", &swiglu_forward, unlocked);
    m.def("swiglu_backward", &swiglu_backward, unlocked);
    m.def("sum_rows", &sum_rows, unlocked);
    m.def("quantize_rows", &quantize_rows, unlocked);
    m.def("linear", &linear, unlocked);
    m.def("read_row", &read_row);
    m.def("probe_int8", &probe_int8, unlocked);
    m.def("probe_read", &probe_read, unlocked);
    m.def("probe_float", &probe_float, unlocked);
    m.def("crc32c", &crc32c, unlocked);
    m.def("join_checksums", &fewfire::join_checksums);
    m.def("read_checked", &read_checked, unlocked);
    m.def("read_plain", &read_plain, unlocked);
    m.def("pool_size", [] { return fewfire::Pool::shared().size(); });
    nb::class_<fewfire::ExpertSource>(m, "ExpertSource").def("counts", &source_counts);
    nb::class_<fewfire::ResidentExperts, fewfire::ExpertSource>(m, "ResidentExperts")
        .def(
            "__init__",
            [](fewfire::ResidentExperts* self, const RecordLayers& layers, std::vector<std::uint32_t> checksums,
               std::uintptr_t memory, const nb::object&) {
                new (self) fewfire::ResidentExperts(pointer<const std::uint8_t>(memory), layers_of(layers), std::move(checksums));
            },
            "layers"_a, "checksums"_a, "memory"_a, "owner"_a, nb::keep_alive<1, 5>())
        .def("verify", [](fewfire::ResidentExperts& experts) { experts.verify(); }, unlocked);
    nb::class_<fewfire::ExpertStore, fewfire::ExpertSource>(m, "ExpertStore")
        .def(
            "__init__",
            [](fewfire::ExpertStore* self, const RecordLayers& layers, std::vector<std::uint32_t> checksums,
               const nb::dict& settings, const nb::object&) {
                new (self) fewfire::ExpertStore(layers_of(layers), std::move(checksums), settings_of(Fields(settings)));
            },
            "layers"_a, "checksums"_a, "settings"_a, "owner"_a, nb::keep_alive<1, 5>())
        .def("set_capacity", &fewfire::ExpertStore::set_capacity, unlocked)
        .def("untouched_bytes", &fewfire::ExpertStore::untouched_bytes, unlocked)
        .def("set_low", &fewfire::ExpertStore::set_low, "low"_a.none(), nb::keep_alive<1, 2>())
        .def("seed", &fewfire::ExpertStore::seed, unlocked)
        .def("residents", &fewfire::ExpertStore::residents);
    m.def("simulate", &simulate, unlocked);
    // args: kind (0 the system, 1 the file's end, 2 a checksum), layer, expert, offset, errno.
    nb::exception<fewfire::ReadError>(m, "ReadError");
    nb::register_exception_translator(
        [](const std::exception_ptr& pointer, void*) {
            try {
                std::rethrow_exception(pointer);
            } catch (const fewfire::ReadError& error) {
                const nb::object type = nb::module_::import_("fewfire._native").attr("ReadError");
                const nb::tuple args = nb::make_tuple(static_cast<int>(error.kind), error.layer, error.expert, error.offset, error.error);
                PyErr_SetObject(type.ptr(), args.ptr());
            }
        },
        nullptr);
    nb::class_<ExpertBank>(m, "ExpertBank")
        .def(nb::init<const nb::dict&, int, fewfire::ExpertSource*>(), nb::keep_alive<1, 4>())
        .def("run", &ExpertBank::run, unlocked);
    nb::class_<fewfire::Engine>(m, "Engine")
        .def(
            "__init__",
            [](fewfire::Engine* self, const nb::dict& spec, fewfire::ExpertSource* experts) {
                new (self) fewfire::Engine(model_of(Fields(spec)), experts);
            },
            "spec"_a, "experts"_a.none(), nb::keep_alive<1, 3>())
        .def_prop_ro("page_bytes", &fewfire::Engine::page_bytes)
        .def_prop_ro("workspace_bytes", &fewfire::Engine::workspace_bytes)
        .def("take_timings", [](fewfire::Engine& engine) { return engine.take_timings().seconds; })
        .def("set_lossy", &set_lossy)
        .def("set_exact", &fewfire::Engine::set_exact)
        .def("step", &step, unlocked)
        .def("head", &head, unlocked);
}
