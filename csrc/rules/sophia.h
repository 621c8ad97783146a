// Sophia -- Liu et al. 2023, https://arxiv.org/abs/2305.14342, Alg. 2 and 3.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

// A step: Alg. 3, lines 6 and 14.  `square` is the curvature, which only estimates change.
struct Sophia : Rule {
    static constexpr const char* kName = "sophia";
    static constexpr uint32_t kPlainLoops = kDensePair;
    static constexpr bool kSquareStored = false;
    HD static void prepare(const Options& o, Hyper& h) { h.curvature = float(o.rho); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.fast = lerp(s.fast, g, h.weight1);
        return clamp(s.fast / max(s.square * h.curvature, F(h.eps)), 1.f);
    }
};

// An estimate: Alg. 3, line 9, of gradients that were multiplied by the root of its scale.  Its
// rounding draws differ from the steps'.
struct Curved : Rule {
    static constexpr const char* kName = "curved";
    static constexpr bool kCounts = false, kModified = false;
    HD static void prepare(const Options&, Hyper& h) {
        h.key = mix(h.key, uint64_t(1) << 32);
        h.passive = 1;
    }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.square = lerp(s.square, g * g, h.weight2);
        return F(0.f);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
