// AVX2 and FMA versions. Compiled with those flags and run only where CPUID and the OS allow them.
#include <immintrin.h>

#include "attention.hpp"
#include "checksum.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "probe.hpp"
#include "steps.hpp"
#include "templates.hpp"

namespace fewfire {
namespace {

struct Avx2 {
    static constexpr int kWidth = 8;
    static std::uint32_t greater(const float* p, float bound) {
        const __m256 above = _mm256_cmp_ps(_mm256_loadu_ps(p), _mm256_set1_ps(bound), _CMP_GT_OQ);
        return static_cast<std::uint32_t>(_mm256_movemask_ps(above));
    }
};

struct Avx2Ops {
    struct Bytes {
        __m256i low, high;
    };
    using Int = Bytes;
    using Word = __m256i;
    struct Float {
        __m256 low, high;
    };
    static constexpr int kTokens = 4, kBlocks = 1, kSums = 6;

    static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static Float zero_float() { return set_float(0.0f); }
    static Float set_float(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static Int set_int(std::int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static Int zero_int() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Word word(const std::int8_t* p) {
        std::int32_t four;
        std::memcpy(&four, p, 4);
        return _mm256_set1_epi32(four);
    }
    static Bytes load_bytes(const std::uint8_t* p) { return {load(p), load(p + 32)}; }
    static Int load_ints(const std::uint8_t* p) { return load_bytes(p); }
    static Float load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Float load_bf16(const std::uint8_t* p) {
        const auto half = [](const std::uint8_t* from) {
            const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
        };
        return {half(p), half(p + 16)};
    }
    static Float load_half(const std::uint8_t* p) {
        const auto half = [](const std::uint8_t* from) {
            return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        };
        return {half(p), half(p + 16)};
    }
    static Float load_int8(const std::int8_t* p) {
        const auto half = [](const std::int8_t* from) {
            return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
        };
        return {half(p), half(p + 8)};
    }
    static void store_floats(float* p, const Float& x) {
        _mm256_storeu_ps(p, x.low);
        _mm256_storeu_ps(p + 8, x.high);
    }
    static void store_bytes(std::uint8_t* p, const Bytes& x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.low);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.high);
    }
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
    static Int prefetch_beside(Int x, const std::uint8_t* p) {  // see avx512.cpp
        __asm__ volatile("prefetcht0 %1" : "+x"(x.low) : "m"(*p));
        return x;
    }

    static Float add(const Float& a, const Float& b) {
        return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
    }
    static Float mul(const Float& a, const Float& b) {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    static Float fused(const Float& sum, const Float& a, const Float& b) {
        return {_mm256_fmadd_ps(a.low, b.low, sum.low), _mm256_fmadd_ps(a.high, b.high, sum.high)};
    }
    static Float to_float(const Int& x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
    static Int multiply_add(const Int& sum, const Int& a, const Int& b) {
        return {_mm256_add_epi32(sum.low, _mm256_mullo_epi32(a.low, b.low)),
                _mm256_add_epi32(sum.high, _mm256_mullo_epi32(a.high, b.high))};
    }
    static Int add_ints(const Int& a, const Int& b) {
        return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
    }
    static Bytes as_bytes(const Int& x) { return x; }
    template <int s>
    static Int signed_nibble(const Int& words) {
        const auto half = [](__m256i x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 28 - 4 * s), 28); };
        return {half(words.low), half(words.high)};
    }
    static Bytes low_nibbles(const Bytes& x) {
        const __m256i mask = _mm256_set1_epi8(15);
        return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
    }
    static Bytes high_nibbles(const Bytes& x) {
        return low_nibbles({_mm256_srli_epi16(x.low, 4), _mm256_srli_epi16(x.high, 4)});
    }
    static Bytes look_up(const std::int8_t* book, int offset, const Bytes& index) {
        const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(book));
        const __m128i moved = _mm_add_epi8(table, _mm_set1_epi8(static_cast<char>(offset)));
        const __m256i both = _mm256_broadcastsi128_si256(moved);
        return {_mm256_shuffle_epi8(both, index.low), _mm256_shuffle_epi8(both, index.high)};
    }
    static void store_sums_of_fours(const std::int8_t* codes, std::int32_t* sums) {
        for (int half = 0; half < 2; ++half) {
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), load(codes + 32 * half));
            const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * half), fours);
        }
    }
    static Bytes or_bytes(const Bytes& a, const Bytes& b) {
        return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
    }
    static Bytes add_bytes(const Bytes& x, int added) {
        const __m256i all = _mm256_set1_epi8(static_cast<char>(added));
        return {_mm256_add_epi8(x.low, all), _mm256_add_epi8(x.high, all)};
    }
    template <int quad>
    static Bytes top_bits(const Bytes& x) {
        const auto half = [](__m256i bytes) {
            const __m256i moved = quad < 2 ? _mm256_slli_epi16(bytes, quad == 0 ? 4 : 2) : _mm256_srli_epi16(bytes, quad == 2 ? 0 : 2);
            return _mm256_and_si256(moved, _mm256_set1_epi8(0x30));
        };
        return {half(x.low), half(x.high)};
    }
    struct Stretch {
        Int factor, added;  // 16 bits each
    };
    static Stretch stretch_by(const Int& step) {
        const auto half = [](__m256i steps) {
            return _mm256_or_si256(_mm256_slli_epi32(steps, 16), _mm256_and_si256(steps, _mm256_set1_epi32(0xffff)));
        };
        const auto added = [](__m256i factor) {
            const __m256i too_much = _mm256_mullo_epi16(factor, _mm256_set1_epi16(kQ4Offset * 257));
            return _mm256_sub_epi16(_mm256_set1_epi16(static_cast<short>(kByteOffset * 257)), too_much);
        };
        const Int factor{half(step.low), half(step.high)};
        return {factor, {added(factor.low), added(factor.high)}};
    }
    static Bytes stretch(const Bytes& x, const Stretch& by) {
        return {_mm256_add_epi16(_mm256_mullo_epi16(x.low, by.factor.low), by.added.low),
                _mm256_add_epi16(_mm256_mullo_epi16(x.high, by.factor.high), by.added.high)};
    }
    // Sums of pairs have 16 bits, so the factor without sign must stay small: the weight's own magnitude, at most 127,
    // with its sign given to the activation. Nothing is 128 too large then.
    static Int start(const std::int32_t*) { return zero_int(); }
    static Int start_small(const std::int32_t* p) { return set_int(*p); }
    static Int dot(const Int& sum, const Bytes& w, Word a) {
        const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
        const auto half = [&](__m256i total, __m256i bytes) {
            const __m256i value = _mm256_xor_si256(bytes, flip);
            const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(value), _mm256_sign_epi8(a, value));
            return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        };
        return {half(sum.low, w.low), half(sum.high, w.high)};
    }
    // Bytes of at most 127: pairs cannot overflow.
    static Int dot_small(const Int& sum, const Bytes& w, Word a) {
        const auto half = [&](__m256i total, __m256i bytes) {
            const __m256i pairs = _mm256_maddubs_epi16(bytes, a);
            return _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        };
        return {half(sum.low, w.low), half(sum.high, w.high)};
    }
};

struct HardwareStep {
    static std::uint32_t byte(std::uint32_t crc, std::uint8_t value) { return _mm_crc32_u8(crc, value); }
    static std::uint32_t word(std::uint32_t crc, std::uint64_t value) {
        return static_cast<std::uint32_t>(_mm_crc32_u64(crc, value));
    }
};

}  // namespace

void fill_avx2(Table& table) {
    fill_templates<Avx2>(table);
    fill_quantized<Avx2Ops>(table.quantized);
    fill_steps<Avx2Ops>(table.quantized);
    fill_attention<Avx2Ops>(table.quantized);
    table.crc32c = crc32c<HardwareStep>;
    fill_probes<Avx2Ops>(table.quantized);
}

}  // namespace fewfire
