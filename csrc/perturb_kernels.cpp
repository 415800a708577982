// theta <- round(theta - epsilon * g), saving theta's old bits, block by block through the
// first-level cache.
//
// A block of g is widened to the accumulation type into a local buffer, the old bits of theta are
// copied out (into g's own storage when values are swapped: g is already in the buffer), then theta
// is rewritten. This file is compiled with -ffp-contract=off (perturb_formats.h).
#include "perturb_kernels.h"

#include "perturb_formats.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vcore::VCORE_ISA {
namespace {

#if defined(__F16C__)
// Where the CPU converts half precision itself, a block is widened first, moved as floats and
// narrowed after.
void widen_halves(uint32_t* to, const uint16_t* from, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(reinterpret_cast<float*>(to + i), _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) to[i] = bits<uint32_t>(F16::widen(from[i]));
}

void narrow_halves(uint16_t* to, const uint32_t* from, int n) {
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 floats = _mm256_loadu_ps(reinterpret_cast<const float*>(from + i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; i < n; ++i) to[i] = F16::narrow(bits<float>(from[i]));
}

struct WidenedF16 : F32 {
  static Storage narrow(Acc x) { return F32::narrow(x); }
  static Storage narrow(Acc x, uint32_t random) {
    return F32::narrow(F16Stochastic::on_grid(x, random));
  }
};
#endif

template <class, class>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

// ---- random bits ----

// The words of block `block` of a tensor, in the order of its entries.
void philox_block(uint32_t out[kPerturbBlock], uint64_t seed, uint32_t tensor, uint64_t block) {
  constexpr int kCounters = kPerturbBlock / 4;
  for (int i = 0; i < kCounters; ++i) {
    const Words words = philox(seed, tensor, block * kCounters + i);
    out[i] = words.word[0];
    out[kCounters + i] = words.word[1];
    out[2 * kCounters + i] = words.word[2];
    out[3 * kCounters + i] = words.word[3];
  }
}

// ---- loops ----

#if defined(__AVX512F__)
using Vector = __m512i;
inline void store_past_caches(Vector* to, const Vector* from) {
  _mm512_stream_si512(to, _mm512_loadu_si512(from));
}
#elif defined(__x86_64__)
using Vector = __m128i;
inline void store_past_caches(Vector* to, const Vector* from) {
  _mm_stream_si128(to, _mm_loadu_si128(from));
}
#endif

void copy(void* to, const void* from, int64_t bytes, bool stream) {
#if defined(__x86_64__)
  // Stores that bypass the caches spare reading the destination first, a fifth of a perturbation's
  // traffic.
  if (stream && reinterpret_cast<uintptr_t>(to) % sizeof(Vector) == 0) {
    auto* out = static_cast<Vector*>(to);
    const auto* in = static_cast<const Vector*>(from);
    const int64_t vectors = bytes / int64_t{sizeof(Vector)};
    for (int64_t i = 0; i < vectors; ++i) store_past_caches(out + i, in + i);
    __builtin_memcpy(out + vectors, in + vectors, bytes - vectors * int64_t{sizeof(Vector)});
    return;
  }
#endif
  (void)stream;
  __builtin_memmove(to, from, bytes);
}

void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// One block: theta is rewritten, its old bits go to `old`. Direction is the storage type of g. The
// counts are kept in integers as wide as the entries they count, so that they cost little.
template <class Type, class Direction, bool kStochastic>
inline void move_block(typename Type::Storage* __restrict theta,
                       const typename Direction::Storage* __restrict g,
                       typename Type::Storage* __restrict old, const uint32_t* __restrict random,
                       typename Type::Acc epsilon, int n, PerturbCounts& counts) {
  using Acc = typename Type::Acc;
  using Bits = typename Direction::Storage;
  constexpr Bits kSize = static_cast<Bits>(~Bits{0}) >> 1;  // all but the sign
  static_assert(kPerturbBlock <= 0xffff);
  typename Type::Storage moved = 0;
  Bits nonzero = 0, largest = 0;
  for (int i = 0; i < n; ++i) {
    const auto before = theta[i];
    const Acc step = static_cast<Acc>(Direction::widen(g[i])) * epsilon;
    typename Type::Storage after;
    if constexpr (kStochastic) {
      after = Type::narrow(Type::widen(before) - step, random[i]);
    } else {
      after = Type::narrow(Type::widen(before) - step);
    }
    old[i] = before;
    theta[i] = after;
    moved += after != before;
    const Bits size = g[i] & kSize;
    nonzero += size != 0;
    largest = size > largest ? size : largest;
  }
  counts.nonzero += nonzero;
  counts.moved += moved;
  counts.nonfinite |= largest >= Direction::kInfinity;
}

#if defined(__F16C__)
int sum(__m128i values) {
  uint16_t lanes[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), values);
  int total = 0;
  for (const uint16_t lane : lanes) total += lane;
  return total;
}

// move_block for half precision all round, the common case of it, in one loop.
void move_halves(uint16_t* theta, const uint16_t* g, uint16_t* old, float epsilon, int n,
                 PerturbCounts& counts) {
  const __m256 step = _mm256_set1_ps(epsilon);
  const __m128i size_mask = _mm_set1_epi16(0x7fff), none = _mm_setzero_si128();
  __m128i unmoved = none, zero = none, largest = none;
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i before = _mm_loadu_si128(reinterpret_cast<const __m128i*>(theta + i));
    const __m128i direction = _mm_loadu_si128(reinterpret_cast<const __m128i*>(g + i));
    const __m256 moved =
        _mm256_sub_ps(_mm256_cvtph_ps(before), _mm256_mul_ps(_mm256_cvtph_ps(direction), step));
    const __m128i after = _mm256_cvtps_ph(moved, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(old + i), before);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(theta + i), after);
    unmoved = _mm_sub_epi16(unmoved, _mm_cmpeq_epi16(after, before));
    const __m128i size = _mm_and_si128(direction, size_mask);
    zero = _mm_sub_epi16(zero, _mm_cmpeq_epi16(size, none));
    largest = _mm_max_epi16(largest, size);
  }
  counts.moved += i - sum(unmoved);
  counts.nonzero += i - sum(zero);
  const __m128i limit = _mm_set1_epi16(F16::kInfinity - 1);
  counts.nonfinite |= _mm_movemask_epi8(_mm_cmpgt_epi16(largest, limit)) != 0;
  move_block<F16, F16, false>(theta + i, g + i, old + i, nullptr, epsilon, n - i, counts);
}
#endif

template <class Type, class Direction, bool kStochastic>
void move(typename Type::Storage* theta, const typename Direction::Storage* g,
          typename Type::Storage* old, const uint32_t* random, typename Type::Acc epsilon, int n,
          PerturbCounts& counts) {
#if defined(__F16C__)
  alignas(64) uint32_t buffer[2][kPerturbBlock];
  if constexpr (same<Type, F16> && same<Direction, F16> && !kStochastic) {
    return move_halves(theta, g, old, epsilon, n, counts);
  } else if constexpr (same<Direction, F16>) {
    widen_halves(buffer[0], g, n);
    return move<Type, F32, kStochastic>(theta, buffer[0], old, random, epsilon, n, counts);
  } else if constexpr (same<Type, F16> || same<Type, F16Stochastic>) {
    PerturbCounts as_floats{0, 0, false};
    widen_halves(buffer[0], theta, n);
    __builtin_memcpy(old, theta, n * sizeof(*old));
    move_block<WidenedF16, Direction, kStochastic>(buffer[0], g, buffer[1], random, epsilon, n,
                                                   as_floats);
    narrow_halves(theta, buffer[0], n);
    uint16_t moved = 0;
    for (int i = 0; i < n; ++i) moved += theta[i] != old[i];
    counts.moved += moved;
    counts.nonzero += as_floats.nonzero;
    counts.nonfinite |= as_floats.nonfinite;
    return;
  }
#endif
  move_block<Type, Direction, kStochastic>(theta, g, old, random, epsilon, n, counts);
}

template <class Type, class Direction, bool kStochastic>
PerturbCounts run(const PerturbRun& call, const PerturbOptions& options) {
  using Storage = typename Type::Storage;
  // 2 KiB of theta: fewer, and the counts weigh; more, and reading and writing memory overlap less.
  constexpr int64_t kBlock = kStochastic ? kPerturbBlock : 2048 / sizeof(Storage);
  alignas(64) Storage old[kBlock];
  alignas(64) uint32_t random[kStochastic ? kPerturbBlock : 1];
  const auto epsilon = static_cast<typename Type::Acc>(options.epsilon);
  PerturbCounts counts{0, 0, false};
  for (int64_t start = 0; start < call.size; start += kBlock) {
    const int n = static_cast<int>(call.size - start < kBlock ? call.size - start : kBlock);
    if constexpr (kStochastic) {
      philox_block(random, options.seed, call.tensor, (call.offset + start) / kPerturbBlock);
    }
    move<Type, Direction, kStochastic>(
        static_cast<Storage*>(call.theta) + start,
        static_cast<const typename Direction::Storage*>(call.direction) + start, old, random,
        epsilon, n, counts);
    copy(static_cast<Storage*>(call.saved) + start, old, n * int64_t{sizeof(Storage)},
         options.stream);
  }
  finish_streaming();
  return counts;
}

template <class Type, bool kStochastic>
PerturbCounts run_on(const PerturbRun& call, const PerturbOptions& options) {
  switch (call.direction_type) {
    case Float::f32:
      return run<Type, F32, kStochastic>(call, options);
    case Float::bf16:
      return run<Type, BF16, kStochastic>(call, options);
    case Float::f16:
      return run<Type, F16, kStochastic>(call, options);
    case Float::f64:
      return run<Type, F64, kStochastic>(call, options);
  }
  __builtin_unreachable();
}

}  // namespace

PerturbCounts perturb_run(const PerturbRun& call, const PerturbOptions& options) {
  const bool stochastic = options.stochastic;
  switch (call.theta_type) {
    case Float::f32:
      return stochastic ? run_on<F32Stochastic, true>(call, options)
                        : run_on<F32, false>(call, options);
    case Float::bf16:
      return stochastic ? run_on<BF16Stochastic, true>(call, options)
                        : run_on<BF16, false>(call, options);
    case Float::f16:
      return stochastic ? run_on<F16Stochastic, true>(call, options)
                        : run_on<F16, false>(call, options);
    case Float::f64:
      return run_on<F64, false>(call, options);
  }
  __builtin_unreachable();
}

void copy_bytes(void* to, const void* from, int64_t bytes, bool stream) {
  copy(to, from, bytes, stream);
  finish_streaming();
}

}  // namespace vcore::VCORE_ISA
