// Attention and its tangent on a CPU, in one sweep over the keys and without the T x T scores.
//
// With P = softmax(S) and dS = scale * (dQ K' + Q dK'): out = P V and
// dout = (P * (dS - mean)) V + P dV, mean = rowsum(P * dS). All sums run beside the usual maximum
// and normaliser. dS is taken relative to its running mean before it is rounded for the product
// (any constant may be taken from it): what is left is as small as the tangent of P itself.
//
// Threads take blocks of queries. Scores are transposed, keys by queries: K is the left operand as
// it lies in memory, [Q' | dQ'] the packed right one, and the probabilities are emitted as the
// packed right operand of [V'; dV'] P. Six products of queries x keys x D where attention alone has
// two.
#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "attention_kernels.h"
#include "isa.h"
#include "tensor.h"

namespace vcore {

template <>
const AttentionKernels<float>* attention_kernels<float>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512bf16) return &avx512bf16::attention_kernels_float;
  if (isa() == Isa::avx512) return &avx512::attention_kernels_float;
  if (isa() == Isa::avx2) return &avx2::attention_kernels_float;
#endif
  return &baseline::attention_kernels_float;
}
template <>
const AttentionKernels<double>* attention_kernels<double>() {
#if defined(__x86_64__)
  if (isa() == Isa::avx512bf16) return &avx512bf16::attention_kernels_double;
  if (isa() == Isa::avx512) return &avx512::attention_kernels_double;
  if (isa() == Isa::avx2) return &avx2::attention_kernels_double;
#endif
  return &baseline::attention_kernels_double;
}
template <>
const AttentionKernels<bf16>* attention_kernels<bf16>() {
#if defined(__x86_64__)
  return &avx512bf16::attention_kernels_bf16;
#else
  return nullptr;
#endif
}

namespace {

// A block of columns: 64 are no faster, and waste more on the diagonal.
constexpr int64_t kQueries = 32;
constexpr int64_t kKeys = 112;  // a tile of rows: eight register blocks of the products

template <typename T>
constexpr ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, bf16>) return ScalarType::BFloat16;
  if constexpr (std::is_same_v<T, float>) return ScalarType::Float;
  return ScalarType::Double;
}

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [B, heads, T, D] as rows of T whose width is padded to a group: in place where that is possible.
template <typename T>
class Rows {
 public:
  int64_t width = 0;

  Rows() = default;
  Rows(const OptionalTensor& x, bool contiguous) {
    if (!x) return;
    const int64_t given = x->size(3);
    width = round_up(given, kGroup<T>);
    if (width == given) {
      contiguous |= x->scalar_type() != scalar_type<T>() || x->stride(3) != 1;
      tensor_ = contiguous ? as_contiguous(*x, scalar_type<T>()) : *x;
    } else {
      tensor_ = zeros({x->size(0), x->size(1), x->size(2), width}, scalar_type<T>());
      copy(view(data<T>(*tensor_), x->sizes(), tensor_->strides(), scalar_type<T>()), detach(*x));
    }
    first_ = const_data<T>(*tensor_);
    for (int64_t d = 0; d < 3; ++d) strides_[d] = tensor_->stride(d);
  }
  bool defined() const { return tensor_.has_value(); }
  int64_t stride() const { return strides_[2]; }
  const T* row(int64_t batch, int64_t head, int64_t t) const {
    return first_ + batch * strides_[0] + head * strides_[1] + t * strides_[2];
  }

 private:
  OptionalTensor tensor_;
  const T* first_ = nullptr;
  int64_t strides_[3] = {};
};

struct Options {
  double scale, softcap;  // softcap 0: none
  int64_t window;         // 0: none
  bool causal;
};

// Which queries see a key: the range [from, to).
class Visible {
 public:
  Visible(const OptionalTensor& key_mask, const OptionalTensor& cu_seqlens, int64_t batch,
          int64_t length, Options options)
      : length_(length), options_(options) {
    if (key_mask) {
      mask_tensor_ = as_contiguous(*key_mask, ScalarType::Bool);
      mask_ = const_data<bool>(*mask_tensor_);
      for (int64_t b = 0; b < batch; ++b) {
        const bool* row = mask_ + b * length;
        const bool* first = std::find(row, row + length, true);
        int64_t end = length;
        while (end > 0 && !row[end - 1]) --end;
        first_.push_back(first - row);
        end_.push_back(end);
      }
    }
    if (cu_seqlens) {
      const Tensor offsets = as_contiguous(*cu_seqlens, ScalarType::Long);
      const int64_t* at = const_data<int64_t>(offsets);
      for (int64_t s = 0; s + 1 < offsets.numel(); ++s) {
        segment_begin_.insert(segment_begin_.end(), at[s + 1] - at[s], at[s]);
        segment_end_.insert(segment_end_.end(), at[s + 1] - at[s], at[s + 1]);
      }
    }
  }

  // The keys that a block of queries [i, end) can see at all.
  std::pair<int64_t, int64_t> keys(int64_t batch, int64_t i, int64_t end) const {
    int64_t from = begin(i), to = options_.causal ? end : this->end(end - 1);
    if (options_.window) from = std::max(from, i - options_.window + 1);
    if (mask_) {
      from = std::max(from, first_[batch]);
      to = std::min(to, end_[batch]);
    }
    return {from, to};
  }
  std::pair<int64_t, int64_t> queries(int64_t batch, int64_t key) const {
    if (mask_ && !mask_[batch * length_ + key]) return {0, 0};
    const int64_t to = end(key);
    return {options_.causal ? key : begin(key),
            options_.window ? std::min(to, key + options_.window) : to};
  }

 private:
  int64_t begin(int64_t t) const { return segment_begin_.empty() ? 0 : segment_begin_[t]; }
  int64_t end(int64_t t) const { return segment_end_.empty() ? length_ : segment_end_[t]; }

  int64_t length_;
  Options options_;
  OptionalTensor mask_tensor_;
  const bool* mask_ = nullptr;
  std::vector<int64_t> first_, end_;                  // visible keys of each row of the batch
  std::vector<int64_t> segment_begin_, segment_end_;  // of each packed token
};

template <typename T>
class Attention {
 public:
  using A = Acc<T>;

  Attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& dq,
            const OptionalTensor& dk, const OptionalTensor& dv, const Visible& visible,
            Options options)
      : visible_(visible),
        options_(options),
        q_(q, false),
        dq_(dq, false),
        k_(k, true),
        dk_(dk, true),
        batch_(q.size(0)),
        heads_(q.size(1)),
        kv_heads_(k.size(1)),
        shared_(q.size(1) / k.size(1)),
        length_(q.size(2)),
        value_width_(v.size(3)),
        values_(dv ? 2 * value_width_ : value_width_),
        tiles_((length_ + kKeys - 1) / kKeys) {
    transpose_values(v, dv);
    const auto output = [&] {  // in memory [B, T, heads, D], as the output projection reads it
      const int64_t head = std::max<int64_t>(value_width_, 1), token = std::max<int64_t>(heads_, 1);
      const int64_t row = std::max<int64_t>(length_, 1) * token * head;
      return empty_strided({batch_, heads_, length_, value_width_}, {row, head, token * head, 1},
                           q.scalar_type());
    };
    out_ = output();
    dout_ = output();
  }

  std::tuple<Tensor, Tensor> run() {
    const int64_t blocks = (length_ + kQueries - 1) / kQueries, items = batch_ * heads_;
    std::atomic<int64_t> next{0};
    parallel_for(0, num_threads(), 1, [&](int64_t, int64_t) {
      Scratch scratch(*this);
      for (int64_t i = next++; i < items * blocks; i = next++) {
        const int64_t block = blocks - 1 - i % blocks;  // the long ones first
        query_block(i / blocks / heads_, i / blocks % heads_, block * kQueries, scratch);
      }
    });
    return {out_, dout_};
  }

 private:
  struct Scratch {
    explicit Scratch(const Attention& a)
        : scores(2 * kKeys * kQueries),
          queries(2 * kQueries * a.q_.width),
          p(kKeys * kQueries),
          dp(kKeys * kQueries),
          sums(2 * a.value_width_ * kQueries),
          state(5 * kQueries),
          rows(kQueries * round_up(a.value_width_, kGroup<T>)) {}
    std::vector<A> scores;
    std::vector<T> queries, p, dp;
    std::vector<A> sums, state;
    std::vector<T> rows;
  };

  // [B, kv_heads, tiles, V then dV, kKeys]: the left operand of the second product, a tile of keys
  // in one piece.
  void transpose_values(const Tensor& v, const OptionalTensor& dv) {
    values_tensor_ = empty({batch_, kv_heads_, tiles_, values_, kKeys}, scalar_type<T>());
    values_t_ = data<T>(values_tensor_);
    const Rows<T> rows[] = {Rows<T>(v, false), Rows<T>(dv, false)};
    parallel_for(0, batch_ * kv_heads_ * tiles_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i % tiles_, head = i / tiles_ % kv_heads_, b = i / tiles_ / kv_heads_;
        const int64_t count = std::min(kKeys, length_ - tile * kKeys);
        T* to = values_t_ + i * values_ * kKeys;
        for (const Rows<T>& x : rows) {
          if (!x.defined()) continue;
          const T* from = x.row(b, head, tile * kKeys);
          constexpr int64_t step = 16;
          for (int64_t t = 0; t < count; t += step) {
            for (int64_t d = 0; d < value_width_; ++d) {
              for (int64_t u = t; u < count && u < t + step; ++u) {
                to[d * kKeys + u] = from[u * x.stride() + d];
              }
            }
          }
          for (int64_t d = 0; d < value_width_; ++d) {
            std::fill(to + d * kKeys + count, to + (d + 1) * kKeys, T{});
          }
          to += value_width_ * kKeys;
        }
      }
    });
  }

  void query_block(int64_t batch, int64_t head, int64_t i, Scratch& w) {
    const int64_t count = std::min(kQueries, length_ - i), kv_head = head / shared_;
    const int64_t cols = round_up(count, head_->panel), width = q_.width, ld = 2 * cols;
    const bool tangent = dq_.defined() || dk_.defined();
    A *s = w.scores.data(), *ds = tangent ? s + cols : nullptr;
    T* queries = w.queries.data();
    head_->pack_transposed(count, width, q_.row(batch, head, i), q_.stride(), queries);
    if (dq_.defined()) {
      head_->pack_transposed(count, width, dq_.row(batch, head, i), dq_.stride(),
                             queries + cols * width);
    }
    A *out = w.sums.data(), *dout = out + value_width_ * cols;
    std::fill(out, dout + value_width_ * cols, A(0));
    A* per_query = w.state.data();
    std::fill(per_query, per_query + 5 * kQueries, A(0));
    const SoftmaxState<A> state{per_query, per_query + kQueries, per_query + 2 * kQueries,
                                per_query + 3 * kQueries, per_query + 4 * kQueries};
    std::fill(state.max, state.max + cols, -std::numeric_limits<A>::infinity());

    const auto [first, last] = visible_.keys(batch, i, i + count);
    for (int64_t begin = first / kGroup<T> * kGroup<T>, end; begin < last; begin = end) {
      const int64_t tile = begin / kKeys, from = begin - tile * kKeys;
      end = std::min((tile + 1) * kKeys, last);
      const int64_t rows = end - begin, padded = round_up(rows, kGroup<T>);
      const T* keys = k_.row(batch, kv_head, begin);
      head_->gemm(rows, dq_.defined() ? 2 * cols : cols, width, keys, k_.stride(), queries, s, ld,
                  false);
      if (dk_.defined()) {
        head_->gemm(rows, cols, width, dk_.row(batch, kv_head, begin), dk_.stride(), queries, ds,
                    ld, dq_.defined());
      }
      const LogitTransform<A> t{A(options_.scale), A(options_.softcap)};
      if (tangent) {
        head_->transform_jvp(rows, cols, ld, t, nullptr, nullptr, s, ds);
      } else {
        head_->transform(rows, cols, ld, t, nullptr, s);
      }
      for (int64_t r = 0; r < rows; ++r) {
        auto [lo, hi] = visible_.queries(batch, begin + r);
        lo = std::clamp<int64_t>(lo - i, 0, count);
        hi = std::clamp<int64_t>(hi - i, lo, count);
        if (lo == 0 && hi == count) continue;
        hide(s + r * ld, lo, hi, cols, -std::numeric_limits<A>::infinity());
        if (tangent) hide(ds + r * ld, lo, hi, cols, A(0));
      }
      kernels_->softmax(rows, cols, ld, s, ds, state, w.p.data(), w.dp.data());
      kernels_->rescale(value_width_, cols, state, out, dout);
      const T* values =
          values_t_ + from + ((batch * kv_heads_ + kv_head) * tiles_ + tile) * values_ * kKeys;
      head_->gemm(values_, cols, padded, values, kKeys, w.p.data(), out, cols, true);
      if (tangent) {
        head_->gemm(value_width_, cols, padded, values, kKeys, w.dp.data(), dout, cols, true);
      }
    }
    kernels_->finish(value_width_, cols, state, out, dout);
    emit(out_, batch, head, i, count, cols, out, w.rows);
    emit(dout_, batch, head, i, count, cols, dout, w.rows);
  }

  static void hide(A* row, int64_t lo, int64_t hi, int64_t cols, A value) {
    std::fill(row, row + lo, value);
    std::fill(row + hi, row + cols, value);
  }

  // The transposed block [value width, cols] to rows i ... of `to`.
  void emit(const Tensor& to, int64_t batch, int64_t head, int64_t i, int64_t count, int64_t cols,
            const A* block, std::vector<T>& rows) {
    const int64_t at = batch * to.stride(0) + head * to.stride(1) + i * to.stride(2);
    char* const target = data<char>(to) + at * itemsize(to);
    if (to.scalar_type() == scalar_type<T>() && value_width_ % kGroup<T> == 0) {
      head_->emit(value_width_, count, cols, block, reinterpret_cast<T*>(target), to.stride(2),
                  nullptr, 0, nullptr);
      return;
    }
    const int64_t width = round_up(value_width_, kGroup<T>);
    head_->emit(value_width_, count, cols, block, rows.data(), width, nullptr, 0, nullptr);
    copy(view(target, {count, value_width_}, {to.stride(2), 1}, to.scalar_type()),
         view(rows.data(), {count, value_width_}, {width, 1}, scalar_type<T>()));
  }

  const HeadKernels<T>* head_ = head_kernels<T>();
  const AttentionKernels<T>* kernels_ = attention_kernels<T>();
  const Visible& visible_;
  Options options_;
  Rows<T> q_, dq_, k_, dk_;
  int64_t batch_, heads_, kv_heads_, shared_, length_, value_width_;
  int64_t values_;  // rows of a tile of values: V's and dV's
  int64_t tiles_;
  Tensor values_tensor_, out_, dout_;
  T* values_t_ = nullptr;
};

std::tuple<Tensor, Tensor> attention_jvp(const Tensor& q, const Tensor& k, const Tensor& v,
                                         const OptionalTensor& dq, const OptionalTensor& dk,
                                         const OptionalTensor& dv, const OptionalTensor& key_mask,
                                         const OptionalTensor& cu_seqlens, bool causal,
                                         double scale, double softcap, int64_t window) {
  check_value(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(3) == q.size(3) &&
                  q.size(0) == k.size(0) && q.size(2) == k.size(2) && v.size(0) == k.size(0) &&
                  v.size(1) == k.size(1) && v.size(2) == k.size(2) && k.size(1) > 0 &&
                  q.size(1) % k.size(1) == 0,
              "attention_jvp: q [B, heads, T, D], k [B, kv_heads, T, D], v [B, kv_heads, T, Dv]");
  for (const auto& [x, dx] : {std::pair{&q, &dq}, std::pair{&k, &dk}, std::pair{&v, &dv}}) {
    check_value(!*dx || same((*dx)->sizes(), x->sizes()),
                "attention_jvp: a tangent has another shape than its tensor");
    check_value(x->scalar_type() == q.scalar_type(), "attention_jvp: dtypes differ");
  }
  check_value(!key_mask || (key_mask->dim() == 2 && key_mask->size(0) == q.size(0) &&
                            key_mask->size(1) == q.size(2)),
              "attention_jvp: key_mask must be [B, T]");
  if (cu_seqlens) {
    const Tensor offsets = as_contiguous(*cu_seqlens, ScalarType::Long);
    const int64_t *first = const_data<int64_t>(offsets), *end = first + offsets.numel();
    check_value(q.size(0) == 1 && offsets.dim() == 1 && first < end && *first == 0 &&
                    end[-1] == q.size(2) && std::is_sorted(first, end),
                "attention_jvp: cu_seqlens must rise from 0 to the number of tokens");
  }
  const Options options{scale, softcap, window, causal};
  const Visible visible(key_mask, cu_seqlens, q.size(0), q.size(2), options);
  const auto run = [&](auto tag) {
    return Attention<decltype(tag)>(q, k, v, dq, dk, dv, visible, options).run();
  };
  if (q.scalar_type() == ScalarType::Double) return run(double{});
  if (q.scalar_type() == ScalarType::BFloat16 && head_kernels<bf16>()) return run(bf16{});
  return run(float{});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(vcore_kernels, CPU, m) {
  m.impl("attention_jvp", TORCH_BOX(&attention_jvp));
}

}  // namespace vcore
