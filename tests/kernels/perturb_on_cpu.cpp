// The CUDA kernels' plain C++ (csrc/perturb_chunk.h) on a CPU, thread after thread:
// test_perturb_cuda.py compares it with the CPU operator.
#include "perturb_chunk.h"

#if !defined(PERTURB_TYPE)
#error "the pair of types to be tested is given on the command line"
#endif

using namespace vcore;

namespace {

template <class Work>
void for_each_thread(const PerturbBatch& batch, const Work& work) {
  // Backwards: no block or thread may rely on another one.
  for (uint32_t block = batch.first[batch.tensors]; block-- > 0;) {
    const int t = tensor_of_block(batch, block);
    for (int thread = kThreads; thread-- > 0;) work(batch.runs[t], block - batch.first[t], thread);
  }
}

PerturbBatch batch_of(const PerturbRun* runs, int tensors) {
  PerturbBatch batch;
  batch.tensors = 0;
  for (int t = 0; t < tensors; ++t) append(batch, runs[t]);
  return batch;
}

}  // namespace

extern "C" void perturb(const PerturbRun* runs, int tensors, double epsilon, uint64_t seed,
                        int64_t* counts) {
  const PerturbOptions options{epsilon, seed, PERTURB_STOCHASTIC, false};
  const PerturbBatch batch = batch_of(runs, tensors);
  for_each_thread(batch, [&](const PerturbRun& run, int64_t chunk, int thread) {
    const ThreadCounts add = move_chunk<PERTURB_TYPE, PERTURB_DIRECTION, PERTURB_STOCHASTIC>(
        run, options, chunk, thread);
    int64_t* row = counts + 3 * run.tensor;
    row[0] += add.nonzero;
    row[1] += add.moved;
    row[2] |= add.nonfinite;
  });
}

extern "C" void restore(const PerturbRun* runs, int tensors) {
  for_each_thread(batch_of(runs, tensors), [](const PerturbRun& run, int64_t chunk, int thread) {
    restore_chunk<PERTURB_TYPE::Storage>(run, chunk, thread);
  });
}
