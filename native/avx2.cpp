// AVX2 and FMA versions. Compiled with those flags and run only where CPUID and the OS allow them.
#include <immintrin.h>

#include "dispatch.hpp"
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

}  // namespace

void fill_avx2(Table& table) { fill_templates<Avx2>(table); }

}  // namespace fewfire
