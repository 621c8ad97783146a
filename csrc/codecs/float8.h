// Non-negative 8-bit codes: an fp32 cut to 4 bits of mantissa, its exponent relative to its
// block's.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kFloat8Block = 128;

// The block's exponent (biased), and with it the grid: code q stands for the float with bits
// (16 exponent - 240 + q) << 19.
HD int32_t float8_exponent(float largest) {
    int32_t exponent = int32_t((bits_of_float(largest) + 0x7FFFFu) >> 23);
    return exponent < 16 ? 16 : exponent > 254 ? 254 : exponent;
}
HD uint32_t float8_base(int32_t exponent) { return uint32_t(exponent * 16 - 240); }

constexpr int kFloat8Cut = 19;  // bits of an fp32 that are cut off, and of a draw

// At most 255, of what is at most the block's largest, and that below 2^127; averages of squares of
// usable gradients are below 2^96.
HD U float8_encode(F x, U draws, U base) {
    U cut = (as_bits(x) + draws) >> kFloat8Cut;
    U code = max(cut, base + U(1u)) - base;
    return min(code, as_bits(x));  // nothing but zero is smaller than its code
}
HD F float8_decode(U code, U base) {
    return as_float(only(code > U(0u), (code << kFloat8Cut) + (base << kFloat8Cut)));
}

// DrawsT: where its random bits come from.
template <class DrawsT>
struct Float8 : Slot {
    uint8_t* const first;
    Exec::Row<uint8_t> codes;
    int8_t* const tops;
    Exec::PerBlock<int8_t, kFloat8Block> exponents;
    U* base;
    F* values;
    DrawsT draws;

    HD Float8(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s),
          first(part<uint8_t>(0)),
          tops(part<int8_t>(1)),
          base(s.base),
          values(s.encoded),
          draws(p.hyper.key, moment.salt, p.words_or(s.words)) {
        codes.start(p, first);
        exponents.start(p, tops);
    }

    HD void begin_row(int64_t row, int width) {
        codes.begin(place, first, row, width);
        exponents.begin(place, tops, row);
        Exec::each_block<kFloat8Block>(
            width, [&](int at) INLINED { base[at] = U(float8_base(exponents.load(at) + 127)); });
        draws.begin_row(row, cols, first_col());
    }

    HD F load(int i, int col, int n) {
        U grid = base[Exec::block_of<kFloat8Block>(i, col)];
        return float8_decode(codes.uint(i, col, n), grid);
    }

    HD void store(int i, int, int, F x) { values[i] = x; }

    HD void end_row(int64_t, int width) {
        Exec::each_block<kFloat8Block>(width, [&](int at) INLINED {
            int32_t exponent =
                float8_exponent(Exec::largest<kFloat8Block, false>(values, at, width));
            base[at] = U(float8_base(exponent));
            exponents.store(at, int8_t(exponent - 127), width);
        });
        Exec::each(width, [&](int i, int col, int n) INLINED {
            U grid = base[Exec::block_of<kFloat8Block>(i, col)];
            U draw = draws.template next<kFloat8Cut>(i, col);
            codes.put_u8(i, col, n, float8_encode(values[i], draw, grid));
        });
        codes.end(place);
    }
    HD void begin() {}
    HD void end() {}
};
using Float8Slot = Float8<Exec::RowDraws>;

}  // namespace ENGINE_ISA
}  // namespace engine
