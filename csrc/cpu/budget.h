// How much of a similarity matrix a loss may keep between its two passes over it.
#pragma once

#include <cstdint>

namespace cl_kernels::cpu {

// Bytes; at first those of CL_KERNELS_KEEP_MB, or 64 MB.
int64_t keep_budget();
void set_keep_budget(int64_t bytes);

}  // namespace cl_kernels::cpu
