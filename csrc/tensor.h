// What the operators here need of PyTorch, on its stable interface (torch/csrc/stable and
// torch/headeronly) alone, so that one library serves every torch from 2.10 on. Nothing of ATen or
// c10 beyond these headers may be named in this folder.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// Younger than 2.10, hence weak: null where this torch does not have it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace vcore {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using IntArrayRef = torch::headeronly::IntHeaderOnlyArrayRef;
using OptionalTensor = std::optional<Tensor>;
using TensorList = const std::vector<Tensor>&;

// ---- Errors. PyTorch's binding of operators makes a ValueError of std::invalid_argument, an
// IndexError of std::out_of_range and a RuntimeError of std::runtime_error. No standard exception
// becomes a TypeError: the public functions in Python raise these before they call an operator.
// ----

template <typename T>
void print(std::ostream& to, const T& value) {
  to << value;
}
inline void print(std::ostream& to, ScalarType type) { to << torch::headeronly::toString(type); }
inline void print(std::ostream& to, const Device& device) {
  to << (device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda" : "another device");
  if (device.has_index()) to << ':' << device.index();
}
inline void print(std::ostream& to, IntArrayRef sizes) {
  to << '[';
  for (size_t i = 0; i < sizes.size(); ++i) to << (i ? ", " : "") << sizes[i];
  to << ']';
}

template <typename Error, typename... Parts>
void check(bool condition, const Parts&... message) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  (print(text, message), ...);
  throw Error(text.str());
}
template <typename... Parts>
void check_value(bool condition, const Parts&... message) {
  check<std::invalid_argument>(condition, message...);
}
template <typename... Parts>
void check_index(bool condition, const Parts&... message) {
  check<std::out_of_range>(condition, message...);
}
template <typename... Parts>
void check_runtime(bool condition, const Parts&... message) {
  check<std::runtime_error>(condition, message...);
}

// For what PyTorch's C interface returns; its own message where this torch gives it away.
inline void succeed(AOTITorchError error, const char* what) {
  if (error == 0) [[likely]]
    return;
  const auto why = torch_exception_get_what_without_backtrace;
  throw std::runtime_error("vcore_kernels: " + std::string(what) + " failed" +
                           (why ? ": " + std::string(why()) : std::string()));
}

// ---- Threads. ----

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

// fn(begin, end) over parts of [begin, end) of at least `grain`, on the threads of PyTorch. The
// first exception of any of them is thrown again here: PyTorch's C interface would lose it.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& fn) {
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      fn(from, to);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// ---- Tensors in the memory of the CPU. ----

inline bool same(IntArrayRef a, IntArrayRef b) { return a.equals(b); }

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

inline int64_t itemsize(const Tensor& t) { return static_cast<int64_t>(t.element_size()); }
inline int64_t nbytes(const Tensor& t) { return t.numel() * itemsize(t); }

inline int32_t shim_type(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

inline std::vector<int64_t> contiguous_strides(IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) {
    strides[i] = stride;
  }
  return strides;
}

inline Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                   shim_type(dtype), aoti_torch_device_type_cpu(), 0, &handle),
          "a new tensor");
  return Tensor(handle);
}
inline Tensor empty(IntArrayRef sizes, ScalarType dtype) {
  return empty_strided(sizes, contiguous_strides(sizes), dtype);
}

inline void zero(const Tensor& t) {  // a contiguous one
  char* const bytes = data<char>(t);
  parallel_for(0, nbytes(t), 1 << 17,
               [&](int64_t begin, int64_t end) { std::fill(bytes + begin, bytes + end, 0); });
}
inline Tensor zeros(IntArrayRef sizes, ScalarType dtype) {
  Tensor t = empty(sizes, dtype);
  zero(t);
  return t;
}

// A tensor over memory that somebody else keeps alive. It has no part in autograd and belongs to
// whichever thread makes it: so threads may copy into and out of tensors of the caller.
inline Tensor view(const void* memory, IntArrayRef sizes, IntArrayRef strides, ScalarType dtype) {
  AtenTensorHandle handle = nullptr;
  succeed(aoti_torch_create_tensor_from_blob(
              const_cast<void*>(memory), static_cast<int64_t>(sizes.size()), sizes.data(),
              strides.data(), 0, shim_type(dtype), aoti_torch_device_type_cpu(), 0, &handle),
          "a view of memory");
  return Tensor(handle);
}
inline Tensor view(const void* memory, IntArrayRef sizes, ScalarType dtype) {
  return view(memory, sizes, contiguous_strides(sizes), dtype);
}
// t without its history.
inline Tensor detach(const Tensor& t) {
  return view(t.const_data_ptr(), t.sizes(), t.strides(), t.scalar_type());
}

// Converts between any two dtypes, as copy_ does.
inline void copy(const Tensor& to, const Tensor& from) {
  succeed(aoti_torch_copy_(to.get(), from.get(), 0), "copy_");
}

// t's values as a contiguous tensor of `dtype`: t itself where it is that already. Neither has part
// in autograd but the former.
inline Tensor as_contiguous(const Tensor& t, ScalarType dtype) {
  if (t.scalar_type() == dtype && t.is_contiguous()) return t;
  Tensor out = empty(t.sizes(), dtype);
  copy(out, detach(t));
  return out;
}
inline Tensor as_contiguous(const Tensor& t) { return as_contiguous(t, t.scalar_type()); }

// aten::OP(arguments) of one result.
template <typename... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  succeed(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION), name);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether the entries fill their memory once each, in whatever order of dimensions.
inline bool non_overlapping_and_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::erase_if(order, [&](size_t d) { return sizes[d] == 1; });
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (size_t d : order) {
    if (strides[d] != expected) return t.numel() == 0;
    expected *= sizes[d];
  }
  return true;
}

}  // namespace vcore
