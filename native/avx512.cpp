// AVX-512 versions (F, BW, DQ, VL, VNNI). Compiled with those flags and run only where CPUID and the OS allow them.
#include <immintrin.h>

#include "dispatch.hpp"
#include "templates.hpp"

namespace fewfire {
namespace {

struct Avx512 {
    static constexpr int kWidth = 16;
    static std::uint32_t greater(const float* p, float bound) {
        return _mm512_cmp_ps_mask(_mm512_loadu_ps(p), _mm512_set1_ps(bound), _CMP_GT_OQ);
    }
};

}  // namespace

void fill_avx512(Table& table) { fill_templates<Avx512>(table); }

}  // namespace fewfire
