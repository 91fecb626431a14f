// The pool and the store of experts under load, for ThreadSanitizer (`make tsan`): random layers of random experts, in
// order and as they come, read ahead, guessed, while slots grow and shrink; every byte that is given out is compared.
//
// Links the pool, the store and what they need, with a table that has a checksum only: seconds to build.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "checksum.hpp"
#include "dispatch.hpp"
#include "pool.hpp"
#include "store.hpp"

namespace fewfire {

const Table& table() {
    static const Table made = [] {
        Table table{};
        table.crc32c = crc32c<TableStep>;
        return table;
    }();
    return made;
}

const std::uint8_t* ResidentExperts::record(int, std::int32_t) const { std::abort(); }  // no copies are used here

namespace {

constexpr int kLayers = 3;
constexpr std::int64_t kExperts = 8, kPages = 5, kRecord = kPages * 4096;

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "store_stress: %s\n", what);
    std::exit(1);
}

std::uint8_t byte_of(std::int64_t id, std::int64_t at) { return static_cast<std::uint8_t>(id * 31 + at / 97 + at); }

struct File {
    int handle;
    std::vector<RecordLayer> layers;
    std::vector<std::uint32_t> checksums;
};

File make_file() {
    char name[] = "/tmp/store_stress_XXXXXX";
    File file{::mkstemp(name), {}, {}};
    check(file.handle >= 0, "no temporary file");
    ::unlink(name);
    std::vector<std::uint8_t> record(kRecord);
    for (std::int64_t id = 0; id < kLayers * kExperts; ++id) {
        for (std::int64_t at = 0; at < kRecord; ++at) record[static_cast<std::size_t>(at)] = byte_of(id, at);
        check(::pwrite(file.handle, record.data(), kRecord, id * kRecord) == kRecord, "the file cannot be written");
        file.checksums.push_back(table().crc32c(0, record.data(), kRecord));
    }
    // The second and third page are what is needed last.
    for (int layer = 0; layer < kLayers; ++layer) file.layers.push_back({layer * kExperts * kRecord, kRecord, kExperts, 4096, 8192});
    return file;
}

// All threads of the pool read [begin, end) of the records given out.
void compare(int layer, const std::int32_t* experts, const Record* records, int count, bool all) {
    std::atomic<std::int64_t> wrong{0};
    Pool::shared().run(0, count * kPages, 1, [&](std::int64_t item, std::int64_t, int) {
        const std::int64_t page = item % kPages, id = layer * kExperts + experts[item / kPages];
        if (!all && (page == 1 || page == 2)) return;
        const std::uint8_t* bytes = records[item / kPages].bytes;
        for (std::int64_t at = page * 4096; at < (page + 1) * 4096; ++at) wrong += bytes[at] != byte_of(id, at) ? 1 : 0;
    });
    check(wrong == 0, all ? "a record differs" : "the first part of a record differs");
}

void run_layer(ExpertStore& store, int layer, const std::vector<std::int32_t>& wanted, bool in_order) {
    store.want(layer, wanted.data(), static_cast<int>(wanted.size()), {in_order, in_order && wanted.size() > kExperts / 2, false});
    std::vector<std::int32_t> experts(wanted.size());
    std::vector<Record> records(wanted.size());
    for (std::size_t taken = 0; taken < wanted.size();) {
        const int some = store.take(static_cast<int>(wanted.size() - taken), experts.data(), records.data());
        check(some > 0, "fewer experts than were wanted");
        compare(layer, experts.data(), records.data(), some, false);
        store.settle(experts.data(), some);
        compare(layer, experts.data(), records.data(), some, true);
        store.give_back(experts.data(), some);
        taken += static_cast<std::size_t>(some);
    }
}

void run(CachePolicy policy, int steps) {
    File file = make_file();
    const std::int64_t records = kLayers * kExperts;
    auto* memory = static_cast<std::uint8_t*>(std::aligned_alloc(4096, static_cast<std::size_t>(records * kRecord)));
    StoreSettings settings;
    settings.file = file.handle, settings.num_readers = 3, settings.capacity = 6, settings.memory = memory;
    settings.slot_bytes = kRecord, settings.policy = policy, settings.always_verifies = true, settings.looks_ahead = true;
    std::mt19937 draw(static_cast<unsigned>(policy) + 1);
    {
        ExpertStore store(file.layers, file.checksums, settings);
        for (int step = 0; step < steps; ++step) {
            if (step % 16 == 15) store.set_capacity(2 + static_cast<std::int64_t>(draw() % static_cast<unsigned>(records - 1)));
            for (int layer = 0; layer < kLayers; ++layer) {
                std::set<std::int32_t> some;
                for (std::size_t i = 0; i < 1 + draw() % kExperts; ++i) some.insert(static_cast<std::int32_t>(draw() % kExperts));
                const std::vector<std::int32_t> guessed{static_cast<std::int32_t>(draw() % kExperts)};
                run_layer(store, layer, {some.begin(), some.end()}, draw() % 4 == 0);
                if (layer + 1 < kLayers && draw() % 2 == 0) store.prefetch(layer + 1, guessed.data(), 1);
            }
            store.counts();
        }
    }
    std::free(memory);
}

}  // namespace
}  // namespace fewfire

int main(int argc, char** argv) {
    const int steps = argc > 1 ? std::atoi(argv[1]) : 2000;
    for (const auto policy : {fewfire::CachePolicy::kLru, fewfire::CachePolicy::kLfru, fewfire::CachePolicy::kS3Fifo}) {
        fewfire::run(policy, steps);
    }
    std::printf("pool and store: %d steps of each policy, all bytes as written\n", steps);
    return 0;
}
