// APOLLO -- Zhu et al. 2024, https://arxiv.org/abs/2412.05270, Alg. 1, the last two lines: the
// gradient, with each of its channels multiplied by a factor that optim/projected.py has computed.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

struct Scaled : Rule {
    static constexpr const char* kName = "scaled";
    static constexpr bool kCounts = false, kSquareStored = false;
    static constexpr uint32_t kPlainLoops = kGivenAlone;
    HD static void prepare(const Options&, Hyper&) {}
    HD static F direction(const Hyper&, F g, Moments& s) { return g * s.square; }
};

}  // namespace ENGINE_ISA
}  // namespace engine
