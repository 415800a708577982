// Tile-level building blocks of the linear-head operators, compiled once per instruction set.
//
// Everything works on a *transposed* tile of logits: rows are vocabulary entries v, columns are
// tokens n. A vector register then holds the same vocabulary entry for consecutive tokens, so the
// online softmax over v needs no horizontal reduction, and every token goes through the same
// operations in the same order whatever the batch around it: its loss alone equals its loss in a
// batch bit for bit.
//
// Matrix products take the left operand A row-major as it lies in memory (a slice of the weight, or
// a tile of logit gradients) and the right operand B packed into panels:
//   B [K, N]  ->  [N / panel][K / group][panel][group]
// where `group` entries along K are consumed by one instruction (2 for bf16's dot product, else 1).
#pragma once

#include <stdint.h>

namespace vcore {

struct bf16 {
  uint16_t bits;
};

// T is what the products read, Acc<T> what they accumulate in and what statistics are kept in.
template <typename T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<bf16> {
  using type = float;
};
template <typename T>
using Acc = typename AccOf<T>::type;

template <typename T>
inline constexpr int64_t kGroup = 1;
template <>
inline constexpr int64_t kGroup<bf16> = 2;

// logits = softcap * tanh(scale * (x . w + bias) / softcap); softcap == 0 means none.
template <typename A>
struct LogitTransform {
  A scale;
  A softcap;
  bool identity(bool has_bias) const { return scale == A(1) && softcap == A(0) && !has_bias; }
};

// What one tile contributes to the softmax statistics of each token; each points at [columns].
template <typename A>
struct TileStats {
  A* max;     // m: maximum logit of the tile
  A* sum;     // sum over v of exp(z_v - m)
  A* moment;  // JVP: sum of exp(z_v - m) * dz_v. Pair: sum of exp(z_v - m) * expm1(dz_v)
  A* max2;    // pair: the same two of the perturbed logits z + dz
  A* sum2;
};

template <typename T>
struct HeadKernels {
  using A = Acc<T>;
  int64_t panel;  // columns of a packed panel

  // C [m, n] (+)= A [m, k] . B, with lda and k in elements of T and k a multiple of the group.
  void (*gemm)(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, A* c,
               int64_t ldc, bool accumulate);
  // B panels of x^T: B[k, n] = x[n, k]. x is [n, k] row-major, rows beyond n count as zero.
  void (*pack_transposed)(int64_t n, int64_t k, const T* x, int64_t ldx, T* b);
  // B panels of x itself: B[k, n] = x[k, n]. Rows beyond k up to the next group, columns beyond n
  // up to the next panel are zero.
  void (*pack)(int64_t k, int64_t n, const T* x, int64_t ldx, T* b);

  // In place: z <- transform(z + bias_v). With dz: dz <- its tangent (or its exact difference, see
  // transform_pair), where dz came as the tangent (difference) of the raw product.
  void (*transform)(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias,
                    A* z);
  void (*transform_jvp)(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias,
                        const A* bias_tangent, A* z, A* dz);
  void (*transform_pair)(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias,
                         const A* bias_difference, A* z, A* dz);

  // Online-softmax statistics of a tile, one value per column.
  void (*stats)(int64_t rows, int64_t cols, int64_t ld, const A* z, TileStats<A> out);
  void (*stats_jvp)(int64_t rows, int64_t cols, int64_t ld, const A* z, const A* dz,
                    TileStats<A> out);
  void (*stats_pair)(int64_t rows, int64_t cols, int64_t ld, const A* z, const A* dz,
                     TileStats<A> out);
  // stats, and keeps e = exp(z - m) * (1 - (z / softcap)^2) as T, [rows, cols] contiguous.
  void (*stats_keep)(int64_t rows, int64_t cols, int64_t ld, A softcap, const A* z,
                     TileStats<A> out, T* kept);

  // Gradient tiles, from the kept exponentials: g = kept * factor_n; and from recomputed logits, in
  // place: z <- exp(z - top_n) * (1 - (z / softcap)^2) * factor_n.
  void (*grad_from_kept)(int64_t rows, int64_t cols, const T* kept, const A* factor, A* g,
                         int64_t ld);
  void (*grad_from_logits)(int64_t rows, int64_t cols, int64_t ld, A softcap, const A* top,
                           const A* factor, A* z);
  // The gradient tile g [rows, cols] as T: by_token [cols, ld_token] with columns up to the next
  // group zeroed, by_vocab [rows, ld_vocab] likewise; either may be null. row_sum[v] += sum over n,
  // may be null.
  void (*emit)(int64_t rows, int64_t cols, int64_t ld, const A* g, T* by_token, int64_t ld_token,
               T* by_vocab, int64_t ld_vocab, A* row_sum);
};

// The kernels for the instruction set of this machine; for bf16 null where no instruction
// multiplies it.
template <typename T>
const HeadKernels<T>* head_kernels();

#define VCORE_DECLARE_ISA(name)                         \
  namespace name {                                      \
  extern const HeadKernels<float> head_kernels_float;   \
  extern const HeadKernels<double> head_kernels_double; \
  }
VCORE_DECLARE_ISA(baseline)
VCORE_DECLARE_ISA(avx2)
VCORE_DECLARE_ISA(avx512)
VCORE_DECLARE_ISA(avx512bf16)
namespace avx512bf16 {
extern const HeadKernels<bf16> head_kernels_bf16;
}
#undef VCORE_DECLARE_ISA

}  // namespace vcore
