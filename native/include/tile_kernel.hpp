// The innermost loop of products in AVX-512 VNNI, in assembly: four blocks of 16 rows times up to 6 tokens, 24 sums in
// registers. Compilers spill some of them or copy all at every step; here the loop is what the processor is asked to do.
// Four blocks by six tokens rather than two by twelve: fewer instructions a product, which counts where another thread
// of the same core wants to be fed too.
#pragma once

#include <cstdint>

namespace fewfire {
namespace {

// One run of columns. Offsets are known to the assembly.
struct TileJob {
    const std::int8_t* codes = nullptr;    // 0: of the tokens, 128 bytes apart
    const std::uint8_t* bytes = nullptr;   // 8: of the first block, 64 for every four columns
    std::int64_t gap = 0;                  // 16: from one block to the next
    const std::int32_t* starts = nullptr;  // 24: one a token
    const std::int8_t* next = nullptr;     // 32: codes that follow, fetched meanwhile, 64 bytes a step
    std::int64_t steps = 0;                // 40: of four columns
    const float* scales = nullptr;         // 48: (4, 16)
    const float* token_scales = nullptr;   // 56: one a token
    float* totals = nullptr;               // 64: (4, 16) of a token, to which the sums are added
    const std::uint8_t* ahead = nullptr;   // 72: weights that follow, fetched meanwhile
    std::int64_t ahead_step = 0;           // 80: bytes of them a step
    std::int64_t stride = 0;               // 88: bytes from one token's totals to the next one's
};

#define FEWFIRE_START(t, a, b, c, d)                                                                    \
    ".if %c[n] > " #t "\n vpbroadcastd 4*" #t "(%%rsi), %%zmm" #a "\n vmovdqa64 %%zmm" #a ", %%zmm" #b        \
    "\n vmovdqa64 %%zmm" #a ", %%zmm" #c "\n vmovdqa64 %%zmm" #a ", %%zmm" #d "\n.endif\n"
#define FEWFIRE_DOT(t, a, b, c, d)                                                                      \
    ".if %c[n] > " #t "\n vpbroadcastd 128*" #t "(%%rax), %%zmm4\n vpdpbusd %%zmm4, %%zmm0, %%zmm" #a         \
    "\n vpdpbusd %%zmm4, %%zmm1, %%zmm" #b "\n vpdpbusd %%zmm4, %%zmm2, %%zmm" #c                            \
    "\n vpdpbusd %%zmm4, %%zmm3, %%zmm" #d "\n.endif\n"
#define FEWFIRE_ADD(at, a)                                                                              \
    " vmulps " at "(%%rdi), %%zmm0, %%zmm1\n vcvtdq2ps %%zmm" #a ", %%zmm" #a "\n vmulps %%zmm" #a          \
    ", %%zmm1, %%zmm" #a "\n vaddps " at "(%%r9), %%zmm" #a ", %%zmm" #a "\n vmovups %%zmm" #a ", " at "(%%r9)\n"
#define FEWFIRE_SCALE(t, a, b, c, d)                                                                    \
    ".if %c[n] > " #t "\n vbroadcastss 4*" #t "(%%r8), %%zmm0\n" FEWFIRE_ADD("0", a)                      \
        FEWFIRE_ADD("64", b) FEWFIRE_ADD("128", c) FEWFIRE_ADD("192", d) " add %%r14, %%r9\n.endif\n"
#define FEWFIRE_TOKENS(M) \
    M(0, 8, 9, 10, 11) M(1, 12, 13, 14, 15) M(2, 16, 17, 18, 19) M(3, 20, 21, 22, 23) M(4, 24, 25, 26, 27) M(5, 28, 29, 30, 31)

template <int kTokens>
[[gnu::always_inline]] inline void run_tile(const TileJob& job) {
    static_assert(kTokens >= 1 && kTokens <= 6);
    __asm__ volatile(
        "mov 24(%[job]), %%rsi\n" FEWFIRE_TOKENS(FEWFIRE_START)
        "mov 0(%[job]), %%rax\n mov 8(%[job]), %%rbx\n mov 16(%[job]), %%rcx\n lea (%%rcx, %%rcx, 2), %%r10\n"
        "mov 32(%[job]), %%rdx\n mov 40(%[job]), %%r11\n mov 48(%[job]), %%rdi\n mov 56(%[job]), %%r8\n"
        "mov 64(%[job]), %%r9\n mov 72(%[job]), %%r12\n mov 80(%[job]), %%r13\n mov 88(%[job]), %%r14\n"
        ".p2align 6\n"
        "1: vmovdqu64 (%%rbx), %%zmm0\n vmovdqu64 (%%rbx, %%rcx), %%zmm1\n"
        " vmovdqu64 (%%rbx, %%rcx, 2), %%zmm2\n vmovdqu64 (%%rbx, %%r10), %%zmm3\n"
        " prefetcht0 (%%rdx)\n prefetcht1 (%%r12)\n" FEWFIRE_TOKENS(FEWFIRE_DOT)
        " add $4, %%rax\n add $64, %%rbx\n add $64, %%rdx\n add %%r13, %%r12\n dec %%r11\n jnz 1b\n"
        FEWFIRE_TOKENS(FEWFIRE_SCALE)
        :
        : [job] "r"(&job), [n] "i"(kTokens)
        : "memory", "cc", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "zmm0", "zmm1", "zmm2", "zmm3",
          "zmm4", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19",
          "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28", "zmm29", "zmm30", "zmm31");
}

#undef FEWFIRE_START
#undef FEWFIRE_DOT
#undef FEWFIRE_ADD
#undef FEWFIRE_SCALE
#undef FEWFIRE_TOKENS

}  // namespace
}  // namespace fewfire
