// The lane types, F for floats, U for unsigned integers, D for doubles and Mask for comparisons: a
// pack of sixteen on a CPU, a single one on a GPU, where every thread is a lane.
#pragma once

#define RARELY(condition) __builtin_expect(condition, 0)

#if defined(ENGINE_CUDA)
#include "core/lanes_cuda.h"
#else
#include "core/memory_cpu.h"
#endif
