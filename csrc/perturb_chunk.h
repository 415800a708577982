// The CUDA kernels of the in-place perturbation, as far as they are plain C++: which entries of
// which tensor a thread block takes, and what each of its threads does with them. The tests compile
// this for a CPU and run every thread in turn.
//
// A block of kThreads threads takes a chunk of kChunk entries of one tensor, in blocks of
// kPerturbBlock = 4 x 256 entries. A thread takes the same few neighbouring entries, 16 bytes of
// the narrower operand, in each of the four quarters: its loads are 16 bytes wide and all under way
// before the first is needed, and stochastic rounding uses all four words of each Philox counter.
// Where an operand is not aligned to 16 bytes, and in the last blocks of a tensor, a thread takes
// one entry of each quarter.
#pragma once

#include "perturb_formats.h"
#include "perturb_kernels.h"

namespace vcore {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 16 * kPerturbBlock;
// As many as fit into 4 KiB, which every driver takes as the parameters of a launch.
constexpr int kBatch = 64;

// The tensors of one launch, passed by value. Blocks [first[t], first[t + 1]) work on tensor t.
struct PerturbBatch {
  PerturbRun runs[kBatch];
  uint32_t first[kBatch + 1];
  int32_t tensors;
};

namespace {

constexpr int kQuarters = 4;
constexpr int kQuarter = kPerturbBlock / kQuarters;
static_assert(kQuarter == kThreads, "one entry of a quarter for each thread");

struct ThreadCounts {
  uint32_t nonzero, moved, nonfinite;
};

inline void append(PerturbBatch& batch, const PerturbRun& run) {
  if (batch.tensors == 0) batch.first[0] = 0;
  batch.runs[batch.tensors] = run;
  const uint32_t chunks = static_cast<uint32_t>((run.size + kChunk - 1) / kChunk);
  batch.first[batch.tensors + 1] = batch.first[batch.tensors] + chunks;
  ++batch.tensors;
}

VCORE_DEVICE inline int tensor_of_block(const PerturbBatch& batch, uint32_t block) {
  int low = 0, high = batch.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

VCORE_DEVICE inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// kEntries neighbours in registers.
template <class Storage, int kEntries>
struct Pack {
  Storage entry[kEntries];
};

// What one instruction loads or stores.
#if defined(__CUDACC__)
using Vector16 = uint4;
#else
struct alignas(16) Vector16 {
  uint32_t word[4];
};
#endif

template <class Storage, int kEntries>
VCORE_DEVICE inline Pack<Storage, kEntries> load(const void* base, int64_t entry) {
  const Storage* from = static_cast<const Storage*>(base) + entry;
  Pack<Storage, kEntries> pack;
  if constexpr (sizeof(pack) % sizeof(Vector16) == 0) {
    constexpr int kVectors = sizeof(pack) / sizeof(Vector16);
    Vector16 vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) vectors[v] = reinterpret_cast<const Vector16*>(from)[v];
    __builtin_memcpy(&pack, vectors, sizeof(pack));
  } else {
    static_assert(kEntries == 1);
    pack.entry[0] = *from;
  }
  return pack;
}

template <class Storage, int kEntries>
VCORE_DEVICE inline void store(void* base, int64_t entry, const Pack<Storage, kEntries>& pack) {
  Storage* to = static_cast<Storage*>(base) + entry;
  if constexpr (sizeof(pack) % sizeof(Vector16) == 0) {
    constexpr int kVectors = sizeof(pack) / sizeof(Vector16);
    Vector16 vectors[kVectors];
    __builtin_memcpy(vectors, &pack, sizeof(pack));
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#if defined(__CUDA_ARCH__)
      __stwb(reinterpret_cast<Vector16*>(to) + v, vectors[v]);  // an assignment is taken apart
#else
      reinterpret_cast<Vector16*>(to)[v] = vectors[v];
#endif
    }
  } else {
    static_assert(kEntries == 1);
    *to = pack.entry[0];
  }
}

// theta - g * epsilon, each operation rounded.
VCORE_DEVICE inline float step(float theta, float g, float epsilon) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(theta, __fmul_rn(g, epsilon));
#else
  return theta - g * epsilon;
#endif
}
VCORE_DEVICE inline double step(double theta, double g, double epsilon) {
#if defined(__CUDA_ARCH__)
  return __dsub_rn(theta, __dmul_rn(g, epsilon));
#else
  return theta - g * epsilon;
#endif
}

// Entries [begin + quarter * kQuarter + index, + kEntries) of each quarter, below `end` if
// kGuarded. The old bits of theta are written before theta, and after everything has been read:
// they may go to the place of g.
template <class Type, class Direction, bool kStochastic, int kEntries, bool kGuarded>
VCORE_DEVICE inline void move_entries(const PerturbRun& run, const PerturbOptions& options,
                                      int64_t begin, int index, int64_t end, ThreadCounts& counts) {
  using Storage = typename Type::Storage;
  using Bits = typename Direction::Storage;
  using Acc = typename Type::Acc;
  constexpr Bits kSize = static_cast<Bits>(~Bits{0}) >> 1;  // all but the sign
  const Acc epsilon = static_cast<Acc>(options.epsilon);

  Pack<Storage, kEntries> theta[kQuarters];
  Pack<Bits, kEntries> g[kQuarters];
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    const int64_t at = begin + quarter * kQuarter + index;
    if (kGuarded && at >= end) continue;
    theta[quarter] = load<Storage, kEntries>(run.theta, at);
    g[quarter] = load<Bits, kEntries>(run.direction, at);
  }
  Words random[kEntries];
  if constexpr (kStochastic) {
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      random[k] = philox(options.seed, run.tensor, begin / kQuarters + index + k);
    }
  }
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    const int64_t at = begin + quarter * kQuarter + index;
    if (kGuarded && at >= end) continue;
    Pack<Storage, kEntries> after;
#pragma unroll
    for (int k = 0; k < kEntries; ++k) {
      const Storage before = theta[quarter].entry[k];
      const Bits bits_of_g = g[quarter].entry[k];
      const Acc moved =
          step(Type::widen(before), static_cast<Acc>(Direction::widen(bits_of_g)), epsilon);
      if constexpr (kStochastic) {
        after.entry[k] = Type::narrow(moved, random[k].word[quarter]);
      } else {
        after.entry[k] = Type::narrow(moved);
      }
      const Bits size = bits_of_g & kSize;
      counts.nonzero += size != 0;
      counts.moved += after.entry[k] != before;
      counts.nonfinite |= size >= Direction::kInfinity;
    }
    store(run.saved, at, theta[quarter]);
    store(run.theta, at, after);
  }
}

// What thread `thread` does of chunk number `chunk` of a tensor.
template <class Type, class Direction, bool kStochastic>
VCORE_DEVICE inline ThreadCounts move_chunk(const PerturbRun& run, const PerturbOptions& options,
                                            int64_t chunk, int thread) {
  constexpr int kNarrower = sizeof(typename Type::Storage) < sizeof(typename Direction::Storage)
                                ? sizeof(typename Type::Storage)
                                : sizeof(typename Direction::Storage);
  constexpr int kEntries = 16 / kNarrower;
  constexpr int kTogether = kQuarter / kEntries;  // threads that share a block of kPerturbBlock
  ThreadCounts counts{0, 0, 0};
  int64_t begin = chunk * kChunk;
  const int64_t end = begin + kChunk < run.size ? begin + kChunk : run.size;
  if (aligned(run.theta) && aligned(run.direction) && aligned(run.saved)) {
    const int index = thread % kTogether * kEntries;
    const int64_t whole = begin + (end - begin) / kPerturbBlock * kPerturbBlock;
    for (begin += thread / kTogether * kPerturbBlock; begin < whole;
         begin += kThreads / kTogether * kPerturbBlock) {
      move_entries<Type, Direction, kStochastic, kEntries, false>(run, options, begin, index, end,
                                                                  counts);
    }
    begin = whole;
  }
  for (; begin < end; begin += kPerturbBlock) {
    move_entries<Type, Direction, kStochastic, 1, true>(run, options, begin, thread, end, counts);
  }
  return counts;
}

// theta <- saved, likewise. Storage is as wide as an entry.
template <class Storage>
VCORE_DEVICE inline void restore_chunk(const PerturbRun& run, int64_t chunk, int thread) {
  constexpr int kEntries = 16 / sizeof(Storage);
  int64_t at = chunk * kChunk;
  const int64_t end = at + kChunk < run.size ? at + kChunk : run.size;
  if (aligned(run.theta) && aligned(run.saved)) {
    const int64_t whole = at + (end - at) / kEntries * kEntries;
#pragma unroll 4
    for (int64_t e = at + thread * kEntries; e < whole; e += kThreads * kEntries) {
      store(run.theta, e, load<Storage, kEntries>(run.saved, e));
    }
    at = whole;
  }
  for (at += thread; at < end; at += kThreads) {
    static_cast<Storage*>(run.theta)[at] = static_cast<const Storage*>(run.saved)[at];
  }
}

}  // namespace
}  // namespace vcore
