// Lion -- Chen et al. 2023, https://arxiv.org/abs/2302.06675, Alg. 2.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

struct Lion : Rule {
    static constexpr const char* kName = "lion";
    static constexpr uint32_t kPlainLoops = kSignAlone | kCodedAlone | kHalfAlone | kDenseAlone;
    HD static void prepare(const Options&, Hyper&) {}

    HD static bool is_usual(const Hyper& h) { return are_slow(h); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        F u = sign(lerp(s.fast, g, h.weight1));
        s.fast = lerp(s.fast, g, h.weight2);
        return u;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
