// The row loops of the in-place perturbation, one copy per instruction set (isa.h). Only built-in
// types cross this interface.
#pragma once

#include <stdint.h>

namespace vcore {

enum class Float { f32, bf16, f16, f64 };

// A run of entries of one parameter tensor, in memory order.
struct PerturbRun {
  void* theta;
  const void* direction;
  void* saved;  // receives theta's old bits; may be `direction` itself, which is then overwritten
  int64_t size;
  int64_t offset;  // of the first entry within its tensor, a multiple of kPerturbBlock
  Float theta_type;
  Float direction_type;
  uint32_t tensor;  // number of the tensor in its list: random bits depend on (seed, tensor,
                    // offset) only
};

struct PerturbOptions {
  double epsilon;
  uint64_t seed;
  bool stochastic;
  bool stream;  // write `saved` past the caches
};

struct PerturbCounts {
  int64_t nonzero;  // entries of the direction that are not zero
  int64_t moved;    // entries of theta whose bits have changed
  bool nonfinite;   // whether the direction holds NaN or infinity
};

constexpr int64_t kPerturbBlock = 1024;

using PerturbFn = PerturbCounts (*)(const PerturbRun&, const PerturbOptions&);
using CopyFn = void (*)(void* to, const void* from, int64_t bytes, bool stream);

#define VCORE_DECLARE_PERTURB(isa)                                         \
  namespace isa {                                                          \
  PerturbCounts perturb_run(const PerturbRun&, const PerturbOptions&);     \
  void copy_bytes(void* to, const void* from, int64_t bytes, bool stream); \
  }
VCORE_DECLARE_PERTURB(baseline)
VCORE_DECLARE_PERTURB(avx2)
VCORE_DECLARE_PERTURB(avx512)
VCORE_DECLARE_PERTURB(avx512bf16)
#undef VCORE_DECLARE_PERTURB

}  // namespace vcore
