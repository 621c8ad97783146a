// CAME -- Luo et al. 2023, https://arxiv.org/abs/2307.02047, Alg. 2: Adafactor's clipped update,
// averaged, over the root of its instability, the average of (u - m)^2.  No average is
// bias-corrected.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

// A vector: the second moment is kept in full, and there is no instability.
struct CameVector : Rule {
    static constexpr const char* kName = "came";
    HD static void prepare(const Options&, Hyper& h) { h.inv_bias2 = 1; }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.square = lerp(s.square, g * g, h.weight2);
        return g / sqrt(max(s.square + h.eps, F(0x1p-126f)));
    }
    HD static F settled(const Hyper& h, F u, Moments& s) {
        s.fast = lerp(s.fast, u, h.weight1);
        return s.fast;
    }
};

// A matrix: both factored averages were updated in passes of their own (engine/tensor.h), and
// `square` and `slow` are 1 / sqrt of them.
struct CameMatrix : CameVector {
    static constexpr int64_t kOwnFlags = kGrowthSettled;
    static constexpr bool kSlowStored = false, kSquareStored = false;
    static constexpr bool kSquareFirst = true, kHasResidual = true;

    HD static F direction(const Hyper&, F g, Moments& s) { return g * min(s.square, F(0x1p63f)); }
    HD static F settled(const Hyper& h, F u, Moments& s) {
        return CameVector::settled(h, u, s) * min(s.slow, F(0x1p63f));
    }
    // What the instability averages: the squared distance of the clipped update from its average.
    HD static F residual(F u, const Moments& after) {
        const F apart = u - after.fast;
        return apart * apart;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
