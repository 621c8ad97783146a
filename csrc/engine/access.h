// How a rule reaches its operands on a CPU, where a strip's dtypes, codecs and flags are known when
// it is run.  (On a GPU they are constants: `Kind` in engine/cuda.h.)
#pragma once

#include "engine/tile.h"

namespace engine {
namespace ENGINE_ISA {

// Any dtype, codec and feature.  kPlain: nothing happens between the rule and the weights.  kMoves:
// it is known that the step moves them.  kFlags: those that there may be, or, where kFlagsKnown,
// those that there are.  kRoundsWithin: some moment is rounded by draws when it is put, and not
// when its row ends.
template <class RuleT>
struct AnyAccess {
    using R = RuleT;
    static constexpr bool kPlain = false, kMoves = false, kFlagsKnown = false;
    static constexpr bool kRoundsWithin = false;
    static constexpr int64_t kFlags = ~int64_t(0);
    AnyGrad grad;
    AnyWeight weight;
    AnySlot fast, slow, square;
    bool factored_sign;  // some moment's signs are bits, which know no zero

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

// Those of a plain step (core/features.h).  kCleanTile: an earlier pass has seen that all gradient
// elements of the tile are usable.  kCodes: the moments are codes, which round by the weights'
// words; their tensor is flat, so that a row follows the other in memory and the hardware sees it
// coming.
template <class RuleT, class FastT, class SlowT, class SquareT, bool kCleanTile = false,
          bool kCodes = false>
struct PlainAccess {
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

// The same for a rule that makes something of its update first, and reads two factored moments.
template <class RuleT, class FastT>
struct SettlingAccess {
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
