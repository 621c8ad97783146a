// SGD with (Nesterov) momentum -- Sutskever et al. 2013: m <- mu m + g.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

struct Sgd : Rule {
    static constexpr const char* kName = "sgd";
    static constexpr uint32_t kPlainLoops = kNothing | kHalfAlone | kDenseAlone;
    HD static void prepare(const Options& o, Hyper& h) { h.momentum = float(o.beta1); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        if (h.momentum == 0.f) return g;
        s.fast = s.fast * h.momentum + g;
        return has(h, kNesterov) ? g + s.fast * h.momentum : s.fast;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
