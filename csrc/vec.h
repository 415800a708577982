// Vectors as wide as the instruction set of this compilation, and the few functions the kernels
// need. Included only by sources that are compiled once per instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace vcore::VCORE_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VecOf<A>::type;
template <typename A>
inline constexpr int kLanes = kVectorBytes / int(sizeof(A));

#define VCORE_INLINE static inline __attribute__((always_inline))

template <typename A>
VCORE_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <typename A>
VCORE_INLINE void store(A* p, Vec<A> v) {
  memcpy(p, &v, sizeof v);
}
template <typename A>
VCORE_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}

// exp(x): 2^n * p(r) with r in [-ln2/2, ln2/2] and a degree-6 polynomial, relative error about
// 1e-7; exactly 0 below the smallest normal number, infinity above the largest; NaN stays NaN.
VCORE_INLINE Vec<float> vexp(Vec<float> x) {
  typedef VecOf<float>::mask Bits;
  const Vec<float> magic =
      splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec<float> inside = x < -87.3f ? splat(-87.3f) : x;
  inside = inside > 88.7f ? splat(88.7f) : inside;
  const Vec<float> n = (inside * 1.44269504088896341f + magic) - magic;
  Vec<float> r = inside - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> p = r * 1.3888889e-3f + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n in two steps, since n can be 128.
  const Bits half = __builtin_convertvector(n, Bits) >> 1;
  const Bits rest = __builtin_convertvector(n, Bits) - half;
  p = p * (Vec<float>)((half + 127) << 23) * (Vec<float>)((rest + 127) << 23);
  p = x < -87.3f ? splat(0.0f) : p;
  p = x > 88.7f ? splat(INFINITY) : p;
  return x == x ? p : x;
}

// exp(x) - 1 with full relative accuracy near 0.
VCORE_INLINE Vec<float> vexpm1(Vec<float> x) {
  Vec<float> p = x * 2.4801587e-5f + 1.9841270e-4f;  // Taylor: below 1e-9 relative for |x| < 0.35
  p = p * x + 1.3888889e-3f;
  p = p * x + 8.3333333e-3f;
  p = p * x + 4.1666667e-2f;
  p = p * x + 1.6666667e-1f;
  p = p * x + 0.5f;
  p = p * (x * x) + x;
  const Vec<float> far = vexp(x) - 1.0f;
  return (x < 0.35f) & (x > -0.35f) ? p : far;
}

VCORE_INLINE Vec<double> vexp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}
VCORE_INLINE Vec<double> vexpm1(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = expm1(x[i]);
  return x;
}

template <typename A>
VCORE_INLINE Vec<A> vmax(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}

template <typename A>
VCORE_INLINE Vec<A> vtanh(Vec<A> x) {
  Vec<A> inside = x > A(20) ? splat(A(20)) : x;
  inside = inside < A(-20) ? splat(A(-20)) : inside;
  const Vec<A> e = vexpm1(inside * A(2));
  return e / (e + A(2));
}

}  // namespace vcore::VCORE_ISA
