// Signed 8-bit codes with an fp32 absolute maximum for every 256 elements of a row.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

// DrawsT: where its random bits come from.
template <class DrawsT>
struct Block8 : Slot {
    static constexpr int kBlock = 256;
    static constexpr float kOne = 65536.f;  // of codes with as many more bits as a draw has

    int8_t* const first;
    Exec::Row<int8_t> codes;
    float* const tops;
    Exec::PerBlock<float, kBlock> absmax;
    F* scale;
    F* values;
    DrawsT draws;

    HD Block8(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s),
          first(part<int8_t>(0)),
          tops(part<float>(1)),
          scale(s.scale),
          values(s.encoded),
          draws(p.hyper.key, moment.salt, p.words_or(s.words)) {
        codes.start(p, first);
        absmax.start(p, tops);
    }

    HD void begin_row(int64_t row, int width) {
        codes.begin(place, first, row, width);
        absmax.begin(place, tops, row);
        Exec::each_block<kBlock>(width,
                                 [&](int at) INLINED { scale[at] = F(over_127(absmax.load(at))); });
        draws.begin_row(row, cols, first_col());
    }

    HD F load(int i, int col, int n) {
        return codes.s8(i, col, n) * scale[Exec::block_of<kBlock>(i, col)];
    }

    HD void store(int i, int, int, F x) { values[i] = x; }

    HD void end_row(int64_t, int width) {
        Exec::each_block<kBlock>(width, [&](int at) INLINED {
            float top = Exec::largest<kBlock>(values, at, width);
            scale[at] = F(top > 1e-31f ? quotient(127.f * kOne, top) : 0.f);
            absmax.store(at, top, width);
        });
        Exec::each(width, [&](int i, int col, int n) INLINED {
            // |values * scale| <= (127 + 2^-17) kOne, which is rounded to 127 kOne.
            U scaled = round_to_int(values[i] * scale[Exec::block_of<kBlock>(i, col)]);
            codes.put_third(i, col, n, scaled + draws.next(i, col));
        });
        codes.end(place);
    }
    HD void begin() {}
    HD void end() {}
};
using Block8Slot = Block8<Exec::RowDraws>;

}  // namespace ENGINE_ISA
}  // namespace engine
