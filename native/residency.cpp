#include "residency.hpp"

#include <algorithm>
#include <utility>

namespace fewfire {
namespace {

// Slots through which records pass in prefill: as many as keep the disk busy while one is used, and never so many that
// the cache is gone.
std::int64_t window_size(std::int64_t capacity) { return std::clamp<std::int64_t>(capacity / 4, 2, 16); }

}  // namespace

Residency::Residency(std::vector<std::int64_t> first_ids, std::int64_t capacity, std::unique_ptr<Policy> policy)
    : first_ids_(std::move(first_ids)), capacity_(capacity), policy_(std::move(policy)) {
    const auto count = static_cast<std::size_t>(num_records());
    slots_.assign(count, -1);
    pins_.assign(count, 0);
    passes_.assign(count, 0);
    prefetched_.assign(count, 0);
    counts_.resize(first_ids_.size() - 1);
    held_.assign(first_ids_.size() - 1, 0);
}

void Residency::want(int layer, const std::int32_t* experts, int count, bool in_order, bool reads_ahead,
                     const std::int64_t* most_fills) {
    in_order_ = in_order || count > capacity_;
    reads_ahead_ = reads_ahead && in_order_;
    policy_->want(layer, experts, count);
    if (ahead_layer_ != layer) end_prefetches();  // a layer that wanted nothing was passed over
    end_prefetches(layer, experts, count);
    if (in_order_) {
        make_window(layer, experts, count);
    } else {
        dissolve_window();
    }
    layer_ = layer;
    LayerCounts& counts = counts_[static_cast<std::size_t>(layer)];
    std::vector<std::int64_t> missing;
    for (int i = 0; i < count; ++i) {
        const std::int64_t id = id_of(layer, experts[i]);
        const auto at = static_cast<std::size_t>(id);
        ++pins_[at];
        if (slots_[at] < 0) {
            ++counts.misses;
            missing.push_back(id);
        } else if (prefetched_[at] != 0) {  // it had to be read, though earlier
            ++counts.misses;
            ++counts.prefetch_useful;
            prefetched_[at] = 0;
            --pins_[at];
        } else {
            ++counts.hits;
            policy_->hit(id);
        }
    }
    if (most_fills != nullptr) {
        if (static_cast<std::int64_t>(missing.size()) > *most_fills) missing.resize(static_cast<std::size_t>(*most_fills));
        for (const std::int64_t id : missing) assign(id, false);
        return;
    }
    for (const std::int64_t id : missing) {
        if (!waiting_.empty() || !assign(id, false)) waiting_.push_back(id);
    }
    read_ahead();
}

void Residency::give_back(std::int32_t expert) {
    const std::int64_t id = id_of(layer_, expert);
    const auto at = static_cast<std::size_t>(id);
    --pins_[at];
    if (pins_[at] == 0) end_passing(id);
    shrink();
    while (!waiting_.empty() && assign(waiting_.front(), false)) waiting_.pop_front();
    read_ahead();
}

// A slot for a record: a free one; one by eviction; in order, one of the window, if the layer has its share of them all.
bool Residency::assign(std::int64_t id, bool is_prefetch) {
    std::int64_t slot = in_order_ && room_of(layer_of_record(first_ids_, id)) == 0 ? -1 : free_slot();
    if (slot < 0 && !in_order_) slot = slot_by_eviction();
    if (slot >= 0) {
        place(id, slot, is_prefetch);
        return true;
    }
    if (!in_order_ || window_.empty()) return false;
    pass_through(id, is_prefetch);
    return true;
}

void Residency::place(std::int64_t id, std::int64_t slot, bool is_prefetch) {
    slots_[static_cast<std::size_t>(id)] = slot;
    ++held_[static_cast<std::size_t>(layer_of_record(first_ids_, id))];
    policy_->insert(id);
    fills_.push_back({id, slot, is_prefetch});
}

// Through the window's last slot.
void Residency::pass_through(std::int64_t id, bool is_prefetch) {
    const std::int64_t slot = window_.back();
    window_.pop_back();
    slots_[static_cast<std::size_t>(id)] = slot;
    passes_[static_cast<std::size_t>(id)] = 1;
    fills_.push_back({id, slot, is_prefetch});
}

// The slot of what passed through is the window's again.
void Residency::end_passing(std::int64_t id) {
    const auto at = static_cast<std::size_t>(id);
    if (passes_[at] == 0) return;
    window_.push_back(slots_[at]);
    passes_[at] = 0;
    slots_[at] = -1;
}

// Holds a record for layer ahead_layer_.
void Residency::expect(std::int64_t id) {
    const auto at = static_cast<std::size_t>(id);
    ++pins_[at];
    prefetched_[at] = 1;
    ahead_.push_back(id);
}

std::int64_t Residency::num_free() const { return static_cast<std::int64_t>(free_.size()) + capacity_ - next_slot_; }

// Free slots that a prompt may fill with a layer's records: all layers get alike of an empty cache, so that in each of them
// some experts can be computed while others are read.
std::int64_t Residency::room_of(int layer) const {
    const auto at = static_cast<std::size_t>(layer);
    const std::int64_t share = (capacity_ * (first_ids_[at + 1] - first_ids_[at]) + num_records() - 1) / num_records();
    return std::clamp<std::int64_t>(share - held_[at], 0, std::max<std::int64_t>(0, num_free()));
}

std::int64_t Residency::free_slot() {
    if (!free_.empty()) {
        const std::int64_t slot = free_.back();
        free_.pop_back();
        return slot;
    }
    return next_slot_ < capacity_ ? next_slot_++ : -1;
}

std::int64_t Residency::slot_by_eviction() {
    const std::int64_t id = policy_->victim(pins_);
    if (id < 0) return -1;
    const std::int64_t slot = slots_[static_cast<std::size_t>(id)];
    drop(id);
    ++evictions_;
    return slot;
}

void Residency::drop(std::int64_t id) {
    policy_->remove(id);
    slots_[static_cast<std::size_t>(id)] = -1;
    --held_[static_cast<std::size_t>(layer_of_record(first_ids_, id))];
}

// What was brought in for `layer`: kept if it is wanted, else no longer held.
void Residency::end_prefetches(int layer, const std::int32_t* experts, int count) {
    if (layer != ahead_layer_) return;
    for (const std::int64_t id : ahead_) {
        const auto expert = static_cast<std::int32_t>(id - first_ids_[static_cast<std::size_t>(layer)]);
        if (std::binary_search(experts, experts + count, expert)) continue;
        const auto at = static_cast<std::size_t>(id);
        --pins_[at];
        prefetched_[at] = 0;
        ++counts_[static_cast<std::size_t>(layer)].prefetch_wasted;
        end_passing(id);
    }
    ahead_.clear();
    ahead_layer_ = -1;
}

void Residency::abandon(const std::vector<std::int32_t>& experts) {
    waiting_.clear();
    reads_ahead_ = false;
    for (const std::int32_t expert : experts) give_back(expert);
    end_prefetches();
}

void Residency::end_prefetches() {
    if (ahead_layer_ >= 0) end_prefetches(ahead_layer_, nullptr, 0);
}

void Residency::prefetch(int layer, const std::int32_t* experts, int count) {
    if (in_order_ || ahead_layer_ >= 0) return;
    ahead_layer_ = layer;
    for (int i = 0; i < count; ++i) {
        const std::int64_t id = id_of(layer, experts[i]);
        if (has(id) || static_cast<std::int64_t>(ahead_.size()) >= capacity_ / 4) continue;
        if (!assign(id, true)) break;
        expect(id);
    }
}

// While slots of the window are idle, the next layer's records that are not in memory come in, in order.
void Residency::read_ahead() {
    const int next = layer_ + 1;
    if (!reads_ahead_ || !waiting_.empty() || next >= static_cast<int>(counts_.size())) return;
    if (ahead_layer_ != next) {
        ahead_layer_ = next;
        ahead_next_ = first_ids_[static_cast<std::size_t>(next)];
    }
    while (!window_.empty() && ahead_next_ < first_ids_[static_cast<std::size_t>(next) + 1]) {
        const std::int64_t id = ahead_next_++;
        if (has(id)) continue;
        pass_through(id, true);
        expect(id);
    }
}

// Slots for what passes through, before anything of this layer is pinned: then there is always one to go on with.
void Residency::make_window(int layer, const std::int32_t* experts, int count) {
    std::int64_t missing = 0;
    for (int i = 0; i < count; ++i) missing += slots_[static_cast<std::size_t>(id_of(layer, experts[i]))] < 0 ? 1 : 0;
    const std::int64_t room = room_of(layer);
    while (window_slots_ < std::min(window_size(capacity_), missing - room)) {
        std::int64_t slot = num_free() > room ? free_slot() : slot_by_eviction();
        if (slot < 0) slot = free_slot();
        if (slot < 0) return;
        window_.push_back(slot);
        ++window_slots_;
    }
}

void Residency::dissolve_window() {
    for (const std::int64_t slot : window_) free_.push_back(slot);
    window_.clear();
    window_slots_ = 0;
    shrink();
}

std::vector<Fill> Residency::take_fills() { return std::exchange(fills_, {}); }

void Residency::set_capacity(std::int64_t capacity) {
    end_prefetches();
    capacity_ = capacity;
    shrink();
}

// Slots from `capacity_` on are given up as far as nothing pinned is in them.
void Residency::shrink() {
    if (next_slot_ <= capacity_) return;
    const auto beyond = [&](std::int64_t slot) { return slot >= capacity_; };
    std::erase_if(free_, beyond);
    window_slots_ -= static_cast<std::int64_t>(std::erase_if(window_, beyond));
    bool held = false;
    for (std::int64_t id = 0; id < num_records(); ++id) {
        const auto at = static_cast<std::size_t>(id);
        if (slots_[at] < capacity_) continue;
        if (pins_[at] != 0 || passes_[at] != 0) {
            held = true;
            continue;
        }
        drop(id);
        ++evictions_;
    }
    if (!held) next_slot_ = capacity_;
}

void Residency::forget(std::int32_t expert) {
    const std::int64_t id = id_of(layer_, expert), slot = slots_[static_cast<std::size_t>(id)];
    if (slot < 0) return;
    drop(id);
    free_.push_back(slot);
}

bool Residency::seed(std::int64_t id) {
    if (slots_[static_cast<std::size_t>(id)] >= 0) return true;
    const std::int64_t slot = free_slot();
    if (slot < 0) return false;
    place(id, slot, true);
    return true;
}

Simulated simulate(CachePolicy kind, const std::vector<std::int64_t>& first_ids, std::int64_t capacity,
                   const std::vector<TraceEvent>& events, const std::vector<std::int32_t>& experts) {
    std::vector<std::int64_t> wanted;
    for (const TraceEvent& event : events) {
        for (std::int64_t i = 0; i < event.count; ++i) {
            wanted.push_back(first_ids[static_cast<std::size_t>(event.layer)] + experts[static_cast<std::size_t>(event.first + i)]);
        }
    }
    const std::int64_t count = first_ids.back();
    std::unique_ptr<Policy> policy = kind == CachePolicy::kBelady ? make_belady(count, wanted) : make_policy(kind, first_ids);
    Policy& known = *policy;
    Residency residency(first_ids, capacity, std::move(policy));
    std::int64_t now = 0;
    for (const TraceEvent& event : events) {
        const std::int32_t* of = experts.data() + event.first;
        known.at(now + event.count);
        residency.want(event.layer, of, static_cast<int>(event.count), event.in_order, event.reads_ahead);
        for (std::int64_t i = 0; i < event.count; ++i) residency.give_back(of[i]);
        now += event.count;
        residency.take_fills();
    }
    Simulated made;
    made.layers = residency.counts();
    made.evictions = residency.evictions();
    for (const LayerCounts& layer : made.layers) {
        made.hits += layer.hits;
        made.misses += layer.misses;
    }
    return made;
}

}  // namespace fewfire
