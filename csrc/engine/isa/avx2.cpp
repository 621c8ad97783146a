// The engine for x86-64 with AVX2 and FMA; setup.py has the compiler's flags.
#if defined(__x86_64__)
#define ENGINE_ISA avx2
#include "engine/isa/define.h"

const engine::Isa engine::kAvx2 = ENGINE_KERNELS("avx2");
#endif
