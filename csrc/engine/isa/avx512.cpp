// The engine for x86-64 with AVX-512 (F, BW, DQ, VL) and FMA; setup.py has the compiler's flags.
#if defined(__x86_64__)
#define ENGINE_ISA avx512
#include "engine/isa/define.h"

const engine::Isa engine::kAvx512 = ENGINE_KERNELS("avx512");
#endif
