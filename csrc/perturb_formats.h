// How the entries of a parameter are stored, widened and rounded, and the random bits of stochastic
// rounding: shared by the CPU kernels (perturb_kernels.cpp) and the CUDA kernels (perturb_chunk.h).
//
// The product and the difference of theta - epsilon * g are each rounded to the accumulation type,
// never fused, so that every instruction set, every device and the PyTorch reference give the same
// bits: whoever includes this is compiled with -ffp-contract=off, or -fmad=false on a GPU.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define VCORE_DEVICE __host__ __device__
#else
#define VCORE_DEVICE
#endif

namespace vcore {
namespace {

template <class To, class From>
VCORE_DEVICE inline To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// condition ? yes : no without a branch, so that loops over it vectorise.
VCORE_DEVICE inline float select(bool condition, float yes, float no) {
  const uint32_t mask = -static_cast<uint32_t>(condition);
  return bits<float>((bits<uint32_t>(yes) & mask) | (bits<uint32_t>(no) & ~mask));
}
VCORE_DEVICE inline double select(bool condition, double yes, double no) {
  const uint64_t mask = -static_cast<uint64_t>(condition);
  return bits<double>((bits<uint64_t>(yes) & mask) | (bits<uint64_t>(no) & ~mask));
}

// ---- storage types: an entry in memory, its accumulation type, widening and narrowing ----

struct F32 {
  using Storage = uint32_t;
  using Acc = float;
  static constexpr Storage kInfinity = 0x7f800000u;
  VCORE_DEVICE static Acc widen(Storage x) { return bits<float>(x); }
  VCORE_DEVICE static Storage narrow(Acc x) { return bits<uint32_t>(x); }
};

struct F64 {
  using Storage = uint64_t;
  using Acc = double;
  static constexpr Storage kInfinity = 0x7ff0000000000000u;
  VCORE_DEVICE static Acc widen(Storage x) { return bits<double>(x); }
  VCORE_DEVICE static Storage narrow(Acc x) { return bits<uint64_t>(x); }
};

// float32 under stochastic rounding: accumulated in double, of which 29 bits are rounded away at
// random.
struct F32Stochastic {
  using Storage = uint32_t;
  using Acc = double;
  VCORE_DEVICE static Acc widen(Storage x) { return bits<float>(x); }
  VCORE_DEVICE static Storage narrow(Acc x, uint32_t random) {
    const double size = __builtin_fabs(x);
    const uint64_t mask = (uint64_t{1} << 29) - 1;
    const double normal = bits<double>((bits<uint64_t>(x) + (random & mask)) & ~mask);
    // Subnormal results lie on a fixed grid of 2^-149.
    const bool small = size < 0x1p-126;
    const double units = select(small, size, 0.0) * 0x1p149 + random * 0x1p-32;
    const double grid = static_cast<double>(static_cast<int32_t>(units));
    const double subnormal = __builtin_copysign(grid * 0x1p-149, x);
    const double rounded = select(small, subnormal, normal);
    return bits<uint32_t>(static_cast<float>(select(size <= 0x1.fffffep127, rounded, x)));
  }
};

struct BF16 {
  using Storage = uint16_t;
  using Acc = float;
  static constexpr Storage kInfinity = 0x7f80u;
  VCORE_DEVICE static Acc widen(Storage x) { return bits<float>(static_cast<uint32_t>(x) << 16); }
  VCORE_DEVICE static Storage narrow(Acc x) {
    const uint32_t u = bits<uint32_t>(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

struct BF16Stochastic : BF16 {
  VCORE_DEVICE static Storage narrow(Acc x, uint32_t random) {
    const uint32_t u = bits<uint32_t>(x);
    const float rounded = bits<float>((u + (random & 0xffffu)) & ~0xffffu);
    return BF16::narrow(select((u & 0x7f800000u) == 0x7f800000u, x, rounded));
  }
};

// Half precision by integer arithmetic (the method of Maratyszcza's FP16 library), which vectorises
// on every CPU. A GPU converts it in one instruction.
struct F16 {
  using Storage = uint16_t;
  using Acc = float;
  static constexpr Storage kInfinity = 0x7c00u;
  VCORE_DEVICE static Acc widen(Storage x) {
#if defined(__CUDA_ARCH__)
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
#else
    const uint32_t w = static_cast<uint32_t>(x) << 16;
    const uint32_t twice = w + w;
    const float normal = bits<float>((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
    const float subnormal = bits<float>((twice >> 17) | (126u << 23)) - 0.5f;
    const uint32_t size = twice < (1u << 27) ? bits<uint32_t>(subnormal) : bits<uint32_t>(normal);
    return bits<float>((w & 0x80000000u) | size);
#endif
  }
  VCORE_DEVICE static Storage narrow(Acc x) {
    const uint32_t w = bits<uint32_t>(x);
#if defined(__CUDA_ARCH__)
    Storage half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return x == x ? half : static_cast<Storage>((w >> 16 & 0x8000u) | 0x7e00u);
#else
    const uint32_t twice = w + w;
    uint32_t bias = twice & 0xff000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    const float base =
        bits<float>((bias >> 1) + 0x07800000u) + (__builtin_fabsf(x) * 0x1p112f) * 0x1p-110f;
    const uint32_t u = bits<uint32_t>(base);
    const uint32_t size = twice > 0xff000000u ? 0x7e00u : ((u >> 13) & 0x7c00u) + (u & 0x0fffu);
    return static_cast<uint16_t>(((w & 0x80000000u) >> 16) | size);
#endif
  }
};

struct F16Stochastic : F16 {
  VCORE_DEVICE static Storage narrow(Acc x, uint32_t random) {
    return F16::narrow(on_grid(x, random));
  }
  // x rounded at random to a float that half precision holds exactly.
  VCORE_DEVICE static Acc on_grid(Acc x, uint32_t random) {
    const uint32_t u = bits<uint32_t>(x);
    const float size = __builtin_fabsf(x);
    const float normal = bits<float>((u + (random & 0x1fffu)) & ~0x1fffu);
    // Subnormal results lie on a fixed grid of 2^-24.
    const bool small = size < 0x1p-14f;
    const float units =
        select(small, size, 0.0f) * 0x1p24f + static_cast<float>(random >> 8) * 0x1p-24f;
    const float grid = static_cast<float>(static_cast<int32_t>(units));
    const float subnormal = __builtin_copysignf(grid * 0x1p-24f, x);
    return select((u & 0x7f800000u) == 0x7f800000u, x, select(small, subnormal, normal));
  }
};

// ---- random bits ----

struct Words {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Entry e of a
// tensor takes word (e % 1024) / 256 of counter (e / 1024) * 256 + e % 256.
VCORE_DEVICE inline Words philox(uint64_t seed, uint32_t tensor, uint64_t counter) {
  uint32_t c0 = static_cast<uint32_t>(counter);
  uint32_t c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = tensor;
  uint32_t c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace
}  // namespace vcore
