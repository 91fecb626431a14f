// Attention over the pages of the cache, and writing into them. Layouts: docs/engine.md.
//
// Included once by each instruction set's file: everything is in an anonymous namespace (see dispatch.hpp). A page's 64
// keys are weighed together, then the next page's, each query for itself: results depend neither on the other queries of
// a job nor on how the tokens came into the cache. What many queries share is the reading of keys and values: sixteen
// keys, or sixteen numbers of a value, are in a register while all queries are multiplied with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "lanes.hpp"
#include "linear.hpp"
#include "loops.hpp"
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

// A job's queries in tiles whose sums fit into the registers: body(first query, number). A tile of more than six is filled
// up to a multiple of four with queries of zeros.
template <class Ops, class Body>
void for_tiles(int count, const Body& body) {
    constexpr int kMost = std::min(Ops::kSums, kMostQueries), kFew = std::min(kMost, 6);
    for (int first = 0; first < count; first += kMost) {
        const int size = std::min(kMost, count - first);
        for_number<kFew>(size, [&](auto n) { body(first, n); });
        if constexpr (kMost > kFew) {
            for_number<kMost / 4>(size > kFew ? (size + 3) / 4 : 0, [&](auto fours) {
                if constexpr (fours > 1) body(first, std::integral_constant<int, 4 * fours>{});
            });
        }
    }
}

// Vectors of keys, or of a value's numbers, that go with a tile of so many queries.
template <class Ops>
constexpr int vectors_of(int queries) {
    return 4 * queries <= Ops::kSums ? 4 : 2 * queries <= Ops::kSums ? 2 : 1;
}

// Rows of queries, sums and scores that a job's tiles touch: those beyond its queries hold zeros.
inline int rows_of(const AttentionJob& job) { return (job.num_queries + 3) / 4 * 4; }

// Queries (chunk, query, kQueryChunk): a step of all queries has fixed distances.
inline void lay_queries(const AttentionJob& job, float* to) {
    const std::int64_t width = job.shape.key_width;
    for (std::int64_t first = 0; first < width; first += kQueryChunk) {
        const std::int64_t some = std::min<std::int64_t>(kQueryChunk, width - first);
        for (int q = 0; q < job.num_queries; ++q) {
            std::memcpy(to + q * kQueryChunk, job.queries[q] + first, static_cast<std::size_t>(some) * 4);
        }
        std::fill(to + job.num_queries * kQueryChunk, to + rows_of(job) * kQueryChunk, 0.0f);
        to += kMostQueries * kQueryChunk;
    }
}

// scores (query, 64): of some blocks of 16 keys, lanes = keys. Products over the head's width are added in rising order.
template <class Ops, int kQueries, int kBlocks, class Element>
void score_blocks(const Element* keys, std::int64_t width, const float* queries, const float* scales, float* scores) {
    typename Ops::Float sums[kQueries * kBlocks];
    unroll<kQueries * kBlocks>([&](auto i) { sums[i] = Ops::zero_float(); });
    for (std::int64_t first = 0; first < width; first += kQueryChunk, queries += kMostQueries * kQueryChunk) {
        const std::int64_t last = std::min(width, first + kQueryChunk);
        const float* at = queries;
        for (std::int64_t d = first; d < last; ++d, ++at) {
            typename Ops::Float key[kBlocks];
            unroll<kBlocks>([&](auto b) { key[b] = load_cached<Ops>(keys + (b * width + d) * 16); });
            unroll<kQueries>([&](auto q) {
                const typename Ops::Float x = Ops::set_float(at[q * kQueryChunk]);
                unroll<kBlocks>([&](auto b) { sums[kBlocks * q + b] = Ops::fused(sums[kBlocks * q + b], key[b], x); });
            });
        }
    }
    unroll<kQueries * kBlocks>([&](auto i) {
        constexpr int q = i / kBlocks, b = i % kBlocks;
        typename Ops::Float made = sums[i];
        if (scales != nullptr) made = Ops::mul(made, Ops::load_floats(scales + 16 * b));
        Ops::store_floats(scores + q * kPage + 16 * b, made);
    });
}

// Of the page's first `count` keys; what stands for the others is unknown.
template <class Ops, class Element>
void score_page(const AttentionJob& job, const PageView<Element>& page, const float* queries, int count, float* scores) {
    const std::int64_t width = job.shape.key_width;
    for_tiles<Ops>(job.num_queries, [&](int first, auto n) {
        constexpr int kBlocks = vectors_of<Ops>(n);
        for (int block = 0; 16 * block < count; block += kBlocks) {
            const float* scales = page.key_scales == nullptr ? nullptr : page.key_scales + 16 * block;
            score_blocks<Ops, n(), kBlocks>(page.keys + block * width * 16, width, queries + first * kQueryChunk, scales,
                                            scores + first * kPage + 16 * block);
        }
    });
}

template <class Ops>
[[gnu::always_inline]] inline float sum_of(typename Ops::Float x) {
    float lanes[16];
    Ops::store_floats(lanes, x);
    return fold_lanes(lanes, std::plus<>());
}

// The same over rows of latents: lanes = 16 numbers of a row, rows two at a time.
template <class Ops, int kQueries, class Element>
void score_rows(const CacheShape& shape, const PageView<Element>& page, const float* const* queries, float* scores) {
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
                scores[q * kPage + key + r] = scaled ? a * page.key_scales[key + r] + b * page.value_scales[key + r] : a + b;
            }
        }
    }
}

template <class Ops, class Element>
void score_latents(const AttentionJob& job, const PageView<Element>& page, float* scores) {
    constexpr int kMost = 6;
    for (int first = 0; first < job.num_queries; first += kMost) {
        for_number<kMost>(std::min(kMost, job.num_queries - first), [&](auto n) {
            score_rows<Ops, n()>(job.shape, page, job.queries + first, scores + first * kPage);
        });
    }
}

// ---------------------------------------------------------------------------------------------------- softmax

// The running softmax of a job's queries: the largest score so far, and the sum of e^(score - largest).
struct Running {
    static constexpr int kPadded = (kMostQueries + 15) / 16 * 16;

    alignas(64) float largest[kPadded], totals[kPadded], factors[kPadded];

    explicit Running(const AttentionJob& job) : largest{}, totals{}, factors{} {
        for (int q = 0; q < job.num_queries; ++q) {
            largest[q] = job.sink[q];
            totals[q] = job.sink[q] == kMinusInfinity ? 0.0f : 1.0f;
        }
    }
};

// Which of a page's 64 keys a query sees.
inline std::uint64_t visible_keys(const AttentionJob& job, int q, std::int64_t page) {
    const std::int64_t begin = std::clamp<std::int64_t>(job.first[q] - page * kPage, 0, kPage);
    const std::int64_t end = std::clamp<std::int64_t>(job.last[q] - page * kPage, 0, kPage);
    const auto below = [](std::int64_t bits) { return bits == kPage ? ~std::uint64_t{0} : (std::uint64_t{1} << bits) - 1; };
    const std::uint64_t selected = job.selected[q] == nullptr ? ~std::uint64_t{0} : job.selected[q][page];
    return selected & below(end) & ~below(begin);
}

inline float largest_lane(Wide::Floats x) {
    float lanes[16];
    Wide::store(lanes, x, 16);
    return fold_lanes(lanes, [](float a, float b) { return b > a ? b : a; });
}

// Scores as the softmax sees them: scaled, capped, -inf where a key is not visible. Returns the largest, or `largest`.
inline float mask_scores(const AttentionJob& job, std::uint64_t visible, float* scores, float largest) {
    constexpr Wide::Words kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    Wide::Floats most = Wide::Floats{} + largest;
    for (int i = 0; i < kPage; i += 16) {
        Wide::Floats score = Wide::load(scores + i, 16) * job.scale;
        if (job.cap > 0) score = (Wide::sigmoid(score * (2.0f / job.cap)) * 2.0f - 1.0f) * job.cap;
        if (visible != ~std::uint64_t{0}) {
            const Wide::Words seen = (Wide::Words{} + static_cast<std::uint32_t>(visible >> i & 0xffff)) >> kLane & 1u;
            score = seen != 0u ? score : Wide::Floats{} + kMinusInfinity;
        }
        Wide::store(scores + i, score, 16);
        most = score > most ? score : most;
    }
    return largest_lane(most);
}

// All queries' scores of a page become probabilities times unknown common factors; running.factors: what all before must
// be multiplied by. A query that has seen nothing yet keeps its zeros.
inline void weigh(const AttentionJob& job, std::int64_t page, float* scores, Running& running) {
    alignas(64) float before[Running::kPadded];
    std::memcpy(before, running.largest, sizeof before);
    for (int q = 0; q < job.num_queries; ++q) {
        running.largest[q] = mask_scores(job, visible_keys(job, q, page), scores + q * kPage, running.largest[q]);
    }
    for (int q = 0; q < job.num_queries; q += 16) {
        const Wide::Floats fall = Wide::load(before + q, 16) - Wide::load(running.largest + q, 16);
        Wide::store(running.factors + q, fall == fall ? Wide::exponential(fall) : Wide::Floats{} + 1.0f, 16);
    }
    for (int q = 0; q < job.num_queries; ++q) {
        const float total = exponentiate(scores + q * kPage, kPage, running.largest[q]);
        running.totals[q] = running.totals[q] * running.factors[q] + total;
    }
}

// Probabilities times the scales of values; what is not seen has no scale.
inline void scale_seen(float* scores, const float* scales) {
    for (int i = 0; i < kPage; i += 16) {
        const Wide::Floats score = Wide::load(scores + i, 16);
        Wide::store(scores + i, score == 0.0f ? Wide::Floats{} : score * Wide::load(scales + i, 16), 16);
    }
}

// sums (column / 16, query, 16) = sums * factor + the sum of probabilities times values, in rising order of keys.
template <class Ops, int kQueries, int kChunks, class Element>
void mix_columns(const Element* values, std::int64_t stride, const float* scores, const float* factors, float* sums,
                 int first, int last) {
    typename Ops::Float made[kQueries * kChunks];
    const auto place = [&](int q, int c) { return sums + (c * kMostQueries + q) * 16; };
    unroll<kQueries * kChunks>([&](auto i) {
        constexpr int q = i / kChunks, c = i % kChunks;
        made[i] = Ops::mul(Ops::load_floats(place(q, c)), Ops::set_float(factors[q]));
    });
    for (int key = first; key < last; ++key) {
        typename Ops::Float value[kChunks];
        unroll<kChunks>([&](auto c) { value[c] = load_cached<Ops>(values + key * stride + 16 * c); });
        Ops::prefetch(values + key * stride + 32);  // of the next columns
        unroll<kQueries>([&](auto q) {
            const typename Ops::Float p = Ops::set_float(scores[q * kPage + key]);
            unroll<kChunks>([&](auto c) { made[q * kChunks + c] = Ops::fused(made[q * kChunks + c], value[c], p); });
        });
    }
    unroll<kQueries * kChunks>([&](auto i) {
        constexpr int q = i / kChunks, c = i % kChunks;
        Ops::store_floats(place(q, c), made[i]);
    });
}

// Keys [first, last) of a page, those that none of the queries sees left out: they may never have been written.
template <class Ops, class Element>
void mix_page(const AttentionJob& job, const Element* values, const float* scores, const float* factors, float* sums,
              int first, int last) {
    const std::int64_t width = job.shape.value_width, stride = job.shape.is_latent ? job.shape.key_width : width;
    for_tiles<Ops>(job.num_queries, [&](int query, auto n) {
        constexpr int kChunks = vectors_of<Ops>(n);
        const auto mix = [&](std::int64_t column, auto chunks) {
            mix_columns<Ops, n(), chunks()>(values + column, stride, scores + query * kPage, factors + query,
                                            sums + column * kMostQueries + query * 16, first, last);
        };
        std::int64_t column = 0;
        for (; column + 16 * kChunks <= width; column += 16 * kChunks) mix(column, std::integral_constant<int, kChunks>{});
        for (; column < width; column += 16) mix(column, std::integral_constant<int, 1>{});
    });
}

template <class Ops, class Element>
void attend_pages(const AttentionJob& job) {
    const CacheShape& shape = job.shape;
    float *scores = job.room, *sums = scores + kMostQueries * kPage, *queries = sums + kMostQueries * shape.value_width;
    std::fill(scores + job.num_queries * kPage, scores + rows_of(job) * kPage, 0.0f);
    for (float* columns = sums; columns < queries; columns += 16 * kMostQueries) {
        std::fill(columns, columns + 16 * rows_of(job), 0.0f);
    }
    if (!shape.is_latent) lay_queries(job, queries);
    const std::int64_t first = *std::min_element(job.first, job.first + job.num_queries);
    const std::int64_t last = *std::max_element(job.last, job.last + job.num_queries);
    Running running(job);
    for (std::int64_t page = first / kPage; page * kPage < last; ++page) {
        const PageView<Element> view(shape, job.pages[page] + job.offset);
        const int begin = static_cast<int>(std::max<std::int64_t>(0, first - page * kPage));
        const int end = static_cast<int>(std::min<std::int64_t>(kPage, last - page * kPage));
        if (shape.is_latent) {
            score_latents<Ops>(job, view, scores);
        } else {
            score_page<Ops>(job, view, queries, end, scores);
        }
        weigh(job, page, scores, running);
        const float* scales = shape.is_latent ? view.key_scales : view.value_scales;
        for (int q = 0; scales != nullptr && q < job.num_queries; ++q) scale_seen(scores + q * kPage, scales);
        mix_page<Ops>(job, view.values, scores, running.factors, sums, begin, end);
    }
    for (int q = 0; q < job.num_queries; ++q) {
        const float factor = 1.0f / running.totals[q];
        for (std::int64_t d = 0; d < shape.value_width; d += 16) {
            Wide::store(job.out[q] + d, Wide::load(sums + d * kMostQueries + q * 16, 16) * factor, 16);
        }
    }
}

template <class Ops>
void attend(const AttentionJob& job) {
    if (job.shape.format == CacheFormat::kQ8) return attend_pages<Ops, std::int8_t>(job);
    attend_pages<Ops, bf16>(job);
}

template <class Ops>
void fill_attention(QuantizedTable& table) {
    table.write_cache = write_cache;
    table.attend = attend<Ops>;
}

}  // namespace
}  // namespace fewfire
