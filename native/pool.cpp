#include "pool.hpp"

#include <algorithm>
#include <chrono>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace fewfire {
namespace {

// How long a worker looks for the next job before it sleeps: parts of a token follow one another within microseconds.
constexpr auto kSpin = std::chrono::microseconds(200);

// Of `gate_`: whether workers may still come in, and how many are inside.
constexpr std::uint32_t kOpen = std::uint32_t{1} << 31, kInside = kOpen - 1;

// Cores that this thread may run on; none where the system does not say.
std::vector<int> affinity() {
    std::vector<int> cores;
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return cores;
    for (int core = 0; core < CPU_SETSIZE; ++core) {
        if (CPU_ISSET(core, &set)) cores.push_back(core);
    }
#endif
    return cores;
}

void set_affinity([[maybe_unused]] const std::vector<int>& cores) {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int core : cores) CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);
#endif
}

std::vector<int> allowed_cores() {
    std::vector<int> cores = affinity();
    for (unsigned core = 0; cores.empty() && core < std::max(1u, std::thread::hardware_concurrency()); ++core) {
        cores.push_back(static_cast<int>(core));
    }
    return cores;
}

}  // namespace

Pool& Pool::shared() {
    // After a fork the child has no threads but its own: it gets a pool of its own (the parent's is left as it is).
#ifdef __linux__
    static std::mutex guard;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(guard);
    if (pool == nullptr || owner != getpid()) {
        pool = new Pool;  // never destroyed: workers may outlive static objects
        owner = getpid();
    }
    return *pool;
#else
    static Pool* pool = new Pool;
    return *pool;
#endif
}

Pool::Pool() : cores_(allowed_cores()), scratch_(cores_.size()) {}

Pool::~Pool() {
    ends_.store(true);
    epoch_.fetch_add(1);
    {
        const std::lock_guard<std::mutex> lock(sleep_);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

std::uint8_t* Pool::scratch(int worker, std::size_t bytes) {
    Scratch& mine = scratch_[static_cast<std::size_t>(worker)];
    if (mine.bytes < bytes) {
        mine.memory.reset(new std::uint8_t[bytes + 64]);
        mine.bytes = bytes;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(mine.memory.get());
    return mine.memory.get() + (64 - address % 64) % 64;
}

void Pool::start_workers(int wanted) {
    while (static_cast<int>(workers_.size()) < wanted) {
        const int worker = static_cast<int>(workers_.size()) + 1;
        // The epoch is read here: a thread that starts late has not missed the job it was started for.
        workers_.emplace_back([this, worker, seen = epoch_.load()] { work(worker, seen); });
#ifdef __linux__
        // A core each, the last first: the caller tends to sit on an early one (see OffWorkers).
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cores_[cores_.size() - static_cast<std::size_t>(worker)], &set);
        pthread_setaffinity_np(workers_.back().native_handle(), sizeof set, &set);
#endif
    }
}

void Pool::run_job(std::int64_t num_threads, std::int64_t count, std::int64_t grain, Call what, const void* body) {
    if (count <= 0) return;
    const std::int64_t parts = (count + grain - 1) / grain;
    const std::int64_t most = num_threads <= 0 ? size() : std::min<std::int64_t>(num_threads, size());
    const int extra = static_cast<int>(std::min(parts, most)) - 1;
    const std::lock_guard<std::mutex> lock(caller_);
    job_ = {what, body, count, grain, extra};
    next_.store(0, std::memory_order_relaxed);
    if (extra > 0) {
        start_workers(extra);
        gate_.store(kOpen, std::memory_order_release);
        epoch_.fetch_add(1);  // the job is out
        if (asleep_.load() > 0) {
            {
                const std::lock_guard<std::mutex> sleeping(sleep_);
            }
            wake_.notify_all();
        }
    }
    take_parts(0);
    if (extra > 0) {
        gate_.fetch_and(~kOpen);  // all parts are taken: who still sleeps is not waited for
        // Where other processes leave both on one core, the waiting one must make room for the working one.
        for (int rounds = 1; (gate_.load(std::memory_order_acquire) & kInside) > 0; ++rounds) {
            relax();
            if (rounds % kPatience == 0) std::this_thread::yield();
        }
    }
}

std::vector<int> Pool::caller_cores(std::int64_t num_threads) const {
    const std::int64_t threads = num_threads <= 0 ? size() : std::min<std::int64_t>(num_threads, size());
    if (threads <= 1) return {};
    return {cores_.begin(), cores_.end() - (threads - 1)};
}

OffWorkers::OffWorkers(std::int64_t num_threads) {
    std::vector<int> now = affinity();
    std::vector<int> own = Pool::shared().caller_cores(num_threads);
    std::erase_if(own, [&](int core) { return std::find(now.begin(), now.end(), core) == now.end(); });
    if (own.empty() || own == now) return;  // somebody has put it elsewhere
    before_ = std::move(now);
    set_affinity(own);
}

OffWorkers::~OffWorkers() {
    if (!before_.empty()) set_affinity(before_);
}

void Pool::take_parts(int worker) {
    for (;;) {
        const std::int64_t begin = next_.fetch_add(job_.grain, std::memory_order_relaxed);
        if (begin >= job_.count) return;
        job_.call(job_.body, begin, std::min(begin + job_.grain, job_.count), worker);
    }
}

void Pool::work(int worker, std::uint64_t seen) {
    for (;;) {
        await_job(seen);
        seen = epoch_.load(std::memory_order_acquire);
        if (ends_.load()) return;
        if (!enter()) continue;
        if (worker <= job_.workers) take_parts(worker);
        gate_.fetch_sub(1, std::memory_order_release);
    }
}

// Until there is another job than the one `seen`: looks for it a while, then sleeps, and looks again where it is roused.
void Pool::await_job(std::uint64_t seen) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    for (int rounds = 1; epoch_.load(std::memory_order_acquire) == seen; ++rounds) {
        relax();
        if (rounds % kPatience != 0) continue;
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() <= until) continue;
        {
            std::unique_lock<std::mutex> lock(sleep_);
            asleep_.fetch_add(1);
            wake_.wait(lock, [&, before = rouses_] { return epoch_.load() != seen || rouses_ != before; });
            asleep_.fetch_sub(1);
        }
        until = std::chrono::steady_clock::now() + kSpin;
    }
}

void Pool::rouse() {
    if (asleep_.load() == 0) return;
    {
        const std::lock_guard<std::mutex> lock(sleep_);
        ++rouses_;
    }
    wake_.notify_all();
}

// False: the job was done meanwhile.
bool Pool::enter() {
    std::uint32_t gate = gate_.load(std::memory_order_relaxed);
    while ((gate & kOpen) != 0) {
        if (gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    }
    return false;
}

}  // namespace fewfire
