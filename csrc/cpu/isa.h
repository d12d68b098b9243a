// Everything that tiles.inl needs from outside, included before any target option is set.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "tiles.h"

namespace cl_kernels::cpu {

// 2^f on [-1/2, 1/2]; lowest degree first.
constexpr float kExp2Float[7] = {1.0f,
                                 6.931472029e-01f,
                                 2.402264791e-01f,
                                 5.550332470e-02f,
                                 9.618437357e-03f,
                                 1.339887487e-03f,
                                 1.535336322e-04f};
constexpr double kExp2Double[14] = {1.0,
                                    0.6931471805599453,
                                    0.24022650695910072,
                                    0.05550410866482158,
                                    0.009618129107628477,
                                    0.0013333558146428443,
                                    0.0001540353039338161,
                                    1.5252733804059841e-05,
                                    1.321548679014431e-06,
                                    1.01780860092397e-07,
                                    7.054911620801123e-09,
                                    4.4455382718708116e-10,
                                    2.5678435993488206e-11,
                                    1.3691488853904128e-12};

}  // namespace cl_kernels::cpu

#define CL_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define CL_TARGET_BEGIN(options) \
  CL_PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define CL_TARGET_END _Pragma("clang attribute pop")
#else
#define CL_TARGET_BEGIN(options) _Pragma("GCC push_options") CL_PRAGMA(GCC target(options))
#define CL_TARGET_END _Pragma("GCC pop_options")
#endif
