// The tile kernels themselves, compiled once for each instruction set: isa_*.cpp sets the target options,
// then defines CL_CAPABILITY (namespace and name), CL_VECTOR_BYTES, CL_MICRO_ROWS, CL_MICRO_VECTORS and,
// where there are bfloat16 dot products, CL_BFLOAT16_DOT, and includes this file. Standard headers are
// included before the target options are set (isa.h), so that no inline function of theirs is compiled for a
// wider instruction set.

namespace cl_kernels::cpu::CL_CAPABILITY {

constexpr int kVectorBytes = CL_VECTOR_BYTES;

#include "simd.h"

// ---- Products
// ----------------------------------------------------------------------------------------------- A
// micro-kernel keeps R x V vectors of sums in registers, and for each step of the contraction loads V vectors
// of a panel and broadcasts R operands. Panels are walked in chunks of kDepthChunk rows, which stay in the
// first cache.

constexpr int kMicroRows = CL_MICRO_ROWS;
constexpr int kMicroVectors = CL_MICRO_VECTORS;
constexpr int kDepthChunk = 128;

template <typename Mode>
struct Multiply {
  using S = Simd<typename Mode::Sum>;
  using Operands = typename S::Vec;
  static inline Operands load(const typename Mode::Operand* p) { return S::load(p); }
  static inline typename S::Vec add(typename S::Vec sum, typename Mode::Operand a, Operands b) {
    return sum + a * b;
  }
};

#ifdef CL_BFLOAT16_DOT
template <>
struct Multiply<BFloat16> {
  using S = Simd<float>;
  using Operands = __m512bh;
  static inline Operands load(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline S::Vec add(S::Vec sum, uint32_t a, Operands b) {
    return (S::Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), b);
  }
};
#endif

template <typename Mode>
constexpr int kPanelWidth = kMicroVectors * Simd<typename Mode::Sum>::kLanes;

enum class Store { kScale, kAdd, kAddScale };

// out (R x panel width) = factor * (a b), or out + a b, or factor * (out + a b). The sums start from zero:
// chains of additions stay short, and so do their errors.
template <typename Mode, int R, bool Transposed>
inline void micro(const typename Mode::Operand* a, ptrdiff_t ld, const typename Mode::Operand* b,
                  ptrdiff_t line, int depth, typename Mode::Sum factor, Store how, typename Mode::Sum* out,
                  ptrdiff_t ld_out) {
  using S = Simd<typename Mode::Sum>;
  using M = Multiply<Mode>;
  typename S::Vec sum[R][kMicroVectors];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = typename S::Vec{};
  for (int k = 0; k < depth; ++k, b += line) {
    typename M::Operands bv[kMicroVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) bv[v] = M::load(b + v * S::kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Mode::Operand av = Transposed ? a[k * ld + r] : a[r * ld + k];
#pragma GCC unroll 4
      for (int v = 0; v < kMicroVectors; ++v) sum[r][v] = M::add(sum[r][v], av, bv[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kMicroVectors; ++v) {
      typename Mode::Sum* at = out + r * ld_out + v * S::kLanes;
      const typename S::Vec total = how == Store::kScale ? sum[r][v] : S::load(at) + sum[r][v];
      S::store(at, how == Store::kAdd ? total : total * factor);
    }
}

template <typename Mode, bool Transposed, int R>
void micro_tail(int rows, const typename Mode::Operand* a, ptrdiff_t ld, const typename Mode::Operand* b,
                ptrdiff_t line, int depth, typename Mode::Sum factor, Store how, typename Mode::Sum* out,
                ptrdiff_t ld_out) {
  if constexpr (R > 0) {
    if (rows == R)
      micro<Mode, R, Transposed>(a, ld, b, line, depth, factor, how, out, ld_out);
    else
      micro_tail<Mode, Transposed, R - 1>(rows, a, ld, b, line, depth, factor, how, out, ld_out);
  }
}

// Lines [first, last) of a panel, soon to be read, into the second cache.
template <typename Mode>
inline void prefetch(const typename Mode::Operand* panel, ptrdiff_t line, int first, int last) {
  constexpr int kCacheLine = 64 / sizeof(*panel);
  for (int k = first; k < last; ++k)
    for (int c = 0; c < kPanelWidth<Mode>; c += kCacheLine) __builtin_prefetch(panel + k * line + c, 0, 2);
}

template <typename Mode, bool Transposed, bool Add>
void product(const typename Mode::Operand* a, ptrdiff_t ld, int n_rows,
             const Panels<typename Mode::Operand>& panels, int64_t depth, typename Mode::Sum factor,
             typename Mode::Sum* out, ptrdiff_t ld_out) {
  for (int64_t k = 0; k < depth; k += kDepthChunk) {
    const int chunk = static_cast<int>(depth - k < kDepthChunk ? depth - k : kDepthChunk);
    const bool first = k == 0 && !Add;
    const bool last = k + chunk == depth && !Add;
    // kScale multiplies by the factor too, which is 1 until the last chunk.
    const Store how = first ? Store::kScale : last ? Store::kAddScale : Store::kAdd;
    const typename Mode::Sum by = last ? factor : 1;
    for (int p = 0; p < panels.count; ++p) {
      const typename Mode::Operand* b = panels.first + p * panels.stride + k * panels.line;
      typename Mode::Sum* c = out + p * kPanelWidth<Mode>;
      const bool last_panel = p + 1 == panels.count;
      int r = 0;
      for (; r + kMicroRows <= n_rows; r += kMicroRows) {
        if (!last_panel)
          prefetch<Mode>(b + panels.stride, panels.line, r * chunk / n_rows,
                         (r + kMicroRows) * chunk / n_rows);
        micro<Mode, kMicroRows, Transposed>(Transposed ? a + k * ld + r : a + r * ld + k, ld, b, panels.line,
                                            chunk, by, how, c + r * ld_out, ld_out);
      }
      micro_tail<Mode, Transposed, kMicroRows - 1>(n_rows - r, Transposed ? a + k * ld + r : a + r * ld + k,
                                                   ld, b, panels.line, chunk, by, how, c + r * ld_out,
                                                   ld_out);
    }
  }
}

template <typename Mode>
void dot(const typename Mode::Operand* rows, ptrdiff_t ld, int n_rows, const typename Mode::Operand* panels,
         int64_t depth, int n_panels, typename Mode::Sum factor, typename Mode::Sum* out, ptrdiff_t ld_out) {
  product<Mode, false, false>(rows, ld, n_rows,
                              {panels, n_panels, depth * kPanelWidth<Mode>, kPanelWidth<Mode>}, depth, factor,
                              out, ld_out);
}

template <typename Mode>
void accumulate(const typename Mode::Operand* g, ptrdiff_t ld, bool transposed, int n_rows, int depth,
                const Panels<typename Mode::Operand>& panels, typename Mode::Sum* out, ptrdiff_t ld_out) {
  if (transposed)
    product<Mode, true, true>(g, ld, n_rows, panels, depth, 1, out, ld_out);
  else
    product<Mode, false, true>(g, ld, n_rows, panels, depth, 1, out, ld_out);
}

// ---- Passes over the rows of a tile
// ---------------------------------------------------------------------------

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

template <typename T>
void sum_exp(const T* s, ptrdiff_t ld, int rows, int cols, T shift, T* row_sum, T* col_sum) {
  using S = Simd<T>;
  for (int i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    typename S::Vec total{};
    if (col_sum) {
      for (int j = 0; j < cols; j += S::kLanes) {
        const typename S::Vec e = exp2_vec<T>(S::load(row + j) - shift);
        total += e;
        S::store(col_sum + j, S::load(col_sum + j) + e);
      }
    } else {
      for (int j = 0; j < cols; j += S::kLanes) total += exp2_vec<T>(S::load(row + j) - shift);
    }
    row_sum[i] += S::sum(total);
  }
}

template <typename T>
inline T row_max(const T* row, int cols, T start) {
  using S = Simd<T>;
  typename S::Vec best = S::fill(start);
  for (int j = 0; j < cols; j += S::kLanes) {
    const typename S::Vec x = S::load(row + j);
    best = S::select(x > best, x, best);
  }
  return S::max(best);
}

// The factor on sums taken relative to `before` when the maximum rises to `after`.
template <typename T>
inline T decay_of(T before, T after) {
  return before == after ? T(1) : std::exp2(before - after);
}

template <typename T>
void online(T* s, ptrdiff_t ld, int rows, int cols, bool keep, T* max, T* sum, T* decay) {
  using S = Simd<T>;
  for (int i = 0; i < rows; ++i) {
    T* row = s + i * ld;
    const T top = row_max(row, cols, max[i]);
    const T shift = top == kMinusInfinity<T> ? T(0) : top;
    typename S::Vec total{};
    if (keep) {
      for (int j = 0; j < cols; j += S::kLanes) {
        const typename S::Vec e = exp2_vec<T>(S::load(row + j) - shift);
        S::store(row + j, e);
        total += e;
      }
    } else {
      for (int j = 0; j < cols; j += S::kLanes) total += exp2_vec<T>(S::load(row + j) - shift);
    }
    const T factor = decay_of(max[i], top);
    max[i] = top;
    sum[i] = sum[i] * factor + S::sum(total);
    if (decay) decay[i] = factor;
  }
}

// Sums of logits are double: they are taken from log-sum-exps nearly as large.
template <typename T, typename Id>
void sum_equal(const T* s, ptrdiff_t ld, int rows, int cols, const Id* row_ids, const Id* col_ids,
               double* row_sum, double* col_sum) {
  using S = Simd<T>;
  for (int i = 0; i < rows; ++i) {
    const T* row = s + i * ld;
    typename S::Wide total{};
    for (int j = 0; j < cols; j += S::kLanes) {
      const typename S::IntVec equal = S::load_ids(col_ids + j) == row_ids[i];
      const typename S::Wide x = S::widen(S::select(equal, S::load(row + j), typename S::Vec{}));
      total += x;
      if (col_sum) S::add_wide(col_sum + j, x);
    }
    row_sum[i] += S::sum_wide(total);
  }
}

template <typename T>
double weighted_sum(const T* w, const T* s, int n) {
  using S = Simd<T>;
  typename S::Wide total{};
  int j = 0;
  for (; j + S::kLanes <= n; j += S::kLanes) total += S::widen(S::load(w + j)) * S::widen(S::load(s + j));
  double sum = S::sum_wide(total);
  for (; j < n; ++j) sum += static_cast<double>(w[j]) * s[j];
  return sum;
}

template <typename T, typename Id, Softmax kSoftmax, bool kIds>
void gradient_rows(const GradientTile<T, Id>& tile) {
  using S = Simd<T>;
  for (int i = 0; i < tile.rows; ++i) {
    const T* row = tile.logits + i * tile.ld;
    T* out = tile.out + i * tile.ld;
    const T coef = tile.row_coef[i];
    const T shift = kSoftmax == Softmax::kBothCommon ? tile.shift : tile.row_shift[i];
    for (int j = 0; j < tile.cols; j += S::kLanes) {
      const typename S::Vec x = S::load(row + j);
      typename S::Vec g = exp2_vec<T>(x - shift);
      if constexpr (kSoftmax == Softmax::kBothCommon) {
        g *= S::load(tile.col_coef + j) + coef;
      } else {
        g *= coef;
        if constexpr (kSoftmax == Softmax::kBothSeparate)
          g += S::load(tile.col_coef + j) * exp2_vec<T>(x - S::load(tile.col_shift + j));
      }
      if constexpr (kIds) {
        typename S::Vec weight = S::fill(tile.row_weight[i]);
        if (tile.col_weight) weight += S::load(tile.col_weight + j);
        g += S::select(S::load_ids(tile.col_ids + j) == tile.row_ids[i], weight, typename S::Vec{});
      }
      S::store(out + j, g);
    }
  }
}

template <typename T, typename Id>
void gradient(const GradientTile<T, Id>& tile) {
  const bool ids = tile.row_ids != nullptr;
  switch (tile.softmax) {
    case Softmax::kRows:
      return ids ? gradient_rows<T, Id, Softmax::kRows, true>(tile)
                 : gradient_rows<T, Id, Softmax::kRows, false>(tile);
    case Softmax::kBothCommon:
      return ids ? gradient_rows<T, Id, Softmax::kBothCommon, true>(tile)
                 : gradient_rows<T, Id, Softmax::kBothCommon, false>(tile);
    case Softmax::kBothSeparate:
      return ids ? gradient_rows<T, Id, Softmax::kBothSeparate, true>(tile)
                 : gradient_rows<T, Id, Softmax::kBothSeparate, false>(tile);
  }
}

template <typename T>
void online_columns(const T* t, const T* s, ptrdiff_t ld, int rows, int cols, T* max, double* sum,
                    double* cross) {
  using S = Simd<T>;
  for (int j = 0; j < cols; j += S::kLanes) {
    const typename S::Vec before = S::load(max + j);
    typename S::Vec top = before;
    for (int i = 0; i < rows; ++i) {
      const typename S::Vec x = S::load(t + i * ld + j);
      top = S::select(x > top, x, top);
    }
    const typename S::Vec shift = S::select(top == kMinusInfinity<T>, typename S::Vec{}, top);
    typename S::Wide total{}, weighted{};
    for (int i = 0; i < rows; ++i) {
      const typename S::Wide e = S::widen(exp2_vec<T>(S::load(t + i * ld + j) - shift));
      total += e;
      if (s) weighted += e * S::widen(S::load(s + i * ld + j));
    }
    const typename S::Wide decay = S::widen(exp2_vec<T>(before - shift));
    S::store(max + j, top);
    S::store_wide(sum + j, S::load_wide(sum + j) * decay + total);
    if (s) S::store_wide(cross + j, S::load_wide(cross + j) * decay + weighted);
  }
}

template <typename T>
void gradient_columns(const ColumnGradient<T>& tile) {
  using S = Simd<T>;
  for (int i = 0; i < tile.rows; ++i) {
    const T *s = tile.s + i * tile.ld, *t = tile.t ? tile.t + i * tile.ld : nullptr;
    for (int j = 0; j < tile.cols; j += S::kLanes) {
      typename S::Vec g = S::load(tile.coef + j) * exp2_vec<T>(S::load(s + j) - S::load(tile.shift + j));
      if (t)
        g += S::load(tile.target_coef + j) * exp2_vec<T>(S::load(t + j) - S::load(tile.target_shift + j));
      S::store(tile.out + i * tile.ld + j, g);
    }
  }
}

template <typename T>
void online_cross(const SoftTargetTile<T>& tile, T* max, double* sum, double* cross, T* decay) {
  using S = Simd<T>;
  for (int i = 0; i < tile.rows; ++i) {
    const T* s = tile.s + i * tile.ld;
    T* t = tile.t + i * tile.ld;
    const T top = row_max(t, tile.cols, max[i]);
    const T shift = top == kMinusInfinity<T> ? T(0) : top;
    typename S::Wide total{}, weighted{};
    for (int j = 0; j < tile.cols; j += S::kLanes) {
      const typename S::Vec e = exp2_vec<T>(S::load(t + j) - shift);
      S::store(t + j, e);
      total += S::widen(e);
      weighted += S::widen(e) * S::widen(S::load(s + j));
    }
    decay[i] = decay_of(max[i], top);
    max[i] = top;
    sum[i] = sum[i] * decay[i] + S::sum_wide(total);
    cross[i] = cross[i] * decay[i] + S::sum_wide(weighted);
  }
}

template <typename T>
void soft_target_gradient(const SoftTargetTile<T>& tile, const SoftTargetRows<T>& rows) {
  using S = Simd<T>;
  const T ln2 = T(0.693147180559945309417);
  for (int i = 0; i < tile.rows; ++i) {
    T* s = tile.s + i * tile.ld;
    T* t = tile.t + i * tile.ld;
    for (int j = 0; j < tile.cols; j += S::kLanes) {
      const typename S::Vec x = S::load(s + j);
      const typename S::Vec p = exp2_vec<T>(S::load(t + j) - rows.target_lse[i]);
      const typename S::Vec centred = (x - rows.cross[i]) - rows.cross_rest[i];
      S::store(s + j, rows.lse_coef[i] * exp2_vec<T>(x - rows.lse[i]) + rows.cross_coef[i] * p);
      S::store(t + j, p * (rows.target_coef[i] + rows.cross_coef[i] * ln2 * centred));
    }
  }
}

// x at p[0 .. count), `otherwise` in the lanes past it.
template <typename T>
inline typename Simd<T>::Vec load_part(const T* p, int64_t count, T otherwise) {
  using S = Simd<T>;
  if (count >= S::kLanes) return S::load(p);
  typename S::Vec v = S::fill(otherwise);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
}

template <typename T>
inline void store_part(T* p, int64_t count, typename Simd<T>::Vec v) {
  using S = Simd<T>;
  if (count >= S::kLanes) return S::store(p, v);
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
}

// All ones in the lanes whose mask byte is nonzero, among the first `count`.
template <typename T>
inline typename Simd<T>::IntVec included(const uint8_t* mask, int64_t count) {
  using S = Simd<T>;
  using Bytes = typename Bits<T>::Bytes;
  Bytes bytes{};
  if (count >= S::kLanes) {
    bytes = *reinterpret_cast<const typename Bits<T>::BytesAt*>(mask);
  } else {
    for (int64_t lane = 0; lane < count; ++lane) bytes[lane] = static_cast<int8_t>(mask[lane]);
  }
  return __builtin_convertvector((Bytes)(bytes != 0), typename S::IntVec);
}

template <typename T>
inline typename Simd<T>::Vec load_included(const T* x, const uint8_t* mask, int64_t j, int64_t n,
                                           T otherwise) {
  using S = Simd<T>;
  const typename S::Vec v = load_part(x + j, n - j, otherwise);
  return mask ? S::select(included<T>(mask + j, n - j), v, S::fill(otherwise)) : v;
}

template <typename T>
void log_softmax(const T* x, const uint8_t* mask, int64_t n, T* out) {
  using S = Simd<T>;
  const T log2e = T(1.44269504088896340736), ln2 = T(0.693147180559945309417);
  typename S::Vec best = S::fill(kMinusInfinity<T>);
  for (int64_t j = 0; j < n; j += S::kLanes) {
    const typename S::Vec v = load_included(x, mask, j, n, kMinusInfinity<T>);
    best = S::select(v > best || v != v, v, best);
  }
  const T top = S::max(best);
  const T shift = top == kMinusInfinity<T> ? T(0) : top;
  typename S::Vec total{};
  for (int64_t j = 0; j < n; j += S::kLanes)
    total += exp2_vec<T>((load_included(x, mask, j, n, kMinusInfinity<T>) - shift) * log2e);
  const T log_sum = std::log2(S::sum(total)) * ln2;
  if (log_sum != log_sum) {  // a NaN reaches what is -inf too
    for (int64_t j = 0; j < n; ++j) out[j] = !mask || mask[j] ? log_sum : kMinusInfinity<T>;
    return;
  }
  for (int64_t j = 0; j < n; j += S::kLanes) {
    const typename S::Vec v = load_included(x, mask, j, n, kMinusInfinity<T>);
    store_part(out + j, n - j, S::select(v == kMinusInfinity<T>, v, (v - shift) - log_sum));
  }
}

template <typename T>
void log_softmax_gradient(const T* g, const T* y, const uint8_t* mask, int64_t n, T* grad) {
  using S = Simd<T>;
  const T log2e = T(1.44269504088896340736);
  typename S::Vec total{};
  typename S::IntVec live{};
  for (int64_t j = 0; j < n; j += S::kLanes) {
    total += load_included(g, mask, j, n, T(0));
    live |= load_included(y, mask, j, n, kMinusInfinity<T>) != kMinusInfinity<T>;
  }
  if (!S::any(live)) {
    for (int64_t j = 0; j < n; ++j) grad[j] = T(0);
    return;
  }
  const T sum = S::sum(total);
  for (int64_t j = 0; j < n; j += S::kLanes) {
    const typename S::Vec p = exp2_vec<T>(load_included(y, mask, j, n, kMinusInfinity<T>) * log2e);
    store_part(grad + j, n - j, load_included(g, mask, j, n, T(0)) - p * sum);
  }
}

#ifdef CL_BFLOAT16_DOT
void round_pairs(const float* s, ptrdiff_t ld, int rows, int cols, uint32_t* along_cols,
                 uint32_t* along_rows) {
  using S = Simd<float>;
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint16_t HalvesAt __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  for (int i = 0; i < rows; i += 2) {
    uint16_t* first = reinterpret_cast<uint16_t*>(along_cols + (i * ld) / 2);
    uint16_t* second = reinterpret_cast<uint16_t*>(along_cols + ((i + 1) * ld) / 2);
    uint32_t* pairs = along_rows + (i / 2) * ld;
    for (int j = 0; j < cols; j += S::kLanes) {
      // To nearest even; a NaN stays one.
      const Halves a = (Halves)_mm512_cvtneps_pbh((__m512)S::load(s + i * ld + j));
      const Halves b = (Halves)_mm512_cvtneps_pbh((__m512)S::load(s + (i + 1) * ld + j));
      *reinterpret_cast<HalvesAt*>(first + j) = a;
      *reinterpret_cast<HalvesAt*>(second + j) = b;
      const Unsigned pair = __builtin_convertvector(a, Unsigned) | __builtin_convertvector(b, Unsigned) << 16;
      S::store(reinterpret_cast<float*>(pairs) + j, (S::Vec)pair);
    }
  }
}
#endif

// ---- The tables
// -------------------------------------------------------------------------------------------------

template <typename Mode>
constexpr TileKernels<Mode> make_table() {
  using T = typename Mode::Sum;
  using Id = typename Mode::Id;
  TileKernels<Mode> table{};
  table.product = {kPanelWidth<Mode>, dot<Mode>, accumulate<Mode>};
  table.row = {sum_exp<T>,
               online<T>,
               sum_equal<T, Id>,
               weighted_sum<T>,
               gradient<T, Id>,
               online_columns<T>,
               gradient_columns<T>,
               online_cross<T>,
               soft_target_gradient<T>,
               log_softmax<T>,
               log_softmax_gradient<T>,
               nullptr};
#ifdef CL_BFLOAT16_DOT
  if constexpr (Mode::kPack == 2) table.row.round_pairs = round_pairs;
#endif
  return table;
}

#define CL_STRING_(x) #x
#define CL_STRING(x) CL_STRING_(x)

const CapabilityTables& tables() {
  static const TileKernels<Float32> float32 = make_table<Float32>();
  static const TileKernels<Float64> float64 = make_table<Float64>();
#ifdef CL_BFLOAT16_DOT
  static const TileKernels<BFloat16> bfloat16 = make_table<BFloat16>();
  static const CapabilityTables all{CL_STRING(CL_CAPABILITY), &float32, &float64, &bfloat16};
#else
  static const CapabilityTables all{CL_STRING(CL_CAPABILITY), &float32, &float64, nullptr};
#endif
  return all;
}

}  // namespace cl_kernels::cpu::CL_CAPABILITY
