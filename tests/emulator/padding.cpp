// Kernels that load rows a vector at a time, on rows that end with their memory. Compiled with
// AddressSanitizer, a read past the end of one ends the program.
#include <cstdio>
#include <cstring>

#include "lse.h"
#include "positive_rows.h"
#include "similarity_rows.h"

using namespace cl_kernels::cuda;

namespace {

// Memory of `count` elements and no more, all 1.
template <typename T>
struct Exact {
  T* data;
  explicit Exact(int64_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {
    for (int64_t i = 0; i < count; ++i) data[i] = static_cast<T>(1.0f);
  }
  ~Exact() { std::free(data); }
};

// Two rows of d features; the second ends with the memory.
template <typename T>
void run(Type type, int d) {
  const int64_t stride = round_up<int64_t>(d, 16 / sizeof(T)), prototype_stride = round_up(d, 8);
  constexpr int n = 2;
  const Exact<T> x(stride + d), y(stride + d), unit(2 * stride);
  const Exact<float> rnorm(n), prototypes(prototype_stride + d);
  Bounds bounds = {};
  launch_bounds({x.data, y.data, stride, stride, n, n, d}, nullptr, &bounds, type, nullptr);
  launch_row_norms({x.data, stride, n, d, rnorm.data, unit.data, stride}, type, nullptr);
  const double counts[n] = {1, 1};
  const int ids[n] = {0, 1};
  double sum[n], count[n];
  PositiveRowsParams p = {};
  p.q = x.data, p.k = y.data, p.q_stride = p.k_stride = stride;
  p.n = p.m = n, p.d = d, p.scale = {nullptr, 1.0f};
  p.prototypes = prototypes.data, p.prototype_stride = prototype_stride;
  p.counts = counts, p.row_ids = p.col_ids = ids, p.excludes = true;
  p.sum = sum, p.count = count;
  launch_positive_rows(p, type, nullptr);
}

}  // namespace

int main(int, char** arguments) {
  if (std::strcmp(arguments[1], "past the end") == 0) {
    const Exact<float> x(5);
    volatile float read = load_vec(x.data + 4).x[1];
    std::printf("%f\n", read);
    return 0;
  }
  for (int d = 1; d < 20; ++d) {
    run<float>(Type::kFloat, d);
    run<half_t>(Type::kHalf, d);
    run<bf16_t>(Type::kBf16, d);
  }
  return 0;
}
