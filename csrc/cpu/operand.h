// Feature matrices in the layouts that the tile kernels read.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "memory.h"
#include "tiles.h"

namespace cl_kernels::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

template <typename Mode>
constexpr at::ScalarType element_type();
template <>
constexpr at::ScalarType element_type<Float32>() {
  return at::kFloat;
}
template <>
constexpr at::ScalarType element_type<Float64>() {
  return at::kDouble;
}
template <>
constexpr at::ScalarType element_type<BFloat16>() {
  return at::kBFloat16;
}

template <typename Mode>
constexpr at::ScalarType sum_type() {
  return element_type<Mode>() == at::kDouble ? at::kDouble : at::kFloat;
}

// Calls f(Mode{}) with the arithmetic for inputs of this type: float16, and bfloat16 without dot products, in
// float.
template <typename F>
auto with_mode(at::ScalarType type, F f) {
  if (type == at::kDouble) return f(Float64{});
  if (type == at::kBFloat16 && has_bfloat16_dot()) return f(BFloat16{});
  return f(Float32{});
}

// A matrix [n, d] of any strides. rows(): itself, row-major, for the left side of a product over d.
// col_panels(): its rows as the columns of panels, for the right side of a product over d.
// row_panels(): its columns in panels, for the right side of a product over n.
template <typename Mode>
class Operand {
 public:
  using Word = typename Mode::Operand;
  static constexpr int kPack = Mode::kPack;

  explicit Operand(const at::Tensor& x)
      : n_(x.size(0)),
        d_(x.size(1)),
        width_(tile_kernels<Mode>().product.panel_width),
        x_(x.to(element_type<Mode>())),
        source_{x_.const_data_ptr(), n_, d_, x_.stride(0), x_.stride(1)} {}

  int64_t n() const { return n_; }
  int64_t d() const { return d_; }
  int64_t depth() const { return ceil_div(d_, kPack); }                  // operands along d
  int panels() const { return static_cast<int>(ceil_div(d_, width_)); }  // groups of columns
  int64_t padded_d() const { return panels() * static_cast<int64_t>(width_); }
  const at::Tensor& tensor() const { return x_; }

  void make_rows() {
    if (rows_.defined()) return;
    rows_ = x_.contiguous();
    if (d_ % kPack != 0) {
      at::Tensor padded = at::zeros({n_, round_up(d_, kPack)}, rows_.options());
      padded.narrow(1, 0, d_).copy_(rows_);
      rows_ = padded;
    }
  }

  void make_col_panels() {
    if (col_panels_.defined()) return;
    const int64_t groups = ceil_div(n_, width_);
    col_panels_ = large_empty<Word>({groups * width_ * depth()});
    Word* out = static_cast<Word*>(col_panels_.data_ptr());
    at::parallel_for(0, groups, grain(width_ * d_), [&](int64_t begin, int64_t end) {
      const Source word = source_;
      const int64_t width = width_, rows = depth();
      for (int64_t group = begin; group < end; ++group) {
        Word* panel = out + group * width * rows;
        const int64_t first = group * width, used = std::min<int64_t>(width, n_ - first);
        if (used < width) std::fill_n(panel, width * rows, Word{});
        for (int64_t block = 0; block < rows;
             block += kBlock) {  // both sides of the transposition stay in cache
          const int64_t last = std::min(rows, block + kBlock);
          for (int64_t c = 0; c < used; ++c)
            for (int64_t k = block; k < last; ++k) panel[k * width + c] = word(first + c, k * kPack, 0, 1);
        }
      }
    });
  }

  void make_row_panels() {
    if (row_panels_.defined()) return;
    const int64_t lines = ceil_div(n_, kPack), stride = lines * width_;
    row_panels_ = large_empty<Word>({panels() * stride});
    Word* out = static_cast<Word*>(row_panels_.data_ptr());
    at::parallel_for(0, lines, grain(d_), [&](int64_t begin, int64_t end) {
      const Source word = source_;
      const int64_t width = width_;
      for (int64_t group = 0; group < panels(); ++group) {
        const int64_t first = group * width, used = std::min<int64_t>(width, d_ - first);
        for (int64_t j = begin; j < end; ++j) {
          Word* line = out + group * stride + j * width;
          for (int64_t c = 0; c < used; ++c) line[c] = word(j * kPack, first + c, 1, 0);
          std::fill(line + used, line + width, Word{});
        }
      }
    });
  }

  const Word* row(int64_t i) const { return static_cast<const Word*>(rows_.data_ptr()) + i * depth(); }
  // Panels of the columns from row j on; j a multiple of kTileAlign.
  const Word* col_panels(int64_t j) const {
    return static_cast<const Word*>(col_panels_.data_ptr()) + j * depth();
  }
  // Panels of the rows from row j on: packed, or where there are none the rows themselves.
  Panels<Word> row_panels(int64_t j) const {
    if (!row_panels_.defined()) return {row(j), panels(), width_, depth()};
    const Word* packed = static_cast<const Word*>(row_panels_.data_ptr());
    return {packed + j / kPack * width_, panels(), ceil_div(n_, kPack) * width_, width_};
  }
  // Whether the rows as make_rows() leaves them can be read as panels.
  bool rows_are_panels() const { return kPack == 1 && d_ % width_ == 0; }

 private:
  static constexpr int64_t kBlock = 16;

  static int64_t grain(int64_t elements) {
    return std::max<int64_t>(1, (int64_t{1} << 16) / std::max<int64_t>(1, elements));
  }

  // Reads the matrix. Loops take a copy, so that what they write is known not to change it.
  struct Source {
    const void* data;
    int64_t n, d, row_stride, col_stride;
    // The element at (i, j) and, for packed operands, its neighbour at (i + di, j + dj): zero past the edge.
    Word operator()(int64_t i, int64_t j, int64_t di, int64_t dj) const {
      if constexpr (kPack == 1) {
        return static_cast<const Word*>(data)[i * row_stride + j * col_stride];
      } else {
        const uint16_t* x = static_cast<const uint16_t*>(data) + i * row_stride + j * col_stride;
        const bool edge = i + di >= n || j + dj >= d;
        return x[0] | static_cast<uint32_t>(edge ? 0 : x[di * row_stride + dj * col_stride]) << 16;
      }
    }
  };

  int64_t n_, d_;
  int width_;
  at::Tensor x_, rows_, col_panels_, row_panels_;
  Source source_;
};

}  // namespace cl_kernels::cpu
