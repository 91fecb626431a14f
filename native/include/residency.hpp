// Which records are in memory: slots, pins, and the policy by which records leave. No file, no thread, no clock: the store
// acts on these decisions, and the simulator replays them, so that what is predicted is what happens.
//
// Deterministic: the same calls give the same decisions, however fast a disk is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "counts.hpp"

namespace fewfire {

enum class CachePolicy : std::int32_t { kLru, kLfru, kS3Fifo, kBelady };

// The order in which records leave. Ids are 0 .. count - 1. Threads: none of its own.
class Policy {
public:
    virtual ~Policy() = default;
    // A layer runs now and wants these experts of it, rising. Comes before their hits and inserts.
    virtual void want(int, const std::int32_t*, int) {}
    virtual void hit(std::int64_t id) = 0;     // a record that is in was wanted
    virtual void insert(std::int64_t id) = 0;  // a record comes in; it was wanted now
    virtual void remove(std::int64_t id) = 0;  // a record leaves
    // The record that leaves next of those that `may_leave`; -1 where none may.
    virtual std::int64_t victim(const std::vector<std::int32_t>& pins) const = 0;
    // Where in the trace what comes after the present use begins, for a policy that knows the future.
    virtual void at(std::int64_t) {}
};

// The layer of a record. `first_ids`: where each layer's records begin, and the count at the end.
inline int layer_of_record(const std::vector<std::int64_t>& first_ids, std::int64_t id) {
    return static_cast<int>(std::upper_bound(first_ids.begin(), first_ids.end(), id) - first_ids.begin()) - 1;
}

std::unique_ptr<Policy> make_policy(CachePolicy kind, const std::vector<std::int64_t>& first_ids);
std::unique_ptr<Policy> make_lfru(const std::vector<std::int64_t>& first_ids);

// Belady's: the record that is wanted latest leaves. `wanted`: the ids of the whole trace, one after the other.
std::unique_ptr<Policy> make_belady(std::int64_t count, const std::vector<std::int64_t>& wanted);

// What must be read into which slot.
struct Fill {
    std::int64_t id, slot;
    bool is_prefetch;
};

class Residency {
public:
    // `first_ids` says where each layer's records begin, and the count at the end.
    Residency(std::vector<std::int64_t> first_ids, std::int64_t capacity, std::unique_ptr<Policy> policy);

    // The experts that `layer` runs now, distinct and rising. in_order: they will be given back in that order, and what
    // is not in memory passes through a few slots without pushing out what is, or fills the layer's share of free ones.
    // `reads_ahead`: the next layer will want nearly all of its experts. `most_fills`: no more than so many of the
    // missing come in, and nobody waits for them; null: all.
    void want(int layer, const std::int32_t* experts, int count, bool in_order, bool reads_ahead,
              const std::int64_t* most_fills = nullptr);

    // The layer is done with an expert.
    void give_back(std::int32_t expert);

    // The layer ends without the experts that it has not given back: nothing is pinned or expected any longer.
    void abandon(const std::vector<std::int32_t>& experts);

    // Experts that `layer`, a later one, will probably want.
    void prefetch(int layer, const std::int32_t* experts, int count);

    // What has to be read, in order, since this was last asked.
    std::vector<Fill> take_fills();

    // Where a record of the current layer is or will be; -1 while it has no slot yet.
    std::int64_t slot_of(std::int32_t expert) const { return slots_[static_cast<std::size_t>(first_ids_[static_cast<std::size_t>(layer_)] + expert)]; }

    // From now on so many slots; records beyond leave, pinned ones when they are given back.
    void set_capacity(std::int64_t capacity);

    // What was brought in for a later layer is no longer expected.
    void end_prefetches();

    // The record of `expert` of the current layer, no longer pinned, is not what it should be: it leaves.
    void forget(std::int32_t expert);

    // Brings in a record before it is wanted, if there is a free slot (a hot set).
    bool seed(std::int64_t id);

    bool has(std::int64_t id) const { return slots_[static_cast<std::size_t>(id)] >= 0; }
    std::int64_t capacity() const { return capacity_; }
    std::int64_t num_records() const { return first_ids_.back(); }
    bool is_in_order() const { return in_order_; }
    const std::vector<LayerCounts>& counts() const { return counts_; }
    std::int64_t evictions() const { return evictions_; }

    // Slots that held something since they were last given up.
    std::int64_t slots_used() const { return next_slot_; }

private:
    std::int64_t id_of(int layer, std::int32_t expert) const { return first_ids_[static_cast<std::size_t>(layer)] + expert; }
    std::int64_t num_free() const;
    std::int64_t room_of(int layer) const;
    std::int64_t free_slot();
    std::int64_t slot_by_eviction();
    void place(std::int64_t id, std::int64_t slot, bool is_prefetch);
    void pass_through(std::int64_t id, bool is_prefetch);
    void end_passing(std::int64_t id);
    void expect(std::int64_t id);
    bool assign(std::int64_t id, bool is_prefetch);
    void drop(std::int64_t id);
    void end_prefetches(int layer, const std::int32_t* experts, int count);
    void make_window(int layer, const std::int32_t* experts, int count);
    void dissolve_window();
    void read_ahead();
    void shrink();

    std::vector<std::int64_t> first_ids_;
    std::int64_t capacity_, next_slot_ = 0, evictions_ = 0;
    std::unique_ptr<Policy> policy_;
    std::vector<std::int64_t> slots_;        // of each record, or -1
    std::vector<std::int32_t> pins_;         // of each record
    std::vector<std::uint8_t> passes_;       // whether a record only passes through
    std::vector<std::uint8_t> prefetched_;   // brought in for a layer that has not come yet
    std::vector<std::int64_t> free_, window_;  // slots that hold nothing: for all, and for what passes through
    std::int64_t window_slots_ = 0;            // slots set aside for passing through, in use ones included
    std::deque<std::int64_t> waiting_;         // wanted records without a slot, in order
    std::vector<std::int64_t> ahead_;          // records that wait for layer ahead_layer_
    int layer_ = 0, ahead_layer_ = -1;
    std::int64_t ahead_next_ = 0;
    bool in_order_ = false, reads_ahead_ = false;
    std::vector<Fill> fills_;
    std::vector<LayerCounts> counts_;
    std::vector<std::int64_t> held_;  // of each layer: records in slots of their own
};

// One use of a layer in a trace.
struct TraceEvent {
    std::int32_t layer;
    std::int64_t first, count;  // of the trace's experts, distinct and rising
    bool in_order, reads_ahead;
};

struct Simulated {
    std::int64_t hits = 0, misses = 0, evictions = 0;
    std::vector<LayerCounts> layers;
};

// A trace through a cache of `capacity` slots.
Simulated simulate(CachePolicy kind, const std::vector<std::int64_t>& first_ids, std::int64_t capacity,
                   const std::vector<TraceEvent>& events, const std::vector<std::int32_t>& experts);

}  // namespace fewfire
