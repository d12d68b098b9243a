#include "budget.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

#include "memory.h"

namespace cl_kernels::cpu {
namespace {

std::atomic<int64_t>& budget() {
  static std::atomic<int64_t> bytes{[] {
    const char* asked = std::getenv("CL_KERNELS_KEEP_MB");
    if (!asked || !*asked) return int64_t{64} << 20;
    char* end;
    const double megabytes = std::strtod(asked, &end);
    TORCH_CHECK_VALUE(*end == 0 && megabytes >= 0 && megabytes < 1e9,
                      "CL_KERNELS_KEEP_MB must be a number of MB, got '", asked, "'");
    return static_cast<int64_t>(megabytes * (1 << 20));
  }()};
  return bytes;
}

struct Spare {
  std::mutex mutex;
  at::Tensor memory;
  int64_t changes = 0;  // of the budget
};

Spare& spare() {
  static Spare& at_exit_too = *new Spare;
  return at_exit_too;
}

}  // namespace

int64_t keep_budget() {
  return budget().load();
}

void set_keep_budget(int64_t bytes) {
  budget().store(bytes);
  const std::lock_guard lock(spare().mutex);
  spare().memory.reset();
  ++spare().changes;
}

KeptMemory take_memory(int64_t bytes) {
  KeptMemory taken;
  {
    const std::lock_guard lock(spare().mutex);
    std::swap(taken.bytes, spare().memory);
    taken.changes = spare().changes;
  }
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (!taken.bytes.defined() || taken.bytes.numel() < bytes || filled) {
    taken.bytes.reset();
    taken.bytes = large_empty<uint8_t>({bytes});
  }
  return taken;
}

void leave_memory(const KeptMemory& left) {
  const std::lock_guard lock(spare().mutex);
  const bool larger = !spare().memory.defined() || spare().memory.numel() < left.bytes.numel();
  if (larger && left.changes == spare().changes) spare().memory = left.bytes;
}

}  // namespace cl_kernels::cpu
