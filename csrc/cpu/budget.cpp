#include "budget.h"

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
}

at::Tensor take_memory(int64_t bytes) {
  at::Tensor memory;
  {
    const std::lock_guard lock(spare().mutex);
    std::swap(memory, spare().memory);
  }
  if (memory.defined() && memory.numel() >= bytes) return memory;
  memory.reset();
  return large_empty<uint8_t>({bytes});
}

void leave_memory(const at::Tensor& memory) {
  const std::lock_guard lock(spare().mutex);
  const bool larger = !spare().memory.defined() || spare().memory.numel() < memory.numel();
  if (larger && keep_budget() > 0) spare().memory = memory;
}

}  // namespace cl_kernels::cpu
