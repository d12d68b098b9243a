// The order in which tiles are visited, so that no two threads ever add to the same rows or columns at a time
// and the order of additions does not depend on the number of threads: results are the same bit for bit.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace cl_kernels::cpu {

// Runs task(0 .. count), in parallel if the tasks are worth it. `flops`: floating-point operations of one
// task.
template <typename Task>
void run_tasks(int64_t count, int64_t flops, Task task) {
  constexpr int64_t kWorthAThread = int64_t{1} << 20;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, flops));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

// Every unordered pair of blocks once, visit(a, b) with a <= b: the diagonal, then the rounds of a
// round-robin tournament (the circle method), in which each block plays once.
template <typename Visit>
void visit_triangle(int64_t blocks, int64_t flops, Visit visit) {
  run_tasks(blocks, flops, [&](int64_t a) { visit(a, a); });
  const int64_t players = blocks + blocks % 2;
  for (int64_t round = 0; round + 1 < players; ++round) {
    run_tasks(players / 2, flops, [&](int64_t pair) {
      const int64_t ring = players - 1;
      const int64_t a = pair == 0 ? players - 1 : (round + pair) % ring;
      const int64_t b = pair == 0 ? round : (round - pair + ring) % ring;
      if (std::max(a, b) < blocks) visit(std::min(a, b), std::max(a, b));
    });
  }
}

// Every pair (row block, column block) once, in rounds in which no row block and no column block comes twice.
template <typename Visit>
void visit_rectangle(int64_t row_blocks, int64_t col_blocks, int64_t flops, Visit visit) {
  const int64_t fewer = std::min(row_blocks, col_blocks), more = std::max(row_blocks, col_blocks);
  for (int64_t round = 0; round < more; ++round) {
    run_tasks(fewer, flops, [&](int64_t a) {
      const int64_t b = (a + round) % more;
      if (row_blocks <= col_blocks)
        visit(a, b);
      else
        visit(b, a);
    });
  }
}

// Rows (or columns) of a tile: large enough for the products to run at full speed, small enough for some
// sixteen tasks a round where n is large. It depends on the sizes alone, never on the number of threads.
inline int64_t triangle_block(int64_t n) {
  return n <= 256 ? 32 : n <= 1024 ? 64 : n <= 4096 ? 128 : 256;
}
inline int64_t rectangle_block(int64_t n) {
  return triangle_block(2 * n);
}

}  // namespace cl_kernels::cpu
