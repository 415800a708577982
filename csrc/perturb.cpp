// vcore_kernels::perturb_, perturb_swap_ and restore_ on a CPU: one parallel region over all
// tensors, the work split by bytes, so that a list of many small tensors runs as fast as one large
// one.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "perturb_arguments.h"
#include "perturb_kernels.h"

namespace vcore {
namespace {

using at::Tensor;
using at::TensorList;

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

// The entries [offset, offset + kRun) of a tensor; `start` counts the bytes of all pieces before
// it.
struct Piece {
  int64_t start;
  int64_t offset;
  int32_t tensor;
};

// Calls work(tensor, offset, size) for runs that cover all tensors, on all threads, an even share
// of bytes each.
template <class Work>
void for_each_run(TensorList tensors, const Work& work) {
  std::vector<Piece> pieces;
  int64_t bytes = 0;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t size = tensors[t].numel();
    for (int64_t offset = 0; offset < size; offset += kRun) {
      pieces.push_back({bytes, offset, static_cast<int32_t>(t)});
      bytes += std::min(kRun, size - offset) * tensors[t].element_size();
    }
  }
  const auto starts_before = [](const Piece& piece, int64_t at) { return piece.start < at; };
  constexpr int64_t kShare = kRun * 4;
  at::parallel_for(0, (bytes + kShare - 1) / kShare, 1, [&](int64_t begin, int64_t end) {
    auto piece = std::lower_bound(pieces.begin(), pieces.end(), begin * kShare, starts_before);
    for (; piece != pieces.end() && piece->start < end * kShare; ++piece) {
      const int64_t left = tensors[piece->tensor].numel() - piece->offset;
      work(piece->tensor, piece->offset, std::min(kRun, left));
    }
  });
}

int64_t total_bytes(TensorList tensors) {
  int64_t bytes = 0;
  for (const auto& tensor : tensors) bytes += static_cast<int64_t>(tensor.nbytes());
  return bytes;
}

// counts int64 [tensors, 3]: nonzero entries of the direction, entries moved, whether the direction
// is not finite. Written if and only if everything has moved.
void perturb(TensorList params, TensorList direction, TensorList saved, double epsilon,
             std::optional<int64_t> seed, const Tensor& result) {
  const std::vector<PerturbRun> whole = perturb_runs(params, direction, saved, seed, result);
  const bool swap = !params.empty() && saved[0].is_same(direction[0]);
  const PerturbOptions options{epsilon, static_cast<uint64_t>(seed.value_or(0)), seed.has_value(),
                               !swap && total_bytes(params) >= kStreamBytes};
  const auto run = kernels().perturb_run;
  std::vector<std::atomic<int64_t>> counts(3 * params.size());
  for_each_run(params, [&](int64_t t, int64_t offset, int64_t size) {
    PerturbRun call = whole[t];
    call.theta = static_cast<char*>(call.theta) + offset * params[t].element_size();
    call.saved = static_cast<char*>(call.saved) + offset * params[t].element_size();
    call.direction =
        static_cast<const char*>(call.direction) + offset * direction[t].element_size();
    call.offset = offset;
    call.size = size;
    const PerturbCounts add = run(call, options);
    counts[3 * t] += add.nonzero;
    counts[3 * t + 1] += add.moved;
    counts[3 * t + 2] |= add.nonfinite;
  });
  std::copy(counts.begin(), counts.end(), result.data_ptr<int64_t>());
}

void perturb_swap(TensorList params, TensorList direction, double epsilon,
                  std::optional<int64_t> seed, const Tensor& counts) {
  check_swap(params, direction);
  perturb(params, direction, direction, epsilon, seed, counts);
}

void restore(TensorList params, TensorList saved) {
  check_saved(params, saved);
  const bool stream = total_bytes(params) >= kStreamBytes;
  const auto copy_bytes = kernels().copy_bytes;
  for_each_run(params, [&](int64_t t, int64_t offset, int64_t size) {
    const int64_t width = params[t].element_size();
    copy_bytes(static_cast<char*>(params[t].data_ptr()) + offset * width,
               static_cast<const char*>(saved[t].const_data_ptr()) + offset * width, size * width,
               stream);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("perturb_", perturb);
  m.impl("perturb_swap_", perturb_swap);
  m.impl("restore_", restore);
}

}  // namespace vcore
