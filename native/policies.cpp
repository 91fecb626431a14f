// The policies by which records leave memory.
#include <algorithm>
#include <limits>
#include <list>
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

std::unique_ptr<Policy> make_policy(CachePolicy kind, const std::vector<std::int64_t>& first_ids) {
    const std::int64_t count = first_ids.back();
    switch (kind) {
        case CachePolicy::kLfru: return make_lfru(first_ids);
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
