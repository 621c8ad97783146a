// One thread runs a tile; a span is 32 vectors of 16 lanes in L1.
#pragma once

#include "core/numerics.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

struct Exec {
    static constexpr int kSpan = kTileCols / kLanes;
    static constexpr int kStripTiles = 8;  // more gain nothing (docs/LOG.md); their sums fill cache
    // With AVX2 a vector takes two registers, of few: if weights are left for later, more vectors
    // fit into the processor's window, which hides the latency of roots and quotients.
    static constexpr bool kWeightsLater = kRegisters > 1;

    // A row in memory: each vector is loaded when asked for, and stored when put.
    template <class T>
    struct Row {
        T* at;
        int64_t cols;

        template <class PlaceT>
        HD void start(const PlaceT&, T*) {}
        template <class PlaceT>
        HD void open(const PlaceT& place, T* data, int64_t row, int) {
            at = data + row * place.cols() + place.col;
            cols = place.cols();
        }
        template <class PlaceT>
        HD void begin(const PlaceT& place, T* data, int64_t row, int width) {
            open(place, data, row, width);
        }
        template <class PlaceT>
        HD void end(const PlaceT&) {}

        HD U uint(int, int col, int n) const {
            ask(col);
            return load_uint(at + col, n);
        }
        HD F f32(int, int col, int n) const {
            ask(col);
            return load_f32(at + col, n);
        }
        HD F bf16(int, int col, int n) const {
            ask(col);
            return load_bf16(at + col, n);
        }

        HD void put_uint(int, int col, int n, U x) { store_uint(at + col, x, n); }
        HD void put_f32(int, int col, int n, F x) { store_f32(at + col, x, n); }
        HD void put_upper(int, int col, int n, U x) { store_upper(at + col, x, n); }
        HD void put_u8(int, int col, int n, U x) { store_saturated(at + col, x, n); }

       private:
        // Codes belong to flat tensors, whose rows follow each other: the hardware prefetches them.
        HD void ask(int col) const {
            if (sizeof(T) > 1) prefetch(at, cols, col);
        }
    };

    // The same for one bit per column, lowest first.
    struct Bits {
        uint8_t* at;

        template <class PlaceT>
        HD void start(const PlaceT&, uint8_t*) {}
        template <class PlaceT>
        HD void begin(const PlaceT& place, uint8_t* data, int64_t row, int) {
            at = data + row * ((place.cols() + 7) / 8) + place.col / 8;
        }
        HD uint32_t load(int, int col, int n) const {
            uint16_t bits = 0;
            memcpy(&bits, at + col / 8, n > 8 ? 2 : 1);
            return bits;
        }
        HD void store(int, int col, int n, uint32_t bits) {
            if (n < kLanes) bits &= (1u << n) - 1;
            memcpy(at + col / 8, &bits, n > 8 ? 2 : 1);
        }
        HD void end() {}
    };

    using RowDraws = Draws;
    HD static void make_words(U&, uint64_t, int64_t, int64_t, int64_t) {}

    template <class PlaceT, class Function>
    HD static void knowing(const PlaceT&, Function&& f) {
        f();
    }

    // A number for each block of kBlock columns of a row.
    template <class T, int kBlock>
    struct PerBlock {
        T* at;

        template <class PlaceT>
        HD void start(const PlaceT&, T*) {}
        template <class PlaceT>
        HD void begin(const PlaceT& place, T* data, int64_t row) {
            at = data + row * ((place.cols() + kBlock - 1) / kBlock) + place.col / kBlock;
        }
        HD T load(int block) const { return at[block]; }
        HD void store(int block, T x, int) { at[block] = x; }
    };

    // A vector that runs along the rows.
    struct AlongRows {
        const float* at;

        template <class PlaceT>
        HD void start(const PlaceT&, const float* vector, int) {
            at = vector;
        }
        template <class PlaceT>
        HD float begin(const PlaceT&, int64_t row) {
            return at[row];
        }
    };

    // A vector that runs along the columns: a tile's part of it.
    struct AlongColumns {
        const float* at;

        HD void begin_tile(const float*, int, int) {}
        template <class PlaceT>
        HD void begin_row(const PlaceT&, const float* from, int) {
            at = from;
        }
        HD F load(int, int col, int n) const { return load_f32(at + col, n); }
    };

    // What a tile keeps for each of its columns, in `room`.
    struct Kept {
        F* at;

        HD void begin(F* room) { at = room; }
        HD void put(int i, F x) { at[i] = x; }
        HD F load(int i) const { return at[i]; }
    };

    // Sums over the rows of a tile, added up in their final place: a tile's columns stay in L1.
    struct Columns {
        float* at;

        HD void begin(float* to, int width) {
            for (int col = 0; col < width; col += kLanes) store_f32(to + col, F(0.f), kLanes);
        }
        HD void begin_row(float* to) { at = to; }
        HD void add(int, int col, F x) {
            store_f32(at + col, load_f32(at + col, kLanes) + x, kLanes);
        }
        HD void end(int) {}
    };

    // The sum of every row of a tile: the two halves of a block of 32 columns are added first, then
    // the blocks in order, then the lanes.
    struct RowSums {
        float* to;
        F sum, half;

        HD void begin(int) {}
        HD void begin_row(float* first) {
            to = first;
            sum = F(0.f);
        }
        HD void add(int i, F x) {
            if (i % 2)
                sum = sum + (half + x);
            else
                half = x;
        }
        HD void add_square(int i, F x) {
            if (i % 2)
                sum = sum + fma(x, x, half);
            else
                half = x * x;
        }
        HD void end_row(int row, int width) {
            if ((width + kLanes - 1) / kLanes % 2) sum = sum + half;
            to[row] = engine::ENGINE_ISA::sum(sum);
        }
        HD void end() {}
    };

    // The same, if only the tile's total is needed.
    struct RowTotals : RowSums {
        float row_sum;

        template <bool, class Access>
        HD void begin(double& total, const Access&) {
            total = 0;
        }
        HD void begin_row() { RowSums::begin_row(&row_sum); }
        HD void end_row(double& total, int, int width) {
            RowSums::end_row(0, width);
            total += row_sum;
        }
        HD void end(double&, int) {}
    };

    // A count over a tile.
    struct Count {
        HD void begin(int64_t& total) { total = 0; }
        HD void add(int64_t& total, int64_t n) { total += n; }
        HD void end(int64_t&) {}
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

    template <int kBlock, class Function>
    HD static void each_block(int width, Function&& f) {
        for (int block = 0; block * kBlock < width; ++block) f(block);
    }
    template <int kBlock>
    HD static int block_of(int, int col) {
        return col / kBlock;
    }

    template <int kBlock, bool kSigned = true>
    HD static float largest(const F* values, int block, int width) {
        auto magnitude = [](F x) INLINED { return kSigned ? abs(x) : x; };
        int first = block * (kBlock / kLanes), end = (width + kLanes - 1) / kLanes;
        if (end > first + kBlock / kLanes) end = first + kBlock / kLanes;
        F top(0.f), other(0.f);  // two, because a maximum takes several cycles
        int i = first;
        for (; i + 2 <= end; i += 2) {
            top = max(magnitude(values[i]), top);
            other = max(magnitude(values[i + 1]), other);
        }
        if (i < end) top = max(magnitude(values[i]), top);
        return engine::ENGINE_ISA::largest(max(top, other));
    }

    // Prefetches column col of a later row.  Strips are walked in the order of memory, but the
    // hardware's own prefetch ends with a page.  Only into the L2 cache: L1 has room for few
    // pending requests, and waiting for one of them holds up the loads.
    template <class T>
    HD static void prefetch(const T* row, int64_t cols, int col) {
        constexpr int kToRead = 0, kToL2 = 2;
        if (col % (64 / int(sizeof(T))) == 0)
            __builtin_prefetch(row + 8 * cols + col, kToRead, kToL2);
    }

    // Every every'th element of a row, from column `first` on: f(at, col, n, g, w) for n of them,
    // starting with the at-th, which is in column col.
    template <class GradT, class WeightT, class Function>
    HD static void each_sample(int first, int every, int width, const GradT& grad,
                               const WeightT& weight, Function&& f) {
        float g[kTileCols], w[kTileCols];
        int count = 0;
        for (int col = first; col < width; col += every, ++count)
            g[count] = grad.element(col), w[count] = weight.element(col);
        for (int at = 0; at < count; at += kLanes) {
            const int n = count - at < kLanes ? count - at : kLanes;
            f(at, first + at * every, n, load_f32(g + at, n), load_f32(w + at, n));
        }
    }
    // One of a row's elements.
    HD static float element(const F* values, int col) {
        float x;
        memcpy(&x, reinterpret_cast<const char*>(values) + col * sizeof(float), sizeof(float));
        return x;
    }

    // Two sums over some elements of a tile, in the order of a GPU, where each thread sums its own
    // columns.
    struct Spread {
        double of_thread[64][2] = {};

        HD void add(int col, int every, int n, D x, D y) {
            double first[kLanes], second[kLanes];
            store_f64(first, x);
            store_f64(second, y);
            for (int lane = 0; lane < n; ++lane, col += every) {
                double* sums = of_thread[col / 32 * 4 + col % 16 / 4];
                sums[0] += first[lane];
                sums[1] += second[lane];
            }
        }
        HD void total(double& x, double& y) {
            for (int warp = 0; warp < 64; warp += 32)
                for (int half = 16; half > 0; half /= 2)
                    for (int i = warp; i < warp + half; ++i)
                        for (int j = 0; j < 2; ++j) of_thread[i][j] += of_thread[i + half][j];
            x = of_thread[0][0] + of_thread[32][0];
            y = of_thread[0][1] + of_thread[32][1];
        }
    };

    HD static double total(D x) { return sum(x); }
    HD static bool leads() { return true; }
    HD static bool leads_warp() { return true; }

    // What follows serves the phases of a tensor.

    HD static void sync() {}
    template <class Function>
    HD static void each_index(int64_t length, Function&& f) {
        for (int64_t i = 0; i < length; ++i) f(i);
    }
    template <class Function>
    HD static void each_pack(int64_t length, Function&& f) {
        for (int64_t at = 0; at < length; at += kLanes)
            f(at, int(length - at < kLanes ? length - at : kLanes));
    }
    template <class Function>
    HD static void each_lane(D x, int n, Function&& f) {
        double lanes[kLanes];
        store_f64(lanes, x);
        for (int lane = 0; lane < n; ++lane) f(lane, lanes[lane]);
    }
    // Blocks of a vector, one after another: f(block, its first index, its length).
    template <class Function>
    HD static void each_run(int64_t length, int run, Function&& f) {
        for (int64_t first = 0; first < length; first += run)
            f(first / run, first, int(length - first < run ? length - first : run));
    }
    HD static float largest_of(const float* x, int length) {
        F top(0.f);
        each_pack(length, [&](int64_t at, int n) INLINED { top = max(load_f32(x + at, n), top); });
        return engine::ENGINE_ISA::largest(top);
    }
    template <class Function>
    HD static void each_pack_of_run(int length, Function&& f) {
        each_pack(length, [&](int64_t at, int n) INLINED { f(int(at), n); });
    }
    template <class Function>
    HD static double sum_of(int64_t length, Function&& f) {
        double sums[32] = {};
        int64_t first = 0;
        for (; first + 32 <= length; first += 32)
            for (int i = 0; i < 32; ++i) sums[i] += f(first + i);
        for (int i = 0; first + i < length; ++i) sums[i] += f(first + i);
        for (int half = 16; half > 0; half /= 2)
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        return sums[0];
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
