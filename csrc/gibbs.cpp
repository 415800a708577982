// vcore_kernels::gibbs_variance on a CPU: segment softmax, KL solve, utility variances in one call.
//
// In parallel over segments: (1) gather the supervised utilities as doubles and find their range;
// (2) bring them to z = (s - max s) / (max s - min s) in [-1, 0]; (3) solve
// KL(softmax(a*z) || uniform) = budget for a, or for one temperature shared by all; (4) write the
// weights and take the moments that the variances are made of. The reference with the same stages
// is vcore_kernels/_gibbs.py.
#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "gibbs_kernels.h"
#include "tensor.h"

namespace vcore {
namespace {

// The constants of vcore_kernels/_gibbs.py.
constexpr double kExpZero = 746.0;
constexpr double kLargest = 1e300;
constexpr double kTiny = 1e-200;
constexpr int kSteps = 64;
constexpr int kNewtonSteps = 8;

struct Segment {
  int64_t begin, length;
  int64_t count = 0;  // supervised
  GibbsExtent extent{0, 0, true};
  double unit = 1;  // other powers of 2 where the spread or its reciprocal would overflow
  double spread = 0;
  bool constant = false, flat = true, saturated = false;
  double ceiling = 0;  // an a at which all but the maxima have weight 0
  double supremum = 0, curvature = 0;
  double a = 0;
  double e_sum = 1, kl = 0, ess = 1;
  GibbsDeviations deviations{};

  bool known() const { return extent.finite && count > 0; }
  double magnitude() const { return std::max(std::abs(extent.high), std::abs(extent.low)); }
  double size() const { return std::max(magnitude(), 1 / kLargest); }
};

struct Divergence {
  double kl, slope;  // KL(a) and dKL/da
};

// The a at which KL(a) = budget; see _solve in _gibbs.py.
template <typename Evaluate>
double solve(double budget, double ceiling, double curvature, double bound,
             const Evaluate& evaluate) {
  double low = std::sqrt(2 * budget / bound), high = ceiling;
  const double guess = std::sqrt(2 * budget / curvature);
  double a = std::min(std::max(std::min(guess, kLargest), low), high);
  for (int step = 0; step < kSteps; ++step) {
    const auto [kl, slope] = evaluate(a);
    if (std::abs(kl - budget) <= 1e-9 * budget + 1e-15) return a;
    (kl > budget ? high : low) = a;
    const double root = std::sqrt(kl);
    const double newton = a - 2 * root * (root - std::sqrt(budget)) / slope;
    const bool inside = newton > low && newton < high && (step < kNewtonSteps || step % 2 == 0);
    a = inside ? newton : std::sqrt(low) * std::sqrt(high);
  }
  return a;
}

Divergence divergence(const GibbsKernels& kernels, const Segment& segment, const double* z,
                      double a) {
  const double n = static_cast<double>(segment.count);
  const GibbsSums sums = kernels.evaluate(z, segment.count, a);
  const double mean = sums.ez / sums.e;
  const double variance = std::max(sums.squares / sums.e - mean * mean, 0.0);
  return {std::max(a * mean - std::log(sums.e / n), 0.0), a * variance};
}

// Unbiased sample variance of values given in groups: sizes, sums, squared deviations from group
// means.
class Variance {
 public:
  void add(double size, double sum, double square) {
    const double total = size_ + size;
    const double distance = sum / size - mean_;
    square_ += square + distance * distance * (size_ * size / total);
    mean_ += distance * (size / total);
    size_ = total;
  }
  double value() const { return square_ / std::max(size_ - 1, 1.0); }

 private:
  double size_ = 0, mean_ = 0, square_ = 0;
};

template <typename T>
struct Typed;
template <>
struct Typed<float> {
  static constexpr auto pack = &GibbsKernels::pack_float;
  static constexpr auto scatter = &GibbsKernels::scatter_float;
};
template <>
struct Typed<double> {
  static constexpr auto pack = &GibbsKernels::pack_double;
  static constexpr auto scatter = &GibbsKernels::scatter_double;
};

enum class Rule { tau, trajectory, batch };

// The utilities and what the user asked for.
template <typename T>
struct Problem {
  const T* utility;
  const bool* mask;  // nullptr: all
  double value;
  Rule rule;
  double resolution;
};

// Gathers the supervised utilities into x and brings them to z in [-1, 0].
template <typename T>
void prepare(const GibbsKernels& kernels, const Problem<T>& problem, Segment& segment, double* x,
             double* z) {
  segment.count = (kernels.*Typed<T>::pack)(problem.utility + segment.begin,
                                            problem.mask ? problem.mask + segment.begin : nullptr,
                                            segment.length, x);
  if (segment.count > 0) segment.extent = kernels.extent(x, segment.count);
  if (segment.known()) {
    const auto [high, low, finite] = segment.extent;
    const double plain = high - low;
    if (plain > 0 && plain < kTiny) segment.unit = 0x1p512;
    if (!std::isfinite(plain)) segment.unit = 0.25;
    segment.spread = high * segment.unit - low * segment.unit;
    segment.constant = segment.spread <= problem.resolution * (segment.magnitude() * segment.unit);
    segment.flat = problem.rule == Rule::tau ? segment.spread == 0 : segment.constant;
  }
  if (segment.flat) {
    std::fill_n(z, segment.count, 0.0);
    return;
  }
  const double n = static_cast<double>(segment.count);
  const GibbsProfile profile = kernels.normalise(
      x, segment.count, segment.unit, segment.extent.high * segment.unit, 1 / segment.spread, z);
  const double mean = profile.sum / n;
  segment.ceiling = std::min(kExpZero / -profile.second, kLargest);
  segment.supremum = std::log(n / profile.peaks);
  segment.curvature = std::max(profile.square / n - mean * mean, 0.0);
}

// a of one segment, by tau or by its own budget.
template <typename T>
void sharpen(const GibbsKernels& kernels, const Problem<T>& problem, Segment& segment,
             const double* z) {
  if (problem.rule == Rule::tau) {
    if (segment.flat) return;
    segment.a = std::min(problem.value * (segment.spread / segment.unit), kLargest);
  } else if (problem.value > 0) {
    segment.saturated = segment.supremum <= problem.value;
    if (segment.flat) return;
    segment.a = segment.saturated
                    ? segment.ceiling
                    : solve(problem.value, segment.ceiling, segment.curvature, 0.25,
                            [&](double a) { return divergence(kernels, segment, z, a); });
  }
}

// Writes the weights; z becomes exp(a*z).
template <typename T>
void finish(const GibbsKernels& kernels, const Problem<T>& problem, Segment& segment,
            const double* x, double* z, T* q, T* weight) {
  const double n = static_cast<double>(segment.count);
  if (segment.count > 0) {
    const GibbsSums sums = kernels.exponentials(z, segment.count, segment.a);
    segment.e_sum = sums.e;
    segment.kl = std::max(segment.a * (sums.ez / sums.e) - std::log(sums.e / n), 0.0);
    segment.ess = std::min(sums.e * sums.e / (n * sums.squares), 1.0);
  }
  if (segment.known()) {
    segment.deviations = kernels.deviations(x, z, segment.count, 1 / segment.size(), segment.e_sum);
  }
  (kernels.*Typed<T>::scatter)(z, problem.mask ? problem.mask + segment.begin : nullptr,
                               segment.length, 1 / segment.e_sum, n / segment.e_sum,
                               q + segment.begin, weight + segment.begin);
}

// One a = t * ratio for all segments, at which the mean KL is the budget.
template <typename ForEach>
void share_temperature(const GibbsKernels& kernels, double budget, std::vector<Segment>& segments,
                       const double* z, const ForEach& for_each) {
  double widest = 0, known = 0;
  for (const Segment& segment : segments) {
    known += segment.known();
    if (!segment.flat) widest = std::max(widest, segment.spread / segment.unit);
  }
  const auto ratio = [&](const Segment& segment) {
    return segment.flat ? 0.0 : segment.spread / segment.unit / widest;
  };
  const double share = 1 / std::max(known, 1.0);
  double ceiling = 0, supremum = 0, curvature = 0, bound = 0;
  for (const Segment& segment : segments) {
    if (segment.flat) continue;
    const double r = ratio(segment);
    ceiling = std::max(ceiling, std::min(segment.ceiling / r, kLargest));
    supremum += share * segment.supremum;
    curvature += share * r * r * segment.curvature;
    bound += share * r * r * 0.25;
  }
  std::vector<Divergence> parts(segments.size());
  const auto evaluate = [&](double t) {
    for_each([&](int64_t i, Segment& segment) {
      const double r = ratio(segment);
      parts[i] = {0, 0};
      if (!segment.flat) parts[i] = divergence(kernels, segment, z + segment.begin, t * r);
      parts[i].slope *= r;
    });
    Divergence mean{0, 0};
    for (const Divergence& part : parts) {
      mean.kl += share * part.kl;
      mean.slope += share * part.slope;
    }
    return mean;
  };
  const bool reached = supremum <= budget;
  const double t = reached ? ceiling : solve(budget, ceiling, curvature, bound, evaluate);
  for (Segment& segment : segments) {
    segment.a = t * ratio(segment);
    segment.saturated = reached;
  }
}

// [2, 2]: over tokens and over trajectories; under uniform weights and under q.
void write_variance(const std::vector<Segment>& segments, double* variance) {
  double largest = 0;
  for (const Segment& segment : segments) {
    if (segment.known()) largest = std::max(largest, segment.size());
  }
  Variance tokens[2], trajectories[2];
  for (const Segment& segment : segments) {
    if (!segment.known()) continue;
    const GibbsDeviations& d = segment.deviations;
    const double n = static_cast<double>(segment.count);
    const double r = segment.size() / largest;
    tokens[0].add(n, r * d.uniform, r * r * d.uniform_square);
    tokens[1].add(n, r * d.weighted, r * r * d.weighted_square);
    trajectories[0].add(1, r * d.uniform, 0);
    trajectories[1].add(1, r * d.weighted, 0);
  }
  for (int column = 0; column < 2; ++column) {
    variance[column] = tokens[column].value();
    variance[2 + column] = trajectories[column].value();
  }
}

template <typename T>
void run(const Problem<T>& problem, const int64_t* offsets, int64_t number, T* q, T* weight,
         T* stats, bool* flags, double* variance) {
  const GibbsKernels& kernels = gibbs_kernels();
  const int64_t size = offsets[number];
  std::vector<Segment> segments(number);
  int64_t longest = 0;
  for (int64_t i = 0; i < number; ++i) {
    segments[i].begin = offsets[i];
    segments[i].length = offsets[i + 1] - offsets[i];
    longest = std::max(longest, segments[i].length);
  }
  const int64_t grain = std::max<int64_t>(1, 8192 * number / std::max<int64_t>(size, 1));
  const auto for_each = [&](const auto& body) {
    parallel_for(0, number, grain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) body(i, segments[i]);
    });
  };

  if (problem.rule == Rule::batch && problem.value > 0) {
    const auto buffer = std::make_unique_for_overwrite<double[]>(2 * size);
    double* const x = buffer.get();
    double* const z = x + size;
    for_each([&](int64_t, Segment& segment) {
      prepare(kernels, problem, segment, x + segment.begin, z + segment.begin);
    });
    share_temperature(kernels, problem.value, segments, z, for_each);
    for_each([&](int64_t, Segment& segment) {
      finish(kernels, problem, segment, x + segment.begin, z + segment.begin, q, weight);
    });
  } else {
    // One segment at a time on each thread, from start to end, in buffers that stay in its cache.
    parallel_for(0, number, grain, [&](int64_t first, int64_t last) {
      const auto buffer = std::make_unique_for_overwrite<double[]>(2 * longest);
      double* const x = buffer.get();
      double* const z = x + longest;
      for (int64_t i = first; i < last; ++i) {
        prepare(kernels, problem, segments[i], x, z);
        sharpen(kernels, problem, segments[i], z);
        finish(kernels, problem, segments[i], x, z, q, weight);
      }
    });
  }

  for (int64_t i = 0; i < number; ++i) {
    const Segment& segment = segments[i];
    double tau = segment.flat ? 0 : segment.a / segment.spread * segment.unit;
    if (problem.rule == Rule::tau) tau = segment.extent.finite ? problem.value : 0;
    stats[i] = static_cast<T>(std::min<double>(tau, std::numeric_limits<T>::max()));
    stats[number + i] = static_cast<T>(segment.kl);
    stats[2 * number + i] = static_cast<T>(segment.ess);
    flags[i] = segment.saturated;
    flags[number + i] = segment.constant;
    flags[2 * number + i] = segment.extent.finite;
  }
  write_variance(segments, variance);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gibbs_variance(
    const Tensor& utility, const OptionalTensor& mask, const Tensor& offsets, double value,
    std::string_view rule, double resolution) {
  check_runtime(utility.dim() == 1 && offsets.dim() == 1 && offsets.size(0) >= 1,
                "gibbs_variance: expected utility [N] and offsets [S + 1]");
  check_runtime(offsets.scalar_type() == ScalarType::Long, "gibbs_variance: offsets must be int64");
  static const std::map<std::string_view, Rule> kRules = {
      {"tau", Rule::tau}, {"trajectory", Rule::trajectory}, {"batch", Rule::batch}};
  const auto named = kRules.find(rule);
  check_runtime(named != kRules.end(),
                "gibbs_variance: rule must be tau, trajectory or batch, got ", rule);
  const int64_t number = offsets.size(0) - 1;
  const ScalarType dtype = utility.scalar_type();
  const Tensor s = as_contiguous(utility), bounds = as_contiguous(offsets);
  const int64_t* const ends = const_data<int64_t>(bounds);
  check_runtime(
      ends[0] == 0 && ends[number] == s.size(0) && std::is_sorted(ends, ends + number + 1),
      "gibbs_variance: offsets must rise from 0 to N");
  OptionalTensor m;
  if (mask) {
    check_runtime(mask->scalar_type() == ScalarType::Bool && same(mask->sizes(), s.sizes()),
                  "gibbs_variance: mask must be bool [N]");
    m = as_contiguous(*mask);
  }
  const bool* const supervised = m ? const_data<bool>(*m) : nullptr;

  const Tensor q = empty(s.sizes(), dtype), weight = empty(s.sizes(), dtype);
  const Tensor stats = empty({3, number}, dtype), flags = empty({3, number}, ScalarType::Bool);
  const Tensor variance = empty({2, 2}, ScalarType::Double);
  const auto solve_as = [&](auto zero) {
    using T = decltype(zero);
    const Problem<T> problem{const_data<T>(s), supervised, value, named->second, resolution};
    run<T>(problem, ends, number, data<T>(q), data<T>(weight), data<T>(stats), data<bool>(flags),
           data<double>(variance));
  };
  if (dtype == ScalarType::Float) {
    solve_as(0.0f);
  } else {
    check_runtime(dtype == ScalarType::Double, "gibbs_variance: expected float32 or float64, got ",
                  dtype);
    solve_as(0.0);
  }
  return {q, weight, stats, flags, variance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("gibbs_variance", TORCH_BOX(&gibbs_variance));
}

}  // namespace vcore
