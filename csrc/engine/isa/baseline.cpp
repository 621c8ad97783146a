// The engine for the compiler's default target: SSE2 on x86-64, NEON on arm64.
#define ENGINE_ISA baseline
#include "engine/isa/define.h"

const engine::Isa engine::kBaseline = ENGINE_KERNELS("baseline");
