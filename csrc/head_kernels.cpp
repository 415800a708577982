#include "head_kernels.h"

#include "vec.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace vcore::VCORE_ISA {
namespace {

// ---------------------------------------------------------------------------------------------------
// Matrix products. A block of kBlockRows x 2 vectors of C lives in registers for the whole of K: 28
// accumulators of 32 registers with AVX-512, 12 of 16 otherwise. Per step the two vectors of B are
// loaded once and kBlockRows groups of A are broadcast. Measured on Zen 4, 1024-wide bf16: 455
// GFLOP/s on two cores, where oneDNN's brgemm reaches 440 and at::mm 412.

#if defined(__AVX512F__)
constexpr int kBlockRows = 14;
#else
constexpr int kBlockRows = 6;
#endif

template <typename T>
struct Product {  // float and double
  using A = T;
  using Group = T;
  VCORE_INLINE Vec<A> broadcast(Group a) { return splat(a); }
  VCORE_INLINE void add(Vec<A>& c, Vec<A> a, Vec<A> b) { c += a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Product<bf16> {
  using A = float;
  using Group = int32_t;  // two bf16 of A, consecutive along K
  VCORE_INLINE Vec<A> broadcast(Group a) { return (Vec<A>)_mm512_set1_epi32(a); }
  VCORE_INLINE void add(Vec<A>& c, Vec<A> a, Vec<A> b) {
    c = (Vec<A>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

template <typename T>
constexpr int64_t kPanel = 2 * kLanes<Acc<T>>;

template <typename T, int kRows>
VCORE_INLINE void gemm_block(int64_t groups, const T* a, int64_t lda, const T* b, Acc<T>* c,
                             int64_t ldc, bool accumulate) {
  using P = Product<T>;
  using A = Acc<T>;
  using Group = typename P::Group;
  constexpr int64_t lanes = kLanes<A>;
  Vec<A> sum[kRows][2];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    sum[i][0] = sum[i][1] = Vec<A>{};
    // Needed when the sums are complete: rows of d_weight come from memory meanwhile.
    __builtin_prefetch(c + i * ldc, 1);
    __builtin_prefetch(c + i * ldc + lanes, 1);
  }
  const A* panel = reinterpret_cast<const A*>(b);  // a group of B entries has the size of an A
  for (int64_t k = 0; k < groups; ++k) {
    const Vec<A> b0 = load(panel + 2 * k * lanes);
    const Vec<A> b1 = load(panel + (2 * k + 1) * lanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      Group group;
      memcpy(&group, a + i * lda + k * kGroup<T>, sizeof group);
      const Vec<A> entry = P::broadcast(group);
      P::add(sum[i][0], entry, b0);
      P::add(sum[i][1], entry, b1);
    }
  }
  // C is added last, not summed onto: a sum over tiles of sums within tiles rounds less than one
  // long sum.
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    A* row = c + i * ldc;
    store(row, accumulate ? load(row) + sum[i][0] : sum[i][0]);
    store(row + lanes, accumulate ? load(row + lanes) + sum[i][1] : sum[i][1]);
  }
}

template <typename T, int kRows>
void gemm_rows(int rows, int64_t groups, const T* a, int64_t lda, const T* b, Acc<T>* c,
               int64_t ldc, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return gemm_rows<T, kRows - 1>(rows, groups, a, lda, b, c, ldc, accumulate);
    }
  }
  gemm_block<T, kRows>(groups, a, lda, b, c, ldc, accumulate);
}

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, Acc<T>* c,
          int64_t ldc, bool accumulate) {
  using A = Acc<T>;
  constexpr int64_t panel = kPanel<T>;
  const int64_t groups = k / kGroup<T>;
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int rows = m - i < kBlockRows ? int(m - i) : kBlockRows;
    for (int64_t j = 0; j < n; j += panel) {
      A* block = c + i * ldc + j;
      const T* columns = b + j * k;
      if (n - j >= panel) {
        gemm_rows<T, kBlockRows>(rows, groups, a + i * lda, lda, columns, block, ldc, accumulate);
        continue;
      }
      A edge[kBlockRows * panel];  // the last panel reaches beyond C
      gemm_rows<T, kBlockRows>(rows, groups, a + i * lda, lda, columns, edge, panel, false);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t q = 0; q < n - j; ++q) {
          block[r * ldc + q] = (accumulate ? block[r * ldc + q] : A(0)) + edge[r * panel + q];
        }
      }
    }
  }
}

template <typename T>
void pack_transposed(int64_t n, int64_t k, const T* x, int64_t ldx, T* b) {
  constexpr int64_t panel = kPanel<T>, group = kGroup<T>;
  for (int64_t j = 0; j < n; j += panel) {
    for (int64_t q = 0; q < panel; ++q) {
      T* to = b + j * k + q * group;
      for (int64_t p = 0; p < k; p += group, to += panel * group) {
        if (j + q < n) {
          memcpy(to, x + (j + q) * ldx + p, group * sizeof(T));
        } else {
          memset(to, 0, group * sizeof(T));
        }
      }
    }
  }
}

// One group row of a panel: `group` rows of x interleaved.
template <typename T>
VCORE_INLINE void interleave(const T* x, int64_t ldx, int64_t rows, int64_t cols, T* to) {
  constexpr int64_t panel = kPanel<T>, group = kGroup<T>;
#if defined(__AVX512BF16__)
  if constexpr (group == 2) {
    if (rows == 2 && cols == panel) {
      const __m512i even = _mm512_loadu_si512(x), odd = _mm512_loadu_si512(x + ldx);
      const __m512i low = _mm512_unpacklo_epi16(even, odd), high = _mm512_unpackhi_epi16(even, odd);
      const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
      const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, first, high));
      _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi64(low, second, high));
      return;
    }
  }
#endif
  if (rows == group && cols == panel && group == 1) {
    memcpy(to, x, panel * sizeof(T));
    return;
  }
  memset(to, 0, panel * group * sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t q = 0; q < cols; ++q) to[q * group + r] = x[r * ldx + q];
  }
}

template <typename T>
void pack(int64_t k, int64_t n, const T* x, int64_t ldx, T* b) {
  constexpr int64_t panel = kPanel<T>, group = kGroup<T>;
  const int64_t padded = (k + group - 1) / group * group;
  for (int64_t p = 0; p < k; p += group) {
    const int64_t rows = k - p < group ? k - p : group;
    for (int64_t j = 0; j < n; j += panel) {
      interleave(x + p * ldx + j, ldx, rows, n - j < panel ? n - j : panel,
                 b + j * padded + p * panel);
    }
  }
}

// ---------------------------------------------------------------------------------------------------
// Row maths on tiles. Column counts are multiples of a panel: the caller pads.

template <typename A>
void transform(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias, A* z) {
  for (int64_t v = 0; v < rows; ++v) {
    const A shift = bias ? bias[v] : A(0);
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      Vec<A> x = (load(z + v * ld + j) + shift) * t.scale;
      if (t.softcap != A(0)) x = vtanh<A>(x / t.softcap) * t.softcap;
      store(z + v * ld + j, x);
    }
  }
}

template <typename A>
void transform_jvp(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias,
                   const A* bias_tangent, A* z, A* dz) {
  for (int64_t v = 0; v < rows; ++v) {
    const A shift = bias ? bias[v] : A(0), dshift = bias_tangent ? bias_tangent[v] : A(0);
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      Vec<A> x = (load(z + v * ld + j) + shift) * t.scale;
      Vec<A> dx = (load(dz + v * ld + j) + dshift) * t.scale;
      if (t.softcap != A(0)) {
        const Vec<A> y = vtanh<A>(x / t.softcap);
        x = y * t.softcap;
        dx = dx * (A(1) - y * y);
      }
      store(z + v * ld + j, x);
      store(dz + v * ld + j, dx);
    }
  }
}

// As transform_jvp for a finite difference. tanh(a + d) - tanh(a) = u (1 - y^2) / (1 + u y) with
// u = tanh(d), y = tanh(a): no cancellation, however small d is.
template <typename A>
void transform_pair(int64_t rows, int64_t cols, int64_t ld, LogitTransform<A> t, const A* bias,
                    const A* bias_difference, A* z, A* dz) {
  for (int64_t v = 0; v < rows; ++v) {
    const A shift = bias ? bias[v] : A(0), dshift = bias_difference ? bias_difference[v] : A(0);
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      Vec<A> x = (load(z + v * ld + j) + shift) * t.scale;
      Vec<A> dx = (load(dz + v * ld + j) + dshift) * t.scale;
      if (t.softcap != A(0)) {
        const Vec<A> y = vtanh<A>(x / t.softcap), u = vtanh<A>(dx / t.softcap);
        // Saturated in opposite directions, u * y is -1 to the last bit: there, subtract.
        const Vec<A> stable = u * (A(1) - y * y) / (A(1) + u * y);
        const Vec<A> plain = vtanh<A>((x + dx) / t.softcap) - y;
        x = y * t.softcap;
        dx = (u * y > A(-0.9) ? stable : plain) * t.softcap;
      }
      store(z + v * ld + j, x);
      store(dz + v * ld + j, dx);
    }
  }
}

enum class Moment { none, jvp, pair };

template <typename A>
VCORE_INLINE Vec<A> column_max(int64_t rows, int64_t ld, const A* z) {
  Vec<A> even = splat(A(-INFINITY)), odd = even;
  int64_t v = 0;
  for (; v + 2 <= rows; v += 2) {
    even = vmax<A>(load(z + v * ld), even);
    odd = vmax<A>(load(z + (v + 1) * ld), odd);
  }
  if (v < rows) even = vmax<A>(load(z + v * ld), even);
  return vmax<A>(even, odd);
}

template <typename A>
VCORE_INLINE Vec<A> finite_or_zero(Vec<A> m) {
  return m == A(-INFINITY) ? Vec<A>{} : m;
}

template <Moment kMoment, typename A>
void stats(int64_t rows, int64_t cols, int64_t ld, const A* z, const A* dz, TileStats<A> out) {
  for (int64_t j = 0; j < cols; j += kLanes<A>) {
    const Vec<A> m = column_max(rows, ld, z + j);
    const Vec<A> ref = finite_or_zero<A>(m);
    Vec<A> ref2{}, sum{}, moment{}, sum2{};
    if constexpr (kMoment == Moment::pair) {
      Vec<A> m2 = splat(A(-INFINITY));
      for (int64_t v = 0; v < rows; ++v)
        m2 = vmax<A>(load(z + v * ld + j) + load(dz + v * ld + j), m2);
      ref2 = finite_or_zero<A>(m2);
      store(out.max2 + j, m2);
    }
    for (int64_t v = 0; v < rows; ++v) {
      const Vec<A> x = load(z + v * ld + j);
      const Vec<A> e = vexp(x - ref);
      sum += e;
      if constexpr (kMoment != Moment::none) {
        const Vec<A> dx = load(dz + v * ld + j);
        const Vec<A> term = e * (kMoment == Moment::pair ? vexpm1(dx) : dx);
        moment +=
            e == A(0) ? Vec<A>{} : term;  // a masked entry (-inf) contributes nothing, not NaN
        if constexpr (kMoment == Moment::pair) sum2 += vexp(x + dx - ref2);
      }
    }
    store(out.max + j, m);
    store(out.sum + j, sum);
    if constexpr (kMoment != Moment::none) store(out.moment + j, moment);
    if constexpr (kMoment == Moment::pair) store(out.sum2 + j, sum2);
  }
}

template <typename A>
void stats_plain(int64_t rows, int64_t cols, int64_t ld, const A* z, TileStats<A> out) {
  stats<Moment::none, A>(rows, cols, ld, z, nullptr, out);
}

// Two vectors as T, consecutive; the reverse.
template <typename T>
VCORE_INLINE void store_pair(T* to, Vec<Acc<T>> low, Vec<Acc<T>> high) {
  if constexpr (kGroup<T> == 1) {
    store(to, low);
    store(to + kLanes<T>, high);
  } else {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    memcpy(to, &both, sizeof both);
#endif
  }
}
template <typename T>
VCORE_INLINE void load_pair(const T* from, Vec<Acc<T>>& low, Vec<Acc<T>>& high) {
  if constexpr (kGroup<T> == 1) {
    low = load(from);
    high = load(from + kLanes<T>);
  } else {
#if defined(__AVX512BF16__)
    const __m512i both = _mm512_loadu_si512(from);
    const __m256i first = _mm512_castsi512_si256(both), second = _mm512_extracti64x4_epi64(both, 1);
    low = (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(first), 16);
    high = (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
#endif
  }
}

template <typename A>
VCORE_INLINE Vec<A> cap_derivative(Vec<A> z, A softcap) {
  const Vec<A> y = z / softcap;
  // A target's logit is replaced by -inf in the tile; its exponential is 0, and 0 * inf would be
  // NaN.
  return z == A(-INFINITY) ? Vec<A>{} : A(1) - y * y;
}

template <typename T>
void stats_keep(int64_t rows, int64_t cols, int64_t ld, Acc<T> softcap, const Acc<T>* z,
                TileStats<Acc<T>> out, T* kept) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t j = 0; j < cols; j += 2 * lanes) {
    const Vec<A> m0 = column_max(rows, ld, z + j), m1 = column_max(rows, ld, z + j + lanes);
    const Vec<A> ref0 = finite_or_zero<A>(m0), ref1 = finite_or_zero<A>(m1);
    Vec<A> sum0{}, sum1{};
    for (int64_t v = 0; v < rows; ++v) {
      const Vec<A> x0 = load(z + v * ld + j), x1 = load(z + v * ld + j + lanes);
      Vec<A> e0 = vexp(x0 - ref0), e1 = vexp(x1 - ref1);
      sum0 += e0;
      sum1 += e1;
      if (softcap != A(0)) {
        e0 = e0 * cap_derivative<A>(x0, softcap);
        e1 = e1 * cap_derivative<A>(x1, softcap);
      }
      store_pair<T>(kept + v * cols + j, e0, e1);
    }
    store(out.max + j, m0);
    store(out.max + j + lanes, m1);
    store(out.sum + j, sum0);
    store(out.sum + j + lanes, sum1);
  }
}

template <typename T>
void grad_from_kept(int64_t rows, int64_t cols, const T* kept, const Acc<T>* factor, Acc<T>* g,
                    int64_t ld) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t v = 0; v < rows; ++v) {
    for (int64_t j = 0; j < cols; j += 2 * lanes) {
      Vec<A> e0, e1;
      load_pair<T>(kept + v * cols + j, e0, e1);
      store(g + v * ld + j, e0 * load(factor + j));
      store(g + v * ld + j + lanes, e1 * load(factor + j + lanes));
    }
  }
}

template <typename A>
void grad_from_logits(int64_t rows, int64_t cols, int64_t ld, A softcap, const A* top,
                      const A* factor, A* z) {
  for (int64_t v = 0; v < rows; ++v) {
    for (int64_t j = 0; j < cols; j += kLanes<A>) {
      const Vec<A> x = load(z + v * ld + j);
      Vec<A> p = vexp(x - load(top + j)) * load(factor + j);
      if (softcap != A(0)) p = p * cap_derivative<A>(x, softcap);
      store(z + v * ld + j, p);
    }
  }
}

#if defined(__AVX512F__)
// 16 x 16 transpose of 32-bit entries.
VCORE_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}
#endif

#if defined(__AVX512BF16__)
VCORE_INLINE bf16 round_to(float x, bf16*) {
  const __m128bh b = _mm_cvtneps_pbh(_mm_set_ss(x));
  bf16 out;
  memcpy(&out, &b, sizeof out);
  return out;
}
#endif
VCORE_INLINE float round_to(float x, float*) { return x; }
VCORE_INLINE double round_to(double x, double*) { return x; }

// 16 tokens x (16 * group) vocabulary entries from g to by_token, in registers. False: not possible
// here.
template <typename T>
VCORE_INLINE bool transpose_block(const Acc<T>* g, int64_t ld, T* to, int64_t ld_to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc<T>) == 4) {
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if constexpr (kGroup<T> == 1) {
        r[i] = _mm512_loadu_si512(g + i * ld);
      } else {
#if defined(__AVX512BF16__)
        // Entries 2i and 2i + 1 of each token, side by side in one 32-bit lane.
        const __m512i low =
            _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(g + 2 * i * ld)));
        const __m512i high = _mm512_cvtepu16_epi32(
            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(g + (2 * i + 1) * ld)));
        r[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#endif
      }
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * ld_to, r[i]);
    return true;
  }
#endif
  (void)g, (void)ld, (void)to, (void)ld_to;
  return false;
}

template <typename T>
void emit(int64_t rows, int64_t cols, int64_t ld, const Acc<T>* g, T* by_token, int64_t ld_token,
          T* by_vocab, int64_t ld_vocab, Acc<T>* row_sum) {
  using A = Acc<T>;
  constexpr int64_t lanes = kLanes<A>, group = kGroup<T>;
  const T zero = round_to(A(0), static_cast<T*>(nullptr));
  if (by_token) {
    constexpr int64_t block_rows = 16 * group, block_cols = 16;
    for (int64_t j = 0; j < cols; j += block_cols) {
      for (int64_t v = 0; v < rows; v += block_rows) {
        const bool whole = j + block_cols <= cols && v + block_rows <= rows;
        if (whole && transpose_block<T>(g + v * ld + j, ld, by_token + j * ld_token + v, ld_token))
          continue;
        for (int64_t q = j; q < cols && q < j + block_cols; ++q) {
          T* to = by_token + q * ld_token;
          for (int64_t u = v; u < rows && u < v + block_rows; ++u) {
            to[u] = round_to(g[u * ld + q], static_cast<T*>(nullptr));
          }
          if (v + block_rows >= rows) {
            for (int64_t u = rows; u % group; ++u) to[u] = zero;
          }
        }
      }
    }
  }
  for (int64_t v = 0; v < rows; ++v) {
    if (by_vocab) {
      T* to = by_vocab + v * ld_vocab;
      int64_t j = 0;
      for (; j + 2 * lanes <= cols; j += 2 * lanes) {
        store_pair<T>(to + j, load(g + v * ld + j), load(g + v * ld + j + lanes));
      }
      for (; j < cols; ++j) to[j] = round_to(g[v * ld + j], static_cast<T*>(nullptr));
      for (; j % group; ++j) to[j] = zero;
    }
    if (row_sum) {
      A sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += g[v * ld + j];
      row_sum[v] += sum;
    }
  }
}

template <typename T>
constexpr HeadKernels<T> table() {
  using A = Acc<T>;
  HeadKernels<T> k{};
  k.panel = kPanel<T>;
  k.gemm = gemm<T>;
  k.pack_transposed = pack_transposed<T>;
  k.pack = pack<T>;
  k.transform = transform<A>;
  k.transform_jvp = transform_jvp<A>;
  k.transform_pair = transform_pair<A>;
  k.stats = stats_plain<A>;
  k.stats_jvp = stats<Moment::jvp, A>;
  k.stats_pair = stats<Moment::pair, A>;
  k.stats_keep = stats_keep<T>;
  k.grad_from_kept = grad_from_kept<T>;
  k.grad_from_logits = grad_from_logits<A>;
  k.emit = emit<T>;
  return k;
}

}  // namespace

extern const HeadKernels<float> head_kernels_float = table<float>();
extern const HeadKernels<double> head_kernels_double = table<double>();
#if defined(__AVX512BF16__)
extern const HeadKernels<bf16> head_kernels_bf16 = table<bf16>();
#endif

}  // namespace vcore::VCORE_ISA
