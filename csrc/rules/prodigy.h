// Prodigy -- Mishchenko & Defazio 2023, https://arxiv.org/abs/2306.06101, Alg. 4: Adam, or Lion, on
// d g with steps of d lr.  d comes from the steps before; optim/prodigy.py updates it.
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

struct DistanceAdapted : Rule {
    static constexpr int64_t kOwnFlags = kSafeguardWarmup | kBiasCorrection;
    static constexpr bool kSampled = true;

    HD static bool is_usual(const Hyper& h) { return are_slow(h); }

    HD static void prepare(const Options& o, Hyper& h) {
        double correction = 1;
        if (has(h, kBiasCorrection))
            correction =
                ::sqrt(1 - ::pow(o.beta2, double(h.t))) / (1 - ::pow(o.beta1, double(h.t)));
        find(o, h, correction);
        h.eps = float(double(h.d) * o.eps);
        if (!h.learns) h.weight1 = h.weight2 = 0.f;  // averages do not change, as in prodigyopt
    }

    // The rate, d lr times this correction, and what the step adds to the sums that d comes from.
    HD static void find(const Options& o, Hyper& h, double correction) {
        h.lr = h.d * float(o.lr * correction);
        h.decay = float(double(h.lr) * o.weight_decay);
        // d / d0 where the paper has d, so that sums do not underflow (its implementation remark).
        const float growth = h.d / float(o.d0);
        h.learns = o.lr > 0;
        h.sum_decay = float(o.beta3);
        h.sum_weight = growth * (has(h, kSafeguardWarmup) ? h.d : h.lr);
        h.progress_weight = growth * h.lr;
    }
};

struct Prodigy : DistanceAdapted {
    static constexpr const char* kName = "prodigy";
    static constexpr uint32_t kPlainLoops = kFactoredPair | kDensePair;
    static constexpr bool kOwnScale = true;

    HD static void prepare(const Options& o, Hyper& h) {
        DistanceAdapted::prepare(o, h);
        if (has(h, kAtan2)) h.direction_scale = kFourOverPi;
    }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        const F dg = g * h.d;
        s.fast = lerp(s.fast, dg, h.weight1);
        s.square = lerp(s.square, dg * dg, h.weight2);
        if (has(h, kAtan2)) return atan2(s.fast, sqrt(s.square));
        return over_root(s.fast, s.square, h.eps);
    }
};

// Both averages are of d g, so that momentum and gradient keep their proportion while d grows.
struct LionProdigy : DistanceAdapted {
    static constexpr const char* kName = "lion_prodigy";
    static constexpr uint32_t kPlainLoops = kDenseAlone;
    HD static F direction(const Hyper& h, F g, Moments& s) {
        const F dg = g * h.d;
        const F u = sign(lerp(s.fast, dg, h.weight1));
        s.fast = lerp(s.fast, dg, h.weight2);
        return u;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
