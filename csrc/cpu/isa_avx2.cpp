#include "isa.h"

#if defined(__x86_64__)
CL_TARGET_BEGIN("avx2,fma")
#define CL_CAPABILITY avx2
#define CL_VECTOR_BYTES 32
#define CL_MICRO_ROWS 6
#define CL_MICRO_VECTORS 2
#include "tiles.inl"
CL_TARGET_END
#endif
