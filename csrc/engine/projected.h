// What APOLLO's projections share on all devices: the key of P, and the factor of a channel.
#pragma once

#include "core/features.h"
#include "engine/projection.h"

namespace engine {
namespace ENGINE_ISA {
namespace projected {

// The key of P at the next step; optim/projection.py draws the same.
HD uint64_t key_of(const Projection& t) {
    const uint64_t gaps = uint64_t(*t.count / t.update_gap);
    return chain(mix(t.seed, uint64_t(t.index), gaps), 'P');
}

// The length of a channel's step relative to its P G, times gain; 0 if P G has no length.
HD float ratio(double step_sq, double low_sq, float gain) {
    const double low = ::sqrt(low_sq);
    return low > 1e-30 ? float(::sqrt(step_sq) / low) * gain : 0.f;
}

}  // namespace projected
}  // namespace ENGINE_ISA
}  // namespace engine
