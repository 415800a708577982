// The loops over tokens of csrc/gibbs.cpp, compiled once per instruction set. All sums are in
// double.
#pragma once
#include <stdint.h>

#include "isa.h"

namespace vcore {

struct GibbsExtent {
  double high, low;
  bool finite;
};

struct GibbsProfile {
  double sum, square;  // of z
  double peaks;        // how many z are 0
  double second;       // the highest z below 0; minus infinity where there is none
};

struct GibbsSums {
  double e, ez;    // sums of exp(a*z) and of z times it
  double squares;  // evaluate: sum of z^2 * exp(a*z); exponentials: sum of exp(a*z)^2
};

struct GibbsDeviations {
  double uniform, weighted;                // sums of x*scale/n and of x*scale*q
  double uniform_square, weighted_square;  // their sums of squared deviations from the mean
};

struct GibbsKernels {
  // x = the supervised values of s, together; returns how many. x has room for n.
  int64_t (*pack_float)(const float* s, const bool* mask, int64_t n, double* x);
  int64_t (*pack_double)(const double* s, const bool* mask, int64_t n, double* x);
  GibbsExtent (*extent)(const double* x, int64_t n);
  // z = (x*unit - high) * scale
  GibbsProfile (*normalise)(const double* x, int64_t n, double unit, double high, double scale,
                            double* z);
  GibbsSums (*evaluate)(const double* z, int64_t n, double a);
  // z <- exp(a*z)
  GibbsSums (*exponentials)(double* z, int64_t n, double a);
  GibbsDeviations (*deviations)(const double* x, const double* e, int64_t n, double scale,
                                double e_sum);
  // q = e * q_scale and weight = e * weight_scale where supervised, 0 elsewhere
  void (*scatter_float)(const double* e, const bool* mask, int64_t n, double q_scale,
                        double weight_scale, float* q, float* weight);
  void (*scatter_double)(const double* e, const bool* mask, int64_t n, double q_scale,
                         double weight_scale, double* q, double* weight);
};

namespace baseline {
extern const GibbsKernels gibbs_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const GibbsKernels gibbs_kernels;
}
namespace avx512 {
extern const GibbsKernels gibbs_kernels;
}
#endif

inline const GibbsKernels& gibbs_kernels() {
#if defined(__x86_64__)
  if (isa() >= Isa::avx512) return avx512::gibbs_kernels;
  if (isa() == Isa::avx2) return avx2::gibbs_kernels;
#endif
  return baseline::gibbs_kernels;
}

}  // namespace vcore
