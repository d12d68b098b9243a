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
  int processors = 2;

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
  const Schedule s = schedule(c.n, c.m, c.mirrored, c.processors);
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
  std::vector<float> shift, coef, weight, level, high, low;
  std::vector<int> index, index_low, index_high;

  RandomTerms(int n, int m, float spread) {
    const int padded = round_up(n, kTermsPadding), blocks = padded / kTermsBlock;
    shift = numbers(padded, 3, 3 + spread), coef = numbers(padded, 0, 1), weight = numbers(padded, -1, 0);
    for (int i = 0; i < padded; ++i) {
      index.push_back(i < n ? static_cast<int>(generator() % (m + 1)) - 1 : -1);
      if (i >= n) shift[i] = coef[i] = weight[i] = 0;
    }
    level.resize(padded), high.assign(blocks, kNothing), low.assign(blocks, -kNothing);
    index_low.assign(blocks, INT_MAX), index_high.assign(blocks, -1);
    for (int i = 0; i < n; ++i) {
      const int block = i / kTermsBlock;
      high[block] = std::max(high[block], shift[i]), low[block] = std::min(low[block], shift[i]);
      if (index[i] < 0) continue;
      index_low[block] = std::min(index_low[block], index[i]);
      index_high[block] = std::max(index_high[block], index[i]);
    }
    for (int i = 0; i < n; ++i)
      level[i] = coef[i] * std::exp2(std::min(high[i / kTermsBlock] - shift[i], 120.0f));
  }
  Terms terms(bool softmax, bool positives) const {
    return {shift.data(), coef.data(),      weight.data(),     level.data(), high.data(),
            low.data(),   index_low.data(), index_high.data(), softmax,      positives};
  }
};

template <typename T>
void check_gradient(const Case& c, Positives positives, bool both_sides, float spread, int first_row,
                    int last_row) {
  Matrix<T> x(c.n, c.d, 1), y(c.m, c.d, 1);
  const std::vector<int> own_ids = labels(c.n), other_ids = labels(c.m);
  const RandomTerms own(c.n, c.m, spread), other(c.m, c.n, spread);
  const std::vector<float> bias = numbers(c.m, -0.5, 0.5), mask = numbers(c.n * c.m, 0, 1);
  const float bound = 3;
  GradientRules rules{};
  rules.pairs = {c.n,   c.m,     c.offset != INT_MAX, c.offset == INT_MAX ? 0 : c.offset,
                 false, c.among, own_ids.data(),      other_ids.data()};
  rules.scale = {nullptr, c.scale};
  rules.own = own.terms(true, true);
  rules.other = other.terms(both_sides, both_sides && positives != kMask);
  rules.other_bias = c.biased ? bias.data() : nullptr;
  rules.positives = positives;
  rules.own_index = own.index.data(), rules.other_index = other.index.data();
  rules.mask = mask.data(), rules.mask_rows = c.n, rules.mask_columns = c.m;
  rules.mask_row_stride = c.m, rules.mask_column_stride = 1;
  rules.bound = std::is_same_v<T, half_t> ? &bound : nullptr;

  const int stride = round_up(c.m, 8), rows = last_row - first_row;
  std::vector<T> out(rows * stride + 8, from_float<T>(NAN));
  T* first = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(out.data()) + 15) / 16 * 16);
  launch_gradient_tiles_sm90({features_of(x, y), rules, first_row, last_row, first, stride},
                             type_of_element<T>(), nullptr);
  const double lift = std::exp2(half_lift(rules.bound)), unit = std::is_same_v<T, bf16_t> ? 0x1p-8 : 0x1p-11;
  for (int i = first_row; i < last_row; ++i)
    for (int j = 0; j < c.m; ++j) {
      const double s = (dot(x, i, y, j) * c.scale + (c.biased ? bias[j] : 0)) / kLn2;
      double want = 0, size = 0;
      auto add = [&](double term) { want += term * lift, size += std::fabs(term * lift); };
      if (counts(rules.pairs, i, j)) {
        if (among_counts(c.among, own_ids[i], other_ids[j])) {
          add(own.coef[i] * std::exp2(s - own.shift[i]));
          if (rules.other.softmax) add(other.coef[j] * std::exp2(s - other.shift[j]));
        }
        const bool alike = own_ids[i] == other_ids[j];
        if (positives == kLabels && alike) add(own.weight[i]);
        if (positives == kLabels && alike && rules.other.positives) add(other.weight[j]);
        if (positives == kMask) add(own.weight[i] * mask[i * c.m + j]);
      }
      if (positives == kIndex && own.index[i] == j) add(own.weight[i]);
      if (positives == kIndex && rules.other.positives && other.index[j] == i) add(other.weight[j]);
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
  check_lse<T>({.n = 1300, .m = 1300, .d = 16, .mirrored = true, .columns = true, .processors = 1});
  check_lse<T>({.n = 1300, .m = 900, .d = 16, .columns = true, .processors = 1});
  check_lse<T>({.n = 900, .m = 600, .d = 200, .columns = true, .processors = 1});
  check_lse<T>({.n = 600, .m = 600, .d = 450, .mirrored = true, .columns = true, .processors = 1});
  check_lse<T>({.n = 700, .m = 700, .d = 520, .mirrored = true, .columns = true, .processors = 1});
  check_lse<T>({.n = 300,
                .m = 290,
                .d = 72,
                .columns = true,
                .biased = true,
                .offset = -100,
                .among = kSame,
                .scale = 40});
  check_lse<T>(
      {.n = 300, .m = 290, .d = 72, .biased = true, .offset = 100, .among = kDifferent, .scale = -40});
  check_similarity<T>(150, 301, 90, true, 301, 0);
  check_similarity<T>(150, 304, 90, true, 312, 3);
  for (Positives positives : {kNoPositives, kLabels, kIndex, kMask}) {
    check_gradient<T>({.n = 150, .m = 270, .d = 40, .scale = 2}, positives, false, 8, 0, 150);
    check_gradient<T>({.n = 150, .m = 270, .d = 40, .biased = true, .offset = 20, .among = kSame, .scale = 2},
                      positives, true, 90, 128, 150);
  }
}

}  // namespace

int main() {
  check_all<bf16_t>();
  check_all<half_t>();
  std::printf("%d faults\n", faults);
  return faults != 0;
}
