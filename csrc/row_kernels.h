// Row-wise layers with a tangent, compiled once per instruction set. Everything is computed in
// Acc<T> and rounded once.
#pragma once

#include "head_kernels.h"

namespace vcore {

// Reads T, writes O. Rows are contiguous; tangents may be null (zero).
template <typename T, typename O>
struct RowKernels {
  using A = Acc<T>;
  // With n = x / sqrt(mean(x^2) + eps), y = weight * n and
  // dy = weight * (dx - n * mean(n * dx)) / sqrt(mean(x^2) + eps) + dweight * n.
  void (*rms_norm)(int64_t rows, int64_t cols, const T* x, const T* dx, const A* weight,
                   const A* dweight, A eps, O* y, O* dy);
  // y = f(gate) * up, dy = f'(gate) * dgate * up + f(gate) * dup. f: silu, or GELU by tanh.
  void (*silu_gated)(int64_t size, const T* gate, const T* up, const T* dgate, const T* dup, O* y,
                     O* dy);
  void (*gelu_gated)(int64_t size, const T* gate, const T* up, const T* dgate, const T* dup, O* y,
                     O* dy);
};

#define VCORE_DECLARE_ISA(name)                                   \
  namespace name {                                                \
  extern const RowKernels<float, float> row_kernels_float;        \
  extern const RowKernels<double, double> row_kernels_double;     \
  extern const RowKernels<bf16, bf16> row_kernels_bf16;           \
  extern const RowKernels<bf16, float> row_kernels_bf16_to_float; \
  }
VCORE_DECLARE_ISA(baseline)
VCORE_DECLARE_ISA(avx2)
VCORE_DECLARE_ISA(avx512)
#undef VCORE_DECLARE_ISA

}  // namespace vcore
