// A factor for each row or each column, which a step only reads.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct GivenSlot : Slot {
    const float *const row_factors, *const col_factors;
    Exec::AlongRows down;
    Exec::AlongColumns along;
    float row_factor;

    HD GivenSlot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), row_factors(part<float>(0)), col_factors(part<float>(1)) {
        if (row_factors) down.start(p, row_factors, 0);
        if (col_factors) along.begin_tile(col_factors + first_col(), p.width(), 0);
    }

    HD void begin_row(int64_t row, int width) {
        row_factor = row_factors ? down.begin(place, row) : 1.f;
        if (col_factors) along.begin_row(place, col_factors + first_col(), width);
    }
    HD F load(int i, int col, int n) { return col_factors ? along.load(i, col, n) : F(row_factor); }
    HD void store(int, int, int, F) {}
    HD void end_row(int64_t, int) {}
    HD void begin() {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
