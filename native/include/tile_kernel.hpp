// The innermost loop of products in AVX-512 VNNI, in assembly: four blocks of 16 rows times up to 6 tokens, 24 sums in
// registers. Compilers spill some of them or copy all at every step; here the loop is what the processor is asked to do.
// What counts is instructions: where another thread of the same core wants to be fed too, they are what there is too few
// of. So there are four blocks by six tokens rather than two by twelve, four steps a turn, and two of six tokens' codes
// are read by the products themselves (more of them would want more reads than there are).
#pragma once

#include <cstdint>

namespace fewfire {
namespace {

// Where one run of columns finds its numbers. Codes, bytes, starts and scales move on to the next run of the same group.
struct TileRun {
    const std::int8_t* codes;     // of the tokens, 128 bytes apart
    const std::uint8_t* bytes;    // of the first block, 64 for every four columns
    const std::int32_t* starts;   // one a token
    const float* scales;          // (4, 16)
    const float* token_scales;    // one a token
    float* totals;                // (4, 16) of a token, to which the sums are added
    std::int64_t stride;          // bytes from one token's totals to the next one's
    std::int64_t gap;             // bytes from one block to the next
    std::int64_t ahead_step;      // of the weights that follow: bytes from one fetch to the next, two for every four steps
};

#define FEWFIRE_START(t, a, b, c, d)                                                                             \
    ".if %c[n] > " #t "\n vpbroadcastd 4*" #t "(%[starts]), %%zmm" #a "\n vmovdqa64 %%zmm" #a ", %%zmm" #b             \
    "\n vmovdqa64 %%zmm" #a ", %%zmm" #c "\n vmovdqa64 %%zmm" #a ", %%zmm" #d "\n.endif\n"
#define FEWFIRE_DOT(t, a, b, c, d)                                                                               \
    ".if %c[n] > " #t "\n vpbroadcastd 128*" #t "+4*\\step(%[codes]), %%zmm4\n vpdpbusd %%zmm4, %%zmm0, %%zmm" #a      \
    "\n vpdpbusd %%zmm4, %%zmm1, %%zmm" #b "\n vpdpbusd %%zmm4, %%zmm2, %%zmm" #c                                     \
    "\n vpdpbusd %%zmm4, %%zmm3, %%zmm" #d "\n.endif\n"
#define FEWFIRE_DOT_READING(t, a, b, c, d)                                                                       \
    ".if %c[n] > " #t "\n vpdpbusd 128*" #t "+4*\\step(%[codes])%{1to16%}, %%zmm0, %%zmm" #a                          \
    "\n vpdpbusd 128*" #t "+4*\\step(%[codes])%{1to16%}, %%zmm1, %%zmm" #b                                            \
    "\n vpdpbusd 128*" #t "+4*\\step(%[codes])%{1to16%}, %%zmm2, %%zmm" #c                                            \
    "\n vpdpbusd 128*" #t "+4*\\step(%[codes])%{1to16%}, %%zmm3, %%zmm" #d "\n.endif\n"
#define FEWFIRE_ADD(at, a)                                                                                       \
    " vmulps " at "(%[scales]), %%zmm0, %%zmm1\n vcvtdq2ps %%zmm" #a ", %%zmm" #a                                     \
    "\n .if %c[begins]\n vfmadd213ps %%zmm5, %%zmm1, %%zmm" #a "\n .else\n vfmadd213ps " at "(%[room]), %%zmm1, %%zmm" #a \
    "\n .endif\n vmovups %%zmm" #a ", " at "(%[room])\n"
#define FEWFIRE_SCALE(t, a, b, c, d)                                                                             \
    ".if %c[n] > " #t "\n vbroadcastss 4*" #t "(%[token_scales]), %%zmm0\n" FEWFIRE_ADD("0", a)                       \
        FEWFIRE_ADD("64", b) FEWFIRE_ADD("128", c) FEWFIRE_ADD("192", d) " add %[stride], %[room]\n.endif\n"
#define FEWFIRE_TOKENS(M, N) \
    M(0, 8, 9, 10, 11) M(1, 12, 13, 14, 15) N(2, 16, 17, 18, 19) M(3, 20, 21, 22, 23) M(4, 24, 25, 26, 27) N(5, 28, 29, 30, 31)

// kSteps times four columns; `ahead`: the weights that follow, fetched meanwhile. Where these are the first columns
// (`kBegins`) totals are not read: what lies there need not be numbers.
template <int kTokens, int kSteps, bool kBegins>
[[gnu::always_inline]] inline void run_tile(TileRun& run, const std::uint8_t* ahead) {
    static_assert(kTokens >= 1 && kTokens <= 6 && kSteps % 4 == 0);
    std::int64_t room = kSteps / 4;  // counts turns, then walks the totals
    __asm__ volatile(
        FEWFIRE_TOKENS(FEWFIRE_START, FEWFIRE_START)
        ".p2align 6\n"
        "1:\n .irp step, 0, 1, 2, 3\n"
        " vmovdqu64 64*\\step(%[bytes]), %%zmm0\n vmovdqu64 64*\\step(%[bytes], %[gap]), %%zmm1\n"
        " vmovdqu64 64*\\step(%[bytes], %[gap], 2), %%zmm2\n vmovdqu64 64*\\step(%[bytes], %[gaps]), %%zmm3\n"
        " .if \\step %% 2 == 0\n prefetcht1 (%[ahead])\n add %[ahead_step], %[ahead]\n .endif\n"
        FEWFIRE_TOKENS(FEWFIRE_DOT, FEWFIRE_DOT_READING)
        " .endr\n add $16, %[codes]\n add $256, %[bytes]\n dec %[room]\n jnz 1b\n"
        " mov %[totals], %[room]\n vxorps %%zmm5, %%zmm5, %%zmm5\n" FEWFIRE_TOKENS(FEWFIRE_SCALE, FEWFIRE_SCALE)
        : [codes] "+r"(run.codes), [bytes] "+r"(run.bytes), [ahead] "+r"(ahead), [room] "+r"(room)
        : [starts] "r"(run.starts), [scales] "r"(run.scales), [token_scales] "r"(run.token_scales), [totals] "r"(run.totals),
          [stride] "r"(run.stride), [gap] "r"(run.gap), [gaps] "r"(3 * run.gap), [ahead_step] "r"(run.ahead_step), [n] "i"(kTokens),
          [begins] "i"(kBegins)
        : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm8", "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14",
          "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27",
          "zmm28", "zmm29", "zmm30", "zmm31");
    run.starts += kTokens;
    run.scales += 4 * 16;
}

#undef FEWFIRE_START
#undef FEWFIRE_DOT
#undef FEWFIRE_DOT_READING
#undef FEWFIRE_ADD
#undef FEWFIRE_SCALE
#undef FEWFIRE_TOKENS

}  // namespace
}  // namespace fewfire
