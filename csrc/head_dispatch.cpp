// Chooses the head kernels for this machine, and lends ATen's brgemm to those that have AMX, where
// this torch has it.
#include <dlfcn.h>
#include <torch/headeronly/util/BFloat16.h>

#include <string>
#include <vector>

#include "head_kernels.h"
#include "isa.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vcore {
namespace {

#if defined(__x86_64__)
// at::native::cpublas::brgemm and brgemm_release for bf16 with fp32 accumulators: internal to ATen,
// so looked up by name at run time. The packed panels here are exactly the VNNI layout it wants.
using Brgemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool,
                        const c10::BFloat16*, const c10::BFloat16*, float*, bool);
using BrgemmRelease = void (*)(bool);

Brgemm find_brgemm() {
  return reinterpret_cast<Brgemm>(
      dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"));
}
BrgemmRelease find_brgemm_release() {
  return reinterpret_cast<BrgemmRelease>(
      dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas14brgemm_releaseEb"));
}

void gemm_brgemm(int64_t m, int64_t n, int64_t k, const bf16* a, int64_t lda, const bf16* b,
                 float* c, int64_t ldc, bool accumulate) {
  static const Brgemm brgemm = find_brgemm();
  static const BrgemmRelease release = find_brgemm_release();
  const int64_t panel = avx512bf16::head_kernels_bf16.panel;
  const auto* left = reinterpret_cast<const c10::BFloat16*>(a);
  for (int64_t j = 0; j < n; j += panel) {
    const auto* right = reinterpret_cast<const c10::BFloat16*>(b + j * k);
    if (n - j >= panel) {
      brgemm(m, panel, k, lda, panel, ldc, accumulate, left, right, c + j, true);
      continue;
    }
    std::vector<float> edge(m * panel);  // the last panel reaches beyond C
    brgemm(m, panel, k, lda, panel, panel, false, left, right, edge.data(), true);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t q = 0; q < n - j; ++q) {
        c[i * ldc + j + q] = (accumulate ? c[i * ldc + j + q] : 0.0f) + edge[i * panel + q];
      }
    }
  }
  release(true);
}

bool has_amx_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
}

const HeadKernels<bf16>* brgemm_kernels() {
  static const HeadKernels<bf16> table = [] {
    HeadKernels<bf16> t = avx512bf16::head_kernels_bf16;
    t.gemm = gemm_brgemm;
    return t;
  }();
  return find_brgemm() && find_brgemm_release() ? &table : nullptr;
}

const HeadKernels<bf16>* choose_bf16(const std::string& engine) {
  if (isa() != Isa::avx512bf16) return nullptr;
  if (engine == "brgemm") return brgemm_kernels();
  if (engine == "microkernel") return &avx512bf16::head_kernels_bf16;
  if (engine != "auto") return nullptr;
  // The microkernel beats brgemm by 3% where both use the AVX-512 dot product (Zen 4); AMX tiles
  // are several times faster than that, and only brgemm speaks to them.
  const auto* amx = has_amx_bf16() ? brgemm_kernels() : nullptr;
  return amx ? amx : &avx512bf16::head_kernels_bf16;
}
#else
const HeadKernels<bf16>* choose_bf16(const std::string&) { return nullptr; }
#endif

const HeadKernels<bf16>*& bf16_slot() {
  static const HeadKernels<bf16>* slot = choose_bf16("auto");
  return slot;
}

}  // namespace

template <>
const HeadKernels<float>* head_kernels<float>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512bf16) return &avx512bf16::head_kernels_float;
  if (isa() == Isa::avx512) return &avx512::head_kernels_float;
  if (isa() == Isa::avx2) return &avx2::head_kernels_float;
#endif
  return &baseline::head_kernels_float;
}
template <>
const HeadKernels<double>* head_kernels<double>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512bf16) return &avx512bf16::head_kernels_double;
  if (isa() == Isa::avx512) return &avx512::head_kernels_double;
  if (isa() == Isa::avx2) return &avx2::head_kernels_double;
#endif
  return &baseline::head_kernels_double;
}
template <>
const HeadKernels<bf16>* head_kernels<bf16>() {
  return bf16_slot();
}

// For tests: "auto", "brgemm", "microkernel", or "float" (bf16 inputs through fp32 products).
// Returns whether it is available here.
bool set_bf16_engine(const std::string& engine) {
  if (engine == "float") {
    bf16_slot() = nullptr;
    return true;
  }
  const auto* chosen = choose_bf16(engine);
  if (chosen) bf16_slot() = chosen;
  return chosen != nullptr;
}

}  // namespace vcore
