// Adam -- Kingma & Ba 2014, https://arxiv.org/abs/1412.6980, Alg. 1; AdEMAMix with a slow average.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

// beta3 and alpha of AdEMAMix at step t: both grow over warmup_steps, beta3 linearly in half-life
// (Pagliardini et al. 2024, https://arxiv.org/abs/2409.03137, Alg. 1).
HD void prepare_slow(const Options& o, Hyper& h) {
    if (!has(h, kSlowMoment)) return;
    double progress = o.warmup_steps > 0 ? double(h.t) / o.warmup_steps : 1.0;
    if (progress > 1) progress = 1;
    double beta3 = o.beta3;
    if (progress < 1 && o.beta1 > 0 && beta3 > 0) {
        double log1 = ::log(o.beta1), log3 = ::log(beta3);
        double warm = ::exp(log1 * log3 / ((1 - progress) * log3 + progress * log1));
        beta3 = warm < beta3 ? warm : beta3;
    }
    h.weight3 = float(1 - beta3);
    h.alpha = float(o.alpha * progress);
}

struct Adam : Rule {
    static constexpr const char* kName = "adam";
    static constexpr uint32_t kPlainLoops =
        kFactoredTriple | kFactoredPair | kCodedPair | kHalfPair | kDenseTriple | kDensePair;
    static constexpr int64_t kOwnFlags = kSlowMoment;
    static constexpr bool kOwnScale = true;

    // The bias corrections c1, c2 are moved out of the arithmetic of elements:
    //   (m / c1) / (sqrt(v / c2) + eps) = sqrt(c2) / c1 * m / (sqrt(v) + eps sqrt(c2)).
    HD static void prepare(const Options& o, Hyper& h) {
        double correction1 = 1 - ::pow(o.beta1, double(h.t));
        double root_correction2 = ::sqrt(1 - ::pow(o.beta2, double(h.t)));
        prepare_slow(o, h);
        h.alpha = float(double(h.alpha) * correction1);
        h.eps = float(o.eps * root_correction2);
        h.direction_scale = float(root_correction2 / correction1);
        if (o.flags & kAtan2) {  // 4/pi atan2(m / c1, sqrt(v / c2)); Everett et al. 2024
            h.atan2_numerator_scale = h.direction_scale;
            h.direction_scale = kFourOverPi;
        }
    }

    HD static bool is_usual(const Hyper& h) { return are_slow(h); }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.fast = lerp(s.fast, g, h.weight1);
        s.square = lerp(s.square, g * g, h.weight2);
        F numerator = mixed(h, s.fast, g, s);
        if (has(h, kAtan2)) return atan2(numerator * h.atan2_numerator_scale, sqrt(s.square));
        return over_root(numerator, s.square, h.eps);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
