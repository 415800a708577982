// vcore_kernels::perturb_, perturb_swap_ and restore_ on a CPU: one parallel region over all
// tensors, the work split by bytes, so that a list of many small tensors runs as fast as one large
// one.
#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "perturb_arguments.h"
#include "perturb_kernels.h"

namespace vcore {
namespace {

// A run of work for one thread: 128 KiB and more of memory traffic, a multiple of kPerturbBlock
// entries.
constexpr int64_t kRun = 32 * kPerturbBlock;
// From here on, the tensors do not fit into the caches that the next pass would find them in.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

struct Kernels {
  PerturbFn perturb_run;
  CopyFn copy_bytes;
};

Kernels kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512bf16:
      return {avx512bf16::perturb_run, avx512bf16::copy_bytes};
    case Isa::avx512:
      return {avx512::perturb_run, avx512::copy_bytes};
    case Isa::avx2:
      return {avx2::perturb_run, avx2::copy_bytes};
#endif
    default:
      return {baseline::perturb_run, baseline::copy_bytes};
  }
}

// The entries [offset, offset + size) of a tensor; `start` counts the bytes of all pieces before
// it.
struct Piece {
  int64_t start;
  int64_t offset;
  int64_t size;
  int32_t tensor;
};

// A tensor's entries, and the bytes of each.
struct Extent {
  int64_t size, width;
};

// Calls work(tensor, offset, size) for runs that cover all tensors, on all threads, an even share
// of bytes each.
template <class Work>
void for_each_run(const std::vector<Extent>& tensors, const Work& work) {
  std::vector<Piece> pieces;
  int64_t bytes = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const auto [size, width] = tensors[t];
    for (int64_t offset = 0; offset < size; offset += kRun) {
      const int64_t part = std::min(kRun, size - offset);
      pieces.push_back({bytes, offset, part, static_cast<int32_t>(t)});
      bytes += part * width;
    }
  }
  const auto starts_before = [](const Piece& piece, int64_t at) { return piece.start < at; };
  constexpr int64_t kShare = kRun * 4;
  parallel_for(0, (bytes + kShare - 1) / kShare, 1, [&](int64_t begin, int64_t end) {
    auto piece = std::lower_bound(pieces.begin(), pieces.end(), begin * kShare, starts_before);
    for (; piece != pieces.end() && piece->start < end * kShare; ++piece) {
      work(piece->tensor, piece->offset, piece->size);
    }
  });
}

int64_t total_bytes(const std::vector<Extent>& tensors) {
  int64_t bytes = 0;
  for (const auto [size, width] : tensors) bytes += size * width;
  return bytes;
}

int64_t width_of(Float type) { return type == Float::f64 ? 8 : type == Float::f32 ? 4 : 2; }

// counts int64 [tensors, 3]: nonzero entries of the direction, entries moved, whether the direction
// is not finite. Written if and only if everything has moved.
void perturb(TensorList params, TensorList direction, TensorList saved, double epsilon,
             std::optional<int64_t> seed, const Tensor& result) {
  const std::vector<PerturbRun> whole = perturb_runs(params, direction, saved, seed, result);
  std::vector<Extent> extents;
  for (const PerturbRun& run : whole) extents.push_back({run.size, width_of(run.theta_type)});
  const bool swap = !whole.empty() && whole[0].saved == whole[0].direction;
  const PerturbOptions options{epsilon, static_cast<uint64_t>(seed.value_or(0)), seed.has_value(),
                               !swap && total_bytes(extents) >= kStreamBytes};
  const auto run = kernels().perturb_run;
  std::vector<std::atomic<int64_t>> counts(3 * params.size());
  for_each_run(extents, [&](int64_t t, int64_t offset, int64_t size) {
    PerturbRun call = whole[t];
    const int64_t skip = offset * width_of(call.theta_type);
    call.theta = static_cast<char*>(call.theta) + skip;
    call.saved = static_cast<char*>(call.saved) + skip;
    call.direction =
        static_cast<const char*>(call.direction) + offset * width_of(call.direction_type);
    call.offset = offset;
    call.size = size;
    const PerturbCounts add = run(call, options);
    counts[3 * t] += add.nonzero;
    counts[3 * t + 1] += add.moved;
    counts[3 * t + 2] |= add.nonfinite;
  });
  std::copy(counts.begin(), counts.end(), data<int64_t>(result));
}

void perturb_swap(TensorList params, TensorList direction, double epsilon,
                  std::optional<int64_t> seed, const Tensor& counts) {
  check_swap(params, direction);
  perturb(params, direction, direction, epsilon, seed, counts);
}

struct Copy {
  char* to;
  const char* from;
};

void restore(TensorList params, TensorList saved) {
  check_saved(params, saved);
  std::vector<Extent> extents;
  std::vector<Copy> copies;
  for (size_t t = 0; t < params.size(); ++t) {
    extents.push_back({params[t].numel(), itemsize(params[t])});
    copies.push_back({data<char>(params[t]), const_data<char>(saved[t])});
  }
  const bool stream = total_bytes(extents) >= kStreamBytes;
  const auto copy_bytes = kernels().copy_bytes;
  for_each_run(extents, [&](int64_t t, int64_t offset, int64_t size) {
    const auto [to, from] = copies[t];
    const int64_t width = extents[t].width;
    copy_bytes(to + offset * width, from + offset * width, size * width, stream);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("perturb_", TORCH_BOX(&perturb));
  m.impl("perturb_swap_", TORCH_BOX(&perturb_swap));
  m.impl("restore_", TORCH_BOX(&restore));
}

}  // namespace vcore
