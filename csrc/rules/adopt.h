// ADOPT -- Taniguchi et al. 2024, https://arxiv.org/abs/2411.02853, Alg. 2: normalise by the
// previous second moment, clip at t^(1/4), then average.  The first step only initialises the
// second moment.
#pragma once

#include "rules/adam.h"

namespace engine {
namespace ENGINE_ISA {

struct Adopt : Rule {
    static constexpr const char* kName = "adopt";
    static constexpr uint32_t kPlainLoops = kFactoredTriple | kFactoredPair | kDensePair;
    static constexpr int64_t kOwnFlags = kSlowMoment;
    static constexpr bool kRoot = true;

    HD static void prepare(const Options& o, Hyper& h) {
        prepare_slow(o, h);
        h.limit = float(::pow(double(h.t - 1), 0.25));
        h.passive = h.t == 1;
    }

    HD static bool is_usual(const Hyper& h) { return are_slow(h); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        if (h.passive) {
            s.square = g * g;
            return F(0.f);
        }
        F n = has(h, kAtan2) ? atan2(g, s.root) * kFourOverPi
                             : clamp(g / max(s.root, F(h.eps)), h.limit);
        s.fast = lerp(s.fast, n, h.weight1);
        F numerator = mixed(h, s.fast, n, s);
        s.square = lerp(s.square, g * g, h.weight2);
        return numerator;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
