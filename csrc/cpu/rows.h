// Work on whole rows around the tiles: scratch memory, sums over features, and the last steps of a gradient.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <limits>
#include <vector>

#include "operand.h"

namespace cl_kernels::cpu {

constexpr double kLog2e = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

// Memory of its own for each thread of a parallel region.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t elements)
      : stride_(round_up(elements, 64 / sizeof(T))),
        memory_(at::empty({at::get_num_threads() * stride_}, at::CppTypeToScalarType<T>::value)) {}
  T* get() { return memory_.template mutable_data_ptr<T>() + at::get_thread_num() * stride_; }

 private:
  int64_t stride_;
  at::Tensor memory_;
};

// f(i) for each of n rows of d features.
template <typename F>
void for_rows(int64_t n, int64_t d, F f) {
  at::parallel_for(0, n, std::max<int64_t>(1, (int64_t{1} << 15) / std::max<int64_t>(1, d)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) f(i);
                   });
}

// Columns in [-1, m), -1 for none.
inline void check_index(const char* name, const at::Tensor& index, int64_t m) {
  const at::Tensor flat = index.contiguous();
  const int64_t* column = flat.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < flat.numel(); ++i)
    TORCH_CHECK_INDEX(column[i] >= -1 && column[i] < m, name, " must lie in [-1, ", m, "), got ", column[i],
                      " in row ", i);
}

// The matrix in the type of sums, row-major.
template <typename Mode>
at::Tensor sum_rows(const Operand<Mode>& x) {
  return x.tensor().to(sum_type<Mode>()).contiguous();
}

// a . b over d elements, in eight partial sums.
template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  T part[8] = {};
  int64_t k = 0;
  for (; k + 8 <= d; k += 8)
    for (int lane = 0; lane < 8; ++lane) part[lane] += a[k + lane] * b[k + lane];
  for (; k < d; ++k) part[0] += a[k] * b[k];
  return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

template <typename T>
void copy_rows(const at::Tensor& x, T* out) {
  if (x.scalar_type() == at::kDouble && x.is_contiguous()) {  // as statistics and their gradients are
    const double* from = x.const_data_ptr<double>();
    std::transform(from, from + x.numel(), out, [](double value) { return static_cast<T>(value); });
    return;
  }
  const at::Tensor flat = x.to(at::CppTypeToScalarType<T>::value).contiguous();
  std::copy_n(flat.const_data_ptr<T>(), flat.numel(), out);
}

// Natural log of sum * 2^max.
template <typename T>
double log_of_sum(T max, double sum) {
  return sum == 0 ? -std::numeric_limits<double>::infinity() : (std::log2(sum) + max) * kLn2;
}

// max ||x_i||; NaN if any row has one.
template <typename Mode>
double largest_norm(const Operand<Mode>& x) {
  using T = typename Mode::Sum;
  const at::Tensor rows = sum_rows(x);
  const int64_t n = x.n(), d = x.d();
  std::vector<T> square(n);
  for_rows(n, d, [&](int64_t i) {
    const T* row = rows.const_data_ptr<T>() + i * d;
    square[i] = dot(row, row, d);
  });
  T largest = 0;
  for (T value : square) largest = value > largest || value != value ? value : largest;
  return std::sqrt(static_cast<double>(largest));
}

// sum_i x_i . grad_i, of x [n, d] and the first d columns of grad [n, >= d]; 0-dim.
template <typename T>
at::Tensor contraction(const at::Tensor& x, const at::Tensor& grad) {
  const int64_t n = x.size(0), d = x.size(1), ld = grad.size(1);
  std::vector<double> part(n);
  for_rows(n, d, [&](int64_t i) {
    part[i] = dot(x.const_data_ptr<T>() + i * d, grad.const_data_ptr<T>() + i * ld, d);
  });
  double total = 0;
  for (double value : part) total += value;
  return at::scalar_tensor(total, grad.options());
}

// Rows over their length, a zero row staying zero.
template <typename T>
struct UnitRows {
  at::Tensor unit;  // [N, D]
  std::vector<T> rnorm;

  explicit UnitRows(const at::Tensor& x)
      : unit(at::empty(x.sizes(), x.options().dtype(at::CppTypeToScalarType<T>::value))), rnorm(x.size(0)) {
    unit.copy_(x);
    const int64_t d = x.size(1);
    for_rows(x.size(0), d, [&](int64_t i) {
      T* row = unit.template mutable_data_ptr<T>() + i * d;
      const T square = dot(row, row, d);
      rnorm[i] = square == 0 ? T(0) : 1 / std::sqrt(square);
      for (int64_t c = 0; c < d; ++c) row[c] *= rnorm[i];
    });
  }

  // From the gradient of the unit rows, in place, to that of the rows: its part along them falls out.
  void through(at::Tensor& grad) const {
    const int64_t d = unit.size(1);
    for_rows(unit.size(0), d, [&](int64_t i) {
      const T* row = unit.template const_data_ptr<T>() + i * d;
      T* g = grad.template mutable_data_ptr<T>() + i * d;
      const T along = dot(row, g, d);
      for (int64_t c = 0; c < d; ++c) g[c] = (g[c] - along * row[c]) * rnorm[i];
    });
  }
};

// scale * (the first d columns of grad [n, >= d]) in the input's type, contiguous.
inline at::Tensor finish_gradient(at::Tensor grad, int64_t d, double scale, at::ScalarType type) {
  grad.mul_(scale);
  if (grad.size(1) == d && grad.scalar_type() == type) return grad;
  return grad.narrow(1, 0, d).to(type).contiguous();
}

// The two products of a gradient tile G with features, G in the scratch memory of a thread.
template <typename Mode>
class GradientProduct {
 public:
  using T = typename Mode::Sum;
  using Word = typename Mode::Operand;
  static constexpr bool kRounds = Mode::kPack == 2;
  // Tiles of scratch memory for G and `rounded`.
  static constexpr int kTiles = kRounds ? 2 : 1;

  // rounded: memory as large as G for its roundings to pairs along columns and along rows, if any.
  GradientProduct(T* g, ptrdiff_t ld, T* rounded, int rows, int cols) : ld_(ld), rows_(rows), cols_(cols) {
    if constexpr (kRounds) {
      along_cols_ = reinterpret_cast<Word*>(rounded);
      along_rows_ = along_cols_ + round_up(rows, 2) * ld / 2;
      const int padded_cols = static_cast<int>(round_up(cols, kTileAlign));
      if (rows % 2) std::fill_n(g + rows * ld, padded_cols, T(0));
      tile_kernels<Mode>().row.round_pairs(g, ld, static_cast<int>(round_up(rows, 2)), padded_cols,
                                           along_cols_, along_rows_);
    } else {
      along_cols_ = along_rows_ = g;
    }
  }

  // out [rows, padded d] += G x[col .. col + cols]
  void add_rows(const Operand<Mode>& x, int64_t col, T* out) const {
    tile_kernels<Mode>().product.accumulate(along_cols_, ld_ / Mode::kPack, false, rows_,
                                            static_cast<int>(ceil_div(cols_, Mode::kPack)), x.row_panels(col),
                                            out, x.padded_d());
  }

  // out [cols, padded d] += Gᵀ x[row .. row + rows]
  void add_cols(const Operand<Mode>& x, int64_t row, T* out) const {
    tile_kernels<Mode>().product.accumulate(along_rows_, ld_, true, cols_,
                                            static_cast<int>(ceil_div(rows_, Mode::kPack)), x.row_panels(row),
                                            out, x.padded_d());
  }

 private:
  ptrdiff_t ld_;
  int rows_, cols_;
  Word *along_cols_, *along_rows_;
};

}  // namespace cl_kernels::cpu
