// DeepSeek sparse attention's indexer: which earlier tokens a query attends to. Plain definition: fewfire.model.latent.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

// A page holds the keys of 64 tokens as rows of bf16.
bf16* key_row(const IndexerSpec& spec, std::uint8_t* page, std::int64_t position) {
    return reinterpret_cast<bf16*>(page) + position % kPageTokens * spec.head_dim;
}

bf16 to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<bf16>(bits >> 16 | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

std::uint8_t* page_of(std::int64_t offset, std::int64_t token, std::int64_t position, const Step& step) {
    return step.tokens.pages[step.tokens.page_starts[token] + position / kPageTokens] + offset;
}

void rotate(const LatentSpec& spec, float* head, std::int64_t position) {
    const std::int64_t half = spec.rope_dim / 2;
    table().quantized.rotate(head, spec.rope.cos + position * half, spec.rope.sin + position * half, half,
                             spec.indexer.is_interleaved);
}

void place_keys(const LatentSpec& spec, std::int64_t offset, Step& step) {
    const IndexerSpec& index = spec.indexer;
    const std::int64_t stride = row_stride(index.head_dim);
    float* keys = step.room.sums.reserve(step.count() * std::max(stride, step.stride()));
    step.linear(index.key, step.normed, keys, stride);
    step.for_tokens([&](std::int64_t t) {
        const std::int64_t position = step.tokens.positions[t];
        float* key = keys + t * stride;
        normalise_row(index.key_norm, key, index.head_dim, key);
        rotate(spec, key, position);
        std::transform(key, key + index.head_dim, key_row(index, page_of(offset, t, position, step), position), to_bf16);
    });
}

// scores[s], s <= the token's position: the weighted sum over heads of relu(query . key) / sqrt(width).
void score(const LatentSpec& spec, std::int64_t offset, std::int64_t token, float* queries, const float* weights,
           float* scores, Step& step) {
    const IndexerSpec& index = spec.indexer;
    const std::int64_t position = step.tokens.positions[token];
    const float scale = 1.0f / std::sqrt(static_cast<float>(index.head_dim));
    const float head_scale = 1.0f / std::sqrt(static_cast<float>(index.num_heads));
    for (std::int64_t h = 0; h < index.num_heads; ++h) rotate(spec, queries + h * index.head_dim, position);
    std::fill(scores, scores + position + 1, 0.0f);
    std::vector<float> products(static_cast<std::size_t>(index.num_heads));
    Activations acts{queries, index.head_dim, index.head_dim, nullptr, {}};
    acts.tiles.count = index.num_heads;
    for (std::int64_t s = 0; s <= position; ++s) {
        const auto* key = reinterpret_cast<const std::uint8_t*>(key_row(index, page_of(offset, token, s, step), s));
        const Matrix row{key, nullptr, 1, index.head_dim, WeightFormat::kBf16};
        table().quantized.linear(row, 0, 1, acts, products.data(), 1, nullptr);
        for (std::int64_t h = 0; h < index.num_heads; ++h) {
            const float product = std::max(0.0f, products[static_cast<std::size_t>(h)] * scale);
            scores[s] += weights[h] * head_scale * product;
        }
    }
}

std::int64_t longest_text(const Step& step) {
    const std::int64_t* positions = step.tokens.positions;
    return step.count() == 0 ? 0 : *std::max_element(positions, positions + step.count()) + 1;
}

}  // namespace

std::int64_t index_page_bytes(const IndexerSpec& spec) {
    return spec.is_present && !spec.is_shared ? kPageTokens * spec.head_dim * 2 : 0;
}

std::int64_t selected_words(const Step& step) {
    return (longest_text(step) + kPageTokens - 1) / kPageTokens;
}

bool select_keys(const LatentSpec& spec, const Rows& latent, std::int64_t offset, Step& step) {
    const IndexerSpec& index = spec.indexer;
    const std::int64_t words = selected_words(step);
    if (index.is_shared) return step.selects;
    step.selects = false;
    place_keys(spec, offset, step);
    const std::int64_t longest = longest_text(step);
    if (longest <= index.top_k) return false;
    std::uint64_t* selected = step.room.selected.reserve(step.count() * words);
    std::fill(selected, selected + step.count() * words, ~std::uint64_t{0});
    const std::int64_t width = index.num_heads * index.head_dim, stride = row_stride(width), room = row_stride(longest);
    float* queries = step.room.index_scores.reserve(step.count() * (stride + row_stride(index.num_heads) + room));
    float* weights = queries + step.count() * stride;
    float* scores = weights + step.count() * row_stride(index.num_heads);
    step.linear(index.query_up, latent, queries, stride);
    step.linear(index.head_weights, step.normed, weights, row_stride(index.num_heads));
    step.for_tokens([&](std::int64_t t) {
        const std::int64_t visible = step.tokens.positions[t] + 1;
        if (visible <= index.top_k) return;
        score(spec, offset, t, queries + t * stride, weights + t * row_stride(index.num_heads), scores + t * room, step);
        std::vector<std::int64_t> ids(static_cast<std::size_t>(index.top_k));
        std::vector<float> values(static_cast<std::size_t>(index.top_k));
        table().top_k_rows(scores + t * room, 1, visible, index.top_k, ids.data(), values.data());
        std::uint64_t* row = selected + t * words;
        std::fill(row, row + words, 0);
        for (const std::int64_t id : ids) row[id / kPageTokens] |= std::uint64_t{1} << (id % kPageTokens);
    });
    return step.selects = true;
}

}  // namespace fewfire
