// Any codec, dtype or combination: decoded into fp32 before the row's arithmetic and encoded after
// it, so that every rule is compiled once, not once per codec.
#pragma once

#include "codecs/dense.h"
#include "codecs/factored.h"
#include "codecs/float8.h"
#include "codecs/given.h"

namespace engine {
namespace ENGINE_ISA {

struct AnySlot {
    int32_t codec;
    bool stored;
    F* values;
    DenseSlot dense;
    Bf16Slot bf16;
    SignedFloat8Slot signed_float8;
    Float8Slot float8;
    FactoredSlot<false> factored;
    FactoredSlot<true> factored_sign;
    GivenSlot given;

    // If `stored` is false the moment is only read.
    HD_CALL AnySlot(const Place& p, SlotId slot, SlotScratch& s, bool stored)
        : codec(p.tensor.moments[slot].codec),
          stored(stored),
          values(s.values),
          dense(p, slot, s),
          bf16(p, slot, s),
          signed_float8(p, slot, s),
          float8(p, slot, s),
          factored(p, slot, s),
          factored_sign(p, slot, s),
          given(p, slot, s) {}

    // Calls f with the slot of the moment's codec, if there is a moment.
    template <class Function>
    HD void visit(Function&& f) {
        switch (codec) {
            case kDense:
                return f(dense);
            case kBf16:
                return f(bf16);
            case kSignedFloat8:
                return f(signed_float8);
            case kFloat8:
                return f(float8);
            case kFactored:
                return f(factored);
            case kFactoredSign:
                return f(factored_sign);
            case kGiven:
                return f(given);
            default:
                return;
        }
    }

    HD void begin_roots() {
        if (codec == kFactored) factored.begin_roots();
    }
    HD void begin() {
        if (stored) visit([&](auto& slot) { slot.begin(); });
    }
    HD_CALL void begin_row(int64_t row, int width) {
        if (codec == kAbsent) return;
        visit([&](auto& slot) {
            slot.begin_row(row, width);
            Exec::each(width,
                       [&](int i, int col, int n) INLINED { values[i] = slot.load(i, col, n); });
        });
    }
    HD F load(int i, int, int) { return codec == kAbsent ? F(0.f) : values[i]; }
    HD F root(int i, F x) {
        if (codec == kFactored) return factored.root(i, x);
        return sqrt(x);
    }
    HD void store(int i, int, int, F x) { values[i] = x; }
    HD_CALL void end_row(int64_t row, int width) {
        if (!stored) return;
        visit([&](auto& slot) {
            Exec::each(width,
                       [&](int i, int col, int n) INLINED { slot.store(i, col, n, values[i]); });
            slot.end_row(row, width);
        });
    }
    HD_CALL void end() {
        if (stored) visit([&](auto& slot) { slot.end(); });
    }
};

// A moment that a rule does not have.
struct NoSlot {
    HD NoSlot(const Place&, SlotId, SlotScratch&) {}
    HD void begin() {}
    HD void begin_row(int64_t, int) {}
    HD F load(int, int, int) { return F(0.f); }
    HD void store(int, int, int, F) {}
    HD void end_row(int64_t, int) {}
    HD void end() {}
};

// A moment that a rule may only read, unless kStored.
template <class SlotT, bool kStored>
struct Kept : SlotT {
    using SlotT::SlotT;
};
template <class SlotT>
struct Kept<SlotT, false> : SlotT {
    using SlotT::SlotT;
    HD void begin() {}
    HD void store(int, int, int, F) {}
    HD void end_row(int64_t, int) {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
