// The policies by which records leave memory.
#include <algorithm>
#include <functional>
#include <limits>
#include <list>
#include <map>
#include <set>
#include <utility>

#include "residency.hpp"

namespace fewfire {
namespace {

// Records by a key that only changes when they are wanted: the smallest that may leave goes first. Equal keys: lower id.
class Ordered : public Policy {
public:
    explicit Ordered(std::int64_t count) : keys_(static_cast<std::size_t>(count), 0.0), in_(static_cast<std::size_t>(count), 0) {}

    void remove(std::int64_t id) override {
        order_.erase({keys_[static_cast<std::size_t>(id)], id});
        in_[static_cast<std::size_t>(id)] = 0;
    }
    std::int64_t victim(const std::vector<std::int32_t>& pins) const override {
        for (const auto& [key, id] : order_) {
            if (pins[static_cast<std::size_t>(id)] == 0) return id;
        }
        return -1;
    }

protected:
    void set_key(std::int64_t id, double key) {
        const auto at = static_cast<std::size_t>(id);
        if (in_[at] != 0) order_.erase({keys_[at], id});
        keys_[at] = key;
        in_[at] = 1;
        order_.insert({key, id});
    }
    double key(std::int64_t id) const { return keys_[static_cast<std::size_t>(id)]; }

private:
    std::vector<double> keys_;
    std::vector<std::uint8_t> in_;
    std::set<std::pair<double, std::int64_t>> order_;
};

// Least recently used.
class Lru final : public Ordered {
public:
    using Ordered::Ordered;
    void hit(std::int64_t id) override { set_key(id, static_cast<double>(++clock_)); }
    void insert(std::int64_t id) override { hit(id); }

private:
    std::int64_t clock_ = 0;
};

// How probably a record is wanted when its layer runs next: the fading share of turns in which it was, and more for those of
// the layer's last turn (Lee et al., LRFU, 2001, with two memories in place of one). How much more is learned: it is the
// share of the last turn's records that come again beyond what their fading shares explain.
class Lfru final : public Policy {
public:
    explicit Lfru(std::int64_t count) : records_(static_cast<std::size_t>(count)) {}

    void want(std::int64_t first_id, const std::int32_t* experts, int count) override {
        if (first_id <= turn_) pass();
        turn_ = first_id;
        std::vector<std::int64_t>& last = last_[first_id];
        learn(last, first_id, experts, count);
        for (const std::int64_t id : last) {
            record(id).is_last = false;
            push(id);
        }
        last.clear();
        for (int i = 0; i < count; ++i) {
            const std::int64_t id = first_id + experts[i];
            last.push_back(id);
            record(id).is_last = true;
            record(id).sum += weight_;
            push(id);
        }
    }
    void hit(std::int64_t) override {}
    void insert(std::int64_t id) override {
        Record& of = record(id);
        if (!of.is_last) of.sum = std::max(of.sum, weight_);  // expected, but not wanted yet
        of.is_in = true;
        push(id);
    }
    void remove(std::int64_t id) override { record(id).is_in = false; }

    std::int64_t victim(const std::vector<std::int32_t>& pins) const override {
        const Entry other = least(others_, false, pins), recent = least(recent_, true, pins);
        if (other.second < 0 || recent.second < 0) return std::max(other.second, recent.second);
        const double bonus = reuse();
        const bool keeps_recent = (1 - bonus) * share(other.first) <= (1 - bonus) * share(recent.first) + bonus;
        return keeps_recent ? other.second : recent.second;
    }

private:
    using Entry = std::pair<double, std::int64_t>;
    using Heap = std::vector<Entry>;  // the least first; an entry whose record has changed since is no longer true
    struct Record {
        double sum = 0;  // of the weights of the turns in which it was wanted
        bool is_in = false, is_last = false;
    };
    static constexpr double kGrowth = 1.0108892860517005;  // 2^(1/64): a turn counts half after 64 more
    static constexpr double kMost = 0x1p500;
    static constexpr double kFade = 255.0 / 256;  // of what is learned, a layer's turn

    Record& record(std::int64_t id) { return records_[static_cast<std::size_t>(id)]; }
    double share(double sum) const { return std::min(1.0, sum * (1 - 1 / kGrowth) / weight_); }
    double reuse() const { return again_ > expected_ ? (again_ - expected_) / (seen_ - expected_) : 0.0; }

    void push(std::int64_t id) {
        const Record& of = record(id);
        if (!of.is_in) return;
        Heap& heap = of.is_last ? recent_ : others_;
        if (heap.size() > 4 * records_.size()) return tidy();
        heap.emplace_back(of.sum, id);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }

    // The least of `heap` that may leave; an id of -1 where there is none. What is not true is dropped.
    Entry least(Heap& heap, bool is_last, const std::vector<std::int32_t>& pins) const {
        Heap pinned;
        Entry found{0, -1};
        while (!heap.empty() && found.second < 0) {
            const Entry top = heap.front();
            const auto at = static_cast<std::size_t>(top.second);
            const Record& of = records_[at];
            const bool is_true = of.is_in && of.is_last == is_last && of.sum == top.first;
            if (is_true && pins[at] == 0) {
                found = top;
                break;
            }
            std::pop_heap(heap.begin(), heap.end(), std::greater<>());
            heap.pop_back();
            if (is_true) pinned.push_back(top);
        }
        for (const Entry& entry : pinned) {
            heap.push_back(entry);
            std::push_heap(heap.begin(), heap.end(), std::greater<>());
        }
        return found;
    }

    // Heaps of what is true only.
    void tidy() {
        recent_.clear(), others_.clear();
        for (std::size_t id = 0; id < records_.size(); ++id) {
            const Record& of = records_[id];
            if (of.is_in) (of.is_last ? recent_ : others_).emplace_back(of.sum, static_cast<std::int64_t>(id));
        }
        std::make_heap(recent_.begin(), recent_.end(), std::greater<>());
        std::make_heap(others_.begin(), others_.end(), std::greater<>());
    }

    // All layers have run: what was before counts less.
    void pass() {
        weight_ *= kGrowth;
        if (weight_ < kMost) return;
        weight_ /= kMost;
        for (Record& of : records_) of.sum /= kMost;
        tidy();
    }

    void learn(const std::vector<std::int64_t>& last, std::int64_t first_id, const std::int32_t* experts, int count) {
        if (last.empty()) return;
        again_ *= kFade, expected_ *= kFade, seen_ *= kFade;
        for (const std::int64_t id : last) {
            again_ += std::binary_search(experts, experts + count, static_cast<std::int32_t>(id - first_id)) ? 1 : 0;
            expected_ += share(record(id).sum);
            seen_ += 1;
        }
    }

    std::vector<Record> records_;
    mutable Heap recent_, others_;  // records that are in: those of their layer's last turn, and the others
    std::map<std::int64_t, std::vector<std::int64_t>> last_;  // by a layer's first id: what its last turn wanted
    std::int64_t turn_ = -1;
    double weight_ = 1;
    double again_ = 1, expected_ = 0, seen_ = 4;
};

// A short queue for what is new, a long one for what was wanted again, and a memory of what left the short one (Yang et
// al., FIFO queues are all you need, 2023).
class S3Fifo final : public Policy {
public:
    explicit S3Fifo(std::int64_t count) : records_(static_cast<std::size_t>(count)) {}

    void hit(std::int64_t id) override {
        Record& of = record(id);
        of.uses = std::min(of.uses + 1, 3);
    }
    void insert(std::int64_t id) override {
        Record& of = record(id);
        of.is_main = of.ghost > 0 && clock_ - of.ghost <= static_cast<std::int64_t>(main_.size() + small_.size());
        auto& queue = of.is_main ? main_ : small_;
        of.place = queue.insert(queue.end(), id);
        of.uses = 0;
    }
    void remove(std::int64_t id) override {
        Record& of = record(id);
        if (!of.is_main) of.ghost = ++clock_;
        (of.is_main ? main_ : small_).erase(of.place);
    }
    std::int64_t victim(const std::vector<std::int32_t>& pins) const override {
        auto& self = const_cast<S3Fifo&>(*this);
        const std::size_t all = small_.size() + main_.size();
        for (std::size_t tries = 0; tries < 5 * all + 1; ++tries) {
            const bool from_small = small_.size() * 10 > all || main_.empty();
            auto& queue = from_small ? self.small_ : self.main_;
            if (queue.empty()) return -1;
            const std::int64_t id = queue.front();
            Record& of = self.record(id);
            if (pins[static_cast<std::size_t>(id)] == 0 && of.uses == 0) return id;
            // Wanted since it came: to the long queue, or round again.
            const bool pinned = pins[static_cast<std::size_t>(id)] != 0;
            if (!pinned) of.uses -= 1;
            of.is_main = of.is_main || !pinned;
            auto& to = of.is_main ? self.main_ : self.small_;
            to.splice(to.end(), queue, of.place);
        }
        for (const auto* queue : {&small_, &main_}) {
            for (const std::int64_t id : *queue) {
                if (pins[static_cast<std::size_t>(id)] == 0) return id;
            }
        }
        return -1;
    }

private:
    struct Record {
        std::list<std::int64_t>::iterator place;
        int uses = 0;
        bool is_main = false;
        std::int64_t ghost = 0;
    };
    Record& record(std::int64_t id) { return records_[static_cast<std::size_t>(id)]; }

    std::vector<Record> records_;
    std::list<std::int64_t> small_, main_;
    std::int64_t clock_ = 0;
};

// What will be wanted latest leaves first: no policy misses less often.
class Belady final : public Ordered {
public:
    Belady(std::int64_t count, const std::vector<std::int64_t>& wanted)
        : Ordered(count), uses_(static_cast<std::size_t>(count)) {
        for (std::size_t i = 0; i < wanted.size(); ++i) uses_[static_cast<std::size_t>(wanted[i])].push_back(static_cast<std::int64_t>(i));
    }
    void hit(std::int64_t id) override {
        const auto& uses = uses_[static_cast<std::size_t>(id)];
        const auto next = std::lower_bound(uses.begin(), uses.end(), now_);
        set_key(id, next == uses.end() ? -std::numeric_limits<double>::infinity() : -static_cast<double>(*next));
    }
    void insert(std::int64_t id) override { hit(id); }
    void at(std::int64_t next) override { now_ = next; }

private:
    std::vector<std::vector<std::int64_t>> uses_;
    std::int64_t now_ = 0;
};

}  // namespace

std::unique_ptr<Policy> make_policy(CachePolicy kind, std::int64_t count) {
    switch (kind) {
        case CachePolicy::kLfru: return std::make_unique<Lfru>(count);
        case CachePolicy::kS3Fifo: return std::make_unique<S3Fifo>(count);
        case CachePolicy::kLru:
        case CachePolicy::kBelady: break;
    }
    return std::make_unique<Lru>(count);
}

std::unique_ptr<Policy> make_belady(std::int64_t count, const std::vector<std::int64_t>& wanted) {
    return std::make_unique<Belady>(count, wanted);
}

}  // namespace fewfire
