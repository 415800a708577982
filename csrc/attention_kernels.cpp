#include "attention_kernels.h"

#include "vec.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vcore::VCORE_ISA {
namespace {

template <typename T>
constexpr int64_t kPanel = 2 * kLanes<Acc<T>>;

// One group of rows of a panel: a vector of `first`, for bf16 interleaved with one of `second`.
template <typename T>
VCORE_INLINE void store_group(T* to, Vec<Acc<T>> first, Vec<Acc<T>> second) {
  if constexpr (kGroup<T> == 1) {
    store(to, first);
    (void)second;
  } else {
#if defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
  }
}

template <typename T>
void softmax(int64_t rows, int64_t cols, int64_t ld, Acc<T>* s, const Acc<T>* ds,
             SoftmaxState<Acc<T>> state, T* p, T* dp) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, panel = kPanel<T>, group = kGroup<T>;
  const int64_t padded = (rows + group - 1) / group * group;
  const Vec<A> zero{};
  for (int64_t j = 0; j < cols; j += lanes) {
    const Vec<A> before = load(state.max + j);
    Vec<A> max = before;
    for (int64_t v = 0; v < rows; ++v) max = vmax<A>(load(s + v * ld + j), max);
    const Vec<A> top = max == splat(A(-INFINITY)) ? zero : max;  // no key visible yet
    const Vec<A> rescale = before == max ? splat(A(1)) : vexp(before - top);

    Vec<A> sum{}, moment{};
    for (int64_t v = 0; v < rows; ++v) {
      const Vec<A> e = vexp(load(s + v * ld + j) - top);
      store(s + v * ld + j, e);
      sum += e;
      if (ds) moment += e * load(ds + v * ld + j);
    }
    const Vec<A> kept = load(state.sum + j) * rescale, total = kept + sum;
    const Vec<A> mean_before = load(state.mean + j);
    const Vec<A> mean = total == zero ? zero : (kept * mean_before + moment) / total;
    store(state.max + j, max);
    store(state.sum + j, total);
    store(state.mean + j, mean);
    store(state.rescale + j, rescale);
    store(state.shift + j, mean_before - mean);

    const int64_t at = j / panel * panel * padded + j % panel * group;
    for (int64_t v = 0; v < rows; v += group) {
      const bool pair = v + 1 < rows;
      const A* row = s + v * ld + j;
      const Vec<A> e0 = load(row), e1 = group == 2 && pair ? load(row + ld) : zero;
      store_group<T>(p + at + v * panel, e0, e1);
      if (!ds) continue;
      const A* tangent = ds + v * ld + j;
      const Vec<A> d0 = e0 * (load(tangent) - mean);
      const Vec<A> d1 = group == 2 && pair ? e1 * (load(tangent + ld) - mean) : zero;
      store_group<T>(dp + at + v * panel, d0, d1);
    }
  }
}

template <typename A>
void rescale(int64_t rows, int64_t cols, SoftmaxState<A> state, A* out, A* dout) {
  for (int64_t v = 0; v < rows; ++v) {
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      const int64_t at = v * cols + j;
      const Vec<A> factor = load(state.rescale + j), o = load(out + at) * factor;
      store(out + at, o);
      store(dout + at, load(dout + at) * factor + load(state.shift + j) * o);
    }
  }
}

template <typename A>
void finish(int64_t rows, int64_t cols, SoftmaxState<A> state, A* out, A* dout) {
  for (int64_t v = 0; v < rows; ++v) {
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      const Vec<A> sum = load(state.sum + j);
      const Vec<A> factor = sum == Vec<A>{} ? Vec<A>{} : A(1) / sum;
      store(out + v * cols + j, load(out + v * cols + j) * factor);
      store(dout + v * cols + j, load(dout + v * cols + j) * factor);
    }
  }
}

template <typename T>
constexpr AttentionKernels<T> table() {
  return {softmax<T>, rescale<Acc<T>>, finish<Acc<T>>};
}

}  // namespace

extern const AttentionKernels<float> attention_kernels_float = table<float>();
extern const AttentionKernels<double> attention_kernels_double = table<double>();
#if defined(__AVX512BF16__)
extern const AttentionKernels<bf16> attention_kernels_bf16 = table<bf16>();
#endif

}  // namespace vcore::VCORE_ISA
