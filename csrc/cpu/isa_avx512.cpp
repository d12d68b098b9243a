#include "isa.h"

#if defined(__x86_64__)
CL_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,fma")
#define CL_CAPABILITY avx512
#define CL_VECTOR_BYTES 64
#define CL_MICRO_ROWS 8
#define CL_MICRO_VECTORS 2
#include "tiles.inl"
CL_TARGET_END
#endif
