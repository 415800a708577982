// Row maths of attention with a tangent, compiled once per instruction set. Tiles are transposed:
// rows are keys, columns queries, so that the online softmax needs no horizontal reduction and the
// probabilities come out in the packed panels that the next product reads (head_kernels.h).
#pragma once

#include "head_kernels.h"

namespace vcore {

// The online softmax of a block of queries, one value a query; each points at [cols].
template <typename A>
struct SoftmaxState {
  A* max;      // of the scores so far
  A* sum;      // of exp(s - max)
  A* mean;     // softmax mean of ds so far: tangents are kept relative to it
  A* rescale;  // out of the last tile: exp(max before - max)
  A* shift;    // and mean before - mean
};

template <typename T>
struct AttentionKernels {
  using A = Acc<T>;
  // Takes a tile of scores s [rows, ld] (-inf: not visible) and their tangents ds (0 there; null:
  // no tangent) into `state`, and emits p = exp(s - max) and dp = p * (ds - mean) as panels over
  // `cols` columns, rows up to the next group zeroed. s is overwritten.
  void (*softmax)(int64_t rows, int64_t cols, int64_t ld, A* s, const A* ds, SoftmaxState<A> state,
                  T* p, T* dp);
  // out and dout [rows, cols] before the tile, in terms of the state after it.
  void (*rescale)(int64_t rows, int64_t cols, SoftmaxState<A> state, A* out, A* dout);
  // Divides by the sum; 0 where a query has seen no key.
  void (*finish)(int64_t rows, int64_t cols, SoftmaxState<A> state, A* out, A* dout);
};

// As head_kernels: for bf16 the caller asks head_kernels<bf16>() first.
template <typename T>
const AttentionKernels<T>* attention_kernels();

#define VCORE_DECLARE_ISA(name)                                   \
  namespace name {                                                \
  extern const AttentionKernels<float> attention_kernels_float;   \
  extern const AttentionKernels<double> attention_kernels_double; \
  }
VCORE_DECLARE_ISA(baseline)
VCORE_DECLARE_ISA(avx2)
VCORE_DECLARE_ISA(avx512)
VCORE_DECLARE_ISA(avx512bf16)
namespace avx512bf16 {
extern const AttentionKernels<bf16> attention_kernels_bf16;
}
#undef VCORE_DECLARE_ISA

}  // namespace vcore
