// The linear-head operators on a CPU: nll = -log softmax(transform(hidden weight^T + bias))[target]
// per token, its gradients, its tangent and its finite difference, without ever storing the N x V
// logits.
//
// Tokens are taken in chunks, the vocabulary in tiles of kTile rows of the weight; threads own
// ranges of tiles. A chunk needs one sweep over the tiles for the softmax statistics (one matrix
// product) and one for the gradients (one product each for d_hidden and d_weight). With the weights
// known beforehand the first sweep keeps the exponentials exp(z - max) of the chunk, rounded like
// the logit gradients that are made of them, so the second needs no further product: 2 products
// with a frozen head, 3 with a trained one. Otherwise the second sweep forms the logits again.
//
// The target's logit is taken out of the tile before the exponentials are summed. With a =
// logsumexp of the others minus the target's logit, nll = log(1 + exp(a)) and p_target - 1 =
// expm1(-nll) keep their relative accuracy when the target's probability nears 1, where logsumexp -
// logit would cancel.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "head_kernels.h"
#include "tensor.h"

namespace vcore {

bool set_bf16_engine(const std::string& engine);

namespace {

constexpr int64_t kTile = 256;
// What a chunk may keep of its exponentials, and what its per-thread sums of d_hidden may take.
constexpr int64_t kChunkBytes = int64_t{64} << 20;
constexpr int64_t kMaxChunkRows = 512;

template <typename T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  return ScalarType::Double;
}

// A new tensor whose pages are 2 MiB where the system lends them: first touches cost less. Measured
// in products of 1024 x 1024 x 65536, bf16: frozen head 1.94 -> 1.75, trained 3.20 -> 3.06.
Tensor empty_huge(IntArrayRef sizes, ScalarType dtype) {
  Tensor t = empty(sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t page = 4096, huge = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t from = (begin + page - 1) / page * page, to = (begin + nbytes(t)) / page * page;
  // A hint: where it is refused, everything still works.
  if (to > from + 2 * huge) (void)madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#endif
  return t;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// fn(thread, begin, end) over contiguous ranges that depend on the number of threads alone.
template <typename F>
void for_each_thread(int64_t threads, int64_t items, const F& fn) {
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) fn(t, items * t / threads, items * (t + 1) / threads);
  });
}

// A matrix [rows, K] read tile by tile as row-major T with K padded to a group: in place where its
// dtype and K allow, otherwise through a converted copy of the tile.
template <typename T>
class TiledMatrix {
 public:
  TiledMatrix() = default;
  explicit TiledMatrix(const Tensor& m)
      : matrix_(as_contiguous(m)),
        padded_(round_up(m.size(1), kGroup<T>)),
        direct_(m.scalar_type() == scalar_type<T>() && padded_ == m.size(1)) {}
  // m - minus, the difference taken in the accumulator's dtype and rounded once.
  TiledMatrix(const Tensor& m, const Tensor& minus) : TiledMatrix(m) {
    minus_ = as_contiguous(minus);
    direct_ = false;
  }

  bool defined() const { return matrix_.defined(); }
  int64_t stride() const { return padded_; }

  // Rows [begin, begin + count). `scratch` belongs to the calling thread and is made on first use.
  const T* rows(int64_t begin, int64_t count, Tensor& scratch) const {
    if (direct_) return data<T>(matrix_) + begin * padded_;
    if (!scratch.defined()) scratch = zeros({kTile, padded_}, scalar_type<T>());
    Tensor tile = rows_of(matrix_, begin, count);
    if (minus_.defined()) {
      using A = Acc<T>;
      const Tensor difference = empty(tile.sizes(), scalar_type<A>());
      const Tensor minus = as_contiguous(rows_of(minus_, begin, count), scalar_type<A>());
      copy(difference, tile);
      A* to = data<A>(difference);
      const A* less = const_data<A>(minus);
      for (int64_t i = 0, size = count * tile.size(1); i < size; ++i) to[i] -= less[i];
      tile = difference;
    }
    copy(view(data<T>(scratch), tile.sizes(), {padded_, 1}, scalar_type<T>()), tile);
    return data<T>(scratch);
  }

 private:
  static Tensor rows_of(const Tensor& m, int64_t begin, int64_t count) {
    const char* from = const_data<char>(m) + begin * m.size(1) * itemsize(m);
    return view(from, {count, m.size(1)}, m.scalar_type());
  }

  Tensor matrix_, minus_;
  int64_t padded_ = 0;
  bool direct_ = false;
};

struct Options {
  double scale;
  double softcap;
  int64_t ignore_index;
};

// Columns of the tile at the perturbed or tangent point, next to those at the base point.
enum class Second { none, jvp, pair };

template <typename T>
class Head {
 public:
  using A = Acc<T>;

  Head(const Tensor& hidden, const Tensor& weight, const Tensor& target, const OptionalTensor& bias,
       Options options)
      : hidden_(detach(hidden)),
        target_(as_contiguous(target)),
        options_(options),
        transform_{A(options.scale), A(options.softcap)},
        weight_(weight),
        vocabulary_(weight.size(0)),
        width_(weight.size(1)),
        tiles_((vocabulary_ + kTile - 1) / kTile),
        threads_(std::max<int64_t>(1, std::min<int64_t>(num_threads(), tiles_))),
        panel_(kernels_.panel),
        padded_width_(round_up(width_, kGroup<T>)) {
    if (bias) bias_ = as_contiguous(*bias, accumulator_type());
    const int64_t n = hidden.size(0);
    nll_ = zeros({n}, accumulator_type());
    lse_ = zeros({2, n}, ScalarType::Double);
  }

  static constexpr ScalarType accumulator_type() { return scalar_type<A>(); }

  using Rows = std::vector<int64_t>;

  // Tokens with a target; those whose `weights` are not 0 come first and are never in one chunk
  // with others. No weights: all alike.
  std::vector<Rows> chunks(int64_t max_rows, const double* weights) const {
    Rows marked, rest;
    for (int64_t n = 0, size = tokens(); n < size; ++n) {
      if (!has_target(n)) continue;
      (weights && weights[n] == 0 ? rest : marked).push_back(n);
    }
    std::vector<Rows> out;
    for (const auto& rows : {marked, rest}) split(rows, max_rows, out);
    return out;
  }

  // Tokens with a target among [begin, end), in their order.
  std::vector<Rows> chunks_of(int64_t begin, int64_t end, int64_t max_rows) const {
    Rows rows;
    for (int64_t n = begin; n < end; ++n) {
      if (has_target(n)) rows.push_back(n);
    }
    std::vector<Rows> out;
    split(rows, max_rows, out);
    return out;
  }

  int64_t max_rows(bool keeps, bool grad_hidden) const {
    int64_t rows = kMaxChunkRows;
    if (keeps) rows = std::min<int64_t>(rows, kChunkBytes / (vocabulary_ * int64_t(sizeof(T))));
    if (grad_hidden) {
      rows = std::min<int64_t>(rows, kChunkBytes / (threads_ * (width_ + 1) * int64_t(sizeof(A))));
    }
    return std::max(panel_, rows / panel_ * panel_);
  }

  struct Chunk {
    std::vector<int64_t> rows;            // token of each column
    int64_t padded;                       // columns, padded to a panel
    Tensor index;                         // rows as int64
    Tensor panels;                        // hidden^T packed; [second block behind it]
    Tensor extra;                         // packed right operand of the weight's tangent, if any
    Tensor kept;                          // exponentials [V, padded], if kept
    Tensor max, sum, moment, max2, sum2;  // [tiles, padded]
    std::vector<int64_t> tile_begin, tile_columns;  // columns whose target lies in each tile
    std::vector<double> at_target, d_at_target;
    int64_t count() const { return rows.size(); }
  };

  // Rows of x in T, padded with zeros to `padded` rows and the padded width.
  Tensor gather(const Tensor& x, const Chunk& chunk) const {
    const Tensor out = zeros({chunk.padded, padded_width_}, scalar_type<T>());
    copy(view(data<T>(out), {chunk.count(), width_}, {padded_width_, 1}, scalar_type<T>()),
         call("aten::index_select", "", x, int64_t{0}, chunk.index));
    return out;
  }

  Chunk begin_chunk(std::vector<int64_t> rows, const Tensor& second = {}) const {
    Chunk c;
    c.rows = std::move(rows);
    c.padded = round_up(c.count(), panel_);
    c.index = empty({c.count()}, ScalarType::Long);
    std::copy(c.rows.begin(), c.rows.end(), data<int64_t>(c.index));
    const int64_t blocks = second.defined() ? 2 : 1, block = c.padded * padded_width_;
    c.panels = empty({blocks, block}, scalar_type<T>());
    pack_transposed(gather(hidden_, c), c, data<T>(c.panels));
    if (second.defined()) pack_transposed(gather(second, c), c, data<T>(c.panels) + block);
    // Columns by the tile of their target.
    const int64_t* target = const_data<int64_t>(target_);
    c.tile_begin.assign(tiles_ + 1, 0);
    for (int64_t n : c.rows) ++c.tile_begin[target[n] / kTile + 1];
    for (int64_t t = 0; t < tiles_; ++t) c.tile_begin[t + 1] += c.tile_begin[t];
    std::vector<int64_t> next(c.tile_begin.begin(), c.tile_begin.end() - 1);
    c.tile_columns.resize(c.count());
    for (int64_t j = 0; j < c.count(); ++j) c.tile_columns[next[target[c.rows[j]] / kTile]++] = j;
    c.at_target.assign(c.count(), 0);
    c.d_at_target.assign(c.count(), 0);
    return c;
  }

  // Sweep 1: softmax statistics of every tile, one product (two with a second block, three with a
  // weight tangent).
  template <Second kSecond>
  void sweep_statistics(Chunk& c, bool keep, const TiledMatrix<T>& second_weight = {},
                        const Tensor& second_bias = {}) {
    for (Tensor* t : {&c.max, &c.sum}) *t = empty({tiles_, c.padded}, accumulator_type());
    if (kSecond != Second::none) c.moment = empty({tiles_, c.padded}, accumulator_type());
    if (kSecond == Second::pair) {
      for (Tensor* t : {&c.max2, &c.sum2}) *t = empty({tiles_, c.padded}, accumulator_type());
    }
    if (keep) {  // in the buffer of the chunk before, whose pages are already there
      const int64_t size = vocabulary_ * c.padded;
      if (!kept_.defined() || kept_.numel() < size) kept_ = empty_huge({size}, scalar_type<T>());
      c.kept = view(data<T>(kept_), {vocabulary_, c.padded}, scalar_type<T>());
    }
    const int64_t blocks = kSecond == Second::none ? 1 : 2;
    const int64_t ld = blocks * c.padded;
    const Tensor logits = empty({threads_, kTile, ld}, accumulator_type());
    const int64_t* target = const_data<int64_t>(target_);

    for_each_thread(threads_, tiles_, [&](int64_t thread, int64_t begin, int64_t end) {
      Tensor scratch, second_scratch;
      A* z = data<A>(logits) + thread * kTile * ld;
      A* dz = kSecond == Second::none ? nullptr : z + c.padded;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t v = tile * kTile, count = std::min(kTile, vocabulary_ - v);
        const T* w = weight_.rows(v, count, scratch);
        kernels_.gemm(count, ld, padded_width_, w, weight_.stride(), data<T>(c.panels), z, ld,
                      false);
        if (second_weight.defined()) {
          const T* dw = second_weight.rows(v, count, second_scratch);
          const Tensor& right = c.extra.defined() ? c.extra : c.panels;
          kernels_.gemm(count, c.padded, padded_width_, dw, second_weight.stride(), data<T>(right),
                        dz, ld, true);
        }
        transform_tile<kSecond>(v, count, c.padded, ld, second_bias, z, dz);
        for (int64_t i = c.tile_begin[tile]; i < c.tile_begin[tile + 1]; ++i) {
          const int64_t j = c.tile_columns[i];
          const int64_t at = (target[c.rows[j]] - v) * ld + j;
          c.at_target[j] = z[at];
          if (dz) c.d_at_target[j] = dz[at];
          z[at] = -std::numeric_limits<A>::infinity();
        }
        const auto row = [&](const Tensor& t) {
          return t.defined() ? data<A>(t) + tile * c.padded : nullptr;
        };
        const TileStats<A> out{row(c.max), row(c.sum), row(c.moment), row(c.max2), row(c.sum2)};
        if (kSecond == Second::jvp) {
          kernels_.stats_jvp(count, c.padded, ld, z, dz, out);
        } else if (kSecond == Second::pair) {
          kernels_.stats_pair(count, c.padded, ld, z, dz, out);
        } else if (keep) {
          kernels_.stats_keep(count, c.padded, ld, transform_.softcap, z, out,
                              data<T>(c.kept) + v * c.padded);
        } else {
          kernels_.stats(count, c.padded, ld, z, out);
        }
      }
    });
  }

  struct LogSum {
    double top;      // the largest logit
    double log_sum;  // log of the sum of exp(z_v - top)
    double mean;     // softmax mean of the moment's terms
    double value() const { return top + log_sum; }
  };

  // Column j over all tiles, in their order.
  LogSum combine_tiles(const Chunk& c, const Tensor& max, const Tensor& sum, const Tensor& moment,
                       int64_t j) const {
    const A *m = data<A>(max) + j, *s = data<A>(sum) + j;
    const A* d = moment.defined() ? data<A>(moment) + j : nullptr;
    constexpr A infinity = std::numeric_limits<A>::infinity();
    A top = -infinity;
    for (int64_t t = 0; t < tiles_; ++t) top = std::max(top, m[t * c.padded]);
    if (top == -infinity) return {-infinity, -infinity, 0};  // no other class, or all masked
    double total = 0, first = 0;
    for (int64_t t = 0; t < tiles_; ++t) {
      const double share = std::exp(m[t * c.padded] - top);
      total += share * s[t * c.padded];
      if (d) first += share == 0 ? 0 : share * d[t * c.padded];
    }
    return {double(top), std::log(total), total == 0 ? 0 : first / total};
  }

  // Combines the tiles in their order. `second`, per token: the tangent, or base minus perturbed
  // loss.
  template <Second kSecond>
  void combine(const Chunk& c, const Tensor& second) {
    A* nll = data<A>(nll_);
    double *top = data<double>(lse_), *rest = top + tokens();
    parallel_for(0, c.count(), 16, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t n = c.rows[j];
        const LogSum others = combine_tiles(c, c.max, c.sum, c.moment, j);
        const double z = c.at_target[j], gap = others.value() - z, loss = softplus(gap);
        nll[n] = A(loss);
        // The largest logit and what the log-sum-exp adds to it.
        const bool target_leads = z >= others.top;
        top[n] = target_leads ? z : others.top;
        rest[n] = target_leads ? loss : others.log_sum + softplus(-gap);
        if (kSecond == Second::none) continue;
        const double one_minus_p = -std::expm1(-loss), dz = c.d_at_target[j];
        double value;
        if (kSecond == Second::jvp) {
          value = one_minus_p == 0 ? 0 : one_minus_p * (others.mean - dz);
        } else {
          // The gap changes by log(mean of exp(dz_v) over the others) - dz_target.
          const double change = std::log1p(others.mean) - dz;
          if (others.mean > -0.5 && std::abs(change) < 1) {
            value = -std::log1p(one_minus_p * std::expm1(change));
          } else {
            const LogSum perturbed = combine_tiles(c, c.max2, c.sum2, {}, j);
            value = loss - softplus(perturbed.value() - (z + dz));
          }
        }
        data<A>(second)[n] = A(value);
      }
    });
  }

  // Where sweep 2 puts its results. Undefined tensors are not wanted.
  struct Gradients {
    Tensor hidden;  // [N, H], any dtype
    Tensor weight;  // [V, H], accumulator dtype
    Tensor bias;    // [V], accumulator dtype
  };

  Gradients new_gradients(bool hidden, bool weight, bool bias) const {
    Gradients g;
    if (hidden) g.hidden = zeros(hidden_.sizes(), hidden_.scalar_type());
    if (weight) g.weight = empty_huge({vocabulary_, width_}, accumulator_type());
    if (bias) g.bias = zeros({vocabulary_}, accumulator_type());
    return g;
  }

  // What the logit gradients take of each token.
  struct Factors {
    std::vector<A> top, scaled, at_target;
  };

  Factors gradient_factors(const Chunk& c, const double* factor) const {
    Factors f{std::vector<A>(c.padded, A(0)), std::vector<A>(c.padded, A(0)),
              std::vector<A>(c.count())};
    const double *top_of = data<double>(lse_), *rest_of = top_of + tokens();
    for (int64_t j = 0; j < c.count(); ++j) {
      const int64_t n = c.rows[j];
      const double nll = data<A>(nll_)[n], w = (factor ? factor[n] : 1.0) * options_.scale;
      f.top[j] = A(top_of[n]);
      f.scaled[j] = A(w * std::exp(-rest_of[n]));
      const double logit = top_of[n] + (rest_of[n] - nll);
      const double y = options_.softcap == 0 ? 0 : logit / options_.softcap;
      f.at_target[j] = A(w * std::expm1(-nll) * (1 - y * y));
    }
    return f;
  }

  // g [rows of the tile, padded]: the logit gradients, from what is kept or from the logits again,
  // for which w is the tile of the weight. `tile_factor` [padded] belongs to the calling thread.
  void gradient_tile(const Chunk& c, const Factors& f, int64_t tile, const T* w,
                     std::vector<A>& tile_factor, A* g) const {
    const int64_t v = tile * kTile, count = std::min(kTile, vocabulary_ - v);
    if (c.kept.defined()) {
      const A* max = data<A>(c.max) + tile * c.padded;
      for (int64_t j = 0; j < c.count(); ++j) {
        tile_factor[j] = f.scaled[j] * std::exp(max[j] - f.top[j]);
      }
      kernels_.grad_from_kept(count, c.padded, data<T>(c.kept) + v * c.padded, tile_factor.data(),
                              g, c.padded);
    } else {
      kernels_.gemm(count, c.padded, padded_width_, w, weight_.stride(), data<T>(c.panels), g,
                    c.padded, false);
      transform_tile<Second::none>(v, count, c.padded, c.padded, {}, g, nullptr);
      kernels_.grad_from_logits(count, c.padded, c.padded, transform_.softcap, f.top.data(),
                                f.scaled.data(), g);
    }
    const int64_t* target = const_data<int64_t>(target_);
    for (int64_t i = c.tile_begin[tile]; i < c.tile_begin[tile + 1]; ++i) {
      const int64_t j = c.tile_columns[i];
      g[(target[c.rows[j]] - v) * c.padded + j] = f.at_target[j];
    }
  }

  // Sweep 2: the logit gradients factor_n * d nll_n / d z and their products. `factor` [N] in
  // double.
  void sweep_gradients(const Chunk& c, const double* factor, Gradients& out,
                       bool& weight_started) const {
    const bool by_token = out.hidden.defined(), by_vocab = out.weight.defined();
    const int64_t group_rows = round_up(c.count(), kGroup<T>);
    const int64_t out_width = round_up(width_, panel_);
    Tensor token_major, vocab_major, weight_panels, hidden_panels, partial;
    if (by_token) {
      token_major = empty({threads_, c.count(), kTile}, scalar_type<T>());
      weight_panels = empty({threads_, kTile * out_width}, scalar_type<T>());
      partial = empty({threads_, c.count(), out_width}, accumulator_type());
    }
    if (by_vocab) {
      vocab_major = empty({threads_, kTile, group_rows}, scalar_type<T>());
      hidden_panels = pack_hidden(c);
    }
    const Tensor tile_gradients = empty({threads_, kTile, c.padded}, accumulator_type());

    const Factors factors = gradient_factors(c, factor);

    for_each_thread(threads_, tiles_, [&](int64_t thread, int64_t begin, int64_t end) {
      Tensor scratch;
      std::vector<A> tile_factor(c.padded, A(0));
      A* g = data<A>(tile_gradients) + thread * kTile * c.padded;
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t v = tile * kTile, count = std::min(kTile, vocabulary_ - v);
        const bool needs_weight = by_token || !c.kept.defined();
        const T* w = needs_weight ? weight_.rows(v, count, scratch) : nullptr;
        gradient_tile(c, factors, tile, w, tile_factor, g);
        T* tokens = by_token ? data<T>(token_major) + thread * c.count() * kTile : nullptr;
        T* vocab = by_vocab ? data<T>(vocab_major) + thread * kTile * group_rows : nullptr;
        A* bias_sum = out.bias.defined() ? data<A>(out.bias) + v : nullptr;
        kernels_.emit(count, c.count(), c.padded, g, tokens, kTile, vocab, group_rows, bias_sum);
        if (by_token) {
          T* panels = data<T>(weight_panels) + thread * kTile * out_width;
          kernels_.pack(count, width_, w, weight_.stride(), panels);
          kernels_.gemm(c.count(), out_width, round_up(count, kGroup<T>), tokens, kTile, panels,
                        data<A>(partial) + thread * c.count() * out_width, out_width, tile > begin);
        }
        if (by_vocab) {
          kernels_.gemm(count, width_, group_rows, vocab, group_rows, data<T>(hidden_panels),
                        data<A>(out.weight) + v * width_, width_, weight_started);
        }
      }
    });
    weight_started = true;
    if (by_token) {
      constexpr std::array<int64_t, 1> kFirst{0};
      const Tensor sum =
          call("aten::sum", "dim_IntList", partial, std::optional<IntArrayRef>(kFirst), false,
               std::optional<ScalarType>());
      const Tensor rows =
          view(data<A>(sum), {c.count(), width_}, {out_width, 1}, accumulator_type());
      call("aten::index_copy_", "", out.hidden, int64_t{0}, c.index,
           as_contiguous(rows, out.hidden.scalar_type()));
    }
  }

  // The square of the norm of the weight's gradient by the tokens of [begin, end): tile by tile,
  // each the sum over all chunks of these tokens, so that no more of the gradient ever exists.
  double weight_gradient_square(int64_t begin_token, int64_t end_token) {
    auto parts = chunks_of(begin_token, end_token, kMaxChunkRows);
    if (parts.empty() || width_ == 0) return 0;
    const bool keep = parts.size() == 1 && int64_t(parts[0].size()) <= max_rows(true, false);
    std::vector<Chunk> chunks;
    std::vector<Factors> factors;
    std::vector<Tensor> hidden_panels;
    for (auto& rows : parts) {
      Chunk& c = chunks.emplace_back(begin_chunk(std::move(rows)));
      sweep_statistics<Second::none>(c, keep);
      combine<Second::none>(c, {});
      factors.push_back(gradient_factors(c, nullptr));
      hidden_panels.push_back(pack_hidden(c));
    }
    int64_t columns = 0;  // chunks but for the last are of one size
    for (const Chunk& c : chunks) columns = std::max(columns, c.padded);
    const Tensor gradients = empty({threads_, kTile, columns}, accumulator_type());
    const Tensor products = empty({threads_, kTile, width_}, accumulator_type());
    const Tensor vocab_major =
        empty({threads_, kTile, round_up(columns, kGroup<T>)}, scalar_type<T>());
    std::vector<double> squares(tiles_, 0);

    for_each_thread(threads_, tiles_, [&](int64_t thread, int64_t begin, int64_t end) {
      Tensor scratch;
      std::vector<A> tile_factor(columns, A(0));
      A* g = data<A>(gradients) + thread * kTile * columns;
      A* product = data<A>(products) + thread * kTile * width_;
      T* vocab = data<T>(vocab_major) + thread * kTile * round_up(columns, kGroup<T>);
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t v = tile * kTile, count = std::min(kTile, vocabulary_ - v);
        const T* w = keep ? nullptr : weight_.rows(v, count, scratch);
        for (size_t i = 0; i < chunks.size(); ++i) {
          const Chunk& c = chunks[i];
          const int64_t rows = round_up(c.count(), kGroup<T>);
          gradient_tile(c, factors[i], tile, w, tile_factor, g);
          kernels_.emit(count, c.count(), c.padded, g, nullptr, 0, vocab, rows, nullptr);
          kernels_.gemm(count, width_, rows, vocab, rows, data<T>(hidden_panels[i]), product,
                        width_, i > 0);
        }
        for (int64_t row = 0; row < count; ++row) {
          const A* p = product + row * width_;
          A square = 0;
#pragma omp simd reduction(+ : square)
          for (int64_t k = 0; k < width_; ++k) square += p[k] * p[k];
          squares[tile] += square;
        }
      }
    });
    double total = 0;
    for (double square : squares) total += square;
    return total;
  }

  // What a recomputing backward needs of the forward pass.
  void restore(const Tensor& nll, const Tensor& lse) {
    nll_ = as_contiguous(nll, accumulator_type());
    lse_ = as_contiguous(lse, ScalarType::Double);
  }

  // The chunk's rows of hidden as a right operand.
  Tensor pack_hidden(const Chunk& c) const {
    const int64_t rows = round_up(c.count(), kGroup<T>);
    Tensor panels = empty({rows * round_up(width_, panel_)}, scalar_type<T>());
    kernels_.pack(c.count(), width_, data<T>(gather(hidden_, c)), padded_width_, data<T>(panels));
    return panels;
  }

  void pack_extra(Chunk& c, const Tensor& x) const {
    c.extra = empty({c.padded * padded_width_}, scalar_type<T>());
    pack_transposed(gather(x, c), c, data<T>(c.extra));
  }

  const Tensor& nll() const { return nll_; }
  Tensor lse() const { return as_contiguous(lse_, accumulator_type()); }
  int64_t tokens() const { return target_.numel(); }

 private:
  bool has_target(int64_t n) const {
    const int64_t target = const_data<int64_t>(target_)[n];
    if (target == options_.ignore_index) return false;
    check_index(target >= 0 && target < vocabulary_, "linear_nll: target ", target, " at row ", n,
                " is outside the vocabulary of ", vocabulary_);
    return true;
  }

  void split(const Rows& rows, int64_t max_rows, std::vector<Rows>& out) const {
    const int64_t n = rows.size();
    if (n == 0) return;
    const int64_t parts = (n + max_rows - 1) / max_rows;
    const int64_t size = std::min(max_rows, round_up((n + parts - 1) / parts, panel_));
    for (int64_t i = 0; i < n; i += size) {
      out.emplace_back(rows.begin() + i, rows.begin() + std::min(n, i + size));
    }
  }

  template <Second kSecond>
  void transform_tile(int64_t v, int64_t count, int64_t cols, int64_t ld, const Tensor& second_bias,
                      A* z, A* dz) const {
    const bool any_bias = bias_.defined() || second_bias.defined();
    if (transform_.identity(any_bias)) return;
    const A* bias = bias_.defined() ? data<A>(bias_) + v : nullptr;
    const A* second = second_bias.defined() ? data<A>(second_bias) + v : nullptr;
    if (kSecond == Second::none) kernels_.transform(count, cols, ld, transform_, bias, z);
    if (kSecond == Second::jvp)
      kernels_.transform_jvp(count, cols, ld, transform_, bias, second, z, dz);
    if (kSecond == Second::pair)
      kernels_.transform_pair(count, cols, ld, transform_, bias, second, z, dz);
  }

  void pack_transposed(const Tensor& x, const Chunk& c, T* out) const {
    kernels_.pack_transposed(c.padded, padded_width_, data<T>(x), padded_width_, out);
  }

  static double softplus(double a) {
    return a > 0 ? a + std::log1p(std::exp(-a)) : std::log1p(std::exp(a));
  }

  const HeadKernels<T>& kernels_ = *head_kernels<T>();
  Tensor hidden_, target_, bias_;
  Options options_;
  LogitTransform<A> transform_;
  TiledMatrix<T> weight_;
  int64_t vocabulary_, width_, tiles_, threads_, panel_, padded_width_;
  Tensor nll_, kept_;
  Tensor lse_;  // [2, N]: the largest logit, and what the log-sum-exp adds to it
};

// Calls fn with a value of the type that the matrix products of `hidden` read.
template <typename F>
auto with_product_type(const Tensor& hidden, const F& fn) {
  switch (hidden.scalar_type()) {
    case ScalarType::Double:
      return fn(double{});
    case ScalarType::BFloat16:
      if (head_kernels<bf16>()) return fn(bf16{});
      break;
    default:
      check_value(
          hidden.scalar_type() == ScalarType::Float || hidden.scalar_type() == ScalarType::Half,
          "linear_nll: no CPU kernel for ", hidden.scalar_type());
  }
  return fn(float{});
}

// The Python layer explains shape errors; this guards the raw operator.
void check(const Tensor& hidden, const Tensor& weight, const Tensor& target,
           const OptionalTensor& bias) {
  check_value(hidden.dim() == 2 && weight.dim() == 2 && target.dim() == 1 &&
                  hidden.size(1) == weight.size(1) && hidden.size(0) == target.size(0) &&
                  weight.size(0) > 0 && (!bias || same(bias->sizes(), weight.sizes().slice(0, 1))),
              "linear_nll: expected hidden [N, H], weight [V, H], target [N], bias [V]; got ",
              hidden.sizes(), ", ", weight.sizes(), ", ", target.sizes());
  check_value(target.scalar_type() == ScalarType::Long, "linear_nll: target must be int64");
}

void check_beside(const char* name, const OptionalTensor& t, IntArrayRef sizes) {
  check_value(!t || same(t->sizes(), sizes), "linear_nll: ", name, " is ",
              t ? t->sizes() : IntArrayRef{}, ", expected ", sizes);
}

void check_second(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
                  const Tensor& second_hidden, const OptionalTensor& second_weight,
                  const OptionalTensor& second_bias) {
  check_beside("the second hidden", second_hidden, hidden.sizes());
  check_beside("the second weight", second_weight, weight.sizes());
  check_value(bias || !second_bias, "linear_nll: a second bias without a first");
  if (bias) check_beside("the second bias", second_bias, bias->sizes());
}

using Triple = std::tuple<Tensor, Tensor, Tensor>;

// d_hidden rows come in the dtype of hidden, except that float16 keeps float32: unweighted rows may
// underflow.
Triple linear_nll_forward(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                          const OptionalTensor& bias, double softcap, double scale,
                          int64_t ignore_index, bool keep_rows) {
  check(hidden, weight, target, bias);
  return with_product_type(hidden, [&](auto tag) -> Triple {
    using T = decltype(tag);
    const Tensor input = keep_rows && hidden.scalar_type() == ScalarType::Half
                             ? as_contiguous(hidden, ScalarType::Float)
                             : hidden;
    Head<T> head(input, weight, target, bias, {scale, softcap, ignore_index});
    auto gradients = head.new_gradients(keep_rows, false, false);
    const std::vector<double> ones(keep_rows ? head.tokens() : 0, 1.0);
    bool started = false;
    for (auto& rows : head.chunks(head.max_rows(keep_rows, keep_rows), nullptr)) {
      auto chunk = head.begin_chunk(std::move(rows));
      head.template sweep_statistics<Second::none>(chunk, keep_rows);
      head.template combine<Second::none>(chunk, {});
      if (keep_rows) head.sweep_gradients(chunk, ones.data(), gradients, started);
    }
    return {head.nll(), head.lse(),
            keep_rows ? gradients.hidden : empty({0}, hidden.scalar_type())};
  });
}

// An unwanted gradient is an empty tensor; no chunk at all leaves d_weight unwritten.
template <typename G>
void finish(G& g, const Tensor& hidden, ScalarType accumulator, bool weight_started) {
  if (g.weight.defined() && !weight_started) zero(g.weight);
  if (!g.hidden.defined()) g.hidden = empty({0}, hidden.scalar_type());
  if (!g.weight.defined()) g.weight = empty({0}, accumulator);
  if (!g.bias.defined()) g.bias = empty({0}, accumulator);
}

Triple linear_nll_backward(const Tensor& grad_nll, const Tensor& hidden, const Tensor& weight,
                           const Tensor& target, const OptionalTensor& bias, const Tensor& nll,
                           const Tensor& lse, double softcap, double scale, int64_t ignore_index,
                           bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, target, bias);
  check_beside("grad_nll", grad_nll, target.sizes());
  check_beside("nll", nll, target.sizes());
  check_beside("lse", lse, {2, target.numel()});
  return with_product_type(hidden, [&](auto tag) -> Triple {
    using T = decltype(tag);
    const Tensor factor = as_contiguous(grad_nll, ScalarType::Double);
    const double* factors = const_data<double>(factor);
    const Tensor live = empty(target.sizes(), ScalarType::Long);
    copy(live, detach(target));
    // A row without weight has no gradient.
    for (int64_t n = 0, size = target.numel(); n < size; ++n) {
      if (factors[n] == 0) data<int64_t>(live)[n] = ignore_index;
    }
    Head<T> head(hidden, weight, live, bias, {scale, softcap, ignore_index});
    head.restore(nll, lse);
    auto g = head.new_gradients(need_hidden, need_weight, need_bias && bias);
    bool started = false;
    for (auto& rows : head.chunks(head.max_rows(false, need_hidden), nullptr)) {
      auto chunk = head.begin_chunk(std::move(rows));
      head.sweep_gradients(chunk, factors, g, started);
    }
    finish(g, hidden, head.accumulator_type(), started);
    Tensor d_weight = g.weight;
    if (d_weight.scalar_type() != weight.scalar_type()) {
      d_weight = empty_huge(g.weight.sizes(), weight.scalar_type());
      copy(d_weight, g.weight);
    }
    return {g.hidden, d_weight, bias ? as_contiguous(g.bias, bias->scalar_type()) : g.bias};
  });
}

// d_hidden in the dtype of hidden (float32 for float16, where token weights could underflow before
// a loss scale arrives), d_weight and d_bias in the accumulator's: scale_cast rounds them once,
// with the upstream gradient.
std::tuple<Tensor, Tensor, Tensor, Tensor> weighted_linear_nll_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target, const Tensor& token_weight,
    const OptionalTensor& bias, double softcap, double scale, int64_t ignore_index,
    bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, target, bias);
  check_beside("token_weight", token_weight, target.sizes());
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  return with_product_type(hidden, [&](auto tag) -> Result {
    using T = decltype(tag);
    const Tensor input = hidden.scalar_type() == ScalarType::Half
                             ? as_contiguous(hidden, ScalarType::Float)
                             : hidden;
    Head<T> head(input, weight, target, bias, {scale, softcap, ignore_index});
    auto g = head.new_gradients(need_hidden, need_weight, need_bias && bias);
    const bool any = need_hidden || need_weight || need_bias;
    const Tensor factor = as_contiguous(token_weight, ScalarType::Double);
    const double* weights = const_data<double>(factor);
    bool started = false;
    for (auto& rows : head.chunks(head.max_rows(any, need_hidden), weights)) {
      const bool keep = any && weights[rows.front()] != 0;
      auto chunk = head.begin_chunk(std::move(rows));
      head.template sweep_statistics<Second::none>(chunk, keep);
      head.template combine<Second::none>(chunk, {});
      if (keep) head.sweep_gradients(chunk, weights, g, started);
    }
    finish(g, input, head.accumulator_type(), started);
    return {head.nll(), g.hidden, g.weight, g.bias};
  });
}

std::tuple<Tensor, Tensor> linear_nll_jvp(const Tensor& hidden, const Tensor& weight,
                                          const Tensor& target, const Tensor& hidden_tangent,
                                          const OptionalTensor& weight_tangent,
                                          const OptionalTensor& bias,
                                          const OptionalTensor& bias_tangent, double softcap,
                                          double scale, int64_t ignore_index) {
  check(hidden, weight, target, bias);
  check_second(hidden, weight, bias, hidden_tangent, weight_tangent, bias_tangent);
  return with_product_type(hidden, [&](auto tag) -> std::tuple<Tensor, Tensor> {
    using T = decltype(tag);
    Head<T> head(hidden, weight, target, bias, {scale, softcap, ignore_index});
    const TiledMatrix<T> d_weight =
        weight_tangent ? TiledMatrix<T>(*weight_tangent) : TiledMatrix<T>();
    const Tensor d_bias =
        bias_tangent ? as_contiguous(*bias_tangent, head.accumulator_type()) : Tensor();
    const Tensor tangent = zeros({hidden.size(0)}, head.accumulator_type());
    for (auto& rows : head.chunks(kMaxChunkRows, nullptr)) {
      auto chunk = head.begin_chunk(std::move(rows), detach(hidden_tangent));
      head.template sweep_statistics<Second::jvp>(chunk, false, d_weight, d_bias);
      head.template combine<Second::jvp>(chunk, tangent);
    }
    return {head.nll(), tangent};
  });
}

std::tuple<Tensor, Tensor> linear_nll_pair(const Tensor& hidden, const Tensor& weight,
                                           const Tensor& target, const Tensor& hidden_perturbed,
                                           const OptionalTensor& weight_perturbed,
                                           const OptionalTensor& bias,
                                           const OptionalTensor& bias_perturbed, double softcap,
                                           double scale, int64_t ignore_index) {
  check(hidden, weight, target, bias);
  check_second(hidden, weight, bias, hidden_perturbed, weight_perturbed, bias_perturbed);
  return with_product_type(hidden, [&](auto tag) -> std::tuple<Tensor, Tensor> {
    using T = decltype(tag);
    using A = Acc<T>;
    Head<T> head(hidden, weight, target, bias, {scale, softcap, ignore_index});
    // z' - z = (h' - h) w + h' (w' - w): the differences are taken between inputs, where they are
    // exact or rounded once, never between logits.
    const auto minus = [](const Tensor& a, const Tensor& b) {
      const Tensor x = as_contiguous(a, scalar_type<A>()), y = as_contiguous(b, scalar_type<A>());
      return torch::stable::subtract(detach(x), detach(y));
    };
    const Tensor d_hidden = minus(hidden_perturbed, hidden);
    TiledMatrix<T> d_weight;
    if (weight_perturbed) d_weight = TiledMatrix<T>(*weight_perturbed, weight);
    Tensor d_bias;
    if (bias_perturbed) {  // -inf, a masked class, less itself is no change
      const Tensor from = as_contiguous(*bias, scalar_type<A>());
      const Tensor to = as_contiguous(*bias_perturbed, scalar_type<A>());
      d_bias = empty(from.sizes(), scalar_type<A>());
      const A *a = const_data<A>(from), *b = const_data<A>(to);
      A* d = data<A>(d_bias);
      for (int64_t v = 0, size = from.numel(); v < size; ++v) {
        d[v] = a[v] == b[v] ? A(0) : b[v] - a[v];
      }
    }
    const Tensor difference = zeros({hidden.size(0)}, head.accumulator_type());
    for (auto& rows : head.chunks(kMaxChunkRows, nullptr)) {
      auto chunk = head.begin_chunk(std::move(rows), d_hidden);
      if (weight_perturbed) head.pack_extra(chunk, detach(hidden_perturbed));
      head.template sweep_statistics<Second::pair>(chunk, false, d_weight, d_bias);
      head.template combine<Second::pair>(chunk, difference);
    }
    return {head.nll(), difference};
  });
}

// [S], the norm of the weight's gradient over the tokens between each two of `offsets` [S + 1].
Tensor linear_nll_grad_norms(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                             const OptionalTensor& bias, const Tensor& offsets, int64_t /*length*/,
                             double softcap, double scale, int64_t ignore_index) {
  check(hidden, weight, target, bias);
  check_value(
      offsets.dim() == 1 && offsets.numel() > 0 && offsets.scalar_type() == ScalarType::Long,
      "linear_nll_grad_norms: expected int64 offsets [S + 1]");
  const Tensor bounds = as_contiguous(offsets);
  const int64_t* bound = const_data<int64_t>(bounds);
  const int64_t number = offsets.numel() - 1;
  for (int64_t s = 0; s < number; ++s) {
    check_value(0 <= bound[s] && bound[s] <= bound[s + 1] && bound[s + 1] <= target.numel(),
                "linear_nll_grad_norms: offsets ", bound[s], ", ", bound[s + 1], " do not cut ",
                target.numel(), " tokens");
  }
  return with_product_type(hidden, [&](auto tag) -> Tensor {
    using T = decltype(tag);
    Head<T> head(hidden, weight, target, bias, {scale, softcap, ignore_index});
    const Tensor norms = zeros({number}, head.accumulator_type());
    for (int64_t s = 0; s < number; ++s) {
      data<Acc<T>>(norms)[s] = std::sqrt(head.weight_gradient_square(bound[s], bound[s + 1]));
    }
    return norms;
  });
}

// x * factor as dtype, rounded once and without a temporary of x's size. factor is 0-dim, or one
// for each row of x [N, H]; then a row with factor 0 is 0, whatever it holds.
Tensor scale_cast(const Tensor& x, const Tensor& factor, ScalarType dtype) {
  const bool by_row = factor.dim() == 1;
  if (by_row) check_beside("factor", factor, x.sizes().slice(0, 1));
  check_value(by_row ? x.dim() == 2 : factor.dim() == 0, "scale_cast: factor must be 0-dim or [N]");
  Tensor out = empty_huge(x.sizes(), dtype);
  if (x.numel() == 0) return out;
  const Tensor from = as_contiguous(x), scale = as_contiguous(factor, ScalarType::Double);
  const int64_t rows = by_row ? x.size(0) : x.numel(), width = x.numel() / rows;
  const int64_t block = std::max<int64_t>(1, (1 << 15) / width);
  const auto part = [&](const Tensor& t, int64_t begin, int64_t size, int64_t cols) {
    const char* memory = const_data<char>(t) + begin * cols * itemsize(t);
    return view(memory, {size, cols}, t.scalar_type());
  };
  const double* scales = const_data<double>(scale);
  const Tensor by = by_row ? as_contiguous(factor) : detach(factor);
  parallel_for(0, (rows + block - 1) / block, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * block; i < std::min(rows, end * block); i += block) {
      const int64_t size = std::min(block, rows - i);
      const Tensor product = call("aten::mul", "Tensor", part(from, i, size, width),
                                  by_row ? part(by, i, size, 1) : by);
      for (int64_t row = 0; by_row && row < size; ++row) {
        if (scales[i + row] != 0) continue;
        char* const at = data<char>(product) + row * width * itemsize(product);
        std::fill(at, at + width * itemsize(product), 0);
      }
      copy(part(out, i, size, width), product);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("scale_cast", TORCH_BOX(&scale_cast));
  m.impl("linear_nll_forward", TORCH_BOX(&linear_nll_forward));
  m.impl("linear_nll_backward", TORCH_BOX(&linear_nll_backward));
  m.impl("weighted_linear_nll_forward", TORCH_BOX(&weighted_linear_nll_forward));
  m.impl("linear_nll_jvp", TORCH_BOX(&linear_nll_jvp));
  m.impl("linear_nll_pair", TORCH_BOX(&linear_nll_pair));
  m.impl("linear_nll_grad_norms", TORCH_BOX(&linear_nll_grad_norms));
}
STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CompositeExplicitAutograd, m) {
  m.impl("set_bf16_engine", TORCH_BOX(&set_bf16_engine));
}

}  // namespace vcore
