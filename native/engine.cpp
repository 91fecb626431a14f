#include "engine.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.hpp"
#include "pool.hpp"

namespace fewfire {
namespace {

constexpr std::int8_t kBookQ4[16] = {-18, -15, -12, -10, -8, -6, -4, -2, 0, 2, 4, 6, 8, 11, 13, 16};
constexpr float kBookMx[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};

float widen(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

float read_bf16(const std::uint8_t* p) {
    std::uint16_t bits;
    std::memcpy(&bits, p, 2);
    return widen(bits);
}

bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<bf16>(bits >> 16 | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// Parts of `count` for products: enough that no thread waits long for the last, few enough that the tokens, which each
// part lays side by side for itself, are not copied much oftener than needed.
std::int64_t grain(std::int64_t count, std::int64_t num_threads, std::int64_t tokens) {
    const std::int64_t threads = num_threads <= 0 ? Pool::shared().size() : num_threads;
    const std::int64_t parts = threads == 1 ? 1 : threads * (tokens > 16 ? 2 : 4);
    return std::max<std::int64_t>(1, (count + parts - 1) / parts);
}

}  // namespace

void read_row(const Matrix& weight, std::int64_t row, float* out) {
    const std::int64_t groups = weight.groups(), block = row / kRows, r = row % kRows;
    for (std::int64_t k = 0; k < weight.columns; ++k) {
        const std::int64_t tile = block * groups + k / kGroup, c = k % kGroup;
        const std::uint8_t* nibbles = weight.codes + tile * kGroup * kRows / 2;
        const std::int64_t byte = c / 8 * 64 + r * 4 + c % 4;
        switch (weight.format) {
            case WeightFormat::kF32: std::memcpy(out + k, weight.codes + (row * weight.columns + k) * 4, 4); break;
            case WeightFormat::kBf16: out[k] = read_bf16(weight.codes + (row * weight.columns + k) * 2); break;
            case WeightFormat::kQ8: {
                const int code = weight.codes[tile * kGroup * kRows + c / 4 * 64 + r * 4 + c % 4] - 128;
                out[k] = static_cast<float>(code) * read_bf16(weight.scales + (tile * kRows + r) * 2);
                break;
            }
            case WeightFormat::kQ4: {
                const std::uint8_t* scales = weight.scales + tile * 6 * kRows;
                const int code = kBookQ4[c % 8 < 4 ? nibbles[byte] & 15 : nibbles[byte] >> 4];
                const std::uint8_t steps = scales[2 * kRows + 4 * r + c / 32];
                const int step = c / 16 % 2 == 0 ? steps & 15 : steps >> 4;
                out[k] = static_cast<float>(code * (step > 7 ? step - 16 : step)) * read_bf16(scales + 2 * r);
                break;
            }
            case WeightFormat::kMxfp4: {
                const float value = kBookMx[c % 8 < 4 ? nibbles[byte] & 15 : nibbles[byte] >> 4];
                const int exponent = weight.scales[tile * 4 * kRows + c / 32 * kRows + r];
                out[k] = exponent == 255 ? NAN : std::ldexp(value, exponent - 127);
                break;
            }
        }
    }
}

// Everything that one step writes, in arrays that grow when a step is larger than all before.
struct Engine::Step {
    const std::int64_t *ids, *positions, *page_starts;
    bf16* const* pages;
    std::int64_t count, num_threads;
    Routes routes;

    std::vector<float> x, normed, projected, mixed, logits, hidden, sums;
    std::vector<std::int8_t> codes, hidden_codes;
    std::vector<float> scales, hidden_scales;
    std::vector<std::int32_t> code_sums, hidden_sums;
    std::vector<std::int32_t> chosen;  // (count, top_k), best first
    std::vector<float> weights;        // the same
    std::vector<std::int32_t> order, starts, tokens;

    // Acts over `rows` rows of `columns` numbers at `values`, with room for their codes.
    static Activations acts(std::vector<float>& values, std::vector<std::int8_t>& to_codes,
                            std::vector<float>& to_scales, std::vector<std::int32_t>& to_sums, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride) {
        const std::int64_t groups = (columns + kGroup - 1) / kGroup;
        const auto size = [&](std::int64_t each) { return static_cast<std::size_t>(rows * groups * each); };
        if (to_codes.size() < size(kGroup)) to_codes.resize(size(kGroup));
        if (to_scales.size() < size(1)) to_scales.resize(size(1));
        if (to_sums.size() < size(kSums)) to_sums.resize(size(kSums));
        return {values.data(), to_codes.data(), to_scales.data(), to_sums.data(), columns, stride};
    }

    template <class Body>
    void parallel(std::int64_t items, std::int64_t each, const Body& body) {
        Pool::shared().run(num_threads, items, each, body);
    }

    // Quantizes all rows, several a thread where there are many.
    void quantize(const Activations& made, std::int64_t rows) {
        parallel(rows, std::max<std::int64_t>(1, (rows + 7) / 8), [&](std::int64_t begin, std::int64_t end, int) {
            table().quantized.quantize_rows(made, begin, end - begin);
        });
    }

    void linear(const Matrix& weight, std::int64_t begin, std::int64_t end, const Activations& made,
                const std::int32_t* rows, std::int64_t num_rows, float* out, std::int64_t stride, int worker,
                std::size_t extra = 0) {
        const auto bytes = static_cast<std::size_t>(linear_scratch(weight.columns, num_rows)) + extra;
        std::uint8_t* scratch = Pool::shared().scratch(worker, bytes);
        table().quantized.linear(weight, begin, end, made, rows, num_rows, out, stride, scratch + extra);
    }
};

Engine::Engine(ModelSpec spec) : spec_(std::move(spec)) {
    for (const LayerSpec& layer : spec_.layers) {
        const AttentionSpec& a = layer.attention;
        offsets_.push_back(page_elements_);
        page_elements_ += a.num_kv_heads * a.head_dim * kPageTokens * 2;
    }
}

void Engine::step(const std::int64_t* ids, const std::int64_t* positions, const std::int64_t* page_starts,
                  bf16* const* pages, std::int64_t count, float* hidden, const Routes& routes,
                  std::int64_t num_threads) {
    const std::int64_t dim = spec_.model_dim;
    Step step{};
    step.ids = ids, step.positions = positions, step.page_starts = page_starts, step.pages = pages;
    step.count = count, step.num_threads = num_threads, step.routes = routes;
    step.x.resize(static_cast<std::size_t>(count * dim));
    step.normed.resize(static_cast<std::size_t>(count * dim));
    for (std::int64_t t = 0; t < count; ++t) {
        float* row = step.x.data() + t * dim;
        read_row(spec_.embed, ids[t], row);
        if (spec_.embed_scale != 1.0f) {
            for (std::int64_t i = 0; i < dim; ++i) row[i] *= spec_.embed_scale;
        }
    }
    for (std::size_t number = 0; number < spec_.layers.size(); ++number) {
        const LayerSpec& layer = spec_.layers[number];
        attend(layer, offsets_[number], step);
        normalise(layer.ffn_norm, step);
        if (layer.is_moe) {
            run_experts(layer.moe, step);
            if (step.routes.ids != nullptr) step.routes.ids += count * layer.moe.top_k;
            if (step.routes.weights != nullptr) step.routes.weights += count * layer.moe.top_k;
            if (step.routes.logits != nullptr) step.routes.logits += count * layer.moe.num_experts;
            if (layer.moe.has_shared) feed(layer.moe.shared, layer.moe.shared_gate, step);
        } else {
            feed(layer.dense, Matrix{}, step);
        }
    }
    for (std::int64_t t = 0; t < count; ++t) {
        table().quantized.rms_norm(step.x.data() + t * dim, spec_.norm, dim, spec_.eps, hidden + t * dim);
    }
}

void Engine::head(float* hidden, std::int64_t count, float* logits, std::int64_t num_threads) {
    const std::int64_t dim = spec_.model_dim;
    Step step{};
    step.count = count, step.num_threads = num_threads;
    Activations acts = Step::acts(step.x, step.codes, step.scales, step.code_sums, count, dim, dim);
    acts.values = hidden;
    step.quantize(acts, count);
    const std::int64_t blocks = spec_.head.blocks();
    step.parallel(blocks, grain(blocks, num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        step.linear(spec_.head, begin, end, acts, nullptr, count, logits, spec_.vocab_size, worker);
    });
    if (spec_.logit_scale != 1.0f) {
        for (std::int64_t i = 0; i < count * spec_.vocab_size; ++i) logits[i] *= spec_.logit_scale;
    }
}

// normed = norm(x), with its codes.
void Engine::normalise(const float* weight, Step& step) {
    const std::int64_t dim = spec_.model_dim, count = step.count;
    const Activations acts = Step::acts(step.normed, step.codes, step.scales, step.code_sums, count, dim, dim);
    step.parallel(count, std::max<std::int64_t>(1, (count + 7) / 8), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            table().quantized.rms_norm(step.x.data() + t * dim, weight, dim, spec_.eps, step.normed.data() + t * dim);
        }
        table().quantized.quantize_rows(acts, begin, end - begin);
    });
}

// --------------------------------------------------------------------------------------------------- attention

void Engine::attend(const LayerSpec& layer, std::int64_t offset, Step& step) {
    const AttentionSpec& spec = layer.attention;
    const std::int64_t dim = spec_.model_dim, width = spec.num_heads * spec.head_dim, count = step.count;
    normalise(layer.attention_norm, step);
    project(spec, step);
    step.parallel(count, std::max<std::int64_t>(1, (count + 7) / 8), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) place(spec, offset, t, step);
    });
    mix(spec, offset, step);
    const Activations acts = Step::acts(step.mixed, step.codes, step.scales, step.code_sums, count, width, width);
    step.quantize(acts, count);
    const std::int64_t blocks = spec.out.blocks();
    step.sums.resize(static_cast<std::size_t>(count * dim));
    step.parallel(blocks, grain(blocks, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        step.linear(spec.out, begin, end, acts, nullptr, count, step.sums.data(), dim, worker);
        const std::int64_t last = std::min(end * kRows, dim);
        for (std::int64_t t = 0; t < count; ++t) {
            for (std::int64_t i = begin * kRows; i < last; ++i) {
                const float bias = spec.out_bias == nullptr ? 0.0f : spec.out_bias[i];
                step.x[static_cast<std::size_t>(t * dim + i)] +=
                    (step.sums[static_cast<std::size_t>(t * dim + i)] + bias) * spec_.residual_scale;
            }
        }
    });
}

// projected (count, queries | keys | values).
void Engine::project(const AttentionSpec& spec, Step& step) {
    const std::int64_t dim = spec_.model_dim, count = step.count;
    const std::int64_t heads = spec.num_heads * spec.head_dim, kv = spec.num_kv_heads * spec.head_dim;
    const std::int64_t stride = heads + 2 * kv;
    step.projected.resize(static_cast<std::size_t>(count * stride));
    const Activations acts = Step::acts(step.normed, step.codes, step.scales, step.code_sums, count, dim, dim);
    const Matrix* parts[3] = {&spec.query, &spec.key, &spec.value};
    const std::int64_t columns[3] = {0, heads, heads + kv};
    const std::int64_t total = spec.query.blocks() + spec.key.blocks() + spec.value.blocks();
    step.parallel(total, grain(total, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        std::int64_t first = 0;
        for (int part = 0; part < 3; ++part) {
            const std::int64_t from = std::max(begin - first, std::int64_t{0});
            const std::int64_t to = std::min(end - first, parts[part]->blocks());
            if (from < to) {
                step.linear(*parts[part], from, to, acts, nullptr, count, step.projected.data() + columns[part], stride,
                            worker);
            }
            first += parts[part]->blocks();
        }
    });
}

namespace {

void rotate(float* head, const float* cos, const float* sin, std::int64_t half, bool interleaved) {
    for (std::int64_t i = 0; i < half; ++i) {
        float& a = head[interleaved ? 2 * i : i];
        float& b = head[interleaved ? 2 * i + 1 : i + half];
        const float first = a * cos[i] - b * sin[i], second = b * cos[i] + a * sin[i];
        a = first;
        b = second;
    }
}

void add_bias(float* row, const float* bias, std::int64_t width) {
    for (std::int64_t i = 0; bias != nullptr && i < width; ++i) row[i] += bias[i];
}

}  // namespace

// Biases, norms, clipping and rope of one token; its keys and values into the cache.
void Engine::place(const AttentionSpec& spec, std::int64_t offset, std::int64_t token, Step& step) {
    const std::int64_t heads = spec.num_heads, kv = spec.num_kv_heads, width = spec.head_dim;
    float* query = step.projected.data() + token * (heads + 2 * kv) * width;
    float *key = query + heads * width, *value = key + kv * width;
    add_bias(query, spec.query_bias, heads * width);
    add_bias(key, spec.key_bias, kv * width);
    add_bias(value, spec.value_bias, kv * width);
    const auto norm = [&](float* rows, const float* weight, std::int64_t count) {
        if (weight == nullptr) return;
        if (spec.norm_is_full) return table().quantized.rms_norm(rows, weight, count * width, spec_.eps, rows);
        for (std::int64_t h = 0; h < count; ++h) {
            table().quantized.rms_norm(rows + h * width, weight, width, spec_.eps, rows + h * width);
        }
    };
    if (spec.norm_is_full) {
        norm(query, spec.query_norm, heads);
        norm(key, spec.key_norm, kv);
    }
    for (std::int64_t i = 0; spec.clip > 0 && i < (heads + 2 * kv) * width; ++i) {
        query[i] = std::clamp(query[i], -spec.clip, spec.clip);
    }
    if (!spec.norm_is_full) {
        norm(query, spec.query_norm, heads);
        norm(key, spec.key_norm, kv);
    }
    const std::int64_t position = step.positions[token], half = spec.rope_dim / 2;
    for (std::int64_t h = 0; half > 0 && h < heads + kv; ++h) {
        rotate(query + h * width, spec.cos + position * half, spec.sin + position * half, half, spec.rope_is_interleaved);
    }
    bf16* page = step.pages[step.page_starts[token] + position / kPageTokens] + offset;
    const std::int64_t slot = position % kPageTokens;
    for (std::int64_t h = 0; h < kv; ++h, page += 2 * kPageTokens * width) {
        bf16* keys = page + slot / 16 * 16 * width + slot % 16;
        bf16* values = page + (kPageTokens + slot) * width;
        for (std::int64_t d = 0; d < width; ++d) {
            keys[d * 16] = to_bf16(key[h * width + d]);
            values[d] = to_bf16(value[h * width + d]);
        }
    }
}

// mixed (count, heads * head_dim): attention of every token over its sequence.
void Engine::mix(const AttentionSpec& spec, std::int64_t offset, Step& step) {
    const std::int64_t heads = spec.num_heads, kv = spec.num_kv_heads, width = spec.head_dim, count = step.count;
    const std::int64_t shared = heads / kv, stride = (heads + 2 * kv) * width;
    step.mixed.resize(static_cast<std::size_t>(count * heads * width));
    // Queries of one key-value head, token after token; four in a row form a job where they are of one sequence.
    const std::int64_t queries = count * shared, jobs = (queries + 3) / 4;
    step.parallel(kv * jobs, count == 1 ? 1 : 4, [&](std::int64_t begin, std::int64_t end, int worker) {
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t head = item / jobs, last = std::min(item % jobs * 4 + 4, queries);
            for (std::int64_t at = item % jobs * 4; at < last;) {
                AttentionJob job;
                const std::int64_t pages = step.page_starts[at / shared];
                job.pages = step.pages + pages;
                job.offset = offset + head * 2 * kPageTokens * width;
                job.width = width, job.window = spec.window, job.scale = spec.scale;
                std::int64_t furthest = 0;
                for (; at < last && step.page_starts[at / shared] == pages; ++at) {
                    const std::int64_t token = at / shared, h = head * shared + at % shared;
                    const int q = job.num_queries++;
                    job.queries[q] = step.projected.data() + token * stride + h * width;
                    job.out[q] = step.mixed.data() + (token * heads + h) * width;
                    job.positions[q] = step.positions[token];
                    job.sink[q] = spec.sinks == nullptr ? -std::numeric_limits<float>::infinity() : spec.sinks[h];
                    furthest = std::max(furthest, job.positions[q]);
                }
                const std::int64_t numbers = 4 * (furthest + 32);
                job.scratch =
                    reinterpret_cast<float*>(Pool::shared().scratch(worker, static_cast<std::size_t>(numbers) * 4));
                table().quantized.attend(job);
            }
        }
    });
}

// ------------------------------------------------------------------------------------------------ feed-forward

// x += down(act(gate) * up) of the normed tokens; times sigmoid(gate row) where a shared expert has one.
void Engine::feed(const FeedForwardSpec& spec, const Matrix& gate, Step& step) {
    const std::int64_t dim = spec_.model_dim, width = spec.up.rows, count = step.count;
    const Activations acts = Step::acts(step.normed, step.codes, step.scales, step.code_sums, count, dim, dim);
    step.hidden.resize(static_cast<std::size_t>(count * width));
    step.sums.resize(static_cast<std::size_t>(count * std::max(width, dim)));
    const std::int64_t blocks = spec.up.blocks();
    step.parallel(blocks, grain(blocks, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        const std::int64_t first = begin * kRows, last = std::min(end * kRows, width);
        step.linear(spec.up, begin, end, acts, nullptr, count, step.hidden.data(), width, worker);
        if (spec.gate.codes != nullptr) {
            step.linear(spec.gate, begin, end, acts, nullptr, count, step.sums.data(), width, worker);
        }
        for (std::int64_t t = 0; t < count; ++t) {
            float* up = step.hidden.data() + t * width + first;
            const float* gated = spec.gate.codes == nullptr ? nullptr : step.sums.data() + t * width + first;
            table().quantized.activate(gated, up, last - first, spec.activation, up);
        }
    });
    const Activations hidden =
        Step::acts(step.hidden, step.hidden_codes, step.hidden_scales, step.hidden_sums, count, width, width);
    step.quantize(hidden, count);
    std::vector<float> gates(static_cast<std::size_t>(count), 1.0f);
    if (gate.codes != nullptr) {
        step.linear(gate, 0, gate.blocks(), acts, nullptr, count, gates.data(), 1, 0);
        table().quantized.sigmoids(gates.data(), count);
    }
    const std::int64_t rows = spec.down.blocks();
    step.parallel(rows, grain(rows, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        step.linear(spec.down, begin, end, hidden, nullptr, count, step.sums.data(), dim, worker);
        const std::int64_t last = std::min(end * kRows, dim);
        for (std::int64_t t = 0; t < count; ++t) {
            const float factor = gates[static_cast<std::size_t>(t)] * spec_.residual_scale;
            for (std::int64_t i = begin * kRows; i < last; ++i) {
                step.x[static_cast<std::size_t>(t * dim + i)] += step.sums[static_cast<std::size_t>(t * dim + i)] * factor;
            }
        }
    });
}

// The experts of one token and their weights, from its logits.
void Engine::route(const MoeSpec& spec, std::int64_t token, Step& step) {
    const std::int64_t experts = spec.num_experts, k = spec.top_k, room = (experts + 15) / 16 * 16;
    float* logits = step.logits.data() + token * room;
    add_bias(logits, spec.router_bias, experts);
    const bool selected = spec.score == RouterScore::kSoftmaxSelected || spec.score == RouterScore::kSigmoidSelected;
    const bool sigmoid = spec.score == RouterScore::kSigmoid || spec.score == RouterScore::kSigmoidSelected;
    std::vector<float> scores(logits, logits + room);
    if (!selected) (sigmoid ? table().quantized.sigmoids : table().quantized.softmax)(scores.data(), experts);
    std::vector<float> choice(scores.begin(), scores.begin() + experts);
    add_bias(choice.data(), spec.select_bias, experts);
    std::vector<std::int64_t> ids(static_cast<std::size_t>(k));
    std::vector<float> values(static_cast<std::size_t>((k + 15) / 16 * 16));
    table().top_k_rows(choice.data(), 1, experts, k, ids.data(), values.data());
    for (std::int64_t i = 0; i < k; ++i) {
        values[static_cast<std::size_t>(i)] = scores[static_cast<std::size_t>(ids[static_cast<std::size_t>(i)])];
    }
    if (selected) (sigmoid ? table().quantized.sigmoids : table().quantized.softmax)(values.data(), k);
    float total = spec.renormalize_eps;
    for (std::int64_t i = 0; i < k; ++i) total += values[static_cast<std::size_t>(i)];
    for (std::int64_t i = 0; i < k; ++i) {
        const auto at = static_cast<std::size_t>(token * k + i);
        step.chosen[at] = static_cast<std::int32_t>(ids[static_cast<std::size_t>(i)]);
        const float weight = values[static_cast<std::size_t>(i)];
        step.weights[at] = (spec.renormalize ? weight / total : weight) * spec.scale;
        if (step.routes.ids != nullptr) step.routes.ids[at] = step.chosen[at];
        if (step.routes.weights != nullptr) step.routes.weights[at] = step.weights[at];
    }
    if (step.routes.logits != nullptr) {
        std::memcpy(step.routes.logits + token * experts, logits, static_cast<std::size_t>(experts) * 4);
    }
}

void Engine::run_experts(const MoeSpec& spec, Step& step) {
    const std::int64_t count = step.count, k = spec.top_k, experts = spec.num_experts, dim = spec_.model_dim;
    const std::int64_t room = (experts + 15) / 16 * 16;
    const Activations acts = Step::acts(step.normed, step.codes, step.scales, step.code_sums, count, dim, dim);
    step.logits.resize(static_cast<std::size_t>(count * room));
    step.chosen.resize(static_cast<std::size_t>(count * k));
    step.weights.resize(static_cast<std::size_t>(count * k));
    if (count == 1) {  // one row: by experts; many: by tokens
        step.parallel(spec.router.blocks(), 1, [&](std::int64_t begin, std::int64_t end, int worker) {
            step.linear(spec.router, begin, end, acts, nullptr, 1, step.logits.data(), room, worker);
        });
        route(spec, 0, step);
    } else {
        step.parallel(count, std::max<std::int64_t>(1, (count + 7) / 8),
                      [&](std::int64_t begin, std::int64_t end, int worker) {
                          const Activations part = acts.from(begin);
                          step.linear(spec.router, 0, spec.router.blocks(), part, nullptr, end - begin,
                                      step.logits.data() + begin * room, room, worker);
                          for (std::int64_t t = begin; t < end; ++t) route(spec, t, step);
                      });
    }
    // Slots sorted by expert, in the order of tokens within one.
    step.starts.assign(static_cast<std::size_t>(experts + 1), 0);
    step.order.resize(static_cast<std::size_t>(count * k));
    step.tokens.resize(static_cast<std::size_t>(count * k));
    for (const std::int32_t expert : step.chosen) ++step.starts[static_cast<std::size_t>(expert) + 1];
    for (std::size_t e = 0; e < static_cast<std::size_t>(experts); ++e) step.starts[e + 1] += step.starts[e];
    std::vector<std::int32_t> next(step.starts.begin(), step.starts.end() - 1);
    for (std::int64_t slot = 0; slot < count * k; ++slot) {
        const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(step.chosen[static_cast<std::size_t>(slot)])]++);
        step.order[place] = static_cast<std::int32_t>(slot);
        step.tokens[place] = static_cast<std::int32_t>(slot / k);
    }
    expert_hidden(spec, step);
    expert_outputs(spec, step);
}

// hidden, a row for each sorted slot: act(gate) * up. Parts are runs of rows of one expert.
void Engine::expert_hidden(const MoeSpec& spec, Step& step) {
    const std::int64_t dim = spec_.model_dim, count = step.count, k = spec.top_k;
    const std::int64_t width = spec.experts[0].up.rows, blocks = spec.experts[0].up.blocks();
    const Activations acts = Step::acts(step.normed, step.codes, step.scales, step.code_sums, count, dim, dim);
    step.hidden.resize(static_cast<std::size_t>(count * k * width));
    std::vector<std::int32_t> busy;
    for (std::int32_t e = 0; e < spec.num_experts; ++e) {
        if (step.starts[static_cast<std::size_t>(e) + 1] > step.starts[static_cast<std::size_t>(e)]) busy.push_back(e);
    }
    const std::int64_t pieces = std::min<std::int64_t>(blocks, busy.size() < 16 ? 4 : 2);
    step.parallel(static_cast<std::int64_t>(busy.size()) * pieces, 1, [&](std::int64_t item, std::int64_t, int worker) {
        const auto e = static_cast<std::size_t>(busy[static_cast<std::size_t>(item / pieces)]);
        const FeedForwardSpec& expert = spec.experts[e];
        const std::int64_t piece = item % pieces, begin = blocks * piece / pieces, end = blocks * (piece + 1) / pieces;
        const std::int64_t first = begin * kRows, rows = std::min(end * kRows, width) - first;
        const std::int64_t slot = step.starts[e], tokens = step.starts[e + 1] - slot;
        const std::int32_t* indices = step.tokens.data() + slot;
        const auto gate_bytes = static_cast<std::size_t>((tokens * rows * 4 + 63) / 64 * 64);
        float* up = step.hidden.data() + slot * width;
        step.linear(expert.up, begin, end, acts, indices, tokens, up, width, worker, gate_bytes);
        auto* gate = reinterpret_cast<float*>(Pool::shared().scratch(
            worker, static_cast<std::size_t>(linear_scratch(dim, tokens)) + gate_bytes));
        if (expert.gate.codes != nullptr) {
            step.linear(expert.gate, begin, end, acts, indices, tokens, gate - first, rows, worker, gate_bytes);
        }
        for (std::int64_t t = 0; t < tokens; ++t) {
            const float* gated = expert.gate.codes == nullptr ? nullptr : gate + t * rows;
            table().quantized.activate(gated, up + t * width + first, rows, expert.activation, up + t * width + first);
        }
    });
    const Activations hidden =
        Step::acts(step.hidden, step.hidden_codes, step.hidden_scales, step.hidden_sums, count * k, width, width);
    step.quantize(hidden, count * k);
}

// x += the weighted sum of each token's experts, in rising order of expert. Parts are runs of output rows.
void Engine::expert_outputs(const MoeSpec& spec, Step& step) {
    const std::int64_t dim = spec_.model_dim, count = step.count, k = spec.top_k;
    const std::int64_t width = spec.experts[0].up.rows, blocks = spec.experts[0].down.blocks();
    const Activations hidden =
        Step::acts(step.hidden, step.hidden_codes, step.hidden_scales, step.hidden_sums, count * k, width, width);
    step.sums.assign(static_cast<std::size_t>(count * dim), 0.0f);
    step.parallel(blocks, grain(blocks, step.num_threads, count), [&](std::int64_t begin, std::int64_t end, int worker) {
        const std::int64_t first = begin * kRows, rows = std::min(end * kRows, dim) - first;
        for (std::int64_t e = 0; e < spec.num_experts; ++e) {
            const std::int64_t slot = step.starts[static_cast<std::size_t>(e)];
            const std::int64_t tokens = step.starts[static_cast<std::size_t>(e) + 1] - slot;
            if (tokens == 0) continue;
            const Activations part = hidden.from(slot);
            const auto bytes = static_cast<std::size_t>((tokens * rows * 4 + 63) / 64 * 64);
            auto* out = reinterpret_cast<float*>(Pool::shared().scratch(
                worker, static_cast<std::size_t>(linear_scratch(width, tokens)) + bytes));
            step.linear(spec.experts[static_cast<std::size_t>(e)].down, begin, end, part, nullptr, tokens, out - first,
                        rows, worker, bytes);
            for (std::int64_t t = 0; t < tokens; ++t) {
                const auto at = static_cast<std::size_t>(slot + t);
                const float weight = step.weights[static_cast<std::size_t>(step.order[at])];
                float* sum = step.sums.data() + step.tokens[at] * dim + first;
                for (std::int64_t i = 0; i < rows; ++i) sum[i] += out[t * rows + i] * weight;
            }
        }
        for (std::int64_t t = 0; t < count; ++t) {
            for (std::int64_t i = first; i < first + rows; ++i) {
                step.x[static_cast<std::size_t>(t * dim + i)] +=
                    step.sums[static_cast<std::size_t>(t * dim + i)] * spec_.residual_scale;
            }
        }
    });
}

}  // namespace fewfire
