// Modifiers that any rule may have; optim/features.py is the same in Python and cites the papers.
#pragma once

#include "core/random.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

// A constant that can be passed to a function.
template <bool kValue_>
struct Constant {
    static constexpr bool kValue = kValue_;
};

template <class A, class B>
constexpr bool is_same = false;
template <class A>
constexpr bool is_same<A, A> = true;

// A parameter's moments at some elements; for the rules that need them, the root of `square` and
// the weight, both before the step.
struct Moments {
    F fast, slow, square, root, weight;
};

constexpr float kFourOverPi = 1.27323954f;  // makes atan2(x, x) a unit step

HD bool has(const Hyper& h, int64_t flag) { return (h.flags & flag) != 0; }

// fast + alpha * (a slow average of x), if there is one (AdEMAMix).
HD F mixed(const Hyper& h, F fast, F x, Moments& s) {
    if (!has(h, kSlowMoment)) return fast;
    s.slow = lerp(s.slow, x, h.weight3);
    return fma(F(h.alpha), s.slow, fast);
}

// The gradient without its component along the weights, and clipped: both as coefficients.
HD F conditioned(const Hyper& h, F g, F w) {
    if (has(h, kOrthograd)) g = fma(F(-h.rho_low), w, fma(F(-h.rho), w, g));
    return g * h.coefficient;
}

HD bool are_slow(const Hyper& h) { return below_half(h.weight1) && below_half(h.weight2); }

// A step is plain if nothing happens between the rule and the weights: bf16 weights rounded
// stochastically, bf16 gradients, no feature that changes the update element by element.  Most runs
// consist of such steps, so some have a loop of their own, for each storage of the moments.
enum Storage : uint32_t {
    kFactoredTriple = 1 << 0,    // factors and signs twice, and factors
    kFactoredPair = 1 << 1,      // factors and signs, and factors
    kCodedPair = 1 << 2,         // signed float8, and float8
    kDenseTriple = 1 << 3,       // fp32, all
    kDensePair = 1 << 4,         // the same without a slow moment
    kSquareAlone = 1 << 5,       // only a second moment: factors
    kGivenAlone = 1 << 6,        // only factors that are read
    kSignAlone = 1 << 7,         // only a first moment: factors and signs
    kCodedAlone = 1 << 8,        // the same: signed float8
    kDenseAlone = 1 << 9,        // the same: fp32
    kNothing = 1 << 10,          // no moments
    kCodedAndFactors = 1 << 11,  // signed float8, and factors
    kHalfPair = 1 << 12,         // bf16, both
    kHalfAlone = 1 << 13,        // only a first moment: bf16
};
struct Stored {
    uint32_t storage;
    int32_t fast, slow, square;
};
constexpr Stored kStorages[] = {
    {kFactoredTriple, kFactoredSign, kFactoredSign, kFactored},
    {kFactoredPair, kFactoredSign, kAbsent, kFactored},
    {kCodedPair, kSignedFloat8, kAbsent, kFloat8},
    {kDenseTriple, kDense, kDense, kDense},
    {kDensePair, kDense, kAbsent, kDense},
    {kSquareAlone, kAbsent, kAbsent, kFactored},
    {kGivenAlone, kAbsent, kAbsent, kGiven},
    {kSignAlone, kFactoredSign, kAbsent, kAbsent},
    {kCodedAlone, kSignedFloat8, kAbsent, kAbsent},
    {kDenseAlone, kDense, kAbsent, kAbsent},
    {kNothing, kAbsent, kAbsent, kAbsent},
    {kCodedAndFactors, kSignedFloat8, kAbsent, kFactored},
    {kHalfPair, kBf16, kAbsent, kBf16},
    {kHalfAlone, kBf16, kAbsent, kAbsent},
};
HD constexpr uint32_t storage_of(int32_t fast, int32_t slow, int32_t square) {
    for (const Stored& x : kStorages)
        if (x.fast == fast && x.slow == slow && x.square == square) return x.storage;
    return 0;
}
// The flags that a plain step may have: those that do not affect the arithmetic of elements.
constexpr int64_t kPlainFlags = kGradClip | kGrowthLimit | kClipExact | kRelativeStep |
                                kScaleParameter | kFixedBeta2 | kStochastic;

// A rule's defaults: each launch counts as a step, every moment is rewritten, and nothing happens
// between the limiter and the weights.  Its kName is its name in optim/plan.py.
struct Rule {
    static constexpr bool kCounts = true;        // whether it is a step: Tensor::step counts it
    static constexpr uint32_t kPlainLoops = 0;   // Storages whose plain steps have a loop
    static constexpr int64_t kOwnFlags = 0;      // flags that only this rule has
    static constexpr bool kModified = true;      // whether its update may be limited or aligned
    static constexpr bool kSlowStored = true;    // otherwise apply() only reads it
    static constexpr bool kSquareStored = true;  // the same
    static constexpr bool kSquareFirst = false;  // its factors are updated before the update
    static constexpr bool kHasResidual = false;  // the slow moment averages residual()
    static constexpr bool kSampled = false;      // it has state for some elements (samples.h)
    static constexpr bool kRoot = false;         // whether it uses Moments::root
    static constexpr bool kWeight = false;       // whether it uses Moments::weight
    static constexpr bool kOwnScale = false;     // whether prepare() sets direction_scale
    HD static F settled(const Hyper&, F u, Moments&) { return u; }
    // What the loop over usable gradients may assume (tile.h); for rules with averages, that these
    // move by less than half.
    HD static bool is_usual(const Hyper&) { return true; }
};

// Where an update agrees with the gradient.
HD Mask agrees(F u, F g) { return u * g > F(0.f); }

// The update after grams or cautious.
HD F aligned(const Hyper& h, F u, F g) {
    if (has(h, kGrams)) return abs(u) * sign(g);
    if (has(h, kCautious)) return select(agrees(u, g), u * h.cautious_scale, F(0.f));
    return u;
}

// The weights after decoupled weight decay.
HD F decayed(const Hyper& h, F w, F u) {
    F decay = F(h.decay);
    if (has(h, kCautiousDecay)) decay = select(u * w > F(0.f), decay, F(0.f));
    return fma(F(0.f) - decay, w, w);
}

}  // namespace ENGINE_ISA
}  // namespace engine
