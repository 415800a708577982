// theta <- round(theta - epsilon * g) on a CUDA device, many tensors in one launch.
//
// Grid: one block of kThreads threads for each chunk of kChunk entries (perturb_chunk.h). The table
// of tensors is a parameter of the launch, so that nothing is copied to the device beforehand.
// Precision: float32 (float64 for float64, and for float32 rounded stochastically), product and
// difference rounded one after the other. The counts are sums of integers, so that the order in
// which blocks finish does not show. 64-bit addresses throughout.
#include <cuda_runtime.h>

#include "perturb_chunk.h"
#include "perturb_cuda.h"

namespace vcore {
namespace {

using Counter = unsigned long long;

// Adds the counts of all threads of the block to `row`; the tensor's first block adds one to each.
__device__ void add_counts(const ThreadCounts& counts, bool first, Counter* row) {
  __shared__ uint32_t total[3];
  if (threadIdx.x < 3) total[threadIdx.x] = 0;
  __syncthreads();
  constexpr unsigned kAll = 0xffffffffu;
  const uint32_t nonzero = __reduce_add_sync(kAll, counts.nonzero);
  const uint32_t moved = __reduce_add_sync(kAll, counts.moved);
  const uint32_t nonfinite = __reduce_or_sync(kAll, counts.nonfinite);
  if (threadIdx.x % 32 == 0) {
    atomicAdd(&total[0], nonzero);
    atomicAdd(&total[1], moved);
    atomicOr(&total[2], nonfinite);
  }
  __syncthreads();
  if (threadIdx.x < 3) {
    const Counter value = Counter{total[threadIdx.x]} + (first ? 1 : 0);
    if (value != 0) atomicAdd(row + threadIdx.x, value);
  }
}

template <class Type, class Direction, bool kStochastic>
__global__ void __launch_bounds__(kThreads, 1)
    perturb_kernel(const __grid_constant__ PerturbBatch batch,
                   const __grid_constant__ PerturbOptions options, Counter* counts) {
  const int t = tensor_of_block(batch, blockIdx.x);
  const PerturbRun& run = batch.runs[t];
  const uint32_t chunk = blockIdx.x - batch.first[t];
  const auto of_thread =
      move_chunk<Type, Direction, kStochastic>(run, options, chunk, static_cast<int>(threadIdx.x));
  add_counts(of_thread, chunk == 0, counts + 3 * int64_t{run.tensor});
}

template <class Storage>
__global__ void __launch_bounds__(kThreads, 1)
    restore_kernel(const __grid_constant__ PerturbBatch batch) {
  const int t = tensor_of_block(batch, blockIdx.x);
  restore_chunk<Storage>(batch.runs[t], blockIdx.x - batch.first[t], static_cast<int>(threadIdx.x));
}

using PerturbKernel = void (*)(PerturbBatch, PerturbOptions, Counter*);
using RestoreKernel = void (*)(PerturbBatch);

template <class Type, bool kStochastic>
PerturbKernel kernel_by_direction(Float direction) {
  switch (direction) {
    case Float::f32:
      return perturb_kernel<Type, F32, kStochastic>;
    case Float::bf16:
      return perturb_kernel<Type, BF16, kStochastic>;
    case Float::f16:
      return perturb_kernel<Type, F16, kStochastic>;
    case Float::f64:
      return perturb_kernel<Type, F64, kStochastic>;
  }
  return nullptr;
}

PerturbKernel kernel_of(Float theta, Float direction, bool stochastic) {
  switch (theta) {
    case Float::f32:
      return stochastic ? kernel_by_direction<F32Stochastic, true>(direction)
                        : kernel_by_direction<F32, false>(direction);
    case Float::bf16:
      return stochastic ? kernel_by_direction<BF16Stochastic, true>(direction)
                        : kernel_by_direction<BF16, false>(direction);
    case Float::f16:
      return stochastic ? kernel_by_direction<F16Stochastic, true>(direction)
                        : kernel_by_direction<F16, false>(direction);
    case Float::f64:
      return kernel_by_direction<F64, false>(direction);
  }
  return nullptr;
}

RestoreKernel restore_kernel_of(Float theta) {
  switch (theta) {
    case Float::f64:
      return restore_kernel<uint64_t>;
    case Float::f32:
      return restore_kernel<uint32_t>;
    default:
      return restore_kernel<uint16_t>;
  }
}

// Calls launch(batch, blocks) for batches of runs of the same two types, until one fails.
template <class Launch>
const char* for_each_batch(const PerturbRun* runs, int64_t size, int device, const Launch& launch) {
  // The caller has made `device` the current one; this says so to the run-time library that is
  // linked into this file, which is not torch's.
  const cudaError_t unusable = cudaSetDevice(device);
  if (unusable != cudaSuccess) return cudaGetErrorString(unusable);
  PerturbBatch batch;
  batch.tensors = 0;
  const auto flush = [&] {
    if (batch.tensors == 0) return cudaSuccess;
    launch(batch, batch.first[batch.tensors]);
    batch.tensors = 0;
    return cudaGetLastError();
  };
  constexpr Float kTypes[] = {Float::f32, Float::bf16, Float::f16, Float::f64};
  for (const Float theta : kTypes) {
    for (const Float direction : kTypes) {
      cudaError_t error = cudaSuccess;
      for (const PerturbRun* run = runs; run < runs + size && error == cudaSuccess; ++run) {
        if (run->theta_type != theta || run->direction_type != direction) continue;
        append(batch, *run);
        if (batch.tensors == kBatch) error = flush();
      }
      if (error == cudaSuccess) error = flush();
      if (error != cudaSuccess) return cudaGetErrorString(error);
    }
  }
  return nullptr;
}

}  // namespace

const char* perturb_on_cuda(const PerturbRun* runs, int64_t size, const PerturbOptions& options,
                            int64_t* counts, int device, void* stream) {
  return for_each_batch(runs, size, device, [&](const PerturbBatch& batch, uint32_t blocks) {
    const PerturbRun& run = batch.runs[0];
    const auto kernel = kernel_of(run.theta_type, run.direction_type, options.stochastic);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        batch, options, reinterpret_cast<Counter*>(counts));
  });
}

const char* restore_on_cuda(const PerturbRun* runs, int64_t size, int device, void* stream) {
  return for_each_batch(runs, size, device, [&](const PerturbBatch& batch, uint32_t blocks) {
    const auto kernel = restore_kernel_of(batch.runs[0].theta_type);
    kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(batch);
  });
}

}  // namespace vcore
