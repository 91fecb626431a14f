#include "experts.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "dispatch.hpp"
#include "pool.hpp"

namespace fewfire {
namespace {

constexpr std::int64_t kBatchSlots = 1024;  // hidden rows that are made before they are used
constexpr std::int64_t kLooseSlots = 512;   // up to here every slot's output is kept, and experts may come in any order
constexpr std::int64_t kDenseSlots = 6;     // slots an expert from which nearly all experts may be wanted;
constexpr double kMostOf = 0.75;            // if so many of this layer are, the next layer's are read ahead
constexpr std::int64_t kFetchAhead = 4;     // tokens whose sums, far apart, are fetched before they are added to
constexpr std::int64_t kCachedTokens = 256;

// Groups of 128 columns of so many tokens that are made and used before the next ones: their floats, 128 KiB a matrix, stay in
// the processor's second cache beside the weights that pass by.
std::int64_t cached_groups(std::int64_t tokens) { return std::max<std::int64_t>(1, kCachedTokens / tokens); }

void fetch_floats(const float* at, std::int64_t count) {
    for (std::int64_t i = 0; i < count; i += 16) __builtin_prefetch(at + i, 1);
}

// Numbers [first, first + count) of a vector of a record as float32, in `room` unless they lie so already.
const float* read_vector(const RecordVector& vector, const std::uint8_t* record, std::int64_t first, std::int64_t count,
                         float* room) {
    if (vector.size == 0) return nullptr;
    const std::uint8_t* from = record + vector.offset;
    for (std::int64_t i = 0; i < count; ++i) {
        if (vector.format == WeightFormat::kF32) {
            std::memcpy(room + i, from + (first + i) * 4, 4);
        } else {
            std::uint16_t half;
            std::memcpy(&half, from + (first + i) * 2, 2);
            const std::uint32_t wide = static_cast<std::uint32_t>(half) << 16;
            std::memcpy(room + i, &wide, 4);
        }
    }
    return room;
}

}  // namespace

// Some tokens of one expert: slots [first, first + count) of the sorted assignment.
struct ExpertRun::Segment {
    const ExpertLayout* layout;
    const std::uint8_t* record;
    std::int64_t first, count;
};

// What a worker has for hidden columns: the segment's tokens as one product's, and room for gates, values and biases,
// rows `stride` apart.
struct ExpertRun::HiddenRoom {
    Activations tokens;
    float* floats;
    std::int64_t stride;
    int worker;
    std::size_t extra;
};

struct ExpertRun::Given {
    const std::int32_t* experts;
    const Record* records;
    std::size_t count;
};

ExpertRun::ExpertRun(const ExpertLayout& layout, const Activations& acts, const Assignment& assignment,
                     ExpertWorkspace& room, std::int64_t num_threads, const ExpertLayout* low)
    : layout_(layout), low_(low), acts_(acts), to_(assignment), room_(room), threads_(num_threads) {
    sort_slots();
}

Demand ExpertRun::demand() const {
    const std::int64_t slots = room_.starts.back();
    const auto busy = static_cast<std::int64_t>(room_.busy.size());
    const bool wants_most = slots >= kDenseSlots * layout_.num_experts && busy >= kMostOf * static_cast<double>(layout_.num_experts);
    return {slots > kLooseSlots, wants_most, low_ != nullptr && slots <= kLooseSlots};
}

void ExpertRun::want(int layer, ExpertSource& source) {
    if (!room_.busy.empty()) source.want(layer, room_.busy.data(), static_cast<int>(room_.busy.size()), demand());
}

void ExpertRun::finish(ExpertSource& source, float* sums, std::int64_t stride) {
    sums_ = sums, stride_ = stride;
    Pool::shared().run(threads_, to_.count, row_grain(to_.count), [&](std::int64_t begin, std::int64_t end, int) {
        std::memset(sums_ + begin * stride_, 0, static_cast<std::size_t>((end - begin) * stride_) * 4);
    });
    const int wanted = static_cast<int>(room_.busy.size());
    const bool in_order = demand().in_order;
    std::vector<std::int32_t> experts(static_cast<std::size_t>(wanted));
    std::vector<Record> records(static_cast<std::size_t>(wanted));
    bool kept = false;
    for (int taken = 0; taken < wanted;) {
        const int some = source.take(wanted - taken, experts.data(), records.data());
        taken += some;
        const Given given{experts.data(), records.data(), static_cast<std::size_t>(some)};
        if (in_order || some == wanted) {
            add_in_order(given, source);
        } else {
            keep_outputs(given, source);
            kept = true;
        }
        source.give_back(experts.data(), some);
    }
    if (kept) add_kept();
}

// Slots sorted by expert, in the order of tokens within one; `busy`: the experts that have any.
void ExpertRun::sort_slots() {
    const std::int64_t slots = to_.count * to_.top_k, experts = layout_.num_experts;
    room_.starts.assign(static_cast<std::size_t>(experts + 1), 0);
    room_.order.resize(static_cast<std::size_t>(slots));
    room_.tokens.resize(static_cast<std::size_t>(slots));
    room_.busy.clear();
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        if (to_.chosen[slot] >= 0) ++room_.starts[static_cast<std::size_t>(to_.chosen[slot]) + 1];
    }
    for (std::int64_t e = 0; e < experts; ++e) {
        const auto at = static_cast<std::size_t>(e);
        if (room_.starts[at + 1] > 0) room_.busy.push_back(static_cast<std::int32_t>(e));
        room_.starts[at + 1] += room_.starts[at];
    }
    std::vector<std::int32_t> next(room_.starts.begin(), room_.starts.end() - 1);
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        if (to_.chosen[slot] < 0) continue;
        const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(to_.chosen[slot])]++);
        room_.order[place] = static_cast<std::int32_t>(slot);
        room_.tokens[place] = static_cast<std::int32_t>(slot / to_.top_k);
    }
}

// Experts given in rising order: hidden rows for some slots at a time, then their outputs added to the sums.
void ExpertRun::add_in_order(const Given& given, ExpertSource& source) {
    std::vector<Segment> segments;
    std::int64_t rows = 0;
    const auto flush = [&] {
        if (segments.empty()) return;
        make_hidden(segments, segments.front().first);
        source.settle(given.experts, static_cast<int>(given.count));
        add_outputs(segments, segments.front().first);
        segments.clear();
        rows = 0;
    };
    for (std::size_t i = 0; i < given.count; ++i) {
        for (std::int64_t first = start(given.experts[i]), last = start(given.experts[i] + 1); first < last;) {
            const std::int64_t some = std::min(last - first, kBatchSlots - rows);
            segments.push_back({layout_of(given.records[i]), given.records[i].bytes, first, some});
            first += some;
            rows += some;
            if (rows == kBatchSlots) flush();
        }
    }
    flush();
}

// Experts in any order: every slot's output is kept until all are there.
void ExpertRun::keep_outputs(const Given& given, ExpertSource& source) {
    std::vector<Segment> segments;
    for (std::size_t i = 0; i < given.count; ++i) {
        const std::int64_t first = start(given.experts[i]);
        segments.push_back({layout_of(given.records[i]), given.records[i].bytes, first, start(given.experts[i] + 1) - first});
    }
    make_hidden(segments, 0);
    source.settle(given.experts, static_cast<int>(given.count));
    const std::int64_t blocks = (width() + kRows - 1) / kRows, out_stride = row_stride(width());
    float* outs = room_.outs.reserve(room_.starts.back() * out_stride);
    Pool::shared().run(threads_, blocks, block_grain(blocks, threads_, 1), [&](std::int64_t begin, std::int64_t end, int worker) {
        for (const Segment& segment : segments) {
            multiply(ExpertLayout::matrix(segment.layout->down, segment.record), begin, end, hidden_rows(segment, 0),
                     outs + segment.first * out_stride, out_stride, worker);
        }
    });
    if (layout_.down_bias.size != 0) add_biases(segments, outs, out_stride);
}

// Kept outputs hold their bias already: outputs come from different records.
void ExpertRun::add_biases(const std::vector<Segment>& segments, float* outs, std::int64_t out_stride) {
    std::vector<float> bias(static_cast<std::size_t>(width()));
    for (const Segment& segment : segments) {
        read_vector(segment.layout->down_bias, segment.record, 0, width(), bias.data());
        for (std::int64_t slot = segment.first; slot < segment.first + segment.count; ++slot) {
            float* out = outs + slot * out_stride;
            for (std::int64_t i = 0; i < width(); ++i) out[i] += bias[static_cast<std::size_t>(i)];
        }
    }
}

void ExpertRun::add_kept() {
    const std::int64_t out_stride = row_stride(width()), slots = room_.starts.back();
    for (std::int64_t slot = 0; slot < slots; ++slot) {
        const auto at = static_cast<std::size_t>(slot);
        table().quantized.add_weighted(sums_ + room_.tokens[at] * stride_, room_.outs.data() + slot * out_stride, nullptr,
                                       output_weight(slot), width());
    }
}

// The hidden state of a segment: rows and tiles of its own, at its slots less `base`.
Rows ExpertRun::hidden_rows(const Segment& segment, std::int64_t base) {
    const std::int64_t slots = std::min(room_.starts.back() - base, std::max(kBatchSlots, kLooseSlots));
    const Rows all = room_.hidden.reserve(slots, layout_.up.rows);
    const std::int64_t at = segment.first - base, groups = groups_of(layout_.up.rows);
    const Tiles tiles = QuantizedRows::make_tiles(all.tiles.memory + at * token_bytes(groups), segment.count, groups);
    return {all.row(at), all.stride, all.columns, tiles};
}

void ExpertRun::make_hidden(const std::vector<Segment>& segments, std::int64_t base) {
    const std::int64_t groups = groups_of(layout_.up.rows);
    const std::int64_t threads = threads_ <= 0 ? Pool::shared().size() : threads_;
    const auto count = static_cast<std::int64_t>(segments.size());
    const std::int64_t pieces = std::clamp<std::int64_t>((4 * threads + count - 1) / count, 1, groups);
    std::vector<const Segment*> order;  // the largest first: what is left for the end is small
    for (const Segment& segment : segments) order.push_back(&segment);
    std::stable_sort(order.begin(), order.end(), [](const Segment* a, const Segment* b) { return a->count > b->count; });
    hidden_rows(segments.front(), base);  // room for all, before threads ask for theirs
    Pool::shared().run(threads_, count * pieces, 1, [&](std::int64_t item, std::int64_t, int worker) {
        const std::int64_t piece = item % pieces;
        const Segment& segment = *order[static_cast<std::size_t>(item / pieces)];
        hidden_piece(segment, hidden_rows(segment, base), groups * piece / pieces, groups * (piece + 1) / pieces, worker);
    });
}

// Groups [begin, end) of the hidden columns of one expert, for some of its tokens.
void ExpertRun::hidden_piece(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end, int worker) {
    const std::int64_t some = std::min(cached_groups(segment.count), end - begin), stride = row_stride(some * kGroup);
    const std::int64_t groups = acts_.tiles.groups, floats = 2 * (segment.count + 1) * stride * 4;  // with two biases
    const auto extra = static_cast<std::size_t>(floats + (segment.count * token_bytes(groups) + 63) / 64 * 64);
    std::uint8_t* scratch = worker_scratch(worker, extra, acts_.columns, segment.count);
    Activations tokens = acts_;
    tokens.rows = room_.tokens.data() + segment.first;
    tokens.tiles = QuantizedRows::make_tiles(scratch + floats, segment.count, groups);
    if (!is_plain(segment.layout->up.format) || !is_plain(segment.layout->gate.format)) {
        table().quantized.gather(acts_.tiles, tokens.rows, tokens.tiles);
    }
    const HiddenRoom room{tokens, reinterpret_cast<float*>(scratch), stride, worker, extra};
    for (; begin < end; begin += some) hidden_groups(segment, hidden, begin, std::min(begin + some, end), room);
}

// act(gate) * up, and its codes; as it is where `down` is plain.
void ExpertRun::hidden_groups(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end,
                              const HiddenRoom& room) {
    const Matrix gate = ExpertLayout::matrix(segment.layout->gate, segment.record);
    const Matrix up = ExpertLayout::matrix(segment.layout->up, segment.record);
    const std::int64_t first = begin * kGroup, rows = std::min(end * kGroup, up.rows) - first;
    const std::int64_t first_block = first / kRows, last_block = (first + rows + kRows - 1) / kRows;
    const bool keeps_values = is_plain(segment.layout->down.format);
    float* gates = room.floats;
    float* made = keeps_values ? hidden.values + first : gates + segment.count * room.stride;
    float* biases = gates + 2 * segment.count * room.stride;
    const std::int64_t stride = keeps_values ? hidden.stride : room.stride;
    multiply(up, first_block, last_block, room.tokens, made - first, stride, room.worker, room.extra);
    if (gate) multiply(gate, first_block, last_block, room.tokens, gates - first, room.stride, room.worker, room.extra);
    Gating gating{layout_.activation, layout_.alpha, layout_.limit};
    gating.gate_bias = read_vector(segment.layout->gate_bias, segment.record, first, rows, biases);
    gating.up_bias = read_vector(segment.layout->up_bias, segment.record, first, rows, biases + room.stride);
    for (std::int64_t t = 0; t < segment.count; ++t) {
        if (to_.is_input_weighted) gating.weight = slot_weight(segment.first + t);
        float* row = made + t * stride;
        table().quantized.activate(gating, gate ? gates + t * room.stride : nullptr, row, rows, row);
    }
    if (!keeps_values) table().quantized.quantize(made, stride, rows, hidden.tiles, {0, hidden.tiles.tiles, begin, end});
}

// sums += the weighted outputs of segments that follow one another. Parts are runs of output rows.
void ExpertRun::add_outputs(const std::vector<Segment>& segments, std::int64_t base) {
    const std::int64_t blocks = (width() + kRows - 1) / kRows;
    const std::int64_t slots = segments.back().first + segments.back().count - base;
    Pool::shared().run(threads_, blocks, block_grain(blocks, threads_, slots), [&](std::int64_t begin, std::int64_t end, int worker) {
        for (const Segment& segment : segments) {
            const std::int64_t some = kGroup / kRows * cached_groups(segment.count);
            for (std::int64_t at = begin; at < end; at += some) {
                add_output_rows(segment, hidden_rows(segment, base), at, std::min(at + some, end), worker);
            }
        }
    });
}

void ExpertRun::add_output_rows(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end, int worker) {
    const std::int64_t first = begin * kRows, rows = std::min(end * kRows, width()) - first, stride = row_stride(rows);
    const auto extra = static_cast<std::size_t>((segment.count + 1) * stride * 4);
    auto* out = reinterpret_cast<float*>(worker_scratch(worker, extra, layout_.up.rows, segment.count));
    multiply(ExpertLayout::matrix(segment.layout->down, segment.record), begin, end, hidden, out - first, stride, worker, extra);
    const float* bias = read_vector(segment.layout->down_bias, segment.record, first, rows, out + segment.count * stride);
    const auto sum_of = [&](std::int64_t t) {
        return sums_ + room_.tokens[static_cast<std::size_t>(segment.first + t)] * stride_ + first;
    };
    for (std::int64_t t = 0; t < segment.count; ++t) {
        if (t + kFetchAhead < segment.count) fetch_floats(sum_of(t + kFetchAhead), rows);
        table().quantized.add_weighted(sum_of(t), out + t * stride, bias, output_weight(segment.first + t), rows);
    }
}

ResidentExperts::ResidentExperts(const std::uint8_t* memory, std::vector<RecordLayer> layers,
                                 std::vector<std::uint32_t> checksums)
    : memory_(memory), layers_(std::move(layers)), checksums_(std::move(checksums)), verified_(checksums_.size(), 0), counts_(layers_.size()) {
    first_ids_.push_back(0);
    for (const RecordLayer& layer : layers_) first_ids_.push_back(first_ids_.back() + layer.num_experts);
}

const std::uint8_t* ResidentExperts::record(int layer, std::int32_t expert) const {
    const RecordLayer& of = layers_[static_cast<std::size_t>(layer)];
    return memory_ + of.offset + expert * of.record_bytes;
}

void ResidentExperts::want(int layer, const std::int32_t* experts, int count, const Demand&) {
    layer_ = layer;
    wanted_.assign(experts, experts + count);
    taken_ = 0;
    counts_[static_cast<std::size_t>(layer)].hits += count;
    verify(layer, experts, count);
}

int ResidentExperts::take(int most, std::int32_t* experts, Record* records) {
    int count = 0;
    for (; count < most && taken_ < wanted_.size(); ++count, ++taken_) {
        experts[count] = wanted_[taken_];
        records[count] = {record(layer_, experts[count]), false};
    }
    return count;
}

SourceCounts ResidentExperts::counts() {
    SourceCounts made;
    made.layers = counts_;
    return made;
}

void ResidentExperts::verify() {
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        std::vector<std::int32_t> all(static_cast<std::size_t>(layers_[layer].num_experts));
        std::iota(all.begin(), all.end(), 0);
        verify(static_cast<int>(layer), all.data(), static_cast<std::int64_t>(all.size()));
    }
}

void ResidentExperts::verify(int layer, const std::int32_t* experts, std::int64_t count) {
    const RecordLayer& of = layers_[static_cast<std::size_t>(layer)];
    const std::int64_t first = first_ids_[static_cast<std::size_t>(layer)];
    std::vector<std::int32_t> open;
    for (std::int64_t i = 0; i < count; ++i) {
        if (verified_[static_cast<std::size_t>(first + experts[i])] == 0) open.push_back(experts[i]);
    }
    if (open.empty()) return;
    Pool::shared().run(0, static_cast<std::int64_t>(open.size()), 1, [&](std::int64_t i, std::int64_t, int) {
        const std::int32_t expert = open[static_cast<std::size_t>(i)];
        const auto id = static_cast<std::size_t>(first + expert);
        verified_[id] = table().crc32c(0, record(layer, expert), of.record_bytes) == checksums_[id] ? 1 : 0;
    });
    for (const std::int32_t expert : open) {
        if (verified_[static_cast<std::size_t>(first + expert)] == 0) {
            throw ReadError(ReadError::Kind::kChecksum, layer, expert, of.offset + expert * of.record_bytes, 0);
        }
    }
}

}  // namespace fewfire
