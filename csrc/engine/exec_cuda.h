// A block of two warps runs a tile (engine/rows_cuda.h, engine/sums_cuda.h); or a tensor.
//
// Sums are added in the order in which engine/exec_cpu.h adds them, except for the three of doubles
// that `measure` adds with `total`.
#pragma once

#include "engine/sums_cuda.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kTensorThreads = 256;  // of a block that runs a tensor's phase

struct Exec : ThreadSums {
    static constexpr int kStripTiles = 1;
    static constexpr bool kWeightsLater = false;

    struct RowTotals : RowSums {
        float* rows;

        template <bool kStores, class Access>
        HD void begin(double&, const Access& a) {
            __shared__ float of_tile[kTileRows];
            rows = of_tile;
            begin_in(a.template room_for_rows<kStores>());
        }
        HD void begin_row() { RowSums::begin_row(rows); }
        HD void end_row(double&, int row, int width) { RowSums::end_row(row, width); }
        HD void end(double& total, int num_rows) {
            RowSums::end();
            double sum = 0;
            for (int row = 0; row < num_rows; ++row) sum += rows[row];
            if (leads()) total = sum;
        }
    };

    struct Count {
        int64_t of_thread;

        HD void begin(int64_t&) { of_thread = 0; }
        HD void add(int64_t&, int64_t n) { of_thread += n; }
        HD void end(int64_t& total) {
            of_thread = Exec::total(of_thread);
            if (leads()) total = of_thread;
        }
    };

    template <class Function>
    HD static void each(int width, Function&& f) {
        if (warp() * kWarpCols >= width) return;
        UNROLLED for (int i = 0; i < kSpan; ++i) f(i, column(i), lanes(i, width));
    }

    // A thread's columns are in one block.  All threads of a warp take part, with zeros if their
    // columns do not exist.
    template <int kBlock, class Function>
    HD static void each_block(int width, Function&& f) {
        if (warp() * kWarpCols < width) f(0);
    }
    template <int kBlock>
    HD static int block_of(int, int) {
        return 0;
    }
    template <int kBlock, bool kSigned = true>
    HD static float largest(const F* values, int, int) {
        float top = 0.f;
        UNROLLED for (int i = 0; i < kSpan; ++i) top = engine::ENGINE_ISA::largest(
            engine::ENGINE_ISA::largest(kSigned ? abs(values[i]) : values[i]), top);
        return largest_of_threads<kBlock / kThreadCols>(top);
    }

    template <class T>
    HD static void prefetch(const T*, int64_t, int) {}  // other blocks compute while one waits

    HD static bool leads() { return thread() == 0; }
    HD static bool leads_warp() { return thread() % 32 == 0; }

    // The sum of the threads' x over a tile.
    HD static double total(D x) { return total(sum(x)); }
    template <class T>
    HD static T total(T x) {
        __shared__ T of_warps[kTileThreads / 32];
        UNROLLED for (int apart = 16; apart > 0; apart /= 2) x =
            x + __shfl_xor_sync(kWarp, x, apart);
        __syncthreads();
        if (leads_warp()) of_warps[warp()] = x;
        __syncthreads();
        return of_warps[0] + of_warps[1];
    }

    // The thread's own samples, in the order of their columns.
    template <class GradT, class WeightT, class Function>
    HD static void each_sample(int first, int every, int width, const GradT& grad,
                               const WeightT& weight, Function&& f) {
        UNROLLED for (int i = 0; i < kSpan; ++i) {
            const F g = grad.load(i, column(i), kLanes), w = weight.load(i, column(i), kLanes);
            const int after = column(i) - first;
            int lane = after > 0 ? every - 1 - (after - 1) % every : -after;
            for (; lane < lanes(i, width); lane += every)
                f((after + lane) / every, column(i) + lane, 1, F(picked(g, lane)),
                  F(picked(w, lane)));
        }
    }
    HD static float picked(F x, int lane) {
        return lane < 2 ? (lane == 0 ? x.r[0] : x.r[1]) : (lane == 2 ? x.r[2] : x.r[3]);
    }
    HD static float element(const F*, int) { return 0.f; }  // only used on a CPU

    struct Spread {
        double first = 0, second = 0;

        HD void add(int, int, int, D x, D y) {
            first = first + x.r[0];
            second = second + y.r[0];
        }
        HD void total(double& x, double& y) {
            x = Exec::total(first);
            y = Exec::total(second);
        }
    };

    // What follows serves the phases of a tensor.

    HD static void sync() { __syncthreads(); }
    template <class Function>
    HD static void each_index(int64_t length, Function&& f) {
        for (int64_t i = threadIdx.x; i < length; i += kTensorThreads) f(i);
    }
    template <class Function>
    HD static void each_pack(int64_t length, Function&& f) {
        for (int64_t at = thread() * kLanes; at < length; at += kTensorThreads * kLanes)
            f(at, length - at < kLanes ? int(length - at) : kLanes);
    }
    template <class Function>
    HD static void each_lane(D x, int n, Function&& f) {
        UNROLLED for (int lane = 0; lane < kLanes; ++lane) if (lane < n) f(lane, x.r[lane]);
    }
    // A warp for each.
    template <class Function>
    HD static void each_run(int64_t length, int run, Function&& f) {
        for (int64_t block = warp(); block * run < length; block += kTensorThreads / 32) {
            const int64_t first = block * run;
            f(block, first, int(length - first < run ? length - first : run));
        }
    }
    HD static float largest_of(const float* x, int length) {
        float top = 0.f;
        for (int i = thread() % 32; i < length; i += 32)
            top = engine::ENGINE_ISA::largest(x[i], top);
        return largest_of_threads<32>(top);
    }
    template <class Function>
    HD static void each_pack_of_run(int length, Function&& f) {
        for (int at = thread() % 32 * kLanes; at < length; at += 32 * kLanes)
            f(at, length - at < kLanes ? length - at : kLanes);
    }
    template <class Function>
    HD static double sum_of(int64_t length, Function&& f) {
        __shared__ double result;
        if (warp() == 0) {
            double sum = 0;
            UNROLLED_BY_8 for (int64_t i = threadIdx.x; i < length; i += 32) sum += f(i);
            UNROLLED for (int apart = 16; apart > 0; apart /= 2) sum +=
                __shfl_xor_sync(kWarp, sum, apart);
            if (leads()) result = sum;
        }
        __syncthreads();
        const double sum = result;
        __syncthreads();
        return sum;
    }

   private:
    // The largest of kThreads neighbouring threads of a warp, which must all call this.
    template <int kThreads>
    HD static float largest_of_threads(float top) {
        UNROLLED for (int apart = kThreads / 2; apart > 0; apart /= 2) top =
            engine::ENGINE_ISA::largest(__shfl_xor_sync(kWarp, top, apart), top);
        return top;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
