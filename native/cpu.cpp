#include "cpu.hpp"

#if defined(__x86_64__) || defined(__i386__)

#include <cpuid.h>

#include <cstdint>

namespace fewfire {
namespace {

struct Registers {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// All zero when the processor has no such leaf.
Registers read_leaf(unsigned leaf) {
    Registers r;
    __get_cpuid_count(leaf, 0, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

bool has_bit(unsigned value, int bit) { return (value >> bit & 1u) != 0; }

// Which registers the OS saves on a context switch (XCR0); 0 when it does not use XSAVE.
std::uint64_t saved_state() {
    if (!has_bit(read_leaf(1).ecx, 27)) return 0;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<std::uint64_t>(high) << 32 | low;
}

constexpr std::uint64_t kYmmState = 0x06;  // SSE and AVX
constexpr std::uint64_t kZmmState = 0xe6;  // and the masks, the upper halves, the upper sixteen

}  // namespace

bool cpu_has_avx2() {
    const Registers basic = read_leaf(1), extended = read_leaf(7);
    const bool instructions =
        has_bit(basic.ecx, 12) && has_bit(basic.ecx, 29) && has_bit(basic.ecx, 28) && has_bit(extended.ebx, 5);
    return instructions && (saved_state() & kYmmState) == kYmmState;
}

bool cpu_has_avx512() {
    const Registers extended = read_leaf(7);
    const bool instructions = has_bit(extended.ebx, 16) && has_bit(extended.ebx, 17) && has_bit(extended.ebx, 30) &&
                              has_bit(extended.ebx, 31) && has_bit(extended.ecx, 11);
    return cpu_has_avx2() && instructions && (saved_state() & kZmmState) == kZmmState;
}

}  // namespace fewfire

#else

namespace fewfire {

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }

}  // namespace fewfire

#endif
