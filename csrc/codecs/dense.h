// fp32 and bf16 moments.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct DenseSlot : Slot {
    float* at;

    HD DenseSlot(const Place& p, SlotId slot, SlotScratch& s) : Slot(p, slot, s) {}
    HD void begin_row(int64_t row, int) { at = part<float>(0) + row * cols + first_col(); }
    HD F load(int, int col, int n) {
        Exec::prefetch(at, cols, col);
        return load_f32(at + col, n);
    }
    HD void store(int, int col, int n, F x) { store_f32(at + col, x, n); }
    HD void end_row(int64_t, int) {}
    HD void begin() {}
    HD void end() {}
};

// Written with stochastic rounding: an average moves by less than a bf16's spacing a step.
struct Bf16Slot : Slot {
    uint16_t* at;
    Draws draws;

    HD Bf16Slot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), draws(p.hyper.key, moment.salt) {}
    HD void begin_row(int64_t row, int) {
        at = part<uint16_t>(0) + row * cols + first_col();
        draws.begin_row(row, cols, first_col());
    }
    HD F load(int, int col, int n) {
        Exec::prefetch(at, cols, col);
        return load_bf16(at + col, n);
    }
    HD void store(int i, int col, int n, F x) { store_bf16(at + col, x, draws.next(i, col), n); }
    HD void end_row(int64_t, int) {}
    HD void begin() {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
