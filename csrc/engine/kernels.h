// Which loop serves which tensor.
#pragma once

#include "engine/access.h"
#include "engine/lines.h"
#include "engine/projected_cpu.h"
#include "engine/tensor.h"

namespace engine {
namespace ENGINE_ISA {

template <class RuleT, bool kClean>
using SquareAccess = PlainAccess<RuleT, NoSlot, NoSlot, FactoredSlot<false, false>, kClean>;

// Whether a tensor's step is plain, apart from how its moments are stored.
template <class RuleT>
HD bool is_plain(const Tensor& t, const Hyper& h) {
    return t.weight_dtype == kBFloat16 && t.grad_dtype == kBFloat16 && !t.compensation &&
           has(h, kStochastic) && !has(h, ~(kPlainFlags | RuleT::kOwnFlags)) && !h.passive;
}

// Calls f<Access>() if the tensor's storage is this one and the rule has a loop for it.
template <class RuleT, uint32_t kStorage, class Access, class Function>
HD bool serves(uint32_t at, const Function& f) {
    if constexpr ((RuleT::kPlainLoops & kStorage) != 0)
        if (at == kStorage) {
            f.template operator()<Access>();
            return true;
        }
    return false;
}
template <class RuleT, class FastT, class SquareT>
using Flat = PlainAccess<RuleT, FastT, NoSlot, SquareT, false, true>;
template <class RuleT, class SquareT>
using Coded = Flat<RuleT, Float8<Signed8, SharedDraws>, SquareT>;

// The same for a narrow matrix (engine/lines.h).  `alone`: the second moment is all that it has.
template <class RuleT, class Function>
HD void with_lines_of(uint32_t at, bool alone, const Function& f) {
    if constexpr ((RuleT::kPlainLoops & kSquareAlone) != 0)
        if (at == kSquareAlone) return f.template operator()<LineAccess<RuleT, true, NoSlot>>();
    if (alone || Function::kDirectionAlone)
        return f.template operator()<LineAccess<RuleT, false, NoSlot>>();
    if constexpr (!Function::kDirectionAlone)
        f.template operator()<LineAccess<RuleT, false, LineSlot>>();
}

// Calls f<Access>() with the fastest access that serves this tensor's strip.
template <class RuleT, class Function>
HD void with_access_of(const Tensor& t, const Hyper& h, const Function& f) {
    using Signed = FactoredSlot<true>;
    using Squares = FactoredSlot<false>;
    const int32_t fast = t.moments[kFast].codec, slow = t.moments[kSlow].codec,
                  square = t.moments[kSquare].codec;
    const bool plain = is_plain<RuleT>(t, h);
    const uint32_t at = plain ? storage_of(fast, slow, square) : 0;
    if constexpr (RuleT::kSquareFirst)
        if (is_narrow(t, plain))
            return with_lines_of<RuleT>(at, fast == kAbsent && slow == kAbsent, f);
    if (serves<RuleT, kFactoredTriple, PlainAccess<RuleT, Signed, Signed, Squares>>(at, f) ||
        serves<RuleT, kFactoredPair, PlainAccess<RuleT, Signed, NoSlot, Squares>>(at, f) ||
        serves<RuleT, kCodedPair, Coded<RuleT, Float8<Unsigned8, SharedDraws>>>(at, f) ||
        serves<RuleT, kCodedAndFactors, Coded<RuleT, Squares>>(at, f) ||
        serves<RuleT, kDenseTriple, PlainAccess<RuleT, DenseSlot, DenseSlot, DenseSlot>>(at, f) ||
        serves<RuleT, kDensePair, PlainAccess<RuleT, DenseSlot, NoSlot, DenseSlot>>(at, f) ||
        serves<RuleT, kGivenAlone, PlainAccess<RuleT, NoSlot, NoSlot, GivenSlot>>(at, f) ||
        serves<RuleT, kSignAlone, PlainAccess<RuleT, Signed, NoSlot, NoSlot>>(at, f) ||
        serves<RuleT, kCodedAlone, Coded<RuleT, NoSlot>>(at, f) ||
        serves<RuleT, kHalfPair, Flat<RuleT, Bf16Later, Bf16Later>>(at, f) ||
        serves<RuleT, kHalfAlone, Flat<RuleT, Bf16Later, NoSlot>>(at, f) ||
        serves<RuleT, kDenseAlone, PlainAccess<RuleT, DenseSlot, NoSlot, NoSlot>>(at, f) ||
        serves<RuleT, kNothing, PlainAccess<RuleT, NoSlot, NoSlot, NoSlot>>(at, f))
        return;
    constexpr bool kReads = RuleT::kHasResidual;  // two factored moments
    if constexpr ((RuleT::kPlainLoops & kSquareAlone) != 0 || (kReads && Function::kDirectionAlone))
        if (at == kSquareAlone || (kReads && plain)) {
            static_assert(RuleT::kSquareFirst, "clean() is what that pass has counted");
            if (f.clean()) return f.template operator()<SquareAccess<RuleT, true>>();
            return f.template operator()<SquareAccess<RuleT, false>>();
        }
    if constexpr (kReads && !Function::kDirectionAlone) {
        if (plain && fast == kDense)
            return f.template operator()<SettlingAccess<RuleT, DenseSlot>>();
        if (plain && fast == kSignedFloat8)
            return f.template operator()<SettlingAccess<RuleT, SignedFloat8Slot>>();
    }
    f.template operator()<AnyAccess<RuleT>>();
}
template <class Function>
HD void with_access(const Launch& launch, const Tensor& t, const Hyper& h, const Function& f) {
    Rules::visit(launch.rule, Factors::exist(t, kSquare),
                 [&](auto rule) INLINED { with_access_of<decltype(rule)>(t, h, f); });
}

// A pass over the strip that begins with this tile.  kDirectionAlone: it only needs the rule's
// direction, which depends on fewer moments.
struct Pass {
    static constexpr bool kDirectionAlone = false;
    const Launch& launch;
    int64_t first_tile;

    // Whether an earlier pass has found all gradient elements usable.
    bool clean() const {
        bool is_clean = true;
        Place p(launch, first_tile, false);
        p.each_tile([&] { is_clean = is_clean && p.sums().nonfinite == 0; });
        return is_clean;
    }
};
struct Norm : Pass {
    static constexpr bool kDirectionAlone = true;
    template <class Access>
    void operator()() const {
        if constexpr (Access::R::kModified) norm<Access, false>(launch, first_tile);
    }
};
struct Residual : Pass {
    template <class Access>
    void operator()() const {
        if constexpr (Access::R::kHasResidual && !Access::kPlain)
            residual<Access>(launch, first_tile);
    }
};
struct Limit : Pass {
    template <class Access>
    void operator()() const {
        if constexpr (Access::R::kModified && !Access::kPlain)
            norm<Access, true>(launch, first_tile);
    }
};
struct Align : Pass {
    template <class Access>
    void operator()() const {
        if constexpr (Access::R::kModified && !Access::kPlain) align<Access>(launch, first_tile);
    }
};
struct Apply : Pass {
    template <class Access>
    void operator()() const {
        apply<Access>(launch, first_tile);
    }
};

// Whether a tensor needs this pass over its tiles.
inline bool wants(Phase pass, const Launch& launch, int64_t member) {
    const Tensor& t = launch.tensors[launch.members[member]];
    const Hyper& h = launch.hypers[member];
    switch (pass) {
        case kMeasure:
            return wants_measure(h);
        case kFactor:
            return wants_factor(t, launch.rule);
        case kNorm:
            return wants_norm(h);
        case kResidual:
            return wants_residual(t, launch.rule);
        case kLimit:
            return wants_limit(h);
        case kAlign:
            return wants_align(h);
        default:
            return true;
    }
}

template <class By>
void factor_by(const Launch& launch, const Tensor& t, int64_t tile) {
    constexpr int64_t kAll = ~int64_t(0);
    if (t.grad_dtype == kBFloat16) return factor<Bf16Grad<>, kAll, By>(launch, tile);
    factor<AnyGrad, kAll, By>(launch, tile);
}

// A pass over the strip that begins with this tile, of a tensor that wants it.
inline void run_strip(Phase pass, const Launch& launch, int64_t tile) {
    const int64_t member = launch.tiles[tile].tensor;
    const Tensor& t = launch.tensors[launch.members[member]];
    const Hyper& h = launch.hypers[member];
    const bool bf16 = t.grad_dtype == kBFloat16;
    switch (pass) {
        case kMeasure:
            if (!wants_measure_of_grad(h)) {
                if (t.weight_dtype == kBFloat16 && !t.compensation)
                    return measure<Unread, Bf16WeightRead>(launch, tile);
                return measure<Unread, AnyWeight>(launch, tile);
            }
            if (wants_measure_of_weight(h)) return measure<AnyGrad, AnyWeight>(launch, tile);
            [[fallthrough]];
        case kMeasureAlone:
            if (bf16) return measure<Bf16Grad<>, Unread>(launch, tile);
            return measure<AnyGrad, Unread>(launch, tile);
        case kFactor:
            if (is_narrow(t, bf16)) return factor_by<ByLine>(launch, t, tile);
            return factor_by<ByRow>(launch, t, tile);
        case kNorm:
            return with_access(launch, t, h, Norm{{launch, tile}});
        case kResidual:
            return with_access(launch, t, h, Residual{{launch, tile}});
        case kLimit:
            return with_access(launch, t, h, Limit{{launch, tile}});
        case kAlign:
            return with_access(launch, t, h, Align{{launch, tile}});
        default:
            return with_access(launch, t, h, Apply{{launch, tile}});
    }
}

// One tensor in one phase.
inline void run_tensor(Phase phase, const Launch& launch, int64_t member) {
    switch (phase) {
        case kBegin:
            return begin(launch, member);
        case kAfterMeasure:
            return after_measure(launch, member);
        case kAfterFactor:
            return after_factor(launch, member);
        case kAfterNorm:
            return after_norm(launch, member);
        case kAfterResidual:
            return after_residual(launch, member);
        case kAfterLimit:
            return after_limit(launch, member);
        case kAfterAlign:
            return after_align(launch, member);
        default:
            return finish(launch, member);
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
