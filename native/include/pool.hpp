// The one pool of threads for native work: started when first needed, one worker a core beyond the caller's.
//
// Which worker does what never changes a result: parts write to places of their own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fewfire {

constexpr int kPatience = 256;  // looks of a thread that waits without sleeping, between two offers of its core to others

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
public:
    static Pool& shared();

    // Calls body(begin, end, worker) over parts of [0, count), `grain` at a time (the last may be shorter), on up to
    // `num_threads` threads, this one included as worker 0; returns when all are done. Parts are handed out in order as
    // threads come free. `num_threads` 0: one a core. Calls from several threads wait for one another; a body must not
    // throw, nor call run.
    template <class Body>
    void run(std::int64_t num_threads, std::int64_t count, std::int64_t grain, const Body& body) {
        run_job(num_threads, count, grain, &call<Body>, &body);
    }

    // Memory of `worker` for the time of one run: at least `bytes`, aligned to 64, contents unspecified.
    std::uint8_t* scratch(int worker, std::size_t bytes);

    // Threads that run() may use: cores this process may run on.
    int size() const { return static_cast<int>(cores_.size()); }

    // Workers that sleep wake up and look for a job a while: one is about to come. From any thread.
    void rouse();

    // Cores of up to `num_threads` threads that no worker is pinned to; empty: all are alike.
    std::vector<int> caller_cores(std::int64_t num_threads) const;

    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

private:
    using Call = void (*)(const void* body, std::int64_t begin, std::int64_t end, int worker);

    struct Job {
        Call call = nullptr;
        const void* body = nullptr;
        std::int64_t count = 0, grain = 1;
        int workers = 0;  // besides the caller
    };

    template <class Body>
    static void call(const void* body, std::int64_t begin, std::int64_t end, int worker) {
        (*static_cast<const Body*>(body))(begin, end, worker);
    }

    Pool();
    void run_job(std::int64_t num_threads, std::int64_t count, std::int64_t grain, Call what, const void* body);
    void start_workers(int wanted);
    void work(int worker, std::uint64_t seen);
    void await_job(std::uint64_t seen);
    void take_parts(int worker);
    bool enter();

    struct Scratch {
        std::unique_ptr<std::uint8_t[]> memory;
        std::size_t bytes = 0;
    };

    std::vector<int> cores_;
    std::vector<std::thread> workers_;
    std::vector<Scratch> scratch_;
    std::mutex caller_;  // one run at a time
    Job job_;
    alignas(64) std::atomic<std::int64_t> next_{0};
    alignas(64) std::atomic<std::uint64_t> epoch_{0};
    alignas(64) std::atomic<std::uint32_t> gate_{0};
    alignas(64) std::atomic<int> asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
    std::uint64_t rouses_ = 0;  // under sleep_
    std::atomic<bool> ends_{false};
};

// While it lives, this thread keeps off the workers' cores: who wakes up beside a pinned worker would share its core with
// it for milliseconds, until the system moves one of them.
class OffWorkers {
public:
    explicit OffWorkers(std::int64_t num_threads);
    ~OffWorkers();
    OffWorkers(const OffWorkers&) = delete;
    OffWorkers& operator=(const OffWorkers&) = delete;

private:
    std::vector<int> before_;  // the cores it may run on otherwise; empty: nothing was changed
};

}  // namespace fewfire
