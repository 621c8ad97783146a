// fp32 and bf16 moments.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct DenseSlot : Slot {
    Exec::Row<float> at;

    HD DenseSlot(const Place& p, SlotId slot, SlotScratch& s) : Slot(p, slot, s) {}
    HD void begin_row(int64_t row, int width) {
        at.begin(part<float>(0) + row * cols + first_col(), cols, width, place.whole);
    }
    HD F load(int i, int col, int n) { return at.f32(i, col, n); }
    HD void store(int i, int col, int n, F x) { at.put_f32(i, col, n, x); }
    HD void end_row(int64_t, int) { at.end(); }
    HD void begin() {}
    HD void end() {}
};

// Written with stochastic rounding: an average moves by less than a bf16's spacing a step.
struct Bf16Slot : Slot {
    Exec::Row<uint16_t> at;
    Draws draws;

    HD Bf16Slot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), draws(p.hyper.key, moment.salt) {}
    HD void begin_row(int64_t row, int width) {
        at.begin(part<uint16_t>(0) + row * cols + first_col(), cols, width, place.whole);
        draws.begin_row(row, cols, first_col());
    }
    HD F load(int i, int col, int n) { return at.bf16(i, col, n); }
    HD void store(int i, int col, int n, F x) {
        at.put_upper(i, col, n, rounded_bf16(x, draws.next(i, col)));
    }
    HD void end_row(int64_t, int) { at.end(); }
    HD void begin() {}
    HD void end() {}
};
}  // namespace ENGINE_ISA
}  // namespace engine
