// What this processor and this OS can execute. Owns detection only; whether a version is in the build is dispatch's.
#pragma once

namespace fewfire {

// AVX2, FMA and F16C, with the OS saving 256-bit registers.
bool cpu_has_avx2();

// AVX-512 F, BW, DQ, VL and VNNI (server processors since 2019), with the OS saving 512-bit registers.
bool cpu_has_avx512();

}  // namespace fewfire
