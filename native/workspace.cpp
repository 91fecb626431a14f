#include "workspace.hpp"

#include "dispatch.hpp"

namespace fewfire {

void quantize_all(const Activations& acts, std::int64_t rows, std::int64_t num_threads) {
    Pool::shared().run(num_threads, rows, row_grain(rows), [&](std::int64_t begin, std::int64_t end, int) {
        table().quantized.quantize_rows(acts, begin, end - begin);
    });
}

void multiply(const Matrix& weight, std::int64_t begin, std::int64_t end, const Activations& acts,
              const std::int32_t* tokens, std::int64_t count, float* out, std::int64_t out_stride, int worker,
              std::size_t extra) {
    std::uint8_t* scratch = worker_scratch(worker, extra, weight.columns, count);
    table().quantized.linear(weight, begin, end, acts, tokens, count, out, out_stride, scratch + extra);
}

std::uint8_t* worker_scratch(int worker, std::size_t extra, std::int64_t columns, std::int64_t tokens) {
    return Pool::shared().scratch(worker, static_cast<std::size_t>(linear_scratch(columns, tokens)) + extra);
}

std::int64_t block_grain(std::int64_t blocks, std::int64_t num_threads, std::int64_t tokens) {
    const std::int64_t threads = num_threads <= 0 ? Pool::shared().size() : num_threads;
    const std::int64_t parts = threads == 1 ? 1 : threads * (tokens > 16 ? 2 : 4);
    const std::int64_t grain = std::max<std::int64_t>(1, (blocks + parts - 1) / parts);
    return grain > 1 ? (grain + 1) / 2 * 2 : grain;
}

}  // namespace fewfire
