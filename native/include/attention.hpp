// Attention over the pages of the cache, and writing into them. Layouts: docs/engine.md.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). A page's 64
// keys are weighed together, then the next page's, each query for itself: results depend neither on the other queries of
// a job nor on how the tokens came into the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "lanes.hpp"
#include "linear.hpp"
#include "quantized.hpp"
#include "steps.hpp"

namespace fewfire {
namespace {

constexpr int kPage = static_cast<int>(kPageTokens);
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

template <class Ops>
[[gnu::always_inline]] inline typename Ops::Float load_cached(const bf16* p) {
    return Ops::load_bf16(reinterpret_cast<const std::uint8_t*>(p));
}

template <class Ops>
[[gnu::always_inline]] inline typename Ops::Float load_cached(const std::int8_t* p) {
    return Ops::load_int8(p);
}

// The parts of one head's page. Keys: four blocks of (key_width, 16 tokens); values (64, value_width). A latent page is
// (64, key_width). scales: null for bf16.
template <class Element>
struct PageView {
    const Element *keys, *values;
    const float *key_scales, *value_scales;

    PageView(const CacheShape& shape, const std::uint8_t* page)
        : keys(reinterpret_cast<const Element*>(page)), values(shape.is_latent ? keys : keys + kPage * shape.key_width) {
        const bool scaled = shape.format == CacheFormat::kQ8;
        key_scales = scaled ? reinterpret_cast<const float*>(page + kPage * shape.stored_width()) : nullptr;
        value_scales = scaled ? key_scales + kPage : nullptr;
    }
};

// ---------------------------------------------------------------------------------------------------- writing

// Codes of up to 127 and what they are multiples of.
inline float store_int8(const float* x, std::int64_t width, std::int8_t* to, std::int64_t step) {
    float largest = 0;
    for (std::int64_t i = 0; i < width; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float scale = largest / 127.0f, inverse = largest < 1e-30f ? 0.0f : 127.0f / largest;
    constexpr float kRounder = 12582912.0f;
    for (std::int64_t i = 0; i < width; ++i) {
        to[i * step] = static_cast<std::int8_t>(static_cast<std::int32_t>((x[i] * inverse + kRounder) - kRounder));
    }
    return scale;
}

inline void store_bf16(const float* x, std::int64_t width, bf16* to, std::int64_t step) {
    for (std::int64_t i = 0; i < width; i += 16) {
        const std::int64_t n = std::min<std::int64_t>(16, width - i);
        bf16 part[16];
        Wide::store(part, Wide::load(x + i, n), 16);
        for (std::int64_t j = 0; j < n; ++j) to[(i + j) * step] = part[j];
    }
}

inline void write_cache(const CacheShape& shape, const CacheWrite& write) {
    const std::int64_t slot = write.slot, keys = shape.key_width, values = shape.value_width;
    const bool latent = shape.is_latent;
    const std::int64_t block = slot / 16 * 16 * keys + slot % 16, row = (latent ? 0 : kPage * keys) + slot * (latent ? keys : values);
    if (shape.format == CacheFormat::kBf16) {
        auto* page = reinterpret_cast<bf16*>(write.page);
        if (latent) return store_bf16(write.key, keys, page + row, 1);
        store_bf16(write.key, keys, page + block, 16);
        return store_bf16(write.value, values, page + row, 1);
    }
    auto* page = reinterpret_cast<std::int8_t*>(write.page);
    auto* scales = reinterpret_cast<float*>(write.page + kPage * shape.stored_width());
    if (latent) {
        scales[slot] = store_int8(write.key, values, page + row, 1);
        scales[kPage + slot] = store_int8(write.key + values, keys - values, page + row + values, 1);
        return;
    }
    scales[slot] = store_int8(write.key, keys, page + block, 16);
    scales[kPage + slot] = store_int8(write.value, values, page + row, 1);
}

// ----------------------------------------------------------------------------------------------------- scores

// Scores of 64 keys, lanes = keys: products over the head's width are added in rising order.
template <class Ops, int kQueries, class Element>
void score_page(const CacheShape& shape, const PageView<Element>& page, const float* const* queries, float (*scores)[kPage]) {
    typename Ops::Float sums[kQueries * 4];
    unroll<kQueries * 4>([&](auto i) { sums[i] = Ops::zero_float(); });
    const std::int64_t width = shape.key_width;
    for (std::int64_t d = 0; d < width; ++d) {
        typename Ops::Float key[4];
        unroll<4>([&](auto b) { key[b] = load_cached<Ops>(page.keys + (b * width + d) * 16); });
        unroll<kQueries>([&](auto q) {
            const typename Ops::Float x = Ops::set_float(queries[q][d]);
            unroll<4>([&](auto b) { sums[4 * q + b] = Ops::fused(sums[4 * q + b], key[b], x); });
        });
    }
    unroll<kQueries * 4>([&](auto i) {
        constexpr int q = i / 4, b = i % 4;
        typename Ops::Float made = sums[i];
        if (page.key_scales != nullptr) made = Ops::mul(made, Ops::load_floats(page.key_scales + 16 * b));
        Ops::store_floats(scores[q] + 16 * b, made);
    });
}

template <class Ops>
[[gnu::always_inline]] inline float sum_of(typename Ops::Float x) {
    float lanes[16];
    Ops::store_floats(lanes, x);
    for (int width = 8; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// The same over rows of latents: lanes = 16 numbers of a row, rows two at a time.
template <class Ops, int kQueries, class Element>
void score_latents(const CacheShape& shape, const PageView<Element>& page, const float* const* queries,
                   float (*scores)[kPage]) {
    const std::int64_t width = shape.key_width, inner = shape.value_width;
    const auto add = [&](const Element* row, std::int64_t begin, std::int64_t end, typename Ops::Float* sums) {
        unroll<2 * kQueries>([&](auto i) { sums[i] = Ops::zero_float(); });
        for (std::int64_t d = begin; d < end; d += 16) {
            typename Ops::Float key[2];
            unroll<2>([&](auto r) { key[r] = load_cached<Ops>(row + r * width + d); });
            unroll<kQueries>([&](auto q) {
                const typename Ops::Float x = Ops::load_floats(queries[q] + d);
                unroll<2>([&](auto r) { sums[2 * q + r] = Ops::fused(sums[2 * q + r], key[r], x); });
            });
        }
    };
    for (int key = 0; key < kPage; key += 2) {
        typename Ops::Float first[2 * kQueries], rest[2 * kQueries];
        add(page.keys + key * width, 0, inner, first);
        add(page.keys + key * width, inner, width, rest);
        for (int q = 0; q < kQueries; ++q) {
            for (int r = 0; r < 2; ++r) {
                const float a = sum_of<Ops>(first[2 * q + r]), b = sum_of<Ops>(rest[2 * q + r]);
                const bool scaled = page.key_scales != nullptr;
                scores[q][key + r] = scaled ? a * page.key_scales[key + r] + b * page.value_scales[key + r] : a + b;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------- softmax

// One query's running softmax: the largest score so far, and the sum of e^(score - largest).
struct Running {
    float largest = kMinusInfinity, total = 0;
};

// Scores as the softmax sees them: scaled, capped, -inf where a key is not visible. Returns the largest, or `largest`.
inline float mask_scores(const AttentionJob& job, int q, std::int64_t page, float* scores, float largest) {
    const std::int64_t begin = job.first[q] - page * kPage, end = job.last[q] - page * kPage;
    const std::uint64_t selected = job.selected[q] == nullptr ? ~std::uint64_t{0} : job.selected[q][page];
    const bool all = begin <= 0 && end >= kPage && selected == ~std::uint64_t{0};
    Wide::Floats most = Wide::Floats{} + largest;
    for (int i = 0; i < kPage; i += 16) {
        Wide::Floats score = Wide::load(scores + i, 16) * job.scale;
        if (job.cap > 0) score = (Wide::sigmoid(score * (2.0f / job.cap)) * 2.0f - 1.0f) * job.cap;
        if (!all) {
            float lanes[16];
            Wide::store(lanes, score, 16);
            for (int l = 0; l < 16; ++l) {
                const bool visible = i + l >= begin && i + l < end && (selected >> (i + l) & 1) != 0;
                lanes[l] = visible ? lanes[l] : kMinusInfinity;
            }
            score = Wide::load(lanes, 16);
        }
        Wide::store(scores + i, score, 16);
        most = score > most ? score : most;
    }
    for (int lane = 0; lane < 16; ++lane) largest = std::max(largest, most[lane]);
    return largest;
}

// scores become probabilities times an unknown common factor; returns what all before must be multiplied by.
inline float weigh(const AttentionJob& job, int q, std::int64_t page, float* scores, Running& running) {
    const float largest = mask_scores(job, q, page, scores, running.largest);
    if (largest == kMinusInfinity) {  // nothing to see yet
        std::fill(scores, scores + kPage, 0.0f);
        return 1;
    }
    const float factor =
        running.largest == kMinusInfinity ? 0.0f : Wide::exponential(Wide::Floats{} + (running.largest - largest))[0];
    running.total = running.total * factor + exponentiate(scores, kPage, largest);
    running.largest = largest;
    return factor;
}

// out (value_width) = out * factor + the sum of 64 probabilities times values, in rising order of keys.
template <class Ops, int kQueries, int kChunks, class Element>
void mix_columns(const Element* values, std::int64_t stride, const float (*scores)[kPage], const float* factors,
                 float* const* out, std::int64_t column, int first, int last) {
    typename Ops::Float sums[kQueries * kChunks];
    unroll<kQueries * kChunks>([&](auto i) {
        constexpr int q = i / kChunks, c = i % kChunks;
        sums[i] = Ops::mul(Ops::load_floats(out[q] + column + 16 * c), Ops::set_float(factors[q]));
    });
    for (int key = first; key < last; ++key) {
        typename Ops::Float value[kChunks];
        unroll<kChunks>([&](auto c) { value[c] = load_cached<Ops>(values + key * stride + column + 16 * c); });
        unroll<kQueries>([&](auto q) {
            const typename Ops::Float p = Ops::set_float(scores[q][key]);
            unroll<kChunks>([&](auto c) { sums[q * kChunks + c] = Ops::fused(sums[q * kChunks + c], value[c], p); });
        });
    }
    unroll<kQueries * kChunks>([&](auto i) {
        constexpr int q = i / kChunks, c = i % kChunks;
        Ops::store_floats(out[q] + column + 16 * c, sums[i]);
    });
}

template <class Ops, int kQueries, class Element>
void attend_queries(const AttentionJob& job) {
    const CacheShape& shape = job.shape;
    const std::int64_t stride = shape.is_latent ? shape.key_width : shape.value_width;
    std::int64_t first = job.first[0], last = job.last[0];
    Running running[kQueries];
    for (int q = 0; q < kQueries; ++q) {
        first = std::min(first, job.first[q]);
        last = std::max(last, job.last[q]);
        running[q] = {job.sink[q], job.sink[q] == kMinusInfinity ? 0.0f : 1.0f};
        std::fill(job.out[q], job.out[q] + shape.value_width, 0.0f);
    }
    alignas(64) float scores[kQueries][kPage];
    for (std::int64_t page = first / kPage; page * kPage < last; ++page) {
        const PageView<Element> view(shape, job.pages[page] + job.offset);
        if (shape.is_latent) {
            score_latents<Ops, kQueries>(shape, view, job.queries, scores);
        } else {
            score_page<Ops, kQueries>(shape, view, job.queries, scores);
        }
        float factors[kQueries];
        for (int q = 0; q < kQueries; ++q) {
            factors[q] = weigh(job, q, page, scores[q], running[q]);
            const float* scales = shape.is_latent ? view.key_scales : view.value_scales;
            for (int i = 0; scales != nullptr && i < kPage; ++i) scores[q][i] = scores[q][i] == 0 ? 0 : scores[q][i] * scales[i];
        }
        // Keys that none of the queries sees may never have been written.
        const int begin = static_cast<int>(std::max<std::int64_t>(0, first - page * kPage));
        const int end = static_cast<int>(std::min<std::int64_t>(kPage, last - page * kPage));
        std::int64_t column = 0;
        for (; column + 64 <= shape.value_width; column += 64) {
            mix_columns<Ops, kQueries, 4>(view.values, stride, scores, factors, job.out, column, begin, end);
        }
        for (; column < shape.value_width; column += 16) {
            mix_columns<Ops, kQueries, 1>(view.values, stride, scores, factors, job.out, column, begin, end);
        }
    }
    for (int q = 0; q < kQueries; ++q) {
        const float factor = 1.0f / running[q].total;
        for (std::int64_t d = 0; d < shape.value_width; ++d) job.out[q][d] *= factor;
    }
}

template <class Ops>
void attend(const AttentionJob& job) {
    for_number<kMostQueries>(job.num_queries, [&](auto queries) {
        if (job.shape.format == CacheFormat::kQ8) return attend_queries<Ops, queries(), std::int8_t>(job);
        attend_queries<Ops, queries(), bf16>(job);
    });
}

template <class Ops>
void fill_attention(QuantizedTable& table) {
    table.write_cache = write_cache;
    table.attend = attend<Ops>;
}

}  // namespace
}  // namespace fewfire
