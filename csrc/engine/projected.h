// What APOLLO's projections are on every device: the key of P, and the factor of a channel.
#pragma once

#include "core/features.h"
#include "engine/projection.h"

namespace engine {
namespace ENGINE_ISA {
namespace projected {

// Of P as it is at the next step: optim/projection.py draws the same.
HD uint64_t key_of(const Projection& t) {
    const uint64_t gaps = uint64_t(*t.count / t.update_gap);
    return chain(mix(t.seed, uint64_t(t.index), gaps), 'P');
}

// How much longer a channel's step is than its P G, 0 where this has no length.
HD float ratio(double step_sq, double low_sq, float gain) {
    const double low = ::sqrt(low_sq);
    return low > 1e-30 ? float(::sqrt(step_sq) / low) * gain : 0.f;
}

}  // namespace projected
}  // namespace ENGINE_ISA
}  // namespace engine
