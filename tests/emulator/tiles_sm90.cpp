// Hopper's tile kernels in the emulator, against double precision. Prints what is wrong; exits with 1 then.
#include <random>

#include "gradient_tiles_sm90.cu"
#include "lse_sm90.cu"
#include "similarity_sm90.cu"
#include "tensor_map.cu"

using namespace cl_kernels::cuda;

namespace {

int faults = 0;
std::mt19937 generator(0);

// [rows, columns] with a stride of a multiple of 8; the padding is NaN.
template <typename T>
struct Matrix {
  int rows, columns, stride;
  std::vector<T> storage;

  Matrix(int rows, int columns, double size)
      : rows(rows),
        columns(columns),
        stride(round_up(columns, 8)),
        storage(rows * stride + 8, from_float<T>(NAN)) {
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows; ++i)
      for (int k = 0; k < columns; ++k)
        data()[i * stride + k] = from_float<T>(normal(generator) * size / std::sqrt(columns));
  }
  T* data() { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16); }
  double at(int i, int k) { return to_float(data()[i * stride + k]); }
  float largest_norm() {
    double most = 0;
    for (int i = 0; i < rows; ++i) {
      double sum = 0;
      for (int k = 0; k < columns; ++k) sum += at(i, k) * at(i, k);
      most = std::max(most, sum);
    }
    return static_cast<float>(most);
  }
};

template <typename T>
double dot(Matrix<T>& x, int i, Matrix<T>& y, int j) {
  double sum = 0;
  for (int k = 0; k < x.columns; ++k) sum += x.at(i, k) * y.at(j, k);
  return sum;
}

template <typename T>
Features features_of(Matrix<T>& x, Matrix<T>& y) {
  return {x.data(), y.data(), x.stride, y.stride, x.rows, y.rows, x.columns};
}

template <typename T>
constexpr Type type_of_element() {
  return std::is_same_v<T, bf16_t> ? Type::kBf16 : Type::kHalf;
}

std::vector<int> labels(int n) {
  std::vector<int> ids(n);
  for (int& id : ids) id = generator() % 5;
  return ids;
}

std::vector<float> numbers(int n, float low, float high) {
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> x(n);
  for (float& value : x) value = uniform(generator);
  return x;
}

bool among_counts(Among among, int own, int other) {
  return among == kAll || (own == other) == (among == kSame);
}

void compare(const std::string& what, double got, double want, double tolerance, const char* of, int i) {
  if (std::fabs(got - want) <= tolerance) return;  // NaN is a fault
  if (++faults < 40) std::printf("%s: %s %d is %.9g, not %.9g\n", what.c_str(), of, i, got, want);
}

struct Case {
  int n, m, d;
  bool mirrored = false, columns = false, biased = false;
  int offset = INT_MAX;  // none
  Among among = kAll;
  float scale = 1;
  int at_once = 0;  // the device's

  std::string name() const {
    return std::to_string(n) + " x " + std::to_string(m) + " x " + std::to_string(d) +
           (mirrored ? " mirrored" : "") + (columns ? " columns" : "") + (biased ? " bias" : "") + " among " +
           std::to_string(among) + " offset " + std::to_string(offset) + " scale " + std::to_string(scale);
  }
};

template <typename T>
void check_lse(const Case& c) {
  Matrix<T> x(c.n, c.d, 1.5), of_keys(c.m, c.d, 1.5);
  Matrix<T>& y = c.mirrored ? x : of_keys;
  std::vector<int> own = labels(c.n), other = c.mirrored ? own : labels(c.m);
  std::vector<float> bias = numbers(c.m, -1, 1);
  if (c.biased) bias[c.m / 2] = -INFINITY;
  const PairRules rules{c.n,        c.m,     c.offset != INT_MAX, c.offset == INT_MAX ? 0 : c.offset,
                        c.mirrored, c.among, own.data(),          other.data()};
  const Bounds bounds{x.largest_norm(), y.largest_norm(), c.biased ? 1.0f : 0.0f};
  Schedule s = lse_schedule_sm90(features_of(x, y), type_of_element<T>(), c.mirrored);
  if (c.at_once > 0) s = schedule(c.n, c.m, c.mirrored, c.at_once, s.cluster);
  std::vector<float> rows(s.column_groups * c.n), columns(s.row_groups * c.m);
  launch_lse_sm90({features_of(x, y),
                   rules,
                   {nullptr, c.scale},
                   c.biased ? bias.data() : nullptr,
                   &bounds,
                   s,
                   rows.data(),
                   c.columns ? columns.data() : nullptr},
                  type_of_element<T>(), nullptr);

  const double shift = fixed_shift(bounds, c.scale);
  std::vector<double> want_rows(c.n), want_columns(c.m);
  for (int i = 0; i < c.n; ++i)
    for (int j = 0; j < c.m; ++j) {
      if (!counts(rules, i, j) || !among_counts(c.among, own[i], other[j])) continue;
      const double e = std::exp2((dot(x, i, y, j) * c.scale + (c.biased ? bias[j] : 0)) / kLn2 - shift);
      want_rows[i] += e;
      want_columns[j] += e;
    }
  auto check = [&](const std::vector<float>& parts, const std::vector<double>& want, const char* of) {
    const int size = static_cast<int>(want.size());
    for (int i = 0; i < size; ++i) {
      double got = 0;
      for (size_t group = 0; group * size < parts.size(); ++group) got += parts[group * size + i];
      // Sums below 2^-100 are computed again.
      compare("lse " + c.name(), got, want[i], 2e-6 * (1 + std::fabs(c.scale)) * want[i] + 0x1p-104, of, i);
    }
  };
  check(rows, want_rows, "row");
  if (c.columns) check(columns, want_columns, "column");
}

template <typename T>
void check_similarity(int n, int m, int d, bool normalised, int stride, int shift) {
  Matrix<T> x(n, d, 1), y(m, d, 1);
  const std::vector<float> x_rnorm = numbers(n, 0.5, 2), y_rnorm = numbers(m, 0.5, 2);
  const T poison = from_float<T>(NAN);
  std::vector<T> out(n * stride + 16, poison);
  T* first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(out.data()) + 15) / 16 * 16) + shift;
  launch_similarity_sm90({features_of(x, y),
                          {nullptr, -2.0f},
                          normalised ? x_rnorm.data() : nullptr,
                          normalised ? y_rnorm.data() : nullptr,
                          first,
                          stride},
                         type_of_element<T>(), nullptr);
  const std::string name = "similarity " + Case{n, m, d}.name();
  const double unit = std::is_same_v<T, bf16_t> ? 0x1p-8 : 0x1p-11;
  size_t written = 0;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < m; ++j) {
      const double want = -2.0 * (normalised ? x_rnorm[i] * y_rnorm[j] : 1.0) * dot(x, i, y, j);
      compare(name, to_float(first[i * stride + j]), want, 1.01 * unit * std::fabs(want) + 1e-6, "element",
              i * m + j);
    }
  for (const T& value : out) written += !std::isnan(to_float(value));
  compare(name, written, static_cast<double>(n) * m, 0, "elements written", 0);
}

// The terms of n rows, at random.
struct RandomTerms {
  std::vector<TermsBlock> blocks;

  RandomTerms(int n, int m, float spread, const std::vector<int>& ids, const std::vector<float>& biases) {
    blocks.resize(round_up(n, kTermsPadding) / kTermsBlock);
    const std::vector<float> shift = numbers(n, 3, 3 + spread), coef = numbers(n, 0, 1),
                             weight = numbers(n, -1, 0);
    for (TermsBlock& block : blocks) {
      block = {};
      block.high = kNothing, block.low = -kNothing, block.index_low = INT_MAX, block.index_high = -1;
      std::fill_n(block.id, kTermsBlock, -1), std::fill_n(block.index, kTermsBlock, -1);
    }
    for (int i = 0; i < n; ++i) {
      TermsBlock& block = blocks[i / kTermsBlock];
      const int at = i % kTermsBlock, index = static_cast<int>(generator() % (m + 1)) - 1;
      block.shift[at] = shift[i], block.coef[at] = coef[i], block.weight[at] = weight[i];
      block.id[at] = ids[i], block.bias[at] = biases.empty() ? 0 : biases[i], block.index[at] = index;
      block.high = std::max(block.high, shift[i]), block.low = std::min(block.low, shift[i]);
      if (index < 0) continue;
      block.index_low = std::min(block.index_low, index);
      block.index_high = std::max(block.index_high, index);
    }
    for (TermsBlock& block : blocks)
      for (int at = 0; at < kTermsBlock; ++at)
        block.level[at] = block.coef[at] * std::exp2(std::min(block.high - block.shift[at], 120.0f));
  }

  // Without a softmax or positives their numbers are zeros.
  Terms terms(bool softmax, bool positives) {
    for (TermsBlock& block : blocks) {
      if (!softmax)
        for (float* x : {block.shift, block.coef, block.level}) std::fill_n(x, kTermsBlock, 0.0f);
      if (!softmax) block.high = kNothing, block.low = -kNothing;
      if (!positives) std::fill_n(block.weight, kTermsBlock, 0.0f);
    }
    return {blocks.data(), softmax, positives};
  }

  struct Row {
    float shift, coef, weight, bias;
    int id, index;
  };
  Row operator[](int i) const {
    const TermsBlock& block = blocks[i / kTermsBlock];
    const int at = i % kTermsBlock;
    return {block.shift[at], block.coef[at], block.weight[at], block.bias[at], block.id[at], block.index[at]};
  }
};

template <typename T>
void check_gradient(const Case& c, Positives positives, bool both_sides, float spread, int first_row,
                    int last_row) {
  Matrix<T> x(c.n, c.d, 1), y(c.m, c.d, 1);
  const std::vector<float> bias = c.biased ? numbers(c.m, -0.5, 0.5) : std::vector<float>();
  const std::vector<float> mask = numbers(c.n * c.m, 0, 1);
  RandomTerms own(c.n, c.m, spread, labels(c.n), {}), other(c.m, c.n, spread, labels(c.m), bias);
  const float bound = 3;
  GradientRules rules{};
  rules.pairs = {c.n,     c.m,    c.offset != INT_MAX, c.offset == INT_MAX ? 0 : c.offset, false, c.among,
                 nullptr, nullptr};
  rules.scale = {nullptr, c.scale};
  rules.own = own.terms(true, true);
  rules.other = other.terms(both_sides, both_sides && positives != kMask);
  rules.biased = c.biased;
  rules.positives = positives;
  rules.mask = mask.data(), rules.mask_rows = c.n, rules.mask_columns = c.m;
  rules.mask_row_stride = c.m, rules.mask_column_stride = 1;
  rules.bound = std::is_same_v<T, half_t> ? &bound : nullptr;

  const int stride = round_up(c.m, 8), rows = last_row - first_row;
  std::vector<T> out(rows * stride + 8, from_float<T>(NAN));
  T* first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(out.data()) + 15) / 16 * 16);
  launch_gradient_tiles_sm90({features_of(x, y), rules, first_row, last_row, 0, first, stride},
                             type_of_element<T>(), nullptr);
  const double lift = std::exp2(half_lift(rules.bound)), unit = std::is_same_v<T, bf16_t> ? 0x1p-8 : 0x1p-11;
  for (int i = first_row; i < last_row; ++i)
    for (int j = 0; j < c.m; ++j) {
      const RandomTerms::Row row = own[i], column = other[j];
      const double s = (dot(x, i, y, j) * c.scale + column.bias) / kLn2;
      double want = 0, size = 0;
      auto add = [&](double term) { want += term * lift, size += std::fabs(term * lift); };
      if (counts(rules.pairs, i, j)) {
        if (among_counts(c.among, row.id, column.id)) {
          add(row.coef * std::exp2(s - row.shift));
          if (rules.other.softmax) add(column.coef * std::exp2(s - column.shift));
        }
        const bool alike = row.id == column.id;
        if (positives == kLabels && alike) add(row.weight);
        if (positives == kLabels && alike && rules.other.positives) add(column.weight);
        if (positives == kMask) add(row.weight * mask[i * c.m + j]);
      }
      if (positives == kIndex && row.index == j) add(row.weight);
      if (positives == kIndex && rules.other.positives && column.index == i) add(column.weight);
      compare("gradient " + c.name() + " positives " + std::to_string(positives),
              to_float(first[(i - first_row) * stride + j]), want,
              unit * std::fabs(want) + 2e-6 * (1 + c.scale) * size + 1e-7, "element", i * c.m + j);
    }
}

template <typename T>
void check_all() {
  const int sizes[][3] = {{300, 170, 64},  {128, 128, 128}, {1, 1, 1},       {5, 700, 24},
                          {257, 400, 100}, {300, 300, 136}, {200, 520, 300}, {130, 257, 600}};
  for (const auto& [n, m, d] : sizes) {
    check_lse<T>({n, m, d});
    check_lse<T>({.n = n, .m = m, .d = d, .columns = true, .offset = 3, .scale = 20});
    check_similarity<T>(n, m, d, false, round_up(m, 8), 0);
    const int last = std::min(n, 250), first = n > 128 && d < 300 ? 128 : 0;
    check_gradient<T>({.n = n, .m = m, .d = d, .offset = 0, .scale = 3}, kIndex, true, 8, first, last);
  }
  for (int n : {1, 2, 130, 600}) {
    check_lse<T>({.n = n, .m = n, .d = 40, .mirrored = true, .columns = true, .offset = 0, .scale = 10});
    check_lse<T>({.n = n, .m = n, .d = 290, .mirrored = true, .columns = true, .among = kDifferent});
  }
  check_lse<T>({.n = 1300, .m = 1300, .d = 16, .mirrored = true, .columns = true, .at_once = 1});
  check_lse<T>({.n = 1300, .m = 900, .d = 16, .columns = true, .at_once = 1});
  check_lse<T>({.n = 900, .m = 600, .d = 200, .columns = true, .at_once = 1});
  check_lse<T>({.n = 600, .m = 600, .d = 450, .mirrored = true, .columns = true, .at_once = 1});
  check_lse<T>({.n = 700, .m = 700, .d = 520, .mirrored = true, .columns = true, .at_once = 1});
  check_lse<T>(
      {.n = 300, .m = 290, .d = 72, .biased = true, .offset = 100, .among = kDifferent, .scale = -40});
  // A width of each loop: alone, a cluster of two, of four.
  for (int d : {40, 264, 516}) {
    check_lse<T>({.n = 900, .m = 900, .d = d, .mirrored = true, .columns = true, .at_once = 1});
    check_lse<T>({.n = 300,
                  .m = 290,
                  .d = d,
                  .columns = true,
                  .biased = true,
                  .offset = -100,
                  .among = kSame,
                  .scale = 40});
    check_similarity<T>(150, 301, d, true, 301, 0);
    check_similarity<T>(150, 304, d, true, 312, 3);
    for (Positives positives : {kNoPositives, kLabels, kIndex, kMask}) {
      check_gradient<T>({.n = 150, .m = 270, .d = d, .scale = 2}, positives, false, 8, 0, 150);
      check_gradient<T>(
          {.n = 150, .m = 270, .d = d, .biased = true, .offset = 20, .among = kSame, .scale = 2}, positives,
          true, 90, 128, 150);
    }
  }
}

}  // namespace

int main() {
  check_all<bf16_t>();
  check_all<half_t>();
  std::printf("%d faults\n", faults);
  return faults != 0;
}
