#include "gibbs_kernels.h"

namespace vcore::VCORE_ISA {
namespace {

// exp(x) for x <= 0 to about one unit in the last place, 0 below -708; exp(0) is exactly 1.
// With k = round(x / ln 2): exp(x) = 2^k * exp(x - k ln 2), the latter by its Taylor series.
inline double exponential(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  constexpr int64_t kShiftBits = 0x4338000000000000;
  const double bounded = x < -708.0 ? -708.0 : x;
  const double shifted = bounded * 1.4426950408889634 + kShift;
  const double k = shifted - kShift;
  const double r = bounded - k * 6.93147180369123816490e-01 - k * 1.90821492927058770002e-10;
  double p = 1.0 / 479001600;
  p = p * r + 1.0 / 39916800;
  p = p * r + 1.0 / 3628800;
  p = p * r + 1.0 / 362880;
  p = p * r + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - kShiftBits + 1023) << 52;
  double power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return x < -708.0 ? 0.0 : p * power;
}

template <typename T>
int64_t pack(const T* s, const bool* mask, int64_t n, double* x) {
  if (!mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] = s[i];
    return n;
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[count] = s[i];
    count += mask[i];
  }
  return count;
}

GibbsExtent extent(const double* x, int64_t n) {
  double high = -__builtin_inf(), low = __builtin_inf();
  int64_t bad = 0;
#pragma omp simd reduction(max : high) reduction(min : low) reduction(+ : bad)
  for (int64_t i = 0; i < n; ++i) {
    high = x[i] > high ? x[i] : high;
    low = x[i] < low ? x[i] : low;
    bad += !(__builtin_fabs(x[i]) <= __DBL_MAX__);
  }
  return {high, low, bad == 0};
}

GibbsProfile normalise(const double* x, int64_t n, double unit, double high, double scale,
                       double* z) {
  double sum = 0, square = 0, peaks = 0, second = -__builtin_inf();
#pragma omp simd reduction(+ : sum, square, peaks) reduction(max : second)
  for (int64_t i = 0; i < n; ++i) {
    const double v = (x[i] * unit - high) * scale;
    z[i] = v;
    sum += v;
    square += v * v;
    peaks += v == 0 ? 1.0 : 0.0;
    const double below = v < 0 ? v : -__builtin_inf();
    second = below > second ? below : second;
  }
  return {sum, square, peaks, second};
}

GibbsSums evaluate(const double* z, int64_t n, double a) {
  double e_sum = 0, ez_sum = 0, ezz_sum = 0;
#pragma omp simd reduction(+ : e_sum, ez_sum, ezz_sum)
  for (int64_t i = 0; i < n; ++i) {
    const double e = exponential(a * z[i]);
    const double ez = e * z[i];
    e_sum += e;
    ez_sum += ez;
    ezz_sum += ez * z[i];
  }
  return {e_sum, ez_sum, ezz_sum};
}

GibbsSums exponentials(double* z, int64_t n, double a) {
  double e_sum = 0, ez_sum = 0, square = 0;
#pragma omp simd reduction(+ : e_sum, ez_sum, square)
  for (int64_t i = 0; i < n; ++i) {
    const double e = exponential(a * z[i]);
    e_sum += e;
    ez_sum += e * z[i];
    square += e * e;
    z[i] = e;
  }
  return {e_sum, ez_sum, square};
}

GibbsDeviations deviations(const double* x, const double* e, int64_t n, double scale,
                           double e_sum) {
  const double u_scale = 1.0 / static_cast<double>(n), v_scale = 1.0 / e_sum;
  double u_sum = 0, v_sum = 0, u_square = 0, v_square = 0;
#pragma omp simd reduction(+ : u_sum, v_sum)
  for (int64_t i = 0; i < n; ++i) {
    const double s = x[i] * scale;
    u_sum += s * u_scale;
    v_sum += s * (e[i] * v_scale);
  }
  const double u_mean = u_sum * u_scale, v_mean = v_sum * u_scale;
#pragma omp simd reduction(+ : u_square, v_square)
  for (int64_t i = 0; i < n; ++i) {
    const double s = x[i] * scale;
    const double u = s * u_scale - u_mean, v = s * (e[i] * v_scale) - v_mean;
    u_square += u * u;
    v_square += v * v;
  }
  return {u_sum, v_sum, u_square, v_square};
}

template <typename T>
void scatter(const double* e, const bool* mask, int64_t n, double q_scale, double weight_scale,
             T* q, T* weight) {
  if (!mask) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      q[i] = static_cast<T>(e[i] * q_scale);
      weight[i] = static_cast<T>(e[i] * weight_scale);
    }
    return;
  }
  int64_t at = 0;
  for (int64_t i = 0; i < n; ++i) {
    q[i] = mask[i] ? static_cast<T>(e[at] * q_scale) : T(0);
    weight[i] = mask[i] ? static_cast<T>(e[at] * weight_scale) : T(0);
    at += mask[i];
  }
}

}  // namespace

extern const GibbsKernels gibbs_kernels;
const GibbsKernels gibbs_kernels = {
    pack<float>,  pack<double>, extent,         normalise,       evaluate,
    exponentials, deviations,   scatter<float>, scatter<double>,
};

}  // namespace vcore::VCORE_ISA
