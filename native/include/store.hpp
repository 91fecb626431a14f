// Experts on disk: records are read into slots under a byte budget, by threads of their own, while the layer goes on with
// those that are here. What is kept and what leaves is Residency's decision.
//
// Threads: want, take, give_back, prefetch and set_capacity by one thread at a time; the readers are inside.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "experts.hpp"
#include "populator.hpp"
#include "reading.hpp"
#include "residency.hpp"

namespace fewfire {

struct StoreSettings {
    int file = -1;                     // open for reading; the store closes it
    bool drops_cache = false;          // tell the system that what was read is not needed again
    bool always_verifies = false;      // every read, not only a record's first
    int num_readers = 4;
    std::int64_t capacity = 0;         // slots
    std::uint8_t* memory = nullptr;    // room for all slots that there may ever be, aligned to 4096
    std::int64_t slot_bytes = 0;       // of the largest record
    std::int64_t touched_bytes = 0;    // at the beginning of `memory`: written to already
    CachePolicy policy = CachePolicy::kLru;
    bool looks_ahead = false;          // the next layer's router is asked beforehand
};

class ExpertStore final : public ExpertSource {
public:
    ExpertStore(std::vector<RecordLayer> layers, std::vector<std::uint32_t> checksums, const StoreSettings& settings);
    ~ExpertStore() override;

    void want(int layer, const std::int32_t* experts, int count, const Demand& demand) override;
    int take(int most, std::int32_t* experts, Record* records) override;
    void settle(const std::int32_t* experts, int count) override;
    bool find_cached(int layer, std::uint8_t* cached) const override;
    void give_back(const std::int32_t* experts, int count) override;
    bool may_wait() const override { return true; }
    double waited_s() override;

    int lookahead() const override { return looks_ahead_ ? 1 : 0; }
    void prefetch(int layer, const std::int32_t* experts, int count) override;
    void end_step(std::int64_t tokens, double seconds) override;

    // Copies in low precision of all records, which stand in where a demand allows it; null: none. They must outlive this.
    void set_low(const ResidentExperts* low) { low_ = low; }

    // So many slots from now on; memory of those beyond is given back to the system.
    void set_capacity(std::int64_t slots);

    // Of the slots, what takes no memory yet: no record has been there, and no page was made ahead.
    std::int64_t untouched_bytes();

    // Reads records (layer, expert pairs) into free slots, as many as there are; returns how many.
    std::int64_t seed(const std::vector<std::pair<int, std::int32_t>>& records);

    SourceCounts counts() override;

    // Experts in memory, as (layer, expert), in rising order.
    std::vector<std::pair<int, std::int32_t>> residents();

private:
    enum class State : std::uint8_t { kAbsent, kReading, kReady, kFailed };

    // Bytes of a record that one reader reads at a time.
    struct Part {
        std::int64_t first, count;
        bool is_late;
    };

    // A part of a record for one reader.
    struct Job {
        std::int64_t id, slot;
        std::size_t part;
        std::uint32_t turn, slot_turn;  // of the record's reading, and of the slot's use, that it belongs to
    };

    struct Reading {
        State state = State::kAbsent;
        std::uint32_t turn = 0;
        std::size_t left = 0, early_left = 0;  // parts that are still to come; those of them that are not late
        bool verifies = false, verified = false, is_prefetch = false;
        std::vector<std::uint32_t> checksums;  // of its parts
        ReadError::Kind kind = ReadError::Kind::kSystem;
        int error = 0;
        std::int64_t error_offset = -1;  // where reading failed
    };

    // Who reads into a slot now: what is to come in next waits for it. Each record that is to come in is a turn.
    struct SlotUse {
        std::int64_t id = -1;
        int running = 0;
        std::uint32_t turn = 0;
    };

    void read_forever();
    bool is_stale(const Job& job) const;
    bool next_job(Job& job);
    void run(const Job& job);
    void abandon();
    void finish(const Job& job, std::unique_lock<std::mutex>& lock);
    static std::vector<Part> parts_of(const RecordLayer& layer);
    void start_fills();
    void await_progress(std::unique_lock<std::mutex>& lock);
    void progress();
    void count_wait(double seconds);
    std::int64_t spare_reads();
    void count_substituted(std::int64_t count);
    std::int64_t id_of(std::int32_t expert) const { return first_ids_[static_cast<std::size_t>(layer_)] + expert; }
    std::int64_t record_offset(std::int64_t id) const;
    const std::uint8_t* record(std::int64_t slot) const { return settings_.memory + slot * settings_.slot_bytes; }
    void fail(std::int64_t id);

    std::vector<RecordLayer> layers_;
    std::vector<std::vector<Part>> parts_;  // of each layer's records, in the order of the file
    std::vector<std::int64_t> first_ids_;
    std::vector<std::uint32_t> checksums_;
    StoreSettings settings_;
    Residency residency_;

    FileStamp stamp_;  // of the file when it was opened; once it differs, every read is compared with its checksum
    std::mutex guard_;
    std::condition_variable work_, done_;
    std::atomic<std::uint64_t> progress_{0};  // steps on the way to a whole record; counted under the lock
    std::deque<Job> wanted_, prefetched_;
    std::vector<Reading> readings_;  // of each record
    std::vector<SlotUse> uses_;      // of each slot
    int running_ = 0;
    bool ends_ = false;
    std::int64_t bytes_read_ = 0, late_ = 0;
    double stall_s_ = 0, waited_s_ = 0;

    const ResidentExperts* low_ = nullptr;
    bool substitutes_ = false;          // whether the layer takes copies for what is not here
    std::int64_t missed_ = 0;           // wanted records of the layer that were in no slot
    std::vector<std::int64_t> unready_; // of each layer: records in a slot, but not read yet, whose copies ran
    std::int64_t substituted_ = 0;

    int layer_ = 0;
    std::vector<std::int32_t> open_, out_;  // wanted experts that were not taken yet, rising; taken ones
    std::vector<std::thread> readers_;
    Populator populator_;  // of slots that no record has been in

    // Looking ahead is tried in turns with not doing so, and kept while it makes tokens faster.
    bool looks_ahead_ = false;
    int trial_ = 0;
    std::array<double, 2> trial_s_{};
    std::array<std::int64_t, 2> trial_tokens_{};
};

}  // namespace fewfire
