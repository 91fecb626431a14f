// Routed experts: where their records are, and the arithmetic over those that tokens were sent to.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "counts.hpp"
#include "model.hpp"
#include "workspace.hpp"

namespace fewfire {

// How experts are wanted. in_order: to be given out in rising order. reads_ahead: so many tokens that the next layer will
// want nearly all of its experts. substitutes: low-precision copies will do for what is not in memory.
struct Demand {
    bool in_order = false, reads_ahead = false, substitutes = false;
};

// An expert's bytes; `is_low`: of its low-precision copy, whose layout is another.
struct Record {
    const std::uint8_t* bytes = nullptr;
    bool is_low = false;
};

// Where the records of experts come from. One layer at a time: want, then take, settle and give back until all have been
// taken.
class ExpertSource {
public:
    ExpertSource() = default;
    virtual ~ExpertSource() = default;
    ExpertSource(const ExpertSource&) = delete;
    ExpertSource& operator=(const ExpertSource&) = delete;

    // The distinct experts that layer `layer` runs next, rising.
    virtual void want(int layer, const std::int32_t* experts, int count, const Demand& demand) = 0;

    // Up to `most` of the wanted experts that are in memory, and where; waits until there is one. 0: all were taken. What
    // is late of a record (see RecordLayer) may still be on its way. Throws ReadError where a record cannot be had.
    virtual int take(int most, std::int32_t* experts, Record* records) = 0;

    // Waits until all of what was taken is there. Throws ReadError as take().
    virtual void settle(const std::int32_t*, int) {}

    // What was taken is not needed any longer.
    virtual void give_back(const std::int32_t* experts, int count) = 0;

    // Of each expert of `layer`, whether it is in memory or on its way; false, and nothing is written: all are.
    virtual bool find_cached(int, std::uint8_t*) const { return false; }

    // Whether take() may sleep until a thread of the source's own has read something.
    virtual bool may_wait() const { return false; }

    // Seconds that take() has waited since this was last asked.
    virtual double waited_s() { return 0; }

    // Between steps only.
    virtual SourceCounts counts() = 0;

    // How many layers ahead the source would like to hear what is probably wanted; and hearing it.
    virtual int lookahead() const { return 0; }
    virtual void prefetch(int, const std::int32_t*, int) {}

    // A step over so many tokens took so long.
    virtual void end_step(std::int64_t, double) {}
};

// Where the records of one layer lie in experts.bin: one after the other. Of each, `late_bytes` from `late_offset` on are
// needed last: the codes of down, once the hidden state is made.
struct RecordLayer {
    std::int64_t offset = 0, record_bytes = 0, num_experts = 0, late_offset = 0, late_bytes = 0;
};

// A record that could not be had: layer, expert and byte are told apart so that the caller can name them.
class ReadError : public std::runtime_error {
public:
    enum class Kind { kSystem, kShort, kChecksum };
    ReadError(Kind what, int of_layer, std::int32_t of_expert, std::int64_t at, int number)
        : std::runtime_error("a record could not be read"), kind(what), layer(of_layer), expert(of_expert), offset(at), error(number) {}

    Kind kind;
    int layer;
    std::int32_t expert;
    std::int64_t offset;  // in the file
    int error;            // errno, or 0
};

// experts.bin in memory, whole. A record is compared with its checksum when it is first used.
class ResidentExperts final : public ExpertSource {
public:
    ResidentExperts(const std::uint8_t* memory, std::vector<RecordLayer> layers, std::vector<std::uint32_t> checksums);

    void want(int layer, const std::int32_t* experts, int count, const Demand& demand) override;
    int take(int most, std::int32_t* experts, Record* records) override;
    void give_back(const std::int32_t*, int) override {}

    // Compares all records that were not used yet. Throws ReadError as take().
    void verify();

    SourceCounts counts() override;

    const std::uint8_t* record(int layer, std::int32_t expert) const;

private:
    void verify(int layer, const std::int32_t* experts, std::int64_t count);

    const std::uint8_t* memory_;
    std::vector<RecordLayer> layers_;
    std::vector<std::int64_t> first_ids_;
    std::vector<std::uint32_t> checksums_;
    std::vector<std::uint8_t> verified_;
    std::vector<std::int32_t> wanted_;
    std::size_t taken_ = 0;
    int layer_ = 0;
    std::vector<LayerCounts> counts_;
};

// Who goes to which expert: `chosen` and `weights` are (count, top_k); a negative id is nobody.
struct Assignment {
    const std::int32_t* chosen;
    const float* weights;
    std::int64_t count, top_k;
    bool is_input_weighted;
};

// The experts of one layer over some tokens, in two halves, so that something else can run while records arrive.
class ExpertRun {
public:
    // `acts`: the tokens. All must stay until the end of finish(). `low`: the layout of low-precision copies, where they
    // will do.
    ExpertRun(const ExpertLayout& layout, const Activations& acts, const Assignment& assignment, ExpertWorkspace& room,
              std::int64_t num_threads, const ExpertLayout* low = nullptr);

    // Tells the source which experts of layer `layer` are needed.
    void want(int layer, ExpertSource& source);

    // sums (count, model_dim, rows `stride` apart) = the weighted sum of each token's experts, added in rising order of
    // expert, whatever the order in which they come.
    void finish(ExpertSource& source, float* sums, std::int64_t stride);

private:
    struct Segment;
    struct Given;
    struct HiddenRoom;
    Demand demand() const;
    const ExpertLayout* layout_of(const Record& record) const { return record.is_low ? low_ : &layout_; }
    std::int64_t width() const { return layout_.down.rows; }
    std::int64_t start(std::int64_t expert) const { return room_.starts[static_cast<std::size_t>(expert)]; }
    float slot_weight(std::int64_t slot) const { return to_.weights[room_.order[static_cast<std::size_t>(slot)]]; }
    float output_weight(std::int64_t slot) const { return to_.is_input_weighted ? 1.0f : slot_weight(slot); }
    Rows hidden_rows(const Segment& segment, std::int64_t base);
    void sort_slots();
    void add_in_order(const Given& given, ExpertSource& source);
    void keep_outputs(const Given& given, ExpertSource& source);
    void add_biases(const std::vector<Segment>& segments, float* outs, std::int64_t out_stride);
    void add_kept();
    void make_hidden(const std::vector<Segment>& segments, std::int64_t base);
    void hidden_piece(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end, int worker);
    void hidden_groups(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end, const HiddenRoom& room);
    void add_outputs(const std::vector<Segment>& segments, std::int64_t base);
    void add_output_rows(const Segment& segment, const Rows& hidden, std::int64_t begin, std::int64_t end, int worker);

    const ExpertLayout& layout_;
    const ExpertLayout* low_;
    Activations acts_;
    Assignment to_;
    ExpertWorkspace& room_;
    std::int64_t threads_;
    float* sums_ = nullptr;
    std::int64_t stride_ = 0;
};

}  // namespace fewfire
