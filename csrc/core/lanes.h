// The lane types, F for floats, U for unsigned integers, D for doubles and Mask for comparisons: a
// pack of sixteen on a CPU, of four in each thread of a GPU.
#pragma once

#define RARELY(condition) __builtin_expect(condition, 0)
#if defined(__CUDACC_RTC__)
#define TRUST(condition) __builtin_assume(condition)  // a GPU issues untaken branches, too
#else
#define TRUST(condition)
#endif

#if defined(ENGINE_CUDA)
#include "core/lanes_cuda.h"
#else
#include "core/memory_cpu.h"
#endif
