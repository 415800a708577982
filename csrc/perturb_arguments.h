// The checks that vcore::perturb_, perturb_swap_ and restore_ share on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "perturb_kernels.h"

namespace vcore {

inline Float float_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Float::f32;
    case at::kBFloat16:
      return Float::bf16;
    case at::kHalf:
      return Float::f16;
    case at::kDouble:
      return Float::f64;
    default:
      TORCH_CHECK_TYPE(false, "perturb_: no kernel for ", tensor.scalar_type());
  }
}

inline void check_dense(at::TensorList tensors, const char* name) {
  for (const auto& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), "perturb_: ", name,
                      " must be dense in memory");
  }
}

inline void check_saved(at::TensorList params, at::TensorList saved) {
  TORCH_CHECK_VALUE(params.size() == saved.size(), "perturb_: ", params.size(), " params, ",
                    saved.size(), " saved");
  check_dense(params, "params");
  check_dense(saved, "saved");
  for (size_t t = 0; t < params.size(); ++t) {
    TORCH_CHECK_VALUE(saved[t].nbytes() >= params[t].nbytes(), "perturb_: saved[", t, "] has ",
                      saved[t].nbytes(), " bytes, expected ", params[t].nbytes());
  }
}

// One run for each whole tensor, once everything has been checked but the devices.
inline std::vector<PerturbRun> perturb_runs(at::TensorList params, at::TensorList direction,
                                            at::TensorList saved, std::optional<int64_t> seed,
                                            const at::Tensor& counts) {
  check_saved(params, saved);
  check_dense(direction, "direction");
  TORCH_CHECK_VALUE(params.size() == direction.size(), "perturb_: ", params.size(), " params, ",
                    direction.size(), " directions");
  TORCH_CHECK_VALUE(counts.numel() == 3 * static_cast<int64_t>(params.size()) &&
                        counts.scalar_type() == at::kLong && counts.is_contiguous(),
                    "perturb_: counts must be int64 [tensors, 3]");
  std::vector<PerturbRun> runs;
  for (size_t t = 0; t < params.size(); ++t) {
    TORCH_CHECK_VALUE(
        params[t].sizes() == direction[t].sizes() && params[t].strides() == direction[t].strides(),
        "perturb_: direction[", t, "] must have the shape and strides of params[", t, "]");
    TORCH_CHECK_TYPE(!seed || params[t].scalar_type() != at::kDouble,
                     "perturb_: no stochastic rounding for float64");
    runs.push_back({params[t].data_ptr(), direction[t].const_data_ptr(), saved[t].data_ptr(),
                    params[t].numel(), 0, float_type(params[t]), float_type(direction[t]),
                    static_cast<uint32_t>(t)});
  }
  return runs;
}

inline void check_swap(at::TensorList params, at::TensorList direction) {
  for (size_t t = 0; t < params.size(); ++t) {
    TORCH_CHECK_TYPE(t >= direction.size() || params[t].dtype() == direction[t].dtype(),
                     "perturb_swap_: direction[", t, "] must have the dtype of params[", t, "]");
  }
}

}  // namespace vcore
