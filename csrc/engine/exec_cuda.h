// A block of two warps runs a tile, each thread being eight columns of a row; or a tensor.
//
// A warp has 256 columns.  In each of its groups of 64 a thread has two: column 32 h + l and the
// one sixteen further, where h is the warp's half that the thread is in and l its place there.  So
// they share a word of random bits, sixteen neighbours read one sector of 32 bytes, a block of 128
// or 256 columns never leaves its warp, and rows need no barrier but where their sums are taken,
// once in four rows.  Sums are added in the order in which engine/exec_cpu.h adds them, but for the
// three that `total` makes of doubles.
#pragma once

#include "core/numerics.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kTileThreads = 64;     // of a block that runs a tile
constexpr int kTensorThreads = 256;  // of a block that runs a tensor's phase

#if !defined(shared_room)
extern __shared__ float shared_room[];  // a RowSums::kRoom for each factored moment
#endif

struct Exec {
    static constexpr int kSpan = kTileCols / kTileThreads;
    static constexpr int kStripTiles = 1;
    static constexpr int kWarpCols = kTileCols / (kTileThreads / 32);
    static constexpr bool kWeightsLater = false;
    static constexpr unsigned kWarp = 0xFFFFFFFFu;

    HD static int warp() { return int(threadIdx.x) / 32; }
    HD static int half() { return int(threadIdx.x) / 16 % 2; }
    HD static int lane() { return int(threadIdx.x) % 16; }
    HD static int group(int i) { return warp() * kWarpCols + i / 2 * 64; }  // its first column
    HD static int column(int i) { return group(i) + half() * 32 + i % 2 * 16 + lane(); }

    struct Columns {
        float* to;
        float sums[kSpan];

        HD void begin(float* first, int) {
            to = first;
            UNROLLED for (int i = 0; i < kSpan; ++i) sums[i] = 0.f;
        }
        HD void begin_row(float*) {}
        HD void add(int i, int, F x) { sums[i] = sums[i] + x; }
        HD void end(int width) {
            UNROLLED for (int i = 0; i < kSpan; ++i) if (column(i) < width) to[column(i)] = sums[i];
        }
    };

    // Four rows are kept until a sixteenth of the threads can sum each.
    struct RowSums {
        static constexpr int kRows = 4;
        static constexpr int kPitch = 16 * 17;  // 16 blocks of 16 lanes; rows begin half the banks
                                                // apart
        static constexpr int kRoom = kRows * kPitch;

        float *to, *room;
        int last;
        float pairs[kSpan / 2];

        HD void begin(int factored) { begin_in(shared_room + factored * kRoom); }
        HD void begin_in(float* where) {
            room = where;
            last = -1;
        }
        HD void begin_row(float* first) {
            to = first;
            UNROLLED for (int j = 0; j < kSpan / 2; ++j) pairs[j] = 0.f;
        }
        HD void add(int i, F x) { pairs[i / 2] = i % 2 ? pairs[i / 2] + x : x; }
        HD void add_square(int i, F x) { pairs[i / 2] = i % 2 ? fma(x, x, pairs[i / 2]) : x * x; }
        HD void end_row(int row, int) {
            UNROLLED for (int j = 0; j < kSpan / 2; ++j) {
                int block = group(2 * j) / 32 + half();
                room[row % kRows * kPitch + block * 16 + lane()] = pairs[j];
            }
            last = row;
            if (row % kRows == kRows - 1) flush();
        }
        HD void end() {
            if (last % kRows != kRows - 1) flush();
        }

       private:
        HD void flush() {
            __syncthreads();
            const int mine = int(threadIdx.x) / 16, row = last / kRows * kRows + mine;
            float sum = 0.f;
            UNROLLED for (int block = 0; block < 16; ++block) sum =
                sum + room[mine * kPitch + block * 16 + lane()];
            UNROLLED for (int apart = 8; apart > 0; apart /= 2) sum =
                sum + __shfl_xor_sync(kWarp, sum, apart);
            if (lane() == 0 && row <= last) to[row] = sum;
            __syncthreads();
        }
    };

    struct RowTotals : RowSums {
        float* rows;

        HD void begin(double&) {
            __shared__ float of_tile[kTileRows], room[kRoom];
            rows = of_tile;
            begin_in(room);
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
        UNROLLED for (int i = 0; i < kSpan; ++i) {
            if (group(i) < width) f(i, column(i), column(i) < width ? 1 : 0);
        }
    }

    template <int kBlock, class Function>
    HD static void each_block(int width, Function&& f) {
        constexpr int kOwn = kWarpCols / kBlock;
        UNROLLED for (int at = 0; at < kOwn; ++at) {
            int block = warp() * kOwn + at;
            if (block * kBlock < width) f(at, block);
        }
    }
    template <int kBlock>
    HD static int block_of(int i, int) {
        return i * 32 / kBlock;
    }
    template <int kBlock, bool kSigned = true>
    HD static float largest(const F* values, int at, int width) {
        float top = 0.f;
        UNROLLED for (int i = 0; i < kSpan; ++i) {
            if (i * 32 / kBlock == at && column(i) < width)
                top = max(kSigned ? abs(values[i]) : values[i], top);
        }
        return largest_of_warp(top);
    }

    template <class T>
    HD static void prefetch(const T*, int64_t, int) {}  // other blocks compute while one waits

    HD static bool leads() { return threadIdx.x == 0; }
    HD static bool leads_block() { return threadIdx.x % 32 == 0; }

    // The threads' x, added: of a tile.
    template <class T>
    HD static T total(T x) {
        __shared__ T of_warps[kTileThreads / 32];
        UNROLLED for (int apart = 16; apart > 0; apart /= 2) x =
            x + __shfl_xor_sync(kWarp, x, apart);
        __syncthreads();
        if (leads_block()) of_warps[warp()] = x;
        __syncthreads();
        return of_warps[0] + of_warps[1];
    }

    template <class GradT, class WeightT, class Function>
    HD static void each_sample(int first, int every, int width, const GradT& grad,
                               const WeightT& weight, Function&& f) {
        each(width, [&](int i, int col, int n) {
            if (n && col >= first && unsigned(col - first) % unsigned(every) == 0)
                f((col - first) / every, col, n, grad.load(i, col, n), weight.load(i, col, n));
        });
    }
    HD static float element(const F* values, int) { return *values; }  // a thread's own

    struct Spread {
        double first = 0, second = 0;

        HD void add(int, int, int, D x, D y) {
            first = first + x;
            second = second + y;
        }
        HD void total(double& x, double& y) {
            x = Exec::total(first);
            y = Exec::total(second);
        }
    };

    HD static uint32_t load_bits(const uint8_t* from, int col, int n) {
        return n ? from[col / 8] >> col % 8 & 1u : 0u;
    }
    HD static void store_bits(uint8_t* to, int col, int n, uint32_t bit) {
        uint32_t bits = __ballot_sync(kWarp, n && bit) >> (threadIdx.x % 32 & 24);
        if (n && col % 8 == 0) to[col / 8] = uint8_t(bits);
    }

    // What follows serves the phases of a tensor.

    HD static void sync() { __syncthreads(); }
    template <class Function>
    HD static void each_index(int64_t length, Function&& f) {
        for (int64_t i = threadIdx.x; i < length; i += kTensorThreads) f(i);
    }
    template <class Function>
    HD static void each_pack(int64_t length, Function&& f) {
        each_index(length, [&](int64_t i) { f(i, 1); });
    }
    template <class Function>
    HD static void each_lane(D x, int, Function&& f) {
        f(0, x);
    }
    // A warp to each.
    template <class Function>
    HD static void each_run(int64_t length, int run, Function&& f) {
        for (int64_t block = warp(); block * run < length; block += kTensorThreads / 32) {
            const int64_t first = block * run;
            f(block, first, int(length - first < run ? length - first : run));
        }
    }
    HD static float largest_of(const float* x, int length) {
        float top = 0.f;
        for (int i = int(threadIdx.x) % 32; i < length; i += 32) top = max(x[i], top);
        return largest_of_warp(top);
    }
    template <class Function>
    HD static void each_pack_of_run(int length, Function&& f) {
        for (int i = int(threadIdx.x) % 32; i < length; i += 32) f(i, 1);
    }
    template <class Function>
    HD static double sum_of(int64_t length, Function&& f) {
        __shared__ double result;
        if (warp() == 0) {
            double sum = 0;
            for (int64_t i = threadIdx.x; i < length; i += 32) sum += f(i);
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
    HD static float largest_of_warp(float top) {
        UNROLLED for (int apart = 16; apart > 0; apart /= 2) top =
            max(__shfl_xor_sync(kWarp, top, apart), top);
        return top;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
