// The baseline: what every processor runs, and the whole table where nothing better is built.
#include <algorithm>
#include <cstdint>

#include "attention.hpp"
#include "checksum.hpp"
#include "dispatch.hpp"
#include "linear.hpp"
#include "probe.hpp"
#include "steps.hpp"
#include "templates.hpp"

namespace fewfire {
namespace {

// Four lanes are what x86-64 and AArch64 have without asking.
struct Scalar {
    static constexpr int kWidth = 4;
    static std::uint32_t greater(const float* p, float bound) {
        return (p[0] > bound) | (p[1] > bound) << 1 | (p[2] > bound) << 2 | (p[3] > bound) << 3;
    }
};

// IEEE binary16, subnormal numbers included.
inline float half_to_float(std::uint16_t bits) {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    std::uint32_t wide = sign | (magnitude << 13);
    float value;
    if (magnitude >= 0x7c00u) {
        wide += (255u - 31u) << 23;  // infinity, NaN
    } else if (magnitude >= 0x0400u) {
        wide += (127u - 15u) << 23;
    } else {
        value = static_cast<float>(magnitude) * 0x1p-24f;
        return sign != 0 ? -value : value;
    }
    std::memcpy(&value, &wide, 4);
    return value;
}

// The plain meaning of every operation, lane by lane; the compiler makes of it what the baseline has.
struct ScalarOps {
    struct Bytes {
        std::uint8_t at[64];
    };
    struct Int {
        std::int32_t at[16];
    };
    struct Float {
        float at[16];
    };
    struct Word {
        std::int8_t at[4];
    };
    static constexpr int kTokens = 4, kBlocks = 1, kSums = 4;

    template <class Vector, class Body>
    static Vector each(Body body) {
        Vector made;
        for (int i = 0; i < static_cast<int>(sizeof made.at / sizeof made.at[0]); ++i) made.at[i] = body(i);
        return made;
    }
    template <class Vector>
    static Vector load(const void* p) {
        Vector made;
        std::memcpy(&made, p, sizeof made);
        return made;
    }

    static Float zero_float() { return set_float(0.0f); }
    static Float set_float(float x) { return each<Float>([&](int) { return x; }); }
    static Int set_int(std::int32_t x) { return each<Int>([&](int) { return x; }); }
    static Int zero_int() { return set_int(0); }
    static Word word(const std::int8_t* p) { return load<Word>(p); }
    static Bytes load_bytes(const std::uint8_t* p) { return load<Bytes>(p); }
    static Int load_ints(const std::uint8_t* p) { return load<Int>(p); }
    static Float load_floats(const float* p) { return load<Float>(p); }
    static Float load_bf16(const std::uint8_t* p) {
        std::uint16_t halves[16];
        std::memcpy(halves, p, sizeof halves);
        return each<Float>([&](int i) { return bf16_to_float(halves[i]); });
    }
    static Float load_half(const std::uint8_t* p) {
        std::uint16_t halves[16];
        std::memcpy(halves, p, sizeof halves);
        return each<Float>([&](int i) { return half_to_float(halves[i]); });
    }
    static Float load_int8(const std::int8_t* p) {
        return each<Float>([&](int i) { return static_cast<float>(p[i]); });
    }
    static void store_floats(float* p, const Float& x) { std::memcpy(p, &x, sizeof x); }
    static void store_bytes(std::uint8_t* p, const Bytes& x) { std::memcpy(p, &x, sizeof x); }
    static void prefetch(const void*) {}
    static Int prefetch_beside(const Int& x, const std::uint8_t*) { return x; }

    static Float add(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.at[i] + b.at[i]; });
    }
    static Float mul(const Float& a, const Float& b) {
        return each<Float>([&](int i) { return a.at[i] * b.at[i]; });
    }
    static Float fused(const Float& sum, const Float& a, const Float& b) {
        return each<Float>([&](int i) { return std::fma(a.at[i], b.at[i], sum.at[i]); });
    }
    static Float to_float(const Int& x) {
        return each<Float>([&](int i) { return static_cast<float>(x.at[i]); });
    }
    static Int multiply_add(const Int& sum, const Int& a, const Int& b) {
        return each<Int>([&](int i) {
            const auto product = static_cast<std::uint32_t>(a.at[i]) * static_cast<std::uint32_t>(b.at[i]);
            return static_cast<std::int32_t>(static_cast<std::uint32_t>(sum.at[i]) + product);
        });
    }
    static Int add_ints(const Int& a, const Int& b) {
        return each<Int>([&](int i) {
            return static_cast<std::int32_t>(static_cast<std::uint32_t>(a.at[i]) + static_cast<std::uint32_t>(b.at[i]));
        });
    }
    static Bytes as_bytes(const Int& x) { return load<Bytes>(&x); }
    template <int s>
    static Int signed_nibble(const Int& words) {
        return each<Int>([&](int i) {
            const auto shifted = static_cast<std::uint32_t>(words.at[i]) << (28 - 4 * s);
            return static_cast<std::int32_t>(shifted) >> 28;
        });
    }
    static Bytes low_nibbles(const Bytes& x) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>(x.at[i] & 15); });
    }
    static Bytes high_nibbles(const Bytes& x) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>(x.at[i] >> 4); });
    }
    // book[index] + offset, as a byte.
    static Bytes look_up(const std::int8_t* book, int offset, const Bytes& index) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>(book[index.at[i]] + offset); });
    }
    // Of 64 codes.
    static void store_sums_of_fours(const std::int8_t* codes, std::int32_t* sums) {
        for (int i = 0; i < 16; ++i) sums[i] = codes[4 * i] + codes[4 * i + 1] + codes[4 * i + 2] + codes[4 * i + 3];
    }
    static Bytes or_bytes(const Bytes& a, const Bytes& b) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>(a.at[i] | b.at[i]); });
    }
    static Bytes add_bytes(const Bytes& x, int added) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>(x.at[i] + added); });
    }
    // Bits 2 * quad and 2 * quad + 1 as bits 4 and 5.
    template <int quad>
    static Bytes top_bits(const Bytes& x) {
        return each<Bytes>([&](int i) { return static_cast<std::uint8_t>((x.at[i] >> 2 * quad & 3) << 4); });
    }
    // Bytes less kQ4Offset, times their row's step of -7 to 7, plus kByteOffset: a byte again. 4 bytes a row. The step is
    // prepared once for many bytes. Vectors do it in 16 bits, both bytes with one product: x0 + 256 x1 times the step is
    // right for both once what the offset adds to each is taken off, since no byte then borrows of its neighbour.
    using Stretch = Int;
    static Stretch stretch_by(const Int& step) { return step; }
    static Bytes stretch(const Bytes& x, const Stretch& step) {
        return each<Bytes>([&](int i) {
            return static_cast<std::uint8_t>((x.at[i] - kQ4Offset) * step.at[i / 4] + kByteOffset);
        });
    }
    // What a run's sum begins with: bytes are too large by an offset, which `dot` of another instruction set may undo
    // itself. For dot, and for dot_small, whose bytes are at most 127.
    static Int start(const std::int32_t* p) { return set_int(*p); }
    static Int start_small(const std::int32_t* p) { return start(p); }
    static Int dot(const Int& sum, const Bytes& w, const Word& a) {
        return each<Int>([&](int i) {
            const std::uint8_t* four = w.at + 4 * i;
            const std::int32_t added = four[0] * a.at[0] + four[1] * a.at[1] + four[2] * a.at[2] + four[3] * a.at[3];
            return static_cast<std::int32_t>(static_cast<std::uint32_t>(sum.at[i]) + static_cast<std::uint32_t>(added));
        });
    }
    static Int dot_small(const Int& sum, const Bytes& w, const Word& a) { return dot(sum, w, a); }
};

// `offsets` serves as counts, then as cursors, so that nothing is allocated.
std::int64_t group_by_expert(const std::int64_t* ids, const std::uint8_t* kept, std::int64_t count,
                             std::int64_t num_experts, std::int64_t* order, std::int64_t* offsets) {
    std::fill(offsets, offsets + num_experts + 1, std::int64_t{0});
    for (std::int64_t a = 0; a < count; ++a) {
        if (kept != nullptr && kept[a] == 0) continue;
        if (ids[a] < 0 || ids[a] >= num_experts) return a;
        ++offsets[ids[a] + 1];
    }
    for (std::int64_t e = 0; e < num_experts; ++e) offsets[e + 1] += offsets[e];
    for (std::int64_t a = 0; a < count; ++a) {
        if (kept == nullptr || kept[a] != 0) order[offsets[ids[a]]++] = a;
    }
    // Each cursor now stands where the next expert begins.
    std::copy_backward(offsets, offsets + num_experts, offsets + num_experts + 1);
    offsets[0] = 0;
    return count;
}

}  // namespace

void fill_scalar(Table& table) {
    fill_templates<Scalar>(table);
    fill_quantized<ScalarOps>(table.quantized);
    fill_steps<ScalarOps>(table.quantized);
    fill_attention<ScalarOps>(table.quantized);
    table.crc32c = crc32c<TableStep>;
    fill_probes<ScalarOps>(table.quantized);
    table.group_by_expert = group_by_expert;
}

}  // namespace fewfire
