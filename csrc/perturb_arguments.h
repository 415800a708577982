// The checks that vcore::perturb_, perturb_swap_ and restore_ share on every device.
#pragma once

#include <optional>
#include <vector>

#include "perturb_kernels.h"
#include "tensor.h"

namespace vcore {

inline Float float_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    case ScalarType::Double:
      return Float::f64;
    default:
      check_value(false, "perturb_: no kernel for ", tensor.scalar_type());
      return Float::f32;
  }
}

inline void check_dense(TensorList tensors, const char* name) {
  for (const auto& tensor : tensors) {
    check_value(non_overlapping_and_dense(tensor), "perturb_: ", name, " must be dense in memory");
  }
}

inline void check_saved(TensorList params, TensorList saved) {
  check_value(params.size() == saved.size(), "perturb_: ", params.size(), " params, ", saved.size(),
              " saved");
  check_dense(params, "params");
  check_dense(saved, "saved");
  for (size_t t = 0; t < params.size(); ++t) {
    check_value(nbytes(saved[t]) >= nbytes(params[t]), "perturb_: saved[", t, "] has ",
                nbytes(saved[t]), " bytes, expected ", nbytes(params[t]));
  }
}

// One run for each whole tensor, once everything has been checked but the devices.
inline std::vector<PerturbRun> perturb_runs(TensorList params, TensorList direction,
                                            TensorList saved, std::optional<int64_t> seed,
                                            const Tensor& counts) {
  check_saved(params, saved);
  check_dense(direction, "direction");
  check_value(params.size() == direction.size(), "perturb_: ", params.size(), " params, ",
              direction.size(), " directions");
  check_value(counts.numel() == 3 * static_cast<int64_t>(params.size()) &&
                  counts.scalar_type() == ScalarType::Long && counts.is_contiguous(),
              "perturb_: counts must be int64 [tensors, 3]");
  std::vector<PerturbRun> runs;
  for (size_t t = 0; t < params.size(); ++t) {
    check_value(same(params[t].sizes(), direction[t].sizes()) &&
                    same(params[t].strides(), direction[t].strides()),
                "perturb_: direction[", t, "] must have the shape and strides of params[", t, "]");
    const Float type = float_type(params[t]);
    check_value(!seed || type != Float::f64, "perturb_: no stochastic rounding for float64");
    runs.push_back({params[t].mutable_data_ptr(), direction[t].const_data_ptr(),
                    saved[t].mutable_data_ptr(), params[t].numel(), 0, type,
                    float_type(direction[t]), static_cast<uint32_t>(t)});
  }
  return runs;
}

inline void check_swap(TensorList params, TensorList direction) {
  for (size_t t = 0; t < params.size(); ++t) {
    check_value(t >= direction.size() || params[t].scalar_type() == direction[t].scalar_type(),
                "perturb_swap_: direction[", t, "] must have the dtype of params[", t, "]");
  }
}

}  // namespace vcore
