// Adafactor -- Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235, Alg. 4 (matrices), 5
// (vectors).
#pragma once

#include "core/features.h"

namespace engine {
namespace ENGINE_ISA {

// A vector: the second moment is kept in full.
struct AdafactorVector : Rule {
    static constexpr const char* kName = "adafactor";
    static constexpr int64_t kOwnFlags = kClipLagged;
    HD static void prepare(const Options& o, Hyper& h) {
        if (o.flags & kFixedBeta2) {
            h.inv_bias2 = 1 / (1 - ::pow(o.beta2, double(h.t)));
        } else {
            h.beta2 = 1 - ::pow(double(h.t), o.beta2_decay);
            h.inv_bias2 = 1;
        }
        h.weight2 = float(1 - h.beta2);
        h.square_scale = float(h.inv_bias2);
        if (o.flags & kFirstMoment) h.settled_scale = float(1 / (1 - ::pow(o.beta1, double(h.t))));
    }

    HD static F direction(const Hyper& h, F g, Moments& s) {
        s.square = lerp(s.square, g * g, h.weight2);
        return g / sqrt(max(s.square * h.square_scale + h.eps, F(0x1p-126f)));
    }

    // The first moment averages the clipped update.
    HD static F settled(const Hyper& h, F u, Moments& s) {
        if (!has(h, kFirstMoment)) return u;
        s.fast = lerp(s.fast, u, h.weight1);
        return s.fast;
    }
};

// A matrix: its row and column means were updated in a pass of their own (engine/tensor.h), and
// `square` is 1 / sqrt(v) from them; v's floor is the smallest normal number.
struct AdafactorMatrix : AdafactorVector {
    static constexpr bool kSquareStored = false, kSquareFirst = true;
    static constexpr uint32_t kPlainLoops = kSquareAlone;
    HD static F direction(const Hyper&, F g, Moments& s) { return g * min(s.square, F(0x1p63f)); }
};

}  // namespace ENGINE_ISA
}  // namespace engine
