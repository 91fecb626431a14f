#include "workspace.hpp"

#include "dispatch.hpp"

namespace fewfire {

Tiles QuantizedRows::make_tiles(std::uint8_t* memory, std::int64_t count, std::int64_t groups) {
    return {memory, count, groups, table().quantized.tile_tokens};
}

void quantize_tiles(const Rows& rows, std::int64_t first, std::int64_t last) {
    table().quantized.quantize(rows.values, rows.stride, rows.columns, rows.tiles, {first, last, 0, rows.tiles.groups});
}

void multiply(const Matrix& weight, std::int64_t begin, std::int64_t end, const Activations& acts, float* out,
              std::int64_t out_stride, int worker, std::size_t extra) {
    std::uint8_t* scratch = worker_scratch(worker, extra, weight.columns, acts.count());
    table().quantized.linear(weight, begin, end, acts, out, out_stride, scratch + extra);
}

std::uint8_t* worker_scratch(int worker, std::size_t extra, std::int64_t columns, std::int64_t tokens) {
    return Pool::shared().scratch(worker, static_cast<std::size_t>(linear_scratch(columns, tokens)) + extra);
}

namespace {

std::int64_t threads_of(std::int64_t num_threads) { return num_threads <= 0 ? Pool::shared().size() : num_threads; }

}  // namespace

std::int64_t block_grain(std::int64_t blocks, std::int64_t num_threads, std::int64_t tokens) {
    const std::int64_t threads = threads_of(num_threads);
    const std::int64_t parts = threads == 1 ? 1 : threads * (tokens > 16 ? 2 : 4);
    const std::int64_t grain = std::max<std::int64_t>(1, (blocks + parts - 1) / parts);
    return grain > 1 ? (grain + kMostBlocks - 1) / kMostBlocks * kMostBlocks : grain;
}

std::int64_t jobs_of(std::int64_t queries, std::int64_t heads, std::int64_t num_threads) {
    const std::int64_t all_busy = (threads_of(num_threads) + heads - 1) / heads;
    return std::max((queries + kMostQueries - 1) / kMostQueries, std::min(queries, all_busy));
}

std::int64_t job_grain(std::int64_t jobs, std::int64_t num_threads) {
    return std::clamp<std::int64_t>(jobs / (4 * threads_of(num_threads)), 1, 4);
}

float* job_room(const CacheShape& shape, int worker) {
    return reinterpret_cast<float*>(Pool::shared().scratch(worker, static_cast<std::size_t>(attention_room(shape)) * 4));
}

}  // namespace fewfire
