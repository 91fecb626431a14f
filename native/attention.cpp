// Grouped-query attention of one layer: projections, rotation, the cache, and the jobs of the attention kernel.
#include <algorithm>
#include <cmath>
#include <limits>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

// Where queries, keys and values of a token lie in `projected`.
struct Columns {
    std::int64_t query, key, value, stride;

    explicit Columns(const AttentionSpec& spec)
        : query(0),
          key(spec.num_heads * spec.query_width()),
          value(key + spec.num_kv_heads * spec.head_dim),
          stride(row_stride(value + spec.num_kv_heads * spec.head_dim)) {}
};

void add_bias(float* row, const float* bias, std::int64_t width) {
    for (std::int64_t i = 0; bias != nullptr && i < width; ++i) row[i] += bias[i];
}

// All three products in one part of work.
void project(const AttentionSpec& spec, const Columns& columns, Step& step) {
    float* projected = step.room.projected.reserve(step.count() * columns.stride);
    const Matrix* parts[3] = {&spec.query, &spec.key, &spec.value};
    const std::int64_t offsets[3] = {columns.query, columns.key, columns.value};
    const std::int64_t total = spec.query.blocks() + spec.key.blocks() + spec.value.blocks();
    step.parallel(total, block_grain(total, step.num_threads, step.count()), [&](std::int64_t begin, std::int64_t end, int worker) {
        std::int64_t first = 0;
        for (int part = 0; part < 3; ++part) {
            const std::int64_t from = std::max(begin - first, std::int64_t{0});
            const std::int64_t to = std::min(end - first, parts[part]->blocks());
            if (from < to) {
                multiply(*parts[part], from, to, step.normed, projected + offsets[part], columns.stride, worker);
            }
            first += parts[part]->blocks();
        }
    });
    step.mark(Phase::kProject);
}

// Heads of `width` numbers, `stride` apart, each normalised or the whole.
void norm_heads(const AttentionSpec& spec, const NormSpec& norm, float* rows, std::int64_t heads, std::int64_t stride) {
    if (spec.head_norm == HeadNorm::kFull) return normalise_row(norm, rows, heads * spec.head_dim, rows);
    for (std::int64_t h = 0; h < heads; ++h) normalise_row(norm, rows + h * stride, spec.head_dim, rows + h * stride);
}

// Biases, norms, clipping and rotation of one token; its keys and values into the cache. The order is AttentionConfig's.
void place(const AttentionSpec& spec, const CacheShape& shape, std::int64_t offset, const Columns& columns,
           std::int64_t token, Step& step) {
    const std::int64_t heads = spec.num_heads, kv = spec.num_kv_heads, width = spec.head_dim, wide = spec.query_width();
    float* query = step.room.projected.data() + token * columns.stride;
    float *key = query + columns.key, *value = query + columns.value;
    add_bias(query, spec.query_bias, heads * wide);
    add_bias(key, spec.key_bias, kv * width);
    add_bias(value, spec.value_bias, kv * width);
    const auto norm = [&] {
        norm_heads(spec, spec.query_norm, query, heads, wide);
        norm_heads(spec, spec.key_norm, key, kv, width);
    };
    if (spec.head_norm == HeadNorm::kFull) norm();
    for (std::int64_t i = 0; spec.clip > 0 && i < columns.value + kv * width; ++i) {
        query[i] = std::clamp(query[i], -spec.clip, spec.clip);
    }
    if (spec.head_norm == HeadNorm::kHead) norm();
    const std::int64_t position = step.tokens.positions[token], half = spec.rope.dim / 2;
    if (half > 0) {
        const float *cos = spec.rope.cos + position * half, *sin = spec.rope.sin + position * half;
        for (std::int64_t h = 0; h < heads; ++h) {
            table().quantized.rotate(query + h * wide, cos, sin, half, spec.rope.is_interleaved);
        }
        for (std::int64_t h = 0; h < kv; ++h) {
            table().quantized.rotate(key + h * width, cos, sin, half, spec.rope.is_interleaved);
        }
        if (spec.head_norm == HeadNorm::kL2) norm();
    }
    if (spec.temperature != 0) {
        const float steps = std::floor(static_cast<float>(position + 1) / spec.temperature_floor);
        const float factor = 1.0f + spec.temperature * std::log1p(steps);
        for (std::int64_t i = 0; i < heads * wide; ++i) query[i] *= factor;
    }
    std::uint8_t* page = step.tokens.pages[step.tokens.page_starts[token] + position / kPageTokens] + offset;
    for (std::int64_t h = 0; h < kv; ++h) {
        table().quantized.write_cache(shape, {page + h * shape.page_bytes(), position % kPageTokens, key + h * width, value + h * width});
    }
}

std::int64_t first_visible(const AttentionSpec& spec, std::int64_t position) {
    if (spec.window > 0) return std::max<std::int64_t>(0, position + 1 - spec.window);
    return spec.chunk > 0 ? position / spec.chunk * spec.chunk : 0;
}

// mixed (count, heads * head_dim): attention of every token over its sequence.
void mix(const AttentionSpec& spec, const CacheShape& shape, std::int64_t offset, const Columns& columns,
         const Rows& mixed, Step& step) {
    const std::int64_t kv = spec.num_kv_heads, width = spec.head_dim;
    const std::int64_t shared = spec.num_heads / kv, queries = step.count() * shared;
    // Queries of one key-value head, token after token; some in a row form a job where they are of one sequence.
    const std::int64_t jobs = jobs_of(queries, kv, step.num_threads);
    step.parallel(kv * jobs, job_grain(kv * jobs, step.num_threads), [&](std::int64_t begin, std::int64_t end, int worker) {
        float* room = job_room(shape, worker);
        for (std::int64_t item = begin; item < end; ++item) {
            const std::int64_t head = item / jobs, part = item % jobs, last = queries * (part + 1) / jobs;
            for (std::int64_t at = queries * part / jobs; at < last;) {
                AttentionJob job;
                const std::int64_t pages = step.tokens.page_starts[at / shared];
                job.shape = shape;
                job.pages = step.tokens.pages + pages;
                job.offset = offset + head * shape.page_bytes();
                job.scale = spec.scale, job.cap = spec.cap;
                job.room = room;
                for (; at < last && step.tokens.page_starts[at / shared] == pages; ++at) {
                    const std::int64_t token = at / shared, h = head * shared + at % shared;
                    const int q = job.num_queries++;
                    job.queries[q] = step.room.projected.data() + token * columns.stride + h * spec.query_width();
                    job.out[q] = mixed.row(token) + h * width;
                    job.first[q] = first_visible(spec, step.tokens.positions[token]);
                    job.last[q] = step.tokens.positions[token] + 1;
                    job.sink[q] = spec.sinks == nullptr ? -std::numeric_limits<float>::infinity() : spec.sinks[h];
                }
                table().quantized.attend(job);
            }
        }
    });
}

}  // namespace

void attend(const AttentionSpec& spec, const CacheShape& shape, std::int64_t offset, Step& step) {
    const Columns columns(spec);
    project(spec, columns, step);
    step.for_tokens([&](std::int64_t t) { place(spec, shape, offset, columns, t, step); });
    const Rows mixed = step.room.mixed.reserve(step.count(), spec.num_heads * spec.head_dim);
    mix(spec, shape, offset, columns, mixed, step);
    make_rows(mixed, step.num_threads, [&](std::int64_t t) {
        const float* query = step.room.projected.data() + t * columns.stride;
        for (std::int64_t h = 0; spec.has_output_gate && h < spec.num_heads; ++h) {
            table().quantized.gate_by(mixed.row(t) + h * spec.head_dim, query + h * spec.query_width() + spec.head_dim,
                                      spec.head_dim);
        }
    });
    step.mark(Phase::kAttend);
    step.linear(spec.out, mixed, step.room.sums.reserve(step.count() * step.stride()), step.stride());
}

}  // namespace fewfire
