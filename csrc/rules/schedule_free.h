// Schedule-Free -- Defazio et al. 2024, https://arxiv.org/abs/2405.15682, Alg. 1, with Adam's
// second moment.  The weights are y; `fast` is the gap y - z, by which z and the average x are
// known.
#pragma once

#include "rules/prodigy.h"

namespace engine {
namespace ENGINE_ISA {

struct ScheduleFree : Rule {
    static constexpr const char* kName = "schedule_free";
    static constexpr bool kModified = false, kWeight = true;
    static constexpr uint32_t kPlainLoops = kCodedAndFactors | kCodedPair | kHalfPair | kDensePair;

    HD static void prepare(const Options& o, Hyper& h) {
        prepare(o, h, o.lr > kLeastRate ? 1 / double(h.t) : 0);
    }

    // A step of z by the rate h.lr; its share of x is then `share`.  With
    // n = g / (sqrt(v / c2) + eps) + weight_decay y
    //   = sqrt(c2) (g / (sqrt(v) + eps sqrt(c2)) + weight_decay / sqrt(c2) y):
    //   y   <- y - lr ((1 - beta1 (1 - share)) n + share / lr gap)
    //   gap <- (1 - share) gap + beta1 (1 - share) lr n
    HD static void prepare(const Options& o, Hyper& h, double share) {
        const double root_correction2 = ::sqrt(1 - ::pow(o.beta2, double(h.t)));
        const double lr = h.lr, of_x = o.beta1 * (1 - share);
        h.eps = float(o.eps * root_correction2);
        h.step_decay = float(o.weight_decay / root_correction2);
        h.step_weight = float((1 - of_x) * root_correction2);
        h.pull = float(share / (lr + 1e-30));
        h.gap_decay = float(1 - share);
        h.gap_weight = float(of_x * lr * root_correction2);
        h.decay = 0.f;  // it is in n
    }

    HD static bool is_usual(const Hyper& h) { return below_half(h.weight2); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.square = lerp(s.square, g * g, h.weight2);
        const F n = fma(F(h.step_decay), s.weight, over_root(g, s.square, h.eps)), gap = s.fast;
        s.fast = fma(F(h.gap_decay), gap, n * h.gap_weight);
        return fma(F(h.pull), gap, n * h.step_weight);
    }

    static constexpr double kLeastRate = 1e-20;  // below it the 1e-30 above would count
};

// Its rate is Prodigy's, and each z weighs the square of its rate in x.
struct ProdigyScheduleFree : DistanceAdapted {
    static constexpr const char* kName = "prodigy_schedule_free";
    static constexpr bool kModified = false, kWeight = true;
    static constexpr uint32_t kPlainLoops = kCodedAndFactors | kHalfPair | kDensePair;

    HD static void prepare(const Options& o, Hyper& h) {
        find(o, h, 1);
        const double weight = double(h.lr) * h.lr;
        h.weight_sum += weight;
        ScheduleFree::prepare(o, h, h.weight_sum > 0 ? weight / h.weight_sum : 0);
    }

    HD static bool is_usual(const Hyper& h) { return ScheduleFree::is_usual(h); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        return ScheduleFree::direction(h, g, s);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
