// Signed 8-bit codes with an fp32 absolute maximum for every 256 elements of a row.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

struct Block8Slot : Slot {
    static constexpr int kBlock = 256;

    int8_t* codes;
    float* absmax;
    F* scale;
    F* values;
    Draws draws;

    HD Block8Slot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), scale(s.scale), values(s.encoded), draws(key) {}

    HD void begin_row(int64_t row, int width) {
        codes = part<int8_t>(0) + row * cols + first_col;
        absmax = part<float>(1) + row * ((cols + kBlock - 1) / kBlock) + first_col / kBlock;
        Exec::each_block<kBlock>(
            width, [&](int at, int block) INLINED { scale[at] = F(absmax[block] / 127.f); });
        draws.begin_row(row, cols, first_col);
    }

    HD F load(int i, int col, int n) {
        Exec::prefetch(codes, cols, col);
        return load_s8(codes + col, n) * scale[Exec::block_of<kBlock>(i, col)];
    }

    HD void store(int i, int, int, F x) { values[i] = x; }

    HD void end_row(int64_t, int width) {
        Exec::each_block<kBlock>(width, [&](int at, int block) INLINED {
            float top = Exec::largest<kBlock>(values, at, width);
            scale[at] = F(top > 1e-36f ? 127.f / top : 0.f);
            if (Exec::leads_block()) absmax[block] = top;
        });
        Exec::each(width, [&](int i, int col, int n) INLINED {
            // |values * scale| <= 127 + 2^-17: only the lower end can be passed.
            F scaled = values[i] * scale[Exec::block_of<kBlock>(i, col)];
            F dithered = fma(to_float(draws.next(col)), F(0x1p-16f), scaled);
            store_floor_s8(codes + col, dithered, n);
        });
    }
    HD void begin() {}
    HD void end() {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
