// The default policy: the record that is least probably wanted next leaves.
#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "residency.hpp"

namespace fewfire {
namespace {

// How probably a record is wanted when its layer runs next, over how long its slot waits for that. The chance: the fading
// share of turns in which it was wanted, and more for those of the layer's last turn (Lee et al., LRFU, 2001, with shares and
// the last turn kept apart). How much more is learned: it is the share of the last turn's records that come again beyond what
// their fading shares explain. How fast shares fade is learned, too: of three half-lives, that whose chances have lately been
// nearest to what was wanted (the smallest sum of squares).
class Lfru final : public Policy {
public:
    explicit Lfru(const std::vector<std::int64_t>& first_ids)
        : first_ids_(first_ids),
          records_(static_cast<std::size_t>(first_ids.back())),
          layers_(first_ids.size() - 1),
          turn_(static_cast<int>(layers_.size()) - 1) {}

    void want(int now, const std::int32_t* experts, int count) override {
        if (now <= turn_) pass();
        turn_ = now;
        Layer& layer = layers_[static_cast<std::size_t>(now)];
        const std::int64_t first_id = first_ids_[static_cast<std::size_t>(now)];
        learn(layer, first_id, experts, count);
        for (const std::int64_t id : layer.last) {
            record(id).is_last = false;
            push(now, id);
        }
        layer.last.clear();
        for (int i = 0; i < count; ++i) {
            const std::int64_t id = first_id + experts[i];
            layer.last.push_back(id);
            Record& of = record(id);
            of.is_last = true;
            for (int m = 0; m < kMemories; ++m) set_sum(layer, of, m, of.sums[m] + memories_[m].weight);
            push(now, id);
        }
    }
    void hit(std::int64_t) override {}
    void insert(std::int64_t id) override {
        Record& of = record(id);
        const int index = layer_of_record(first_ids_, id);
        Layer& layer = layers_[static_cast<std::size_t>(index)];
        for (int m = 0; m < kMemories && !of.is_last; ++m) {  // expected, but not wanted yet
            set_sum(layer, of, m, std::max(of.sums[m], memories_[m].weight));
        }
        of.is_in = true;
        push(index, id);
    }
    void remove(std::int64_t id) override { record(id).is_in = false; }

    std::int64_t victim(const std::vector<std::int32_t>& pins) const override {
        const double bonus = reuse(used_), fades = (1 - bonus) / (memories_[used_].total + memories_[used_].weight);
        Entry found{0, -1};
        const int num_layers = static_cast<int>(layers_.size());
        for (int index = 0; index < num_layers; ++index) {
            const Layer& layer = layers_[static_cast<std::size_t>(index)];
            const int turns = (index + num_layers - turn_ - 1) % num_layers + 1;
            const double waits = 1 + static_cast<double>(turns) / num_layers;
            for (const bool is_last : {false, true}) {
                const Entry least = least_of(is_last ? layer.recent : layer.others, is_last, pins);
                const double worth = (fades * least.first + (is_last ? bonus : 0)) / waits;
                if (least.second >= 0 && (found.second < 0 || worth < found.first)) found = {worth, least.second};
            }
        }
        return found.second;
    }

private:
    using Entry = std::pair<double, std::int64_t>;
    using Heap = std::vector<Entry>;  // the least first; an entry whose record has changed since is no longer true
    static constexpr int kMemories = 3;
    struct Record {
        double sums[kMemories] = {};  // of the weights of the turns in which it was wanted
        bool is_in = false, is_last = false;
    };
    struct Layer {
        std::vector<std::int64_t> last;  // what its last turn wanted
        double squares[kMemories] = {};  // the sum of its records' squared sums
        mutable Heap recent, others;     // records that are in: those of the last turn, and the others
    };
    struct Memory {                    // one half-life
        double growth;                 // of a turn's weight from one pass over all layers to the next
        double weight = 1, total = 0;  // of a turn of the present pass, and of all before it
        double expected = 0;           // of the last turns' records: how many come again by their shares
        double error = 0;              // how far its chances were from what was wanted
    };
    static constexpr double kMost = 0x1p400;
    static constexpr double kFade = 255.0 / 256;              // of what is learned of reuse, a layer's turn
    static constexpr double kErrorFade = 0.9892280131939755;  // 2^(-1/64): of errors, a pass

    Record& record(std::int64_t id) { return records_[static_cast<std::size_t>(id)]; }
    const Record& record(std::int64_t id) const { return records_[static_cast<std::size_t>(id)]; }
    // The chance to come again of a record of the last turn that its share does not explain.
    double reuse(int m) const {
        const double expected = memories_[m].expected;
        return again_ > expected ? (again_ - expected) / (seen_ - expected) : 0.0;
    }

    static void set_sum(Layer& layer, Record& of, int m, double sum) {
        layer.squares[m] += sum * sum - of.sums[m] * of.sums[m];
        of.sums[m] = sum;
    }

    void push(int index, std::int64_t id) {
        const Record& of = record(id);
        if (!of.is_in) return;
        const auto at = static_cast<std::size_t>(index);
        Heap& heap = of.is_last ? layers_[at].recent : layers_[at].others;
        if (static_cast<std::int64_t>(heap.size()) > 4 * (first_ids_[at + 1] - first_ids_[at])) return tidy(at);
        heap.emplace_back(of.sums[used_], id);
        std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }

    // The least of `heap` that may leave; an id of -1 where there is none. What is not true is dropped.
    Entry least_of(Heap& heap, bool is_last, const std::vector<std::int32_t>& pins) const {
        Heap pinned;
        Entry found{0, -1};
        while (!heap.empty()) {
            const Entry top = heap.front();
            const Record& of = record(top.second);
            const bool is_true = of.is_in && of.is_last == is_last && of.sums[used_] == top.first;
            if (is_true && pins[static_cast<std::size_t>(top.second)] == 0) {
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

    // A layer's heaps of what is true only.
    void tidy(std::size_t index) {
        Layer& layer = layers_[index];
        layer.recent.clear(), layer.others.clear();
        for (std::int64_t id = first_ids_[index]; id < first_ids_[index + 1]; ++id) {
            const Record& of = record(id);
            if (of.is_in) (of.is_last ? layer.recent : layer.others).emplace_back(of.sums[used_], id);
        }
        std::make_heap(layer.recent.begin(), layer.recent.end(), std::greater<>());
        std::make_heap(layer.others.begin(), layer.others.end(), std::greater<>());
    }

    // All layers have run: what was before counts less, and the memory with the smallest error is used from now on.
    void pass() {
        const auto errs_less = [](const Memory& a, const Memory& b) { return a.error < b.error; };
        const auto used = static_cast<int>(std::min_element(memories_, memories_ + kMemories, errs_less) - memories_);
        bool must_tidy = used != used_;
        used_ = used;
        for (int m = 0; m < kMemories; ++m) {
            Memory& memory = memories_[m];
            memory.error *= kErrorFade;
            memory.total += memory.weight;
            memory.weight *= memory.growth;
            if (memory.weight < kMost) continue;
            memory.weight /= kMost, memory.total /= kMost;
            for (Record& of : records_) of.sums[m] /= kMost;
            for (Layer& layer : layers_) layer.squares[m] /= kMost * kMost;
            must_tidy = true;
        }
        for (std::size_t index = 0; must_tidy && index < layers_.size(); ++index) tidy(index);
    }

    void learn(const Layer& layer, std::int64_t first_id, const std::int32_t* experts, int count) {
        if (layer.last.empty()) return;
        for (int m = 0; m < kMemories; ++m) memories_[m].error += error(m, layer, first_id, experts, count);
        again_ *= kFade, seen_ *= kFade;
        for (Memory& memory : memories_) memory.expected *= kFade;
        for (const std::int64_t id : layer.last) {
            again_ += std::binary_search(experts, experts + count, static_cast<std::int32_t>(id - first_id)) ? 1 : 0;
            for (int m = 0; m < kMemories; ++m) memories_[m].expected += record(id).sums[m] / memories_[m].total;
            seen_ += 1;
        }
    }

    // The sum over a layer's records of the squared difference between a memory's chance and what is wanted, less the
    // number wanted.
    double error(int m, const Layer& layer, std::int64_t first_id, const std::int32_t* experts, int count) const {
        const double bonus = reuse(m), fades = (1 - bonus) / memories_[m].total;
        double last = 0, wanted = 0;
        for (const std::int64_t id : layer.last) last += record(id).sums[m];
        for (int i = 0; i < count; ++i) {
            const Record& of = record(first_id + experts[i]);
            wanted += fades * of.sums[m] + (of.is_last ? bonus : 0);
        }
        const double again = 2 * fades * last + bonus * static_cast<double>(layer.last.size());
        return fades * fades * layer.squares[m] + bonus * again - 2 * wanted;
    }

    std::vector<std::int64_t> first_ids_;
    Memory memories_[kMemories] = {{1.0442737824274138}, {1.0108892860517005}, {1.0027112750502025}};  // 2^(1/16, 64, 256)
    int used_ = 0;
    std::vector<Record> records_;
    std::vector<Layer> layers_;
    int turn_;                     // the layer that runs
    double again_ = 1, seen_ = 4;  // of the last turns' records: how many came again
};

}  // namespace

std::unique_ptr<Policy> make_lfru(const std::vector<std::int64_t>& first_ids) { return std::make_unique<Lfru>(first_ids); }

}  // namespace fewfire
