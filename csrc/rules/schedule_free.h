// Schedule-Free -- Defazio et al. 2024, https://arxiv.org/abs/2405.15682, Alg. 1, with Adam's
// second moment.  The weights are y; `fast` is the gap y - z, by which z and the average x are
// known.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

struct ScheduleFree : Rule {
    static constexpr const char* kName = "schedule_free";
    static constexpr bool kWeightInFast = true;
    static constexpr uint32_t kPlainLoops = kCodedAndFactors | kCodedPair | kDensePair;

    // With n = g / (sqrt(v / c2) + eps) = sqrt(c2) g / (sqrt(v) + eps sqrt(c2)) and c the share of
    // z in x:  y <- y - lr ((1 - beta1 (1 - c)) n + c / lr gap),
    //          gap <- (1 - c) (gap + beta1 lr n).
    // Weight decay is z's, at y: it counts as weight_decay y beside n.
    HD static void prepare(const Options& o, Hyper& h) {
        double root_correction2 = ::sqrt(1 - ::pow(o.beta2, double(h.t)));
        bool moves = o.lr > kLeastRate;
        double share = moves ? 1 / double(h.t) : 0;
        h.eps = float(o.eps * root_correction2);
        double of_x = o.beta1 * (1 - share), to_gap = moves ? of_x * o.lr : 0;
        h.step_weight = float((1 - of_x) * root_correction2);
        h.pull = moves ? float(share / o.lr) : 0.f;
        h.decay = float((1 - of_x) * o.lr * o.weight_decay);
        h.gap_decay = float(1 - share);
        h.gap_weight = float(to_gap * root_correction2);
        h.gap_of_weight = float(to_gap * o.weight_decay);
    }

    HD static bool is_usual(const Hyper& h) { return below_half(h.weight2); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.square = lerp(s.square, g * g, h.weight2);
        F n = over_root(g, s.square, h.eps), gap = s.fast;
        s.fast = fma(F(h.gap_decay), gap, n * h.gap_weight);
        return fma(F(h.pull), gap, n * h.step_weight);
    }

    // Below it c / lr may have no fp32; the weights do not move, and so z must not.
    static constexpr double kLeastRate = 1e-30;
};

}  // namespace ENGINE_ISA
}  // namespace engine
