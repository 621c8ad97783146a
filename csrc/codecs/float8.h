// 8-bit floats with 3 bits of mantissa and exponents relative to their block's: a truncated fp32,
// with a draw added below the cut first.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kFloat8Block = 128;
constexpr int kFloat8Cut = 20;  // bits of an fp32 that are cut off, and of a draw

// The block's exponent, biased, with room for all codes below it and for the largest to round up.
HD int32_t float8_exponent(float largest) {
    int32_t exponent = int32_t((bits_of_float(largest) + 0xFFFFFu) >> 23);
    return exponent < 32 ? 32 : exponent > 254 ? 254 : exponent;
}

// Codes of non-negative numbers.  Code q is the fp32 with the bits (base + q) << 20, over 32
// octaves; only zero has code 0.
struct Unsigned8 {
    static constexpr bool kSigned = false;

    HD static uint32_t base(int32_t exponent) { return uint32_t(exponent - 31) << 3; }
    // At most 255 for values up to the block's largest, if that is below 2^127; averages of squares
    // of usable gradients are below 2^96.
    HD static U encode(F x, U draws, U base) {
        U cut = (as_bits(x) + draws) >> kFloat8Cut;
        U code = max(cut, base + U(1u)) - base;
        return min(code, as_bits(x));  // only the bits of zero are smaller than its code
    }
    HD static F decode(U code, U base) {
        return as_float(only(code > U(0u), (code + base) << kFloat8Cut));
    }
};

// Codes of signed numbers, with the sign in the highest bit.  Code q is the fp32 with the bits
// (base + q) << 20, minus that of code 0: so codes are evenly spaced around zero, and further apart
// in each of the 14 octaves above.
struct Signed8 {
    static constexpr bool kSigned = true;

    HD static uint32_t base(int32_t exponent) { return uint32_t(exponent - 14) << 3; }
    HD static F zero(U base) { return as_float(base << kFloat8Cut); }
    // At most 121 for values up to the block's largest.
    HD static U encode(F x, U draws, U base) {
        U code = ((as_bits(abs(x) + zero(base)) + draws) >> kFloat8Cut) - base;
        return code | ((as_bits(x) >> 24) & U(0x80u));
    }
    HD static F decode(U code, U base) {
        F size = as_float(((code & U(0x7Fu)) + base) << kFloat8Cut) - zero(base);
        return as_float(as_bits(size) | ((code & U(0x80u)) << 24));
    }
};

// DrawsT: where its random bits come from.
template <class Code, class DrawsT>
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
            width, [&](int at) INLINED { base[at] = U(Code::base(exponents.load(at) + 127)); });
        draws.begin_row(row, cols, first_col());
    }

    HD F load(int i, int col, int n) {
        U grid = base[Exec::block_of<kFloat8Block>(i, col)];
        return Code::decode(codes.uint(i, col, n), grid);
    }

    HD void store(int i, int, int, F x) { values[i] = x; }

    HD void end_row(int64_t, int width) {
        Exec::each_block<kFloat8Block>(width, [&](int at) INLINED {
            int32_t exponent =
                float8_exponent(Exec::largest<kFloat8Block, Code::kSigned>(values, at, width));
            base[at] = U(Code::base(exponent));
            exponents.store(at, int8_t(exponent - 127), width);
        });
        Exec::each(width, [&](int i, int col, int n) INLINED {
            U grid = base[Exec::block_of<kFloat8Block>(i, col)];
            U draw = draws.template next<kFloat8Cut>(i, col);
            codes.put_u8(i, col, n, Code::encode(values[i], draw, grid));
        });
        codes.end(place);
    }
    HD void begin() {}
    HD void end() {}
};
using Float8Slot = Float8<Unsigned8, Exec::RowDraws>;
using SignedFloat8Slot = Float8<Signed8, Exec::RowDraws>;

}  // namespace ENGINE_ISA
}  // namespace engine
