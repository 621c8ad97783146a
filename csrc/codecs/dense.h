// fp32 and bf16 moments.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct DenseSlot : Slot {
    float* const first;
    Exec::Row<float> at;

    HD DenseSlot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), first(part<float>(0)) {
        at.start(p, first);
    }
    HD void begin_row(int64_t row, int width) { at.begin(place, first, row, width); }
    HD F load(int i, int col, int n) { return at.f32(i, col, n); }
    HD void store(int i, int col, int n, F x) { at.put_f32(i, col, n, x); }
    HD void end_row(int64_t, int) { at.end(place); }
    HD void begin() {}
    HD void end() {}
};

// Written with stochastic rounding: an average moves by less than a spacing of bf16 per step.
struct Bf16Slot : Slot {
    uint16_t* const first;
    Exec::Row<uint16_t> at;
    Exec::RowDraws draws;

    HD Bf16Slot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s),
          first(part<uint16_t>(0)),
          draws(p.hyper.key, moment.salt, p.words_or(s.words)) {
        at.start(p, first);
    }
    HD void begin_row(int64_t row, int width) {
        at.begin(place, first, row, width);
        draws.begin_row(row, cols, first_col());
    }
    HD F load(int i, int col, int n) { return at.bf16(i, col, n); }
    HD void store(int i, int col, int n, F x) {
        at.put_upper(i, col, n, rounded_bf16(x, draws.next(i, col)));
    }
    HD void end_row(int64_t, int) { at.end(place); }
    HD void begin() {}
    HD void end() {}
};

// The same, rounded when its row ends, with the random words of the weights.
struct Bf16Later : Slot {
    uint16_t* const first;
    Exec::Row<uint16_t> at;
    F* values;
    SharedDraws draws;

    HD Bf16Later(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s),
          first(part<uint16_t>(0)),
          values(s.encoded),
          draws(p.hyper.key, moment.salt, p.words_or(s.words)) {
        at.start(p, first);
    }
    HD void begin_row(int64_t row, int width) { at.begin(place, first, row, width); }
    HD F load(int i, int col, int n) { return at.bf16(i, col, n); }
    HD void store(int i, int, int, F x) { values[i] = x; }
    HD void end_row(int64_t, int width) {
        Exec::each(width, [&](int i, int col, int n) INLINED {
            at.put_upper(i, col, n, rounded_bf16(values[i], draws.next(i, col)));
        });
        at.end(place);
    }
    HD void begin() {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
