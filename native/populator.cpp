#include "populator.hpp"

#include <algorithm>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#endif

namespace fewfire {
namespace {

constexpr std::int64_t kPiece = 2 << 20;    // made at a time: a huge page
constexpr std::int64_t kAhead = 512 << 20;  // beyond what is in use

bool populate([[maybe_unused]] std::uint8_t* from, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
    return madvise(from, static_cast<std::size_t>(bytes), MADV_POPULATE_WRITE) == 0;
#else
    return false;
#endif
}

void take_lowest_priority() {
#ifdef __linux__
    const sched_param none{};
    pthread_setschedparam(pthread_self(), SCHED_IDLE, &none);
#endif
}

}  // namespace

Populator::Populator(std::uint8_t* memory, std::int64_t limit, std::int64_t made)
    : memory_(memory), limit_(limit), made_(made), thread_([this] { run(); }) {}

Populator::~Populator() {
    wanted_.store(-1);
    wanted_.notify_all();
    thread_.join();
}

void Populator::reach(std::int64_t bytes) {
    if (bytes + kAhead <= wanted_.load()) return;
    wanted_.store(bytes + kAhead);
    wanted_.notify_all();
}

void Populator::limit(std::int64_t bytes) {
    const std::lock_guard<std::mutex> lock(making_);
    limit_ = bytes;
    made_ = std::min(made_, bytes);
}

std::int64_t Populator::made() {
    const std::lock_guard<std::mutex> lock(making_);
    return made_;
}

void Populator::run() {
    take_lowest_priority();
    for (std::int64_t wanted = 0; wanted >= 0; wanted = wanted_.load()) {
        while (make_piece()) {
        }
        wanted_.wait(wanted);
    }
}

// False where nothing is to be made now, or the kernel does not do it.
bool Populator::make_piece() {
    const std::lock_guard<std::mutex> lock(making_);
    const std::int64_t end = std::min({made_ + kPiece, limit_, wanted_.load()});
    if (fails_ || end <= made_) return false;
    fails_ = !populate(memory_ + made_, end - made_);
    if (!fails_) made_ = end;
    return !fails_;
}

}  // namespace fewfire
