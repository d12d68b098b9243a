// Chooses the instruction set, once, when the library is first used.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "tiles.h"

namespace cl_kernels::cpu {

namespace baseline {
const CapabilityTables& tables();
}
#if defined(__x86_64__)
namespace avx2 {
const CapabilityTables& tables();
}
namespace avx512 {
const CapabilityTables& tables();
}
namespace avx512_bf16 {
const CapabilityTables& tables();
}
#endif

namespace {

// What this machine can run, narrowest first.
const std::vector<const CapabilityTables*>& available() {
  static const std::vector<const CapabilityTables*> list = [] {
    std::vector<const CapabilityTables*> found{&baseline::tables()};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back(&avx2::tables());
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512::tables());
        if (__builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::tables());
      }
    }
#endif
    return found;
  }();
  return list;
}

const CapabilityTables* find(const std::string& name) {
  for (const CapabilityTables* tables : available())
    if (name == tables->name) return tables;
  std::string known;
  for (const CapabilityTables* tables : available())
    known += std::string(known.empty() ? "" : ", ") + tables->name;
  throw std::invalid_argument("CPU capability must be one of " + known + " on this machine, got '" + name +
                              "'");
}

std::atomic<const CapabilityTables*>& current() {
  static std::atomic<const CapabilityTables*> tables{[] {
    const char* asked = std::getenv("CL_KERNELS_CPU_CAPABILITY");
    return asked && *asked ? find(asked) : available().back();
  }()};
  return tables;
}

}  // namespace

template <>
const TileKernels<Float32>& tile_kernels<Float32>() {
  return *current().load()->float32;
}
template <>
const TileKernels<Float64>& tile_kernels<Float64>() {
  return *current().load()->float64;
}
template <>
const TileKernels<BFloat16>& tile_kernels<BFloat16>() {
  return *current().load()->bfloat16;
}

bool has_bfloat16_dot() {
  return current().load()->bfloat16 != nullptr;
}

std::string capability() {
  return current().load()->name;
}

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (const CapabilityTables* tables : available()) names.emplace_back(tables->name);
  return names;
}

void set_capability(const std::string& name) {
  current().store(find(name));
}

}  // namespace cl_kernels::cpu
