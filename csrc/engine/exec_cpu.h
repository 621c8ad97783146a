// One thread runs a tile; a span is 32 vectors of 16 lanes in L1.
#pragma once

#include "core/numerics.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

struct Exec {
    static constexpr int kSpan = kTileCols / kLanes;

    // Sums over the rows of a tile, kept where they are wanted: a tile's columns stay in L1.
    struct Columns {
        float* at;

        HD void begin(float* to, int width) {
            at = to;
            for (int col = 0; col < width; col += kLanes) store_f32(at + col, F(0.f), kLanes);
        }
        HD void add(int, int col, F x) {
            store_f32(at + col, load_f32(at + col, kLanes) + x, kLanes);
        }
        HD void end(int) {}
    };

    // Two vectors at a time, so that the halves of a block of 32 columns follow each other.
    template <class Function>
    HD static void each(int width, Function&& f) {
        int col = 0, i = 0;
        for (; col + 2 * kLanes <= width; col += 2 * kLanes, i += 2) {
            f(i, col, kLanes);
            f(i + 1, col + kLanes, kLanes);
        }
        for (; col < width; col += kLanes, ++i)
            f(i, col, width - col < kLanes ? width - col : kLanes);
    }

    template <int kBlock>
    HD static float largest(const F* values, int block, int width) {
        int first = block * (kBlock / kLanes), end = (width + kLanes - 1) / kLanes;
        if (end > first + kBlock / kLanes) end = first + kBlock / kLanes;
        F top(0.f), other(0.f);  // two, because a maximum takes several cycles
        int i = first;
        for (; i + 2 <= end; i += 2) {
            top = max(abs(values[i]), top);
            other = max(abs(values[i + 1]), other);
        }
        if (i < end) top = max(abs(values[i]), top);
        return engine::ENGINE_ISA::largest(max(top, other));
    }

    // Asks for column col of rows to come, to be written.  The pieces of rows that a tile is made
    // of lie apart in memory and are too short for the hardware to see them coming: without this, a
    // pass that does little else than read takes twice as long.
    template <class T>
    HD static void prefetch(const T* row, int64_t cols, int col) {
        constexpr int kForWriting = 1, kToL1 = 3, kToL2 = 2;
        if (col % (64 / int(sizeof(T))) != 0) return;
        __builtin_prefetch(row + 8 * cols + col, kForWriting, kToL2);
        __builtin_prefetch(row + 2 * cols + col, kForWriting, kToL1);
    }

    HD static float total(F x) { return sum(x); }
    HD static double total(D x) { return sum(x); }
    HD static int64_t total(int64_t x) { return x; }
    HD static void put_sum(float* to, F x) { *to = sum(x); }
    HD static bool leads() { return true; }

    HD static uint32_t load_bits(const uint8_t* from, int col, int n) {
        uint16_t bits = 0;
        memcpy(&bits, from + col / 8, n > 8 ? 2 : 1);
        return bits;
    }
    HD static void store_bits(uint8_t* to, int col, int n, uint32_t bits) {
        if (n < kLanes) bits &= (1u << n) - 1;
        memcpy(to + col / 8, &bits, n > 8 ? 2 : 1);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
