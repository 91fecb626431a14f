// Memory gets its pages before it is written, some way ahead of its use, while no other thread wants the core.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>

namespace fewfire {

// A page that is written for the first time is cleared by the kernel, and a read into it waits for that. One thread of the
// lowest priority clears them beforehand; where the kernel cannot (before Linux 5.14), nothing happens.
// Threads: `reach` and `limit` by one thread at a time.
class Populator {
public:
    // The first `limit` bytes of `memory`, both multiples of a page, may be populated; `made` of them are.
    Populator(std::uint8_t* memory, std::int64_t limit, std::int64_t made);
    ~Populator();
    Populator(const Populator&) = delete;
    Populator& operator=(const Populator&) = delete;

    // The first `bytes` are in use: pages are made a way beyond them.
    void reach(std::int64_t bytes);

    // How much has its pages. Waits for the piece that is being made.
    std::int64_t made();

    // From now on no page beyond `bytes` is made.
    void limit(std::int64_t bytes);

private:
    void run();
    bool make_piece();

    std::uint8_t* memory_;
    std::mutex making_;  // held while pages are made
    std::int64_t limit_, made_;
    bool fails_ = false;
    std::atomic<std::int64_t> wanted_{0};  // less than 0: the end
    std::thread thread_;
};

}  // namespace fewfire
