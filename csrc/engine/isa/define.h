// What every instruction set's file has in common.
//
// Each compiles the same headers in a namespace of its own, so that no inline function of one is
// ever linked into another.
#pragma once

#include "engine/isa.h"
#include "engine/kernels.h"

#define ENGINE_KERNELS(name)                        \
    {name,                                          \
     engine::ENGINE_ISA::Rules::kNames,             \
     engine::ENGINE_ISA::Rules::kCount,             \
     engine::ENGINE_ISA::Exec::kStripTiles,         \
     engine::ENGINE_ISA::wants,                     \
     engine::ENGINE_ISA::run_tensor,                \
     engine::ENGINE_ISA::run_strip,                 \
     engine::ENGINE_ISA::projected::run_projection, \
     engine::ENGINE_ISA::projected::multiplies_pairs}
