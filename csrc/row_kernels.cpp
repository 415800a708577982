#include "row_kernels.h"

#include "vec.h"

namespace vcore::VCORE_ISA {
namespace {

// The first `count` values at p as a vector, zeros after them; all of them where count is kLanes.
template <typename A>
VCORE_INLINE Vec<A> read(const A* p, int64_t count) {
  Vec<A> v{};
  if (count == kLanes<A>) {
    memcpy(&v, p, sizeof v);
  } else {
    memcpy(&v, p, count * sizeof(A));
  }
  return v;
}
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef VecOf<float>::mask Bits;
typedef uint32_t UnsignedBits __attribute__((vector_size(kVectorBytes)));

VCORE_INLINE Vec<float> read(const bf16* p, int64_t count) {
  Halves v{};
  if (count == kLanes<float>) {
    memcpy(&v, p, sizeof v);
  } else {
    memcpy(&v, p, count * sizeof(bf16));
  }
  return (Vec<float>)(__builtin_convertvector(v, UnsignedBits) << 16);
}

template <typename A>
VCORE_INLINE void write(A* p, Vec<A> v, int64_t count) {
  if (count == kLanes<A>) {
    memcpy(p, &v, sizeof v);
  } else {
    memcpy(p, &v, count * sizeof(A));
  }
}
// Rounds to nearest, ties to even; NaN stays NaN.
VCORE_INLINE void write(bf16* p, Vec<float> v, int64_t count) {
  const UnsignedBits bits = (UnsignedBits)v;
  const UnsignedBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UnsignedBits quiet = (bits >> 16) | 0x40u;
  const Halves out = __builtin_convertvector(v == v ? rounded : quiet, Halves);
  if (count == kLanes<float>) {
    memcpy(p, &out, sizeof out);
  } else {
    memcpy(p, &out, count * sizeof(bf16));
  }
}

template <typename A>
VCORE_INLINE A sum_of(Vec<A> v) {
  A total = 0;
  for (int i = 0; i < kLanes<A>; ++i) total += v[i];
  return total;
}

// body(index, count) for each vector of n values; count is kLanes but for the last.
template <typename A, typename Body>
VCORE_INLINE void for_vectors(int64_t n, const Body& body) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) body(j, lanes);
  if (j < n) body(j, n - j);
}

VCORE_INLINE float root(float x) { return sqrtf(x); }
VCORE_INLINE double root(double x) { return sqrt(x); }

template <typename T, typename O>
void rms_norm(int64_t rows, int64_t cols, const T* x, const T* dx, const Acc<T>* weight,
              const Acc<T>* dweight, Acc<T> eps, O* y, O* dy) {
  using A = Acc<T>;
  for (int64_t i = 0; i < rows; ++i, x += cols, y += cols, dy += cols) {
    Vec<A> square{}, product{};
    for_vectors<A>(cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const Vec<A> v = read(x + j, count);
      square += v * v;
      if (dx) product += v * read(dx + j, count);
    });
    const A scale = A(1) / root(sum_of<A>(square) / A(cols) + eps);
    const A along = sum_of<A>(product) / A(cols) * scale;  // mean(n * dx)
    for_vectors<A>(cols, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
      const Vec<A> n = read(x + j, count) * scale, w = read(weight + j, count);
      Vec<A> tangent{};
      if (dx) tangent = w * ((read(dx + j, count) - n * along) * scale);
      if (dweight) tangent += n * read(dweight + j, count);
      write(y + j, w * n, count);
      write(dy + j, tangent, count);
    });
    if (dx) dx += cols;
  }
}

template <typename A>
VCORE_INLINE void silu(Vec<A> g, Vec<A>& value, Vec<A>& slope) {
  const Vec<A> sigmoid = A(1) / (A(1) + vexp(-g));
  value = g * sigmoid;
  slope = sigmoid * (A(1) + g * (A(1) - sigmoid));
}

template <typename A>
VCORE_INLINE void gelu(Vec<A> g, Vec<A>& value, Vec<A>& slope) {
  constexpr A kRoot = A(0.79788456080286535588);  // sqrt(2 / pi)
  constexpr A kCube = A(0.044715);
  const Vec<A> tanh = vtanh<A>(kRoot * (g + kCube * (g * g * g)));
  const Vec<A> half = A(0.5) * (A(1) + tanh);
  value = g * half;
  slope = half + A(0.5) * g * (A(1) - tanh * tanh) * kRoot * (A(1) + A(3) * kCube * (g * g));
}

template <typename T, typename O, bool kSilu>
void gated(int64_t size, const T* gate, const T* up, const T* dgate, const T* dup, O* y, O* dy) {
  using A = Acc<T>;
  for_vectors<A>(size, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
    Vec<A> value, slope, tangent{};
    const Vec<A> g = read(gate + j, count);
    if constexpr (kSilu) {
      silu<A>(g, value, slope);
    } else {
      gelu<A>(g, value, slope);
    }
    const Vec<A> u = read(up + j, count);
    if (dgate) tangent = slope * read(dgate + j, count) * u;
    if (dup) tangent += value * read(dup + j, count);
    write(y + j, value * u, count);
    write(dy + j, tangent, count);
  });
}

template <typename T, typename O>
constexpr RowKernels<T, O> table() {
  return {rms_norm<T, O>, gated<T, O, true>, gated<T, O, false>};
}

}  // namespace

extern const RowKernels<float, float> row_kernels_float = table<float, float>();
extern const RowKernels<double, double> row_kernels_double = table<double, double>();
extern const RowKernels<bf16, bf16> row_kernels_bf16 = table<bf16, bf16>();
extern const RowKernels<bf16, float> row_kernels_bf16_to_float = table<bf16, float>();

}  // namespace vcore::VCORE_ISA
