// Tile kernels: everything that depends on the instruction set, behind one table of functions for each
// arithmetic. A tile is a block of the N x M similarity matrix, held row-major in a thread's scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace cl_kernels::cpu {

// The arithmetic of a product: what it multiplies (Operand), what it sums in (Sum), and how many elements
// along the contraction one operand holds (kPack).
struct Float32 {
  using Operand = float;
  using Sum = float;
  using Id = int32_t;
  static constexpr int kPack = 1;
};
struct Float64 {
  using Operand = double;
  using Sum = double;
  using Id = int64_t;
  static constexpr int kPack = 1;
};
struct BFloat16 {  // two neighbours along the contraction in one word, the first in the low half
  using Operand = uint32_t;
  using Sum = float;
  using Id = int32_t;
  static constexpr int kPack = 2;
};

// Panels: a matrix cut into groups of `panel_width` columns; inside a group, row after row.
// Tiles start at multiples of kTileAlign rows and columns, and hold as many columns.
constexpr int kTileAlign = 32;

template <typename Operand>
struct Panels {
  const Operand* first;
  int count;
  ptrdiff_t stride;  // operands from a panel to the next
  ptrdiff_t line;    // and from a row of a panel to the next
};

template <typename Mode>
struct ProductKernels {
  using Operand = typename Mode::Operand;
  using Sum = typename Mode::Sum;

  int panel_width;

  // out[r][c] = factor * sum_k rows[r][k] * panels[c / width][k][c % width]
  // rows [n_rows, depth], leading dimension ld; panels [n_panels, depth, width].
  void (*dot)(const Operand* rows, ptrdiff_t ld, int n_rows, const Operand* panels, int64_t depth,
              int n_panels, Sum factor, Sum* out, ptrdiff_t ld_out);

  // out[r][c] += sum_k g(r, k) * panels[c / width][k][c % width]
  // g(r, k) is g[r * ld + k], or g[k * ld + r] when transposed.
  void (*accumulate)(const Operand* g, ptrdiff_t ld, bool transposed, int n_rows, int depth,
                     const Panels<Operand>& panels, Sum* out, ptrdiff_t ld_out);
};

// How a gradient tile combines the softmax over its rows with the one over its columns.
enum class Softmax {
  kRows,          // row_coef_i 2^(s - row_shift_i)
  kBothCommon,    // (row_coef_i + col_coef_j) 2^(s - shift)
  kBothSeparate,  // row_coef_i 2^(s - row_shift_i) + col_coef_j 2^(s - col_shift_j)
};

template <typename T, typename Id>
struct GradientTile {
  const T* logits;  // [rows, ld], in base 2
  T* out;           // [rows, ld], the gradients; it may be the logits
  ptrdiff_t ld;
  int rows, cols;  // cols: a multiple of kTileAlign
  Softmax softmax;
  T shift;
  const T *row_coef, *row_shift, *col_coef, *col_shift;
  // Pairs with equal ids add row_weight_i + col_weight_j; null ids: no such term.
  const Id *row_ids, *col_ids;
  const T *row_weight, *col_weight;
};

// Rows of a tile of soft targets: s and t hold base-2 logits of the student and of the teacher.
template <typename T>
struct SoftTargetTile {
  T *s, *t;
  ptrdiff_t ld;
  int rows, cols;
};

// Of each of its rows: base-2 log-sum-exps, the coefficients of a gradient, and the teacher's mean of s in
// two parts.
template <typename T>
struct SoftTargetRows {
  const T *lse_coef, *lse, *cross_coef, *target_lse, *target_coef, *cross, *cross_rest;
};

// out_ij = coef_j 2^(s_ij - shift_j) + target_coef_j 2^(t_ij - target_shift_j); null t: no such term.
template <typename T>
struct ColumnGradient {
  const T *s, *t;
  T* out;
  ptrdiff_t ld;
  int rows, cols;
  const T *coef, *shift, *target_coef, *target_shift;
};

template <typename Mode>
struct RowKernels {
  using T = typename Mode::Sum;
  using Id = typename Mode::Id;

  // row_sum_i += sum_j 2^(s_ij - shift); col_sum_j += sum_i of the same unless null.
  void (*sum_exp)(const T* s, ptrdiff_t ld, int rows, int cols, T shift, T* row_sum, T* col_sum);

  // Running maximum and sum of each row: sum_i = sum_i 2^(max_i - max'_i) + sum_j 2^(s_ij - max'_i).
  // keep: s becomes 2^(s - max'); decay_i: what the row's earlier sums were multiplied by.
  void (*online)(T* s, ptrdiff_t ld, int rows, int cols, bool keep, T* max, T* sum, T* decay);

  // row_sum_i += sum_j s_ij over the pairs with equal ids; col_sum_j += sum_i of the same unless null.
  void (*sum_equal)(const T* s, ptrdiff_t ld, int rows, int cols, const Id* row_ids, const Id* col_ids,
                    double* row_sum, double* col_sum);
  // sum_j w_j s_j
  double (*weighted_sum)(const T* w, const T* s, int n);

  void (*gradient)(const GradientTile<T, Id>& tile);

  // Tiles whose columns are the rows of the problem: running maximum and sum of each column, and
  // cross_j = cross_j 2^(max_j - max'_j) + sum_i 2^(t_ij - max'_j) s_ij of t's; null s: no cross.
  void (*online_columns)(const T* t, const T* s, ptrdiff_t ld, int rows, int cols, T* max, double* sum,
                         double* cross);
  void (*gradient_columns)(const ColumnGradient<T>& tile);

  // The teacher's running maximum and sum as in `online`, t becoming 2^(t - max'), and
  // cross_i = cross_i decay_i + sum_j 2^(t_ij - max'_i) s_ij.
  void (*online_cross)(const SoftTargetTile<T>& tile, T* max, double* sum, double* cross, T* decay);

  // s becomes G = lse_coef_i 2^(s - lse_i) + cross_coef_i p, t becomes
  // H = p (target_coef_i + cross_coef_i ln2 (s - cross_i - cross_rest_i)), with p = 2^(t - target_lse_i).
  void (*soft_target_gradient)(const SoftTargetTile<T>& tile, const SoftTargetRows<T>& rows);

  // out_j = x_j - LSE over the columns whose mask is nonzero (null: all); -inf at the others and in an empty
  // row.
  void (*log_softmax)(const T* x, const uint8_t* mask, int64_t n, T* out);
  // grad_x_j = g_j - exp(y_j) sum of g over the included columns; 0 at the others, and everywhere in a row
  // whose y are all -inf.
  void (*log_softmax_gradient)(const T* g, const T* y, const uint8_t* mask, int64_t n, T* grad);

  // Tiles of bfloat16 operands from a tile of float sums: pairs along the columns, and pairs along the rows.
  // rows is even; null for the other arithmetics.
  void (*round_pairs)(const T* s, ptrdiff_t ld, int rows, int cols, uint32_t* along_cols,
                      uint32_t* along_rows);
};

template <typename Mode>
struct TileKernels {
  ProductKernels<Mode> product;
  RowKernels<Mode> row;
};

// The tables of the instruction set in use (the widest that this machine has, unless set otherwise).
template <typename Mode>
const TileKernels<Mode>& tile_kernels();

// Whether the instruction set in use multiplies bfloat16 pairs itself.
bool has_bfloat16_dot();

std::string capability();
std::vector<std::string> capabilities();
void set_capability(const std::string& name);  // throws std::invalid_argument

// Tables of one instruction set; bfloat16 is null where it cannot multiply pairs.
struct CapabilityTables {
  const char* name;
  const TileKernels<Float32>* float32;
  const TileKernels<Float64>* float64;
  const TileKernels<BFloat16>* bfloat16;
};

}  // namespace cl_kernels::cpu
