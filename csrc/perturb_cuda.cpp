// vcore_kernels::perturb_, perturb_swap_ and restore_ on CUDA devices. Everything is enqueued on
// the current stream and nothing waits for the device. Without any CUDA header, so that this
// compiles, links and loads beside a torch without CUDA as well.
#include "perturb_cuda.h"

#include <vector>

#include "perturb_arguments.h"

// Of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), in libtorch_cuda; null
// where torch has no CUDA. c10::Stream::native_handle is younger than the oldest torch we serve.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                            void** stream);

namespace vcore {
namespace {

void* current_stream(Device device) {
  check_runtime(aoti_torch_get_current_cuda_stream != nullptr,
                "vcore_kernels: this torch has no CUDA");
  void* stream = nullptr;
  const int32_t error = aoti_torch_get_current_cuda_stream(device.index(), &stream);
  check_runtime(error == 0, "vcore_kernels: no current stream on ", device);
  return stream;
}

// Moves the tensors on the device of `counts` and leaves the others: who has tensors on several
// devices calls once for each, and random bits still go by the number in the whole list.
void perturb(TensorList params, TensorList direction, TensorList saved, double epsilon,
             std::optional<int64_t> seed, const Tensor& counts) {
  const Device device = counts.device();
  check_value(device.is_cuda(), "perturb_: counts is on ", device, ", expected a CUDA device");
  std::vector<PerturbRun> here;
  for (const PerturbRun& run : perturb_runs(params, direction, saved, seed, counts)) {
    const size_t t = run.tensor;
    check_value(
        direction[t].device() == params[t].device() && saved[t].device() == params[t].device(),
        "perturb_: params[", t, "] is on ", params[t].device(), ", its direction on ",
        direction[t].device(), ", saved on ", saved[t].device());
    if (params[t].device() == device && run.size > 0) here.push_back(run);
  }
  const PerturbOptions options{epsilon, static_cast<uint64_t>(seed.value_or(0)), seed.has_value(),
                               false};
  const torch::stable::accelerator::DeviceGuard guard(device.index());
  const char* error =
      perturb_on_cuda(here.data(), static_cast<int64_t>(here.size()), options,
                      data<int64_t>(counts), device.index(), current_stream(device));
  check_runtime(error == nullptr, "perturb_: ", error);
}

void perturb_swap(TensorList params, TensorList direction, double epsilon,
                  std::optional<int64_t> seed, const Tensor& counts) {
  check_swap(params, direction);
  perturb(params, direction, direction, epsilon, seed, counts);
}

void restore(TensorList params, TensorList saved) {
  check_saved(params, saved);
  std::vector<PerturbRun> left;
  for (size_t t = 0; t < params.size(); ++t) {
    check_value(params[t].device().is_cuda() && saved[t].device() == params[t].device(),
                "restore_: params[", t, "] is on ", params[t].device(), ", saved on ",
                saved[t].device());
    const Float type = float_type(params[t]);
    left.push_back({params[t].mutable_data_ptr(), nullptr, saved[t].mutable_data_ptr(),
                    params[t].numel(), 0, type, type, static_cast<uint32_t>(t)});
  }
  while (!left.empty()) {  // device by device
    const Device device = params[left.front().tensor].device();
    std::vector<PerturbRun> here, others;
    for (const PerturbRun& run : left) {
      const bool is_here = params[run.tensor].device() == device;
      if (!is_here) others.push_back(run);
      if (is_here && run.size > 0) here.push_back(run);
    }
    const torch::stable::accelerator::DeviceGuard guard(device.index());
    const char* error = restore_on_cuda(here.data(), static_cast<int64_t>(here.size()),
                                        device.index(), current_stream(device));
    check_runtime(error == nullptr, "restore_: ", error);
    left = std::move(others);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CUDA, m) {
  m.impl("perturb_", TORCH_BOX(&perturb));
  m.impl("perturb_swap_", TORCH_BOX(&perturb_swap));
  m.impl("restore_", TORCH_BOX(&restore));
}

}  // namespace vcore
