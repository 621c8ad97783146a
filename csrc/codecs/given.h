// A factor for each row or each column, which a step only reads.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct GivenSlot : Slot {
    const float *row_factors, *col_factors;
    float row_factor;

    HD GivenSlot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), row_factors(part<float>(0)), col_factors(part<float>(1)) {}

    HD void begin_row(int64_t row, int) { row_factor = row_factors ? row_factors[row] : 1.f; }
    HD F load(int, int col, int n) {
        return col_factors ? load_f32(col_factors + first_col() + col, n) : F(row_factor);
    }
    HD void store(int, int, int, F) {}
    HD void end_row(int64_t, int) {}
    HD void begin() {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
