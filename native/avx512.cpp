// AVX-512 versions (F, BW, DQ, VL, VNNI). Compiled with those flags and run only where CPUID and the OS allow them.
#include <immintrin.h>

#include "attention.hpp"
#include "checksum.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "probe.hpp"
#include "steps.hpp"
#include "templates.hpp"
#include "tile_kernel.hpp"

namespace fewfire {
namespace {

struct Avx512 {
    static constexpr int kWidth = 16;
    static std::uint32_t greater(const float* p, float bound) {
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_set1_ps(bound), _CMP_GT_OQ);
    }
};

struct Avx512Ops {
    using Bytes = __m512i;
    using Int = __m512i;
    using Word = __m512i;
    using Float = __m512;
    static constexpr int kTokens = 6, kBlocks = 4, kSums = 24;

    static Float zero_float() { return _mm512_setzero_ps(); }
    static Float set_float(float x) { return _mm512_set1_ps(x); }
    static Int set_int(std::int32_t x) { return _mm512_set1_epi32(x); }
    static Int zero_int() { return _mm512_setzero_si512(); }
    static Word word(const std::int8_t* p) {
        std::int32_t four;
        std::memcpy(&four, p, 4);
        return _mm512_set1_epi32(four);
    }
    static Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    static Int load_ints(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
    static Float load_floats(const float* p) { return _mm512_loadu_ps(p); }
    static Float load_bf16(const std::uint8_t* p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static Float load_half(const std::uint8_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Float load_int8(const std::int8_t* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    static void store_floats(float* p, Float x) { _mm512_storeu_ps(p, x); }
    static void store_bytes(std::uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    // Bound to a number that is worked on: a compiler moves prefetches together otherwise, and many at once make loads wait.
    static Int prefetch_beside(Int x, const std::uint8_t* p) {
        __asm__ volatile("prefetcht0 %1" : "+v"(x) : "m"(*p));
        return x;
    }

    static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
    static Float fused(Float sum, Float a, Float b) { return _mm512_fmadd_ps(a, b, sum); }
    static Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
    static Int multiply_add(Int sum, Int a, Int b) { return _mm512_add_epi32(sum, _mm512_mullo_epi32(a, b)); }
    static Int add_ints(Int a, Int b) { return _mm512_add_epi32(a, b); }
    static Bytes as_bytes(Int x) { return x; }
    template <int s>
    static Int signed_nibble(Int words) {
        return _mm512_srai_epi32(_mm512_slli_epi32(words, static_cast<unsigned>(28 - 4 * s)), 28);
    }
    static Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
    static Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
    static Bytes look_up(const std::int8_t* book, int offset, Bytes index) {
        const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(book));
        const __m128i moved = _mm_add_epi8(table, _mm_set1_epi8(static_cast<char>(offset)));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(moved), index);
    }
    static void store_sums_of_fours(const std::int8_t* codes, std::int32_t* sums) {
        const __m512i ones = _mm512_set1_epi8(1);
        _mm512_storeu_si512(sums, dot(_mm512_setzero_si512(), ones, _mm512_loadu_si512(codes)));
    }
    static Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
    static Bytes add_bytes(Bytes x, int added) { return _mm512_add_epi8(x, _mm512_set1_epi8(static_cast<char>(added))); }
    template <int quad>
    static Bytes top_bits(Bytes x) {
        const __m512i moved = quad < 2 ? _mm512_slli_epi16(x, quad == 0 ? 4 : 2) : _mm512_srli_epi16(x, quad == 2 ? 0 : 2);
        return _mm512_and_si512(moved, _mm512_set1_epi8(0x30));
    }
    struct Stretch {
        Int factor, added;  // 16 bits each
    };
    static Stretch stretch_by(Int step) {
        const __m512i factor = _mm512_or_si512(_mm512_slli_epi32(step, 16), _mm512_and_si512(step, _mm512_set1_epi32(0xffff)));
        const __m512i too_much = _mm512_mullo_epi16(factor, _mm512_set1_epi16(kQ4Offset * 257));
        return {factor, _mm512_sub_epi16(_mm512_set1_epi16(static_cast<short>(kByteOffset * 257)), too_much)};
    }
    static Bytes stretch(Bytes x, const Stretch& by) {
        return _mm512_add_epi16(_mm512_mullo_epi16(x, by.factor), by.added);
    }
    // The panel's groups times those of a tile, see multiply_tile.
    template <int kTokens, int kRuns>
    static void multiply_tile(const Panel& panel, std::int64_t first, std::int64_t some, const Tile& tile,
                              const std::int32_t* starts, const Totals& totals, Ahead& ahead) {
        static_assert(kMostBlocks == 4 && kRows == 16);
        const std::int64_t group = first * kTokens;
        TileRun at{tile.codes + group * kGroup, panel.bytes, starts + group * kRuns, panel.scales, tile.scales + group,
                   totals.first, totals.stride * 4, panel.gap, ahead.part_bytes * kRuns / 16};
        for (std::int64_t g = 0; g < some; ++g) {
            unroll<kRuns>([&](auto run) {
                if (run == 0 && first + g == 0) return run_tile<kTokens, 32 / kRuns, true>(at, ahead.next());
                run_tile<kTokens, 32 / kRuns, false>(at, ahead.next());
            });
            at.codes += (kTokens - 1) * kGroup;
            at.token_scales += kTokens;
        }
    }

    static Int start(const std::int32_t* p) { return _mm512_set1_epi32(*p); }
    static Int start_small(const std::int32_t* p) { return start(p); }
    // In assembly because GCC 12 copies every accumulator of the intrinsic twice a step.
    static Int dot(Int sum, Bytes w, Word word) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(word));
        return sum;
    }
    static Int dot_small(Int sum, Bytes w, Word word) { return dot(sum, w, word); }
};

struct HardwareStep {
    static std::uint32_t byte(std::uint32_t crc, std::uint8_t value) { return _mm_crc32_u8(crc, value); }
    static std::uint32_t word(std::uint32_t crc, std::uint64_t value) {
        return static_cast<std::uint32_t>(_mm_crc32_u64(crc, value));
    }
};

}  // namespace

void fill_avx512(Table& table) {
    fill_templates<Avx512>(table);
    fill_quantized<Avx512Ops>(table.quantized);
    fill_steps<Avx512Ops>(table.quantized);
    fill_attention<Avx512Ops>(table.quantized);
    table.crc32c = crc32c<HardwareStep>;
    fill_probes<Avx512Ops>(table.quantized);
}

}  // namespace fewfire
