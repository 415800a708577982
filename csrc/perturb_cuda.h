// The CUDA kernels of the in-place perturbation behind an interface that needs neither torch's nor
// CUDA's headers. Both calls only enqueue, on `stream` of `device`, and can be captured in a graph.
// They return CUDA's description of an error, or null.
#pragma once

#include "perturb_kernels.h"

namespace vcore {

// theta <- round(theta - epsilon * g) for each run, a whole tensor of at least one entry (offset
// 0). counts: int64 [tensors, 3] on the device; row run.tensor receives, added to what stands there
// plus one, the nonzero entries of g, the entries moved, and a number that is zero if and only if g
// is finite. Rows that begin as -1 thus end as the counts, and stay -1 where nothing was enqueued.
const char* perturb_on_cuda(const PerturbRun* runs, int64_t size, const PerturbOptions& options,
                            int64_t* counts, int device, void* stream);

// theta <- saved, bit for bit.
const char* restore_on_cuda(const PerturbRun* runs, int64_t size, int device, void* stream);

}  // namespace vcore
