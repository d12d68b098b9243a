// The instruction set that every machine of this architecture has: SSE2 on x86-64, NEON on aarch64.
#include "isa.h"

#define CL_CAPABILITY baseline
#define CL_VECTOR_BYTES 16
#define CL_MICRO_ROWS 4
#define CL_MICRO_VECTORS 2
#include "tiles.inl"
