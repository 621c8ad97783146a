// The instruction sets of one binary; which of them runs is chosen at run time.
#pragma once

#include "engine/projection.h"

namespace engine {

// The engine as compiled for one instruction set.
struct Isa {
    const char* name;
    const char* const* rules;  // their names, in the order of Launch::rule
    int num_rules;
    int strip_tiles;  // most tiles that run_strip takes together
    bool (*wants)(Phase pass, const Launch&, int64_t member);
    void (*run_tensor)(Phase, const Launch&, int64_t member);
    void (*run_strip)(Phase pass, const Launch&, int64_t tile);
    void (*run_projection)(ProjectionStep, const Projections&, int64_t number, float* panel);
    bool (*multiplies_pairs)();
};

extern const Isa kBaseline;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

}  // namespace engine
