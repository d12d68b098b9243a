#include "positives.h"

#include <ATen/Context.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/take.h>

#include <algorithm>

#include "tensors.h"

namespace cl_kernels::cuda {
namespace {

constexpr int64_t kMaskElements = 1 << 26;  // of a mask that are widened at once

// Prototypes by mask, and what they count: mask @ (k folded to the mask's columns), in float32.
struct MaskedPrototypes {
  at::Tensor prototypes;  // [R, stride]; undefined for float32
  at::Tensor counts;      // [R] double
};

MaskedPrototypes mask_prototypes(const at::Tensor& k, const at::Tensor& mask) {
  const int64_t rows = mask.size(0), columns = mask.size(1), d = k.size(1), stride = round_up<int64_t>(d, 8);
  const bool half = k.scalar_type() != at::kFloat;
  MaskedPrototypes out;
  out.counts = empty_like_device(k, {rows}, at::kDouble);
  at::Tensor folded;
  if (half) {
    folded = empty_like_device(k, {columns, stride}, at::kFloat);
    launch_fold({k.const_data_ptr(), row_stride(k), static_cast<int>(k.size(0)), static_cast<int>(d),
                 static_cast<int>(columns), folded.mutable_data_ptr<float>(), stride},
                type_of(k), stream());
    out.prototypes = empty_like_device(k, {rows, stride}, at::kFloat);
  }
  const at::NoTF32Guard whole_floats;
  const int64_t each = std::clamp<int64_t>(kMaskElements / columns, 1, rows);
  for (int64_t first = 0; first < rows; first += each) {
    const int64_t count = std::min(each, rows - first);
    const at::Tensor weights = mask.narrow(0, first, count).to(at::kFloat).contiguous();
    if (half) {
      at::Tensor part = out.prototypes.narrow(0, first, count);
      at::mm_out(part, weights, folded);
    }
    launch_mask_counts(
        {weights.const_data_ptr<float>(), columns, static_cast<int>(count), static_cast<int>(columns),
         static_cast<int>(k.size(0)), out.counts.mutable_data_ptr<double>() + first},
        stream());
  }
  return out;
}

// The mask at (i, i + offset), as it is read there: [N] float.
at::Tensor weights_at(const at::Tensor& mask, int64_t n, int64_t offset) {
  const at::Tensor rows = at::arange(n, mask.options().dtype(at::kLong));
  const at::Tensor place =
      rows.remainder(mask.size(0)) * mask.size(1) + (rows + offset).remainder(mask.size(1));
  return at::take(mask, place).to(at::kFloat);
}

at::Tensor class_prototypes(const at::Tensor& k, const LabelClasses& classes) {
  const int64_t m = k.size(0), d = k.size(1), stride = round_up<int64_t>(d, 8);
  at::Tensor sums = empty_like_device(k, {m, stride}, at::kFloat);
  at::Tensor carry = empty_like_device(k, {ceil_div<int64_t>(m, kClassChunk), d}, at::kDouble);
  launch_class_sums({k.const_data_ptr(), row_stride(k), classes.order.const_data_ptr<int64_t>(),
                     classes.sorted.const_data_ptr<int>(), static_cast<int>(m), static_cast<int>(d),
                     sums.mutable_data_ptr<float>(), stride, carry.mutable_data_ptr<double>()},
                    type_of(k), stream());
  return sums;
}

// [n] int32 in the memory of whole tiles, whose end the kernels fill.
at::Tensor padded_ids(const at::Tensor& labels) {
  const int64_t n = labels.size(0);
  return empty_like_device(labels, {round_up<int64_t>(n, kIdsPadding)}, at::kInt).narrow(0, 0, n);
}

}  // namespace

LabelIds label_ids(const at::Tensor& row_labels, const at::Tensor& col_labels) {
  const DeviceGuard guard(col_labels);
  const bool same = row_labels.is_same(col_labels);
  const at::Tensor cols = col_labels.contiguous(), rows = same ? cols : row_labels.contiguous();
  LabelIds ids;
  ids.cols = padded_ids(cols);
  ids.rows = same ? ids.cols : padded_ids(rows);
  launch_ids({same ? nullptr : rows.const_data_ptr<int64_t>(), cols.const_data_ptr<int64_t>(),
              static_cast<int>(rows.size(0)), static_cast<int>(cols.size(0)),
              same ? nullptr : ids.rows.mutable_data_ptr<int>(), ids.cols.mutable_data_ptr<int>()},
             stream());
  return ids;
}

LabelClasses label_classes(const at::Tensor& row_labels, const at::Tensor& col_labels) {
  const DeviceGuard guard(col_labels);
  const int64_t n = row_labels.size(0), m = col_labels.size(0);
  const auto [sorted, order] = at::sort(col_labels, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  LabelClasses classes;
  classes.order = order.contiguous();
  classes.ids.cols = padded_ids(col_labels);
  classes.sorted = empty_like_device(col_labels, {m}, at::kInt);
  at::Tensor counts = empty_like_device(col_labels, {m}, at::kDouble);
  const at::Tensor labels = sorted.contiguous();
  const int64_t* of_columns = labels.const_data_ptr<int64_t>();
  launch_classes({of_columns, of_columns, classes.order.const_data_ptr<int64_t>(), static_cast<int>(m),
                  static_cast<int>(m), classes.ids.cols.mutable_data_ptr<int>(),
                  classes.sorted.mutable_data_ptr<int>(), counts.mutable_data_ptr<double>()},
                 stream());
  if (row_labels.is_same(col_labels)) {
    classes.ids.rows = classes.ids.cols;
    classes.counts = counts;
    return classes;
  }
  classes.ids.rows = padded_ids(row_labels);
  classes.counts = empty_like_device(row_labels, {n}, at::kDouble);
  const at::Tensor rows = row_labels.contiguous();
  launch_classes(
      {of_columns, rows.const_data_ptr<int64_t>(), nullptr, static_cast<int>(n), static_cast<int>(m),
       classes.ids.rows.mutable_data_ptr<int>(), nullptr, classes.counts.mutable_data_ptr<double>()},
      stream());
  return classes;
}

std::tuple<at::Tensor, at::Tensor> positive_sums(const Contrast& contrast, const LabelClasses* classes,
                                                 const TileSums& tiles) {
  const DeviceGuard guard(contrast.q);
  const bool any = contrast.label_positives || contrast.positive_index || contrast.positive_mask;
  const int64_t n = contrast.q.size(0);
  at::Tensor sum = empty_like_device(contrast.q, {any ? n : 0}, at::kDouble), count = at::empty_like(sum);
  if (!any) return {sum, count};
  const bool half = contrast.q.scalar_type() != at::kFloat;
  const at::Tensor q = half ? row_major(contrast.q) : contrast.q;
  const at::Tensor k = !contrast.k ? q : half ? row_major(*contrast.k) : *contrast.k;
  PositiveRowsParams p{};
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.q_stride = row_stride(q);
  p.k_stride = row_stride(k);
  p.n = static_cast<int>(n);
  p.m = static_cast<int>(k.size(0));
  p.d = static_cast<int>(q.size(1));
  p.scale = scalar_of(contrast.scale);
  p.tiles = tiles;
  p.sum = sum.mutable_data_ptr<double>();
  p.count = count.mutable_data_ptr<double>();
  at::Tensor index, prototypes, counts, excluded_weight;
  if (contrast.positive_index) {
    index = contrast.positive_index->to(at::kInt).contiguous();
    p.index = index.const_data_ptr<int>();
    launch_positive_rows(p, type_of(q), stream());
    return {sum, count};
  }
  p.excludes = contrast.exclude && *contrast.exclude > -n && *contrast.exclude < p.m;
  p.offset = p.excludes ? static_cast<int>(*contrast.exclude) : 0;
  if (contrast.label_positives) {
    TORCH_CHECK_VALUE(classes != nullptr, "positives by label need labels");
    if (half) prototypes = class_prototypes(k, *classes);
    counts = classes->counts;
    p.row_ids = classes->ids.rows.const_data_ptr<int>();
    p.col_ids = classes->ids.cols.const_data_ptr<int>();
  } else {
    const at::Tensor& mask = *contrast.positive_mask;
    MaskedPrototypes masked = mask_prototypes(k, mask);
    prototypes = masked.prototypes;
    counts = masked.counts;
    p.groups = static_cast<int>(mask.size(0));
    if (p.excludes) {
      excluded_weight = weights_at(mask, n, p.offset);
      p.excluded_weight = excluded_weight.const_data_ptr<float>();
    }
  }
  if (half) p.prototypes = prototypes.const_data_ptr<float>(), p.prototype_stride = prototypes.stride(0);
  p.counts = counts.const_data_ptr<double>();
  launch_positive_rows(p, type_of(q), stream());
  return {sum, count};
}

}  // namespace cl_kernels::cuda
