// Root-mean-square norm and gated product with their tangents, on a CPU, one sweep each.
#include <optional>
#include <string_view>
#include <tuple>

#include "isa.h"
#include "row_kernels.h"
#include "tensor.h"

namespace vcore {
namespace {

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
  Values(const OptionalTensor& tensor, ScalarType dtype) {
    if (!tensor) return;
    tensor_ = as_contiguous(*tensor, dtype);
    first_ = const_data<T>(*tensor_);
  }
  const T* at(int64_t index) const { return first_ ? first_ + index : nullptr; }

 private:
  OptionalTensor tensor_;
  const T* first_ = nullptr;
};

template <typename T, typename O>
void rms_norm_rows(ScalarType dtype, const Tensor& x, const Tensor& weight,
                   const OptionalTensor& dx, const OptionalTensor& dweight, double eps, Tensor& y,
                   Tensor& dy) {
  using A = Acc<T>;
  const ScalarType wide = dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Values<T> xs(x, dtype), dxs(dx, dtype);
  const Values<A> ws(weight, wide), dws(dweight, wide);
  const int64_t rows = x.size(0), cols = x.size(1);
  const auto& kernel = kernels<T, O>();
  O* const out = data<O>(y);
  O* const dout = data<O>(dy);
  parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(cols, 1)),
               [&](int64_t begin, int64_t end) {
                 const int64_t at = begin * cols;
                 kernel.rms_norm(end - begin, cols, xs.at(at), dxs.at(at), ws.at(0), dws.at(0),
                                 static_cast<A>(eps), out + at, dout + at);
               });
}

std::tuple<Tensor, Tensor> rms_norm_jvp(const Tensor& x, const Tensor& weight,
                                        const OptionalTensor& dx, const OptionalTensor& dweight,
                                        double eps, ScalarType out_dtype) {
  check_value(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1) &&
                  (!dx || same(dx->sizes(), x.sizes())) &&
                  (!dweight || same(dweight->sizes(), weight.sizes())),
              "rms_norm_jvp: expected x and dx [N, H], weight and dweight [H]");
  const ScalarType given = x.scalar_type();
  const bool narrow_out = given == ScalarType::BFloat16 && out_dtype == ScalarType::BFloat16;
  const ScalarType computed = given == ScalarType::Double
                                  ? ScalarType::Double
                                  : (narrow_out ? ScalarType::BFloat16 : ScalarType::Float);
  Tensor y = empty(x.sizes(), computed), dy = empty(x.sizes(), computed);
  if (given == ScalarType::Double) {
    rms_norm_rows<double, double>(ScalarType::Double, x, weight, dx, dweight, eps, y, dy);
  } else if (narrow_out) {
    rms_norm_rows<bf16, bf16>(ScalarType::BFloat16, x, weight, dx, dweight, eps, y, dy);
  } else if (given == ScalarType::BFloat16) {
    rms_norm_rows<bf16, float>(ScalarType::BFloat16, x, weight, dx, dweight, eps, y, dy);
  } else {
    rms_norm_rows<float, float>(ScalarType::Float, x, weight, dx, dweight, eps, y, dy);
  }
  return {as_contiguous(y, out_dtype), as_contiguous(dy, out_dtype)};
}

template <typename T>
void gated_values(ScalarType dtype, bool silu, const Tensor& gate, const Tensor& up,
                  const OptionalTensor& dgate, const OptionalTensor& dup, Tensor& y, Tensor& dy) {
  const Values<T> gates(gate, dtype), ups(up, dtype), dgates(dgate, dtype), dups(dup, dtype);
  const auto& kernel = kernels<T, T>();
  const auto call = silu ? kernel.silu_gated : kernel.gelu_gated;
  T* const out = data<T>(y);
  T* const dout = data<T>(dy);
  parallel_for(0, gate.numel(), kGrain, [&](int64_t begin, int64_t end) {
    call(end - begin, gates.at(begin), ups.at(begin), dgates.at(begin), dups.at(begin), out + begin,
         dout + begin);
  });
}

std::tuple<Tensor, Tensor> gated_jvp(const Tensor& gate, const Tensor& up,
                                     const OptionalTensor& dgate, const OptionalTensor& dup,
                                     std::string_view activation) {
  check_value(same(up.sizes(), gate.sizes()) && (!dgate || same(dgate->sizes(), gate.sizes())) &&
                  (!dup || same(dup->sizes(), gate.sizes())),
              "gated_jvp: shapes differ");
  const bool silu = activation == "silu";
  check_value(silu || activation == "gelu_tanh", "gated_jvp: unknown activation ", activation);
  const ScalarType given = gate.scalar_type();
  const ScalarType computed =
      given == ScalarType::Double || given == ScalarType::BFloat16 ? given : ScalarType::Float;
  Tensor y = empty(gate.sizes(), computed), dy = empty(gate.sizes(), computed);
  if (given == ScalarType::Double) {
    gated_values<double>(computed, silu, gate, up, dgate, dup, y, dy);
  } else if (given == ScalarType::BFloat16) {
    gated_values<bf16>(computed, silu, gate, up, dgate, dup, y, dy);
  } else {
    gated_values<float>(computed, silu, gate, up, dgate, dup, y, dy);
  }
  return {as_contiguous(y, given), as_contiguous(dy, given)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("rms_norm_jvp", TORCH_BOX(&rms_norm_jvp));
  m.impl("gated_jvp", TORCH_BOX(&gated_jvp));
}

}  // namespace vcore
