#include "store.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

#include "checksum_join.hpp"
#include "dispatch.hpp"
#include "pool.hpp"
#include "reading.hpp"

namespace fewfire {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::int64_t kPartBytes = 512 << 10;  // what one reader reads at a time: a record keeps several busy to its end
constexpr std::int64_t kPage = 4096;         // parts begin and end at multiples of this
constexpr std::int64_t kTrialTokens = 24;    // with and without looking ahead, in turns
constexpr int kTrials = 4;
constexpr auto kSpin = std::chrono::milliseconds(1);  // at most, for parts that are on their way

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::int64_t misses_of(const Residency& residency, int layer) {
    return residency.counts()[static_cast<std::size_t>(layer)].misses;
}

std::vector<std::int64_t> first_ids_of(const std::vector<RecordLayer>& layers) {
    std::vector<std::int64_t> ids{0};
    for (const RecordLayer& layer : layers) ids.push_back(ids.back() + layer.num_experts);
    return ids;
}

}  // namespace

ExpertStore::ExpertStore(std::vector<RecordLayer> layers, std::vector<std::uint32_t> checksums, const StoreSettings& settings)
    : layers_(std::move(layers)),
      first_ids_(first_ids_of(layers_)),
      checksums_(std::move(checksums)),
      settings_(settings),
      residency_(first_ids_, settings.capacity, make_policy(settings.policy, first_ids_)),
      stamp_(stamp_of(settings.file)),
      readings_(static_cast<std::size_t>(first_ids_.back())),
      uses_(static_cast<std::size_t>(first_ids_.back())),
      unready_(layers_.size()),
      populator_(settings.memory, settings.capacity * settings.slot_bytes, settings.touched_bytes),
      looks_ahead_(settings.looks_ahead) {
    for (const RecordLayer& layer : layers_) parts_.push_back(parts_of(layer));
    for (int i = 0; i < std::max(1, settings_.num_readers); ++i) readers_.emplace_back([this] { read_forever(); });
}

ExpertStore::~ExpertStore() {
    {
        const std::lock_guard<std::mutex> lock(guard_);
        ends_ = true;
    }
    work_.notify_all();
    for (std::thread& reader : readers_) reader.join();
    ::close(settings_.file);
}

// ------------------------------------------------------------------------------------------------- the layer's side

void ExpertStore::want(int layer, const std::int32_t* experts, int count, const Demand& demand) {
    layer_ = layer;
    open_.assign(experts, experts + count);
    out_.clear();
    substitutes_ = low_ != nullptr && demand.substitutes && count <= residency_.capacity();
    if (substitutes_) {
        const std::int64_t most_fills = spare_reads(), before = misses_of(residency_, layer);
        residency_.want(layer, experts, count, demand.in_order, demand.reads_ahead, &most_fills);
        missed_ = misses_of(residency_, layer) - before;
    } else {
        residency_.want(layer, experts, count, demand.in_order, demand.reads_ahead);
    }
    {
        const std::lock_guard<std::mutex> lock(guard_);
        for (int i = 0; i < count; ++i) {
            Reading& reading = readings_[static_cast<std::size_t>(id_of(experts[i]))];
            if (reading.is_prefetch && reading.state == State::kReading) ++late_;
            reading.is_prefetch = false;
        }
        // What was only hoped for and is wanted now goes before what is still only hoped for.
        const auto is_wanted = [&](const Job& job) { return !readings_[static_cast<std::size_t>(job.id)].is_prefetch; };
        std::copy_if(prefetched_.begin(), prefetched_.end(), std::back_inserter(wanted_), is_wanted);
        std::erase_if(prefetched_, is_wanted);
    }
    start_fills();
}

int ExpertStore::take(int most, std::int32_t* experts, Record* records) {
    if (open_.empty()) return 0;
    const Clock::time_point start = Clock::now();
    const bool takes_early = !substitutes_ && !residency_.is_in_order();
    bool waits = false;
    std::unique_lock<std::mutex> lock(guard_);
    for (;;) {
        int count = 0;
        std::int64_t substituted = 0;
        std::vector<std::int32_t> left;
        for (const std::int32_t expert : open_) {
            const Reading& reading = readings_[static_cast<std::size_t>(id_of(expert))];
            const bool has_slot = residency_.slot_of(expert) >= 0;
            if (has_slot && reading.state == State::kFailed) fail(id_of(expert));
            const bool blocked = residency_.is_in_order() && !left.empty();
            const bool is_begun = takes_early && reading.state == State::kReading && reading.early_left == 0;
            const bool is_ready = has_slot && (reading.state == State::kReady || is_begun);
            if ((!is_ready && !substitutes_) || count == most || blocked) {
                left.push_back(expert);
                continue;
            }
            experts[count] = expert;
            records[count] = is_ready ? Record{record(residency_.slot_of(expert)), false} : Record{low_->record(layer_, expert), true};
            substituted += is_ready ? 0 : 1;
            ++count;
        }
        if (count > 0) {
            open_ = std::move(left);
            out_.insert(out_.end(), experts, experts + count);
            if (substituted > 0) count_substituted(substituted);
            if (waits) count_wait(seconds_since(start));
            return count;
        }
        waits = true;
        await_progress(lock);
    }
}

void ExpertStore::settle(const std::int32_t* experts, int count) {
    if (substitutes_) return;  // only what is whole was given out
    const Clock::time_point start = Clock::now();
    bool waits = false;
    std::unique_lock<std::mutex> lock(guard_);
    for (int i = 0; i < count; ++i) {
        const Reading& reading = readings_[static_cast<std::size_t>(id_of(experts[i]))];
        for (; reading.state == State::kReading; waits = true) await_progress(lock);
        if (reading.state == State::kFailed) fail(id_of(experts[i]));
    }
    if (waits) count_wait(seconds_since(start));
}

// Until a reader has done something. While the last parts are on their way this thread does not sleep, and has the pool
// woken: waking up takes about as long as what is left to be done with them.
void ExpertStore::await_progress(std::unique_lock<std::mutex>& lock) {
    const std::uint64_t before = progress_.load();
    if (wanted_.empty()) {
        lock.unlock();
        const Clock::time_point until = Clock::now() + kSpin;
        for (int rounds = 1; progress_.load() == before; ++rounds) {
            relax();
            if (rounds % kPatience != 0) continue;
            std::this_thread::yield();
            if (Clock::now() > until) break;
        }
        Pool::shared().rouse();
        lock.lock();
    }
    if (progress_.load() == before) done_.wait(lock);
}

// Under the lock.
void ExpertStore::progress() {
    progress_.fetch_add(1);
    done_.notify_all();
}

void ExpertStore::count_wait(double seconds) {
    waited_s_ += seconds;
    stall_s_ += seconds;
}

// With copies nothing waits, so that reads could pile up, and records leave before they have come: as many are on their
// way as keep the readers busy.
std::int64_t ExpertStore::spare_reads() {
    const std::lock_guard<std::mutex> lock(guard_);
    std::erase_if(wanted_, [&](const Job& job) { return is_stale(job); });
    const std::int64_t parts = (settings_.slot_bytes + kPartBytes - 1) / kPartBytes;
    const std::int64_t pending = (static_cast<std::int64_t>(wanted_.size()) + running_) / parts;
    return std::max<std::int64_t>(0, 2 * static_cast<std::int64_t>(readers_.size()) - pending);
}

void ExpertStore::count_substituted(std::int64_t count) {
    substituted_ += count;
    unready_[static_cast<std::size_t>(layer_)] += std::max<std::int64_t>(0, count - missed_);
}

bool ExpertStore::find_cached(int layer, std::uint8_t* cached) const {
    const std::int64_t first = first_ids_[static_cast<std::size_t>(layer)];
    const std::int64_t count = layers_[static_cast<std::size_t>(layer)].num_experts;
    for (std::int64_t expert = 0; expert < count; ++expert) cached[expert] = residency_.has(first + expert) ? 1 : 0;
    return true;
}

void ExpertStore::give_back(const std::int32_t* experts, int count) {
    for (int i = 0; i < count; ++i) {
        residency_.give_back(experts[i]);
        std::erase(out_, experts[i]);
    }
    start_fills();
}

void ExpertStore::prefetch(int layer, const std::int32_t* experts, int count) {
    residency_.prefetch(layer, experts, count);
    start_fills();
}

double ExpertStore::waited_s() { return std::exchange(waited_s_, 0.0); }

// Parts end where what is late begins and ends, so that few bytes belong to both.
std::vector<ExpertStore::Part> ExpertStore::parts_of(const RecordLayer& layer) {
    const std::int64_t late = (layer.late_offset + kPage - 1) / kPage * kPage;
    const std::int64_t late_end = (layer.late_offset + layer.late_bytes) / kPage * kPage;
    std::vector<Part> parts;
    for (std::int64_t first = 0; first < layer.record_bytes;) {
        const bool is_late = first >= late && first < late_end;
        const std::int64_t end = is_late ? late_end : first < late && late < late_end ? late : layer.record_bytes;
        const std::int64_t count = std::min(kPartBytes, end - first);
        parts.push_back({first, count, is_late});
        first += count;
    }
    return parts;
}

// Every record that Residency gave a slot is read into it; who held the slot before is no longer there.
void ExpertStore::start_fills() {
    const std::vector<Fill> fills = residency_.take_fills();
    if (fills.empty()) return;
    populator_.reach(residency_.slots_used() * settings_.slot_bytes);
    {
        const std::lock_guard<std::mutex> lock(guard_);
        for (const Fill& fill : fills) {
            Reading& reading = readings_[static_cast<std::size_t>(fill.id)];
            const std::vector<Part>& parts = parts_[static_cast<std::size_t>(layer_of_record(first_ids_, fill.id))];
            reading.state = State::kReading;
            reading.error_offset = -1;
            ++reading.turn;
            const std::uint32_t slot_turn = ++uses_[static_cast<std::size_t>(fill.slot)].turn;
            reading.left = parts.size();
            reading.early_left = 0;
            reading.is_prefetch = fill.is_prefetch;
            reading.verifies = settings_.always_verifies || !reading.verified;
            reading.checksums.assign(parts.size(), 0);
            auto& queue = fill.is_prefetch ? prefetched_ : wanted_;
            for (const bool late : {false, true}) {
                for (std::size_t part = 0; part < parts.size(); ++part) {
                    if (parts[part].is_late != late) continue;
                    queue.push_back({fill.id, fill.slot, part, reading.turn, slot_turn});
                    if (!late) ++reading.early_left;
                }
            }
        }
    }
    work_.notify_all();
}

// Nothing of this layer is held any longer, and what is broken is not kept: the next step may try again.
void ExpertStore::abandon() {
    open_.insert(open_.end(), out_.begin(), out_.end());
    residency_.abandon(open_);
    for (const std::int32_t expert : open_) {
        Reading& reading = readings_[static_cast<std::size_t>(id_of(expert))];
        if (reading.state != State::kFailed) continue;
        residency_.forget(expert);
        reading.state = State::kAbsent;
    }
    open_.clear();
    out_.clear();
}

// Where a record begins in the file.
std::int64_t ExpertStore::record_offset(std::int64_t id) const {
    const auto layer = static_cast<std::size_t>(layer_of_record(first_ids_, id));
    return layers_[layer].offset + (id - first_ids_[layer]) * layers_[layer].record_bytes;
}

void ExpertStore::fail(std::int64_t id) {
    const Reading reading = readings_[static_cast<std::size_t>(id)];
    const int layer = layer_of_record(first_ids_, id);
    abandon();
    throw ReadError(reading.kind, layer, static_cast<std::int32_t>(id - first_ids_[static_cast<std::size_t>(layer)]),
                    reading.error_offset, reading.error);
}

// --------------------------------------------------------------------------------------------------------- readers

// Whether a record has left its slot, or comes anew, since it was to be read.
bool ExpertStore::is_stale(const Job& job) const {
    return readings_[static_cast<std::size_t>(job.id)].turn != job.turn || uses_[static_cast<std::size_t>(job.slot)].turn != job.slot_turn;
}

// The first job whose slot nobody else reads into (under the lock). Stale ones are dropped.
bool ExpertStore::next_job(Job& job) {
    for (auto* queue : {&wanted_, &prefetched_}) {
        for (auto at = queue->begin(); at != queue->end();) {
            if (is_stale(*at)) {
                at = queue->erase(at);
                progress();
                continue;
            }
            const SlotUse& use = uses_[static_cast<std::size_t>(at->slot)];
            if (use.running == 0 || use.id == at->id) {
                job = *at;
                queue->erase(at);
                return true;
            }
            ++at;
        }
    }
    return false;
}

void ExpertStore::read_forever() {
    std::unique_lock<std::mutex> lock(guard_);
    for (;;) {
        Job job{};
        work_.wait(lock, [&] { return ends_ || next_job(job); });
        if (ends_) return;
        SlotUse& use = uses_[static_cast<std::size_t>(job.slot)];
        use.id = job.id;
        ++use.running;
        ++running_;
        lock.unlock();
        run(job);
        lock.lock();
        --use.running;
        --running_;
        if (use.running == 0) work_.notify_all();
        progress();
    }
}

void ExpertStore::run(const Job& job) {
    const Part part = parts_[static_cast<std::size_t>(layer_of_record(first_ids_, job.id))][job.part];
    const std::int64_t offset = record_offset(job.id) + part.first;
    std::uint8_t* to = settings_.memory + job.slot * settings_.slot_bytes + part.first;
    bool verifies;
    {
        const std::lock_guard<std::mutex> lock(guard_);
        verifies = readings_[static_cast<std::size_t>(job.id)].verifies;
    }
    const ReadResult result = read_record(settings_.file, offset, part.count, to, verifies);
    if (settings_.drops_cache) posix_fadvise(settings_.file, offset, part.count, POSIX_FADV_DONTNEED);
    std::unique_lock<std::mutex> lock(guard_);
    bytes_read_ += result.done;
    Reading& reading = readings_[static_cast<std::size_t>(job.id)];
    if (is_stale(job)) return;
    if (result.done < part.count && reading.error_offset < 0) {
        reading.kind = result.error != 0 ? ReadError::Kind::kSystem : ReadError::Kind::kShort;
        reading.error = result.error;
        reading.error_offset = offset + result.done;
    }
    reading.checksums[job.part] = result.checksum;
    if (!part.is_late) --reading.early_left;
    if (--reading.left == 0) finish(job, lock);
}

// All parts of a record are there (under the lock, which is given up while a checksum is made).
void ExpertStore::finish(const Job& job, std::unique_lock<std::mutex>& lock) {
    Reading& reading = readings_[static_cast<std::size_t>(job.id)];
    const auto layer = static_cast<std::size_t>(layer_of_record(first_ids_, job.id));
    if (reading.error_offset >= 0) {
        reading.state = State::kFailed;
        return;
    }
    std::uint32_t checksum = 0;
    if (reading.verifies) {
        for (std::size_t part = 0; part < reading.checksums.size(); ++part) {
            checksum = join_checksums(checksum, reading.checksums[part], parts_[layer][part].count);
        }
    } else if (stamp_of(settings_.file) == stamp_) {
        reading.state = State::kReady;
        return;
    } else {  // somebody wrote to the file since it was opened
        lock.unlock();
        checksum = table().crc32c(0, record(job.slot), layers_[layer].record_bytes);
        lock.lock();
        if (is_stale(job)) return;
    }
    reading.verified = checksum == checksums_[static_cast<std::size_t>(job.id)];
    reading.state = reading.verified ? State::kReady : State::kFailed;
    if (reading.verified) return;
    reading.kind = ReadError::Kind::kChecksum;
    reading.error_offset = record_offset(job.id);
}

// ------------------------------------------------------------------------------------------------ from outside

void ExpertStore::set_capacity(std::int64_t slots) {
    const std::int64_t before = residency_.capacity();
    residency_.set_capacity(slots);
    populator_.limit(slots * settings_.slot_bytes);
    std::unique_lock<std::mutex> lock(guard_);
    if (slots < before) {
        done_.wait(lock, [&] { return running_ == 0 && wanted_.empty() && prefetched_.empty(); });
        std::uint8_t* from = settings_.memory + slots * settings_.slot_bytes;
        madvise(from, static_cast<std::size_t>((before - slots) * settings_.slot_bytes), MADV_DONTNEED);
    }
}

std::int64_t ExpertStore::untouched_bytes() {
    const std::int64_t used = residency_.slots_used() * settings_.slot_bytes;
    return std::max<std::int64_t>(0, residency_.capacity() * settings_.slot_bytes - std::max(used, populator_.made()));
}

std::int64_t ExpertStore::seed(const std::vector<std::pair<int, std::int32_t>>& records) {
    std::int64_t seeded = 0;
    for (const auto& [layer, expert] : records) {
        if (!residency_.seed(first_ids_[static_cast<std::size_t>(layer)] + expert)) break;
        ++seeded;
    }
    start_fills();
    return seeded;
}

SourceCounts ExpertStore::counts() {
    const std::lock_guard<std::mutex> lock(guard_);
    std::vector<LayerCounts> layers = residency_.counts();
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        layers[layer].hits -= unready_[layer];
        layers[layer].misses += unready_[layer];
    }
    return {std::move(layers), bytes_read_, residency_.evictions(), late_, stall_s_, looks_ahead_, substituted_, residency_.slots_used()};
}

std::vector<std::pair<int, std::int32_t>> ExpertStore::residents() {
    std::vector<std::pair<int, std::int32_t>> found;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        for (std::int64_t id = first_ids_[layer]; id < first_ids_[layer + 1]; ++id) {
            if (residency_.has(id)) found.emplace_back(static_cast<int>(layer), static_cast<std::int32_t>(id - first_ids_[layer]));
        }
    }
    return found;
}

// Some tokens with looking ahead, some without, a few times over; then what was faster, for good.
void ExpertStore::end_step(std::int64_t tokens, double seconds) {
    if (!settings_.looks_ahead || tokens != 1 || trial_ >= 2 * kTrials) return;
    const auto turn = static_cast<std::size_t>(trial_ % 2);
    trial_s_[turn] += seconds;
    if (++trial_tokens_[turn] % kTrialTokens != 0) return;
    ++trial_;
    looks_ahead_ = trial_ % 2 == 0;
    if (trial_ == 2 * kTrials) looks_ahead_ = trial_s_[0] < trial_s_[1];
}

}  // namespace fewfire
