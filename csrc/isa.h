// Run-time choice of the instruction set. A source listed in ISA_SOURCES (CMakeLists.txt) is
// compiled once per entry below with VCORE_ISA set to its name, and defines its functions in
// namespace vcore::VCORE_ISA; callers pick one by isa().
#pragma once

namespace vcore {

enum class Isa { baseline, avx2, avx512, avx512bf16 };

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return Isa::avx512bf16;
  if (avx512) return Isa::avx512;
  // F16C came with the generation before AVX2 on every CPU that has AVX2.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

inline Isa isa() {
  static const Isa value = detect_isa();
  return value;
}

}  // namespace vcore
