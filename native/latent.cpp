// Multi-head latent attention in its absorbed form, in prefill too, and the indexer of DeepSeek sparse attention.
// Plain definition: fewfire.model.latent.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

// `absorbed` (count, heads, kv_rank + rope_dim): queries as latents, then rotated parts.
struct Widths {
    std::int64_t head, key, stride;  // of a query as projected; of a cached row; between tokens of `absorbed`

    explicit Widths(const LatentSpec& spec)
        : head(spec.nope_dim + spec.rope_dim), key(spec.kv_rank + spec.rope_dim), stride(spec.num_heads * key) {}
};

// Rows of kv_up of one head: what makes keys of a latent, then what makes values.
Matrix up_rows(const LatentSpec& spec, std::int64_t head, bool values) {
    Matrix rows = spec.kv_up;
    const std::int64_t each = spec.nope_dim + spec.value_dim, bytes = rows.format == WeightFormat::kF32 ? 4 : 2;
    rows.codes += (head * each + (values ? spec.nope_dim : 0)) * rows.columns * bytes;
    rows.rows = values ? spec.value_dim : spec.nope_dim;
    return rows;
}

void add_bias(float* row, const float* bias, std::int64_t width) {
    for (std::int64_t i = 0; bias != nullptr && i < width; ++i) row[i] += bias[i];
}

// Latents and rotated keys of all tokens into the cache. `rows` (count, key): projected.
void place(const LatentSpec& spec, const CacheShape& shape, std::int64_t offset, float* rows, std::int64_t stride,
           Step& step) {
    const std::int64_t half = spec.rope_dim / 2;
    step.for_tokens([&](std::int64_t t) {
        float* row = rows + t * stride;
        add_bias(row, spec.kv_down_bias, spec.kv_rank + spec.rope_dim);
        normalise_row(spec.kv_norm, row, spec.kv_rank, row);
        const std::int64_t position = step.tokens.positions[t];
        table().quantized.rotate(row + spec.kv_rank, spec.rope.cos + position * half, spec.rope.sin + position * half, half,
                                 spec.rope.is_interleaved);
        std::uint8_t* page = step.tokens.pages[step.tokens.page_starts[t] + position / kPageTokens] + offset;
        table().quantized.write_cache(shape, {page, position % kPageTokens, row, nullptr});
    });
}

// Queries of all heads (count, heads * head) into `projected`; the normed query latents are returned, where there are any.
Rows project_queries(const LatentSpec& spec, float* queries, std::int64_t stride, Step& step) {
    if (spec.query) {
        step.linear(spec.query, step.normed, queries, stride);
        return {};
    }
    const Rows latent = step.room.latent.reserve(step.count(), spec.query_down.rows);
    step.linear(spec.query_down, step.normed, latent.values, latent.stride);
    make_rows(latent, step.num_threads, [&](std::int64_t t) {
        add_bias(latent.row(t), spec.query_down_bias, latent.columns);
        normalise_row(spec.query_norm, latent.row(t), latent.columns, latent.row(t));
    });
    step.linear(spec.query_up, latent, queries, stride);
    return latent;
}

// Tokens [first, first + count) of a step: their queries over latents are too wide to hold for all of them.
struct Part {
    std::int64_t first, count;
};

constexpr std::int64_t kPartTokens = 64;

// Each head's query becomes one over latents: `absorbed` (count, heads, key).
void absorb(const LatentSpec& spec, const Widths& widths, float* queries, std::int64_t stride, float* absorbed,
            const Part& part, Step& step) {
    const std::int64_t half = spec.rope_dim / 2;
    step.parallel(spec.num_heads, 1, [&](std::int64_t head, std::int64_t, int) {
        float* from = queries + part.first * stride + head * widths.head;
        float* to = absorbed + head * widths.key;
        table().quantized.linear_transposed(up_rows(spec, head, false), from, stride, part.count, to, widths.stride);
        for (std::int64_t t = 0; t < part.count; ++t) {
            float* turned = from + t * stride + spec.nope_dim;
            const std::int64_t position = step.tokens.positions[part.first + t];
            table().quantized.rotate(turned, spec.rope.cos + position * half, spec.rope.sin + position * half, half,
                                     spec.rope.is_interleaved);
            std::memcpy(to + t * widths.stride + spec.kv_rank, turned, static_cast<std::size_t>(spec.rope_dim) * 4);
        }
    });
}

// `made` (count, heads, kv_rank): each head's mean of latents.
void mix(const LatentSpec& spec, const CacheShape& shape, std::int64_t offset, const Widths& widths, const float* absorbed,
         float* made, const std::uint64_t* selected, const Part& part, Step& step) {
    const std::int64_t heads = spec.num_heads, queries = part.count * heads, words = selected_words(step);
    const std::int64_t jobs = jobs_of(queries, 1, step.num_threads);
    step.parallel(jobs, job_grain(jobs, step.num_threads), [&](std::int64_t begin, std::int64_t end, int worker) {
        float* room = job_room(shape, worker);
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t last = queries * (item + 1) / jobs;
            for (std::int64_t at = queries * item / jobs; at < last;) {
                AttentionJob job;
                const std::int64_t pages = step.tokens.page_starts[part.first + at / heads];
                job.shape = shape;
                job.pages = step.tokens.pages + pages;
                job.offset = offset;
                job.scale = spec.scale;
                job.room = room;
                for (; at < last && step.tokens.page_starts[part.first + at / heads] == pages; ++at) {
                    const std::int64_t token = part.first + at / heads;
                    const int q = job.num_queries++;
                    job.queries[q] = absorbed + at * widths.key;
                    job.out[q] = made + at * spec.kv_rank;
                    job.last[q] = step.tokens.positions[token] + 1;
                    job.sink[q] = -std::numeric_limits<float>::infinity();
                    job.selected[q] = selected == nullptr ? nullptr : selected + token * words;
                }
                table().quantized.attend(job);
            }
        }
    });
}

// Means of latents become each head's values.
void expand(const LatentSpec& spec, const float* made, const Rows& mixed, const Part& part, Step& step) {
    step.parallel(spec.num_heads, 1, [&](std::int64_t head, std::int64_t, int worker) {
        const Matrix values = up_rows(spec, head, true);
        Activations acts{made + head * spec.kv_rank, spec.num_heads * spec.kv_rank, spec.kv_rank, nullptr, {}};
        acts.tiles.count = part.count;
        multiply(values, 0, values.blocks(), acts, mixed.row(part.first) + head * spec.value_dim, mixed.stride, worker);
    });
}

}  // namespace

void attend_latent(const LatentSpec& spec, const CacheShape& shape, std::int64_t offset, Step& step) {
    const Widths widths(spec);
    const std::int64_t count = step.count(), rows = row_stride(widths.key);
    const std::int64_t stride = row_stride(spec.num_heads * widths.head);
    float* latents = step.room.projected.reserve(count * (stride + rows));
    float* queries = latents + count * rows;
    step.linear(spec.kv_down, step.normed, latents, rows);
    const Rows query_latents = project_queries(spec, queries, stride, step);
    step.mark(Phase::kProject);
    place(spec, shape, offset, latents, rows, step);
    const bool selects = spec.indexer.is_present && select_keys(spec, query_latents, offset + shape.page_bytes(), step);
    const std::int64_t together = std::min(count, kPartTokens);
    float* absorbed = step.room.absorbed.reserve(together * spec.num_heads * (widths.key + spec.kv_rank));
    float* made = absorbed + together * widths.stride;
    const Rows mixed = step.room.mixed.reserve(count, spec.num_heads * spec.value_dim);
    for (std::int64_t first = 0; first < count; first += kPartTokens) {
        const Part part{first, std::min(kPartTokens, count - first)};
        absorb(spec, widths, queries, stride, absorbed, part, step);
        mix(spec, shape, offset, widths, absorbed, made, selects ? step.room.selected.data() : nullptr, part, step);
        expand(spec, made, mixed, part, step);
    }
    make_rows(mixed, step.num_threads, [](std::int64_t) {});
    step.mark(Phase::kAttend);
    step.linear(spec.out, mixed, step.room.sums.reserve(count * step.stride()), step.stride());
}

}  // namespace fewfire
