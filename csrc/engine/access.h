// How a rule accesses its operands on a CPU, where a strip's dtypes, codecs and flags are known at
// run time.  (On a GPU they are constants: `Kind` in engine/cuda.h.)
#pragma once

#include "engine/tile.h"

namespace engine {
namespace ENGINE_ISA {

// Any dtype, codec and feature.  kPlain: nothing happens between the rule and the weights.  kMoves:
// the step is known to move them.  kFlags: the flags that may be set, or, with kFlagsKnown, those
// that are.  kRoundsWithin: some moment is rounded when an element is stored, not when its row
// ends.
template <class RuleT>
struct AnyAccess : ByRow {
    using R = RuleT;
    static constexpr bool kPlain = false, kMoves = false, kFlagsKnown = false;
    static constexpr bool kRoundsWithin = false;
    static constexpr int64_t kFlags = ~int64_t(0);
    AnyGrad grad;
    AnyWeight weight;
    AnySlot fast, slow, square;
    bool factored_sign;  // some moment has sign bits, which have no zero

    HD AnyAccess(Place& p, Scratch& s)
        : grad(p, s.grad),
          weight(p, s.weight),
          fast(p, kFast, s.slots[kFast], true),
          slow(p, kSlow, s.slots[kSlow], RuleT::kSlowStored),
          square(p, kSquare, s.slots[kSquare], RuleT::kSquareStored) {
        factored_sign = fast.codec == kFactoredSign || slow.codec == kFactoredSign;
        if constexpr (R::kRoot) p.each_tile([&]() INLINED { square.begin_roots(); });
    }
};

// The operands of a plain step (core/features.h).  kCleanTile: an earlier pass has found all
// gradient elements of the tile usable.  kCodes: the moments are codes, rounded with the random
// words of the weights; their tensor is flat, so that rows follow each other in memory and the
// hardware prefetches them.
template <class RuleT, class FastT, class SlowT, class SquareT, bool kCleanTile = false,
          bool kCodes = false>
struct PlainAccess : ByRow {
    using R = RuleT;
    static constexpr bool kPlain = true, kMoves = true, kFlagsKnown = false;
    static constexpr bool kRoundsWithin = false;
    static constexpr int64_t kFlags =
        (kPlainFlags | RuleT::kOwnFlags) & ~(is_same<SlowT, NoSlot> ? kSlowMoment : int64_t(0));
    static constexpr bool factored_sign = is_same<FastT, FactoredSlot<true>>;
    Bf16Grad<!kCodes> grad;
    Bf16Weight<!kCodes, kCodes> weight;
    FastT fast;
    Kept<SlowT, RuleT::kSlowStored> slow;
    Kept<SquareT, RuleT::kSquareStored> square;

    HD PlainAccess(Place& p, Scratch& s)
        : grad(p, nullptr, kCleanTile),
          weight(p, s.words),
          fast(p, kFast, shared(s, kFast)),
          slow(p, kSlow, shared(s, kSlow)),
          square(p, kSquare, shared(s, kSquare)) {
        if constexpr (R::kRoot) p.each_tile([&]() INLINED { square.begin_roots(); });
    }

    HD static SlotScratch& shared(Scratch& s, SlotId slot) {
        s.slots[slot].words = s.words;
        return s.slots[slot];
    }
};

// The same for a rule that transforms its update first (settled()) and reads two factored moments.
template <class RuleT, class FastT>
struct SettlingAccess : ByRow {
    using R = RuleT;
    static constexpr bool kPlain = false, kMoves = true, kFlagsKnown = false;
    static constexpr bool kRoundsWithin = false;
    static constexpr int64_t kFlags = kPlainFlags | RuleT::kOwnFlags;
    static constexpr bool factored_sign = false;
    Bf16Grad<> grad;
    Bf16Weight<> weight;
    FastT fast;
    FactoredSlot<false, false> slow, square;

    HD SettlingAccess(Place& p, Scratch& s)
        : grad(p),
          weight(p, s.words),
          fast(p, kFast, s.slots[kFast]),
          slow(p, kSlow, s.slots[kSlow]),
          square(p, kSquare, s.slots[kSquare]) {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
