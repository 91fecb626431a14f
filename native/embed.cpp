// Tokens become rows: from memory, or from the file where their matrix stays on disk.
#include <fcntl.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "dispatch.hpp"
#include "experts.hpp"
#include "reading.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

constexpr int kOfTrunk = -1;  // the layer of a ReadError that is about no expert

// Tells the system which blocks are read next, so that it reads many at a time.
void announce([[maybe_unused]] const RowFile& from, [[maybe_unused]] const Tokens& tokens) {
#ifdef POSIX_FADV_WILLNEED
    for (std::int64_t t = 0; t < tokens.count; ++t) {
        const std::int64_t block = tokens.ids[t] / from.block_rows;
        ::posix_fadvise(from.file, from.codes + block * from.code_bytes, from.code_bytes, POSIX_FADV_WILLNEED);
        if (from.scale_bytes > 0) {
            ::posix_fadvise(from.file, from.scales + block * from.scale_bytes, from.scale_bytes, POSIX_FADV_WILLNEED);
        }
    }
#endif
}

using Fault = std::optional<ReadError>;

void read_part(int file, std::int64_t offset, std::int64_t count, std::uint32_t checksum, std::uint8_t* to, std::int32_t row, Fault& fault) {
    if (fault || count == 0) return;
    const ReadResult read = read_checked(file, offset, count, to, 0);
    using Kind = ReadError::Kind;
    if (read.error != 0) {
        fault = ReadError(Kind::kSystem, kOfTrunk, row, offset + read.done, read.error);
    } else if (read.done < count) {
        fault = ReadError(Kind::kShort, kOfTrunk, row, offset + read.done, 0);
    } else if (read.checksum != checksum) {
        fault = ReadError(Kind::kChecksum, kOfTrunk, row, offset, 0);
    }
}

// Row `id` through the block that holds it. `room`: the block's codes, then its scales.
void read_row(const Matrix& matrix, const RowFile& from, std::int32_t id, std::uint8_t* room, float* row, Fault& fault) {
    const std::int64_t block = id / from.block_rows;
    const std::uint32_t* checksums = from.checksums + 2 * block;
    read_part(from.file, from.codes + block * from.code_bytes, from.code_bytes, checksums[0], room, id, fault);
    read_part(from.file, from.scales + block * from.scale_bytes, from.scale_bytes, checksums[1], room + from.code_bytes, id, fault);
    if (fault) return;
    const Matrix held{room, room + from.code_bytes, from.block_rows, matrix.columns, matrix.format};
    table().quantized.read_row(held, id % from.block_rows, row);
}

// All rows of the matrix that stays on disk. Throws ReadError.
void read_rows(const Matrix& matrix, const RowFile& from, Step& step) {
    if (step.count() > 1) announce(from, step.tokens);
    std::vector<Fault> faults(static_cast<std::size_t>(step.count()));
    step.parallel(step.count(), row_grain(step.count()), [&](std::int64_t begin, std::int64_t end, int) {
        std::vector<std::uint8_t> room(static_cast<std::size_t>(from.code_bytes + from.scale_bytes) + 64);
        std::uint8_t* block = room.data() + (64 - reinterpret_cast<std::uintptr_t>(room.data()) % 64) % 64;
        for (std::int64_t t = begin; t < end; ++t) {
            const auto id = static_cast<std::int32_t>(step.tokens.ids[t]);
            read_row(matrix, from, id, block, step.room.x.data() + t * step.stride(), faults[static_cast<std::size_t>(t)]);
        }
    });
    for (const Fault& fault : faults) {
        if (fault) throw ReadError(*fault);
    }
}

}  // namespace

void embed(Step& step) {
    const ModelSpec& model = step.model;
    step.room.x.reserve(step.count() * step.stride());
    const bool on_disk = model.embed_file.file >= 0;
    if (on_disk) read_rows(model.embed, model.embed_file, step);
    step.for_tokens([&](std::int64_t t) {
        float* row = step.room.x.data() + t * step.stride();
        if (!on_disk) table().quantized.read_row(model.embed, step.tokens.ids[t], row);
        for (std::int64_t i = 0; model.embed_scale != 1.0f && i < model.model_dim; ++i) row[i] *= model.embed_scale;
        if (model.positions) {
            std::vector<float> position(static_cast<std::size_t>(model.model_dim));
            table().quantized.read_row(model.positions, step.tokens.positions[t], position.data());
            for (std::int64_t i = 0; i < model.model_dim; ++i) row[i] += position[static_cast<std::size_t>(i)];
        }
    });
}

}  // namespace fewfire
