// A block of two warps runs a tile, each thread being two packs of four columns of a row; or a
// tensor.
//
// Four threads share a block of 32 columns: each has four neighbours of its first half and the four
// that are sixteen further.  So the halves share words of random bits within a thread, a row comes
// in two vectors, and a block of 128 or 256 columns never leaves its warp.  Rows need no barrier
// but where their sums are taken, once in eight rows.  Sums are added in the order in which
// engine/exec_cpu.h adds them, but for the three that `total` makes of doubles.
#pragma once

#include "core/numerics.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kTileThreads = 64;     // of a block that runs a tile
constexpr int kTensorThreads = 256;  // of a block that runs a tensor's phase
#if !defined(TILE_BLOCKS)
#define TILE_BLOCKS 1
#endif
constexpr int kTileBlocks = TILE_BLOCKS;

#if !defined(shared_room)
extern __shared__ float shared_room[];  // a RowSums::kRoom for each factored moment
#endif

struct Exec {
    static constexpr int kSpan = kTileCols / kTileThreads / kLanes;
    static constexpr int kStripTiles = 1;
    static constexpr int kWarpCols = kTileCols / (kTileThreads / 32);
    static constexpr int kThreadCols = kSpan * kLanes;
    static constexpr bool kWeightsLater = false;
    static constexpr unsigned kWarp = 0xFFFFFFFFu;

    HD static int thread() { return int(threadIdx.x); }
    HD static int warp() { return thread() / 32; }
    HD static int block() { return thread() / 4; }  // of 32 columns
    // The first column of the thread's pack i.
    HD static int column(int i) { return block() * 32 + i * 16 + thread() % 4 * kLanes; }
    HD static int lanes(int i, int width) {
        const int left = width - column(i);
        return left < 0 ? 0 : left < kLanes ? left : kLanes;
    }

    // A thread's elements of a row in memory: all are on their way before the first is asked for,
    // and stored when all have been put.
    template <class T>
    struct Row {
        static constexpr int kWords = int(sizeof(T)), kEach = 4 / kWords;  // elements of a word
        static constexpr int kBits = 8 * kWords;

        T* at;
        int width;
        bool whole;
        uint32_t read[kSpan][kWords], written[kSpan][kWords];

        // To be put.
        HD void open(T* row, int64_t, int row_width, bool is_whole) {
            at = row;
            width = row_width;
            whole = is_whole;
        }
        // To be read.
        HD void begin(T* row, int64_t cols, int row_width, bool is_whole) {
            open(row, cols, row_width, is_whole);
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                UNROLLED for (int j = 0; j < kWords; ++j) read[i][j] = 0;
                if (whole) {
                    if (column(i) < width) load_words(at + column(i), read[i]);
                    continue;
                }
                UNROLLED for (int k = 0; k < kLanes; ++k) {
                    const int col = column(i) + k;
                    if (col < width) read[i][k / kEach] |= bits_at(col) << k % kEach * kBits;
                }
            }
        }
        HD void end() {
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                if (whole) {
                    if (column(i) < width) store_words(at + column(i), written[i]);
                    continue;
                }
                UNROLLED for (int k = 0; k < kLanes; ++k) {
                    const int col = column(i) + k;
                    if (col < width) put_at(col, written[i][k / kEach] >> k % kEach * kBits);
                }
            }
        }

        HD U uint(int i, int, int) const {
            U x;
            UNROLLED for (int k = 0; k < kLanes; ++k) x.r[k] =
                read[i][k / kEach] >> k % kEach * kBits & (0xFFFFFFFFu >> (32 - kBits));
            return x;
        }
        HD F f32(int i, int col, int n) const { return as_float(uint(i, col, n)); }
        HD F bf16(int i, int, int) const {
            U x;
            UNROLLED for (int k = 0; k < kLanes; ++k) x.r[k] =
                k % 2 ? read[i][k / 2] & 0xFFFF0000u : read[i][k / 2] << 16;
            return as_float(x);
        }
        HD F s8(int i, int, int) const {
            F x;
            UNROLLED for (int k = 0; k < kLanes; ++k) x.r[k] = float(int8_t(read[i][0] >> 8 * k));
            return x;
        }

        HD void put_uint(int i, int, int, U x) {
            UNROLLED for (int k = 0; k < kLanes; ++k) {
                uint32_t& word = written[i][k / kEach];
                word = k % kEach ? word | x.r[k] << k % kEach * kBits : x.r[k];
            }
        }
        HD void put_f32(int i, int col, int n, F x) { put_uint(i, col, n, as_bits(x)); }
        HD void put_upper(int i, int, int, U x) {
            UNROLLED for (int k = 0; k < kLanes; k += 2) written[i][k / 2] =
                upper_halves(x.r[k], x.r[k + 1]);
        }
        HD void put_s8(int i, int col, int n, U x) { put_uint(i, col, n, x & U(255u)); }
        HD void put_saturated(int i, int col, int n, U x) {
            put_uint(i, col, n, min(x, U(255u)));
        }

       private:
        HD uint32_t bits_at(int col) const {
            if constexpr (kWords == 4)
                return __float_as_uint(at[col]);
            else if constexpr (kWords == 2)
                return at[col];
            else
                return uint8_t(at[col]);
        }
        HD void put_at(int col, uint32_t bits) {
            if constexpr (kWords == 4)
                at[col] = __uint_as_float(bits);
            else
                at[col] = T(bits);
        }
    };

    // The same of one bit a column, lowest first.
    struct Bits {
        uint8_t* at;
        int width;
        uint32_t read, written;  // the packs' from bits 0 and 16 on

        HD void begin(uint8_t* row, int row_width, bool whole) {
            at = row;
            width = row_width;
            written = 0;
            uint32_t word = 0;
            const int first = 4 * block();
            if (whole) {
                if (8 * first < width) word = *reinterpret_cast<const uint32_t*>(at + first);
            } else {
                UNROLLED for (int j = 0; j < 4; ++j) {
                    if (8 * (first + j) < width) word |= uint32_t(at[first + j]) << 8 * j;
                }
            }
            read = word >> thread() % 4 * kLanes;
        }
        HD uint32_t load(int i, int, int) const { return read >> 16 * i; }
        HD void store(int i, int, int, uint32_t bits) { written |= bits << 16 * i; }
        HD void end() {
            uint32_t word = written << thread() % 4 * kLanes;
            UNROLLED for (int apart = 1; apart < 4; apart *= 2) word |=
                __shfl_xor_sync(kWarp, word, apart);
            if (8 * thread() < width) at[thread()] = uint8_t(word >> 8 * (thread() % 4));
        }
    };

    // A vector that runs along the columns: a tile's part of it, read once.
    struct AlongColumns {
        F values[kSpan];
        bool whole;

        HD void begin_tile(const float* from, int width, bool is_whole) {
            whole = is_whole;
            UNROLLED for (int i = 0; i < kSpan; ++i) values[i] =
                load_f32(from + column(i), lanes(i, width));
        }
        HD void begin_row(const float*) {}
        // The last row may end early.
        HD F load(int i, int, int n) const {
            return whole ? values[i] : select(lane_index() < U(uint32_t(n)), values[i], F(0.f));
        }
    };

    struct Columns {
        float* to;
        F sums[kSpan];

        HD void begin(float* first, int) {
            to = first;
            UNROLLED for (int i = 0; i < kSpan; ++i) sums[i] = F(0.f);
        }
        HD void begin_row(float*) {}
        HD void add(int i, int, F x) { sums[i] = sums[i] + x; }
        HD void end(int width) {
            UNROLLED for (int i = 0; i < kSpan; ++i)
                store_f32(to + column(i), sums[i], lanes(i, width));
        }
    };

    // Eight rows are kept until an eighth of the threads can sum each.
    struct RowSums {
        static constexpr int kRows = 8;
        static constexpr int kPitch = 16 * 17;  // 16 blocks of 16 lanes; rows begin half the banks
                                                // apart
        static constexpr int kRoom = kRows * kPitch;

        float *to, *room;
        int last;
        F pairs;

        HD void begin(int factored) { begin_in(shared_room + factored * kRoom); }
        HD void begin_in(float* where) {
            room = where;
            last = -1;
        }
        HD void begin_row(float* first) {
            to = first;
            pairs = F(0.f);
        }
        HD void add(int i, F x) { pairs = i ? pairs + x : x; }
        HD void add_square(int i, F x) { pairs = i ? fma(x, x, pairs) : x * x; }
        HD void end_row(int row, int) {
            float4* four = reinterpret_cast<float4*>(room + row % kRows * kPitch) + thread();
            *four = make_float4(pairs.r[0], pairs.r[1], pairs.r[2], pairs.r[3]);
            last = row;
            if (row % kRows == kRows - 1) flush();
        }
        HD void end() {
            if (last % kRows != kRows - 1) flush();
        }

       private:
        // A thread adds up two neighbouring lanes.
        HD void flush() {
            __syncthreads();
            const int mine = thread() / 8, row = last / kRows * kRows + mine;
            const float* from = room + mine * kPitch + thread() % 8 * 2;
            float sum[2] = {};
            UNROLLED for (int block = 0; block < 16; ++block) {
                UNROLLED for (int j = 0; j < 2; ++j) sum[j] = sum[j] + from[block * 16 + j];
            }
            UNROLLED for (int apart = 4; apart > 0; apart /= 2) {
                UNROLLED for (int j = 0; j < 2; ++j) sum[j] =
                    sum[j] + __shfl_xor_sync(kWarp, sum[j], apart);
            }
            if (thread() % 8 == 0 && row <= last) to[row] = sum[0] + sum[1];
            __syncthreads();
        }
    };

    struct RowTotals : RowSums {
        float* rows;

        HD void begin(double&) {
            __shared__ float of_tile[kTileRows];
            alignas(16) __shared__ float room_of_rows[kRoom];
            rows = of_tile;
            begin_in(room_of_rows);
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

    // A thread's columns are in one block.
    template <int kBlock, class Function>
    HD static void each_block(int width, Function&& f) {
        const int mine = block() * 32 / kBlock;
        if (mine * kBlock < width) f(0, mine);
    }
    template <int kBlock>
    HD static int block_of(int, int) {
        return 0;
    }
    template <int kBlock, bool kSigned = true>
    HD static float largest(const F* values, int, int) {
        F top(0.f);
        UNROLLED for (int i = 0; i < kSpan; ++i) top =
            max(kSigned ? abs(values[i]) : values[i], top);
        return largest_of_threads<kBlock / kThreadCols>(engine::ENGINE_ISA::largest(top));
    }
    template <int kBlock>
    HD static bool leads_block() {
        return thread() % (kBlock / kThreadCols) == 0;
    }

    template <class T>
    HD static void prefetch(const T*, int64_t, int) {}  // other blocks compute while one waits

    HD static bool leads() { return thread() == 0; }
    HD static bool leads_warp() { return thread() % 32 == 0; }

    // The threads' x, added: of a tile.
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

    // A thread's own, in the order of their columns.
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
    HD static float element(const F*, int) { return 0.f; }  // asked for by a CPU alone

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
    // Of so many neighbouring threads, which all ask.
    template <int kThreads>
    HD static float largest_of_threads(float top) {
        const unsigned them = kThreads == 32 ? kWarp
                                             : ((1u << kThreads % 32) - 1)
                                                   << thread() % 32 / kThreads * kThreads;
        UNROLLED for (int apart = kThreads / 2; apart > 0; apart /= 2) top =
            engine::ENGINE_ISA::largest(__shfl_xor_sync(them, top, apart), top);
        return top;
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
