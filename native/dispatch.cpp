#include "dispatch.hpp"

#include <array>
#include <atomic>
#include <cstddef>

#include "cpu.hpp"

namespace fewfire {
namespace {

#ifdef FEWFIRE_X86
constexpr bool kHasX86 = true;
#else
constexpr bool kHasX86 = false;
#endif

// Empty where the machine lacks the instructions: filling a table runs code that may have been compiled to them.
Table build_table(Isa isa) {
    Table table{};
    if (!is_supported(isa)) return table;
    fill_scalar(table);
#ifdef FEWFIRE_X86
    if (isa >= Isa::kAvx2) fill_avx2(table);
    if (isa >= Isa::kAvx512) fill_avx512(table);
#else
    (void)isa;
#endif
    return table;
}

Isa best_isa() {
    if (is_supported(Isa::kAvx512)) return Isa::kAvx512;
    return is_supported(Isa::kAvx2) ? Isa::kAvx2 : Isa::kScalar;
}

std::atomic<Isa>& chosen_isa() {
    static std::atomic<Isa> isa{best_isa()};
    return isa;
}

}  // namespace

bool is_supported(Isa isa) {
    switch (isa) {
        case Isa::kScalar: return true;
        case Isa::kAvx2: return kHasX86 && cpu_has_avx2();
        case Isa::kAvx512: return kHasX86 && cpu_has_avx512();
    }
    return false;
}

const Table& table() {
    static const std::array<Table, 3> tables{build_table(Isa::kScalar), build_table(Isa::kAvx2), build_table(Isa::kAvx512)};
    return tables[static_cast<std::size_t>(current_isa())];
}

Isa current_isa() { return chosen_isa().load(std::memory_order_relaxed); }

bool set_isa(Isa isa) {
    if (!is_supported(isa)) return false;
    chosen_isa().store(isa, std::memory_order_relaxed);
    return true;
}

}  // namespace fewfire
