// Root-mean-square norm and gated product with their tangents, on a CPU, one sweep each.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "isa.h"
#include "row_kernels.h"

namespace vcore {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kGrain = 32768;  // elements that are worth a thread

template <typename T, typename O>
const RowKernels<T, O>& kernels();

#if defined(__x86_64__)
#define VCORE_CHOOSE_ISA(name)                   \
  if (isa() >= Isa::avx512) return avx512::name; \
  if (isa() == Isa::avx2) return avx2::name;     \
  return baseline::name;
#else
#define VCORE_CHOOSE_ISA(name) return baseline::name;
#endif
template <>
const RowKernels<float, float>& kernels() {
  VCORE_CHOOSE_ISA(row_kernels_float)
}
template <>
const RowKernels<double, double>& kernels() {
  VCORE_CHOOSE_ISA(row_kernels_double)
}
template <>
const RowKernels<bf16, bf16>& kernels() {
  VCORE_CHOOSE_ISA(row_kernels_bf16)
}
template <>
const RowKernels<bf16, float>& kernels() {
  VCORE_CHOOSE_ISA(row_kernels_bf16_to_float)
}
#undef VCORE_CHOOSE_ISA

// A tensor, or none, as the contiguous values that a kernel reads.
template <typename T>
class Values {
 public:
  Values(const OptionalTensor& tensor, at::ScalarType dtype) {
    if (tensor) tensor_ = tensor->to(dtype).contiguous();
  }
  const T* at(int64_t index) const {
    return tensor_.defined() ? static_cast<const T*>(tensor_.const_data_ptr()) + index : nullptr;
  }

 private:
  Tensor tensor_;
};

template <typename T, typename O>
void rms_norm_rows(at::ScalarType dtype, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& dx, const OptionalTensor& dweight, double eps, Tensor& y,
                   Tensor& dy) {
  using A = Acc<T>;
  const at::ScalarType wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const Values<T> xs(x, dtype), dxs(dx, dtype);
  const Values<A> ws(weight, wide), dws(dweight, wide);
  const int64_t rows = x.size(0), cols = x.size(1);
  const auto& kernel = kernels<T, O>();
  O* const out = static_cast<O*>(y.data_ptr());
  O* const dout = static_cast<O*>(dy.data_ptr());
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(cols, 1)),
                   [&](int64_t begin, int64_t end) {
                     const int64_t at = begin * cols;
                     kernel.rms_norm(end - begin, cols, xs.at(at), dxs.at(at), ws.at(0), dws.at(0),
                                     static_cast<A>(eps), out + at, dout + at);
                   });
}

std::tuple<Tensor, Tensor> rms_norm_jvp(const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& dx, const OptionalTensor& dweight,
                                        double eps, at::ScalarType out_dtype) {
  TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1) &&
                        (!dx || dx->sizes() == x.sizes()) &&
                        (!dweight || dweight->sizes() == weight.sizes()),
                    "rms_norm_jvp: expected x and dx [N, H], weight and dweight [H]");
  const at::ScalarType given = x.scalar_type();
  const bool narrow_out = given == at::kBFloat16 && out_dtype == at::kBFloat16;
  const at::ScalarType computed =
      given == at::kDouble ? at::kDouble : (narrow_out ? at::kBFloat16 : at::kFloat);
  Tensor y = at::empty(x.sizes(), x.options().dtype(computed)), dy = at::empty_like(y);
  if (given == at::kDouble) {
    rms_norm_rows<double, double>(at::kDouble, x, weight, dx, dweight, eps, y, dy);
  } else if (narrow_out) {
    rms_norm_rows<bf16, bf16>(at::kBFloat16, x, weight, dx, dweight, eps, y, dy);
  } else if (given == at::kBFloat16) {
    rms_norm_rows<bf16, float>(at::kBFloat16, x, weight, dx, dweight, eps, y, dy);
  } else {
    rms_norm_rows<float, float>(at::kFloat, x, weight, dx, dweight, eps, y, dy);
  }
  return {y.to(out_dtype), dy.to(out_dtype)};
}

template <typename T>
void gated_values(at::ScalarType dtype, bool silu, const Tensor& gate, const Tensor& up,
                  const OptionalTensor& dgate, const OptionalTensor& dup, Tensor& y, Tensor& dy) {
  const Values<T> gates(gate, dtype), ups(up, dtype), dgates(dgate, dtype), dups(dup, dtype);
  const auto& kernel = kernels<T, T>();
  const auto call = silu ? kernel.silu_gated : kernel.gelu_gated;
  T* const out = static_cast<T*>(y.data_ptr());
  T* const dout = static_cast<T*>(dy.data_ptr());
  at::parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    call(end - begin, gates.at(begin), ups.at(begin), dgates.at(begin), dups.at(begin), out + begin,
         dout + begin);
  });
}

std::tuple<Tensor, Tensor> gated_jvp(const Tensor& gate, const Tensor& up,
                                     const OptionalTensor& dgate, const OptionalTensor& dup,
                                     std::string_view activation) {
  TORCH_CHECK_VALUE(up.sizes() == gate.sizes() && (!dgate || dgate->sizes() == gate.sizes()) &&
                        (!dup || dup->sizes() == gate.sizes()),
                    "gated_jvp: shapes differ");
  const bool silu = activation == "silu";
  TORCH_CHECK_VALUE(silu || activation == "gelu_tanh", "gated_jvp: unknown activation ",
                    activation);
  const at::ScalarType given = gate.scalar_type();
  const at::ScalarType computed =
      given == at::kDouble || given == at::kBFloat16 ? given : at::kFloat;
  Tensor y = at::empty(gate.sizes(), gate.options().dtype(computed)), dy = at::empty_like(y);
  if (given == at::kDouble) {
    gated_values<double>(computed, silu, gate, up, dgate, dup, y, dy);
  } else if (given == at::kBFloat16) {
    gated_values<bf16>(computed, silu, gate, up, dgate, dup, y, dy);
  } else {
    gated_values<float>(computed, silu, gate, up, dgate, dup, y, dy);
  }
  return {y.to(given), dy.to(given)};
}

}  // namespace

TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("rms_norm_jvp", rms_norm_jvp);
  m.impl("gated_jvp", gated_jvp);
}

}  // namespace vcore
