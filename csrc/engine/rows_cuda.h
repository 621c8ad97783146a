// What a thread of a GPU has of a tile's rows: its elements in memory, and sums over rows and
// columns.
//
// A block of two warps runs a tile, each thread being two packs of four columns of a row.  Four
// threads share a block of 32 columns: each has four neighbours of its first half and the four that
// are sixteen further.  So the halves share words of random bits within a thread, a row comes in
// two vectors, and a block of 128 or 256 columns never leaves its warp.  Rows need no barrier but
// where their sums are taken, once in eight rows.
#pragma once

#include "core/numerics.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kTileThreads = 64;  // of a block that runs a tile

#if !defined(shared_room)
// RowSums::kShared for each factored moment; read in vectors of 16 bytes.
extern __shared__ __align__(16) float shared_room[];
#endif

struct ThreadRows {
    static constexpr int kSpan = kTileCols / kTileThreads / kLanes;
    static constexpr int kWarpCols = kTileCols / (kTileThreads / 32);
    static constexpr int kThreadCols = kSpan * kLanes;
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

    HD static float4 four(F x) { return make_float4(x.r[0], x.r[1], x.r[2], x.r[3]); }

    // A thread's elements of the rows of a tile in memory.  Those of a row are stored when all have
    // been put; those of a whole tile's next row are under way while one is computed.
    template <class T>
    struct Row {
        static constexpr int kWords = int(sizeof(T)), kEach = 4 / kWords;  // elements of a word
        static constexpr int kBits = 8 * kWords;
        using Vectors = uint32_t[kSpan][kWords];
        using Element = Choice<kWords == 4, uint32_t, Choice<kWords == 2, uint16_t, uint8_t>>;

        T* at;
        int width;
        bool whole;
        Vectors read, ahead, written;

        // Once a tile: where its first row is.
        template <class PlaceT>
        HD void start(const PlaceT& place, T* first) {
            if (place.whole) ask(first, place.width());
        }

        // To be put.
        template <class PlaceT>
        HD void open(const PlaceT& place, T* first, int row_width) {
            at = first;
            width = row_width;
            whole = place.whole;
        }
        // To be read: row `row`, whose tile's columns begin at `first`.
        template <class PlaceT>
        HD void begin(const PlaceT& place, T* first, int64_t row, int row_width) {
            open(place, first, row_width);
            if (!whole) {
                UNROLLED for (int i = 0; i < kSpan; ++i) {
                    Element* mine = own();
                    ROLLED for (int k = 0; k < kLanes; ++k) {
                        const int col = column(i) + k;
                        mine[k] = col < width ? reinterpret_cast<const Element*>(at)[col] : 0;
                    }
                    load_words(mine, read[i]);
                }
                return;
            }
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                UNROLLED for (int j = 0; j < kWords; ++j) read[i][j] = ahead[i][j];
            }
            if (row + 1 < place.end_row()) ask(first + place.cols(), width);
        }
        HD void end() {
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                if (whole) {
                    if (column(i) < width) store_words(at + column(i), written[i]);
                    continue;
                }
                Element* mine = own();
                store_words(mine, written[i]);
                ROLLED for (int k = 0; k < kLanes; ++k) {
                    const int col = column(i) + k;
                    if (col < width) reinterpret_cast<Element*>(at)[col] = mine[k];
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
        HD void put_saturated(int i, int col, int n, U x) { put_uint(i, col, n, min(x, U(255u))); }

       private:
        HD void ask(T* first, int row_width) {
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                UNROLLED for (int j = 0; j < kWords; ++j) ahead[i][j] = 0;
                if (column(i) < row_width) load_words(first + column(i), ahead[i]);
            }
        }
        // Where elements become words, one by one, and the other way.
        HD static Element* own() {
            alignas(16) __shared__ Element of_threads[kTileThreads * kLanes];
            return of_threads + thread() * kLanes;
        }
    };

    // The same of one bit a column, lowest first.
    struct Bits {
        uint8_t* at;
        int width;
        uint32_t read, ahead, written;  // the packs' from bits 0 and 16 on

        template <class PlaceT>
        HD void start(const PlaceT& place, uint8_t* first) {
            if (place.whole) ask(first, place.width());
        }
        template <class PlaceT>
        HD void begin(const PlaceT& place, uint8_t* first, int64_t row, int row_width) {
            at = first;
            width = row_width;
            written = 0;
            uint32_t word = 0;
            if (place.whole) {
                word = ahead;
                if (row + 1 < place.end_row()) ask(first + place.cols() / 8, width);
            } else {
                ROLLED for (int j = 0; j < 4; ++j) {
                    const int byte = 4 * block() + j;
                    if (8 * byte < width) word |= uint32_t(at[byte]) << 8 * j;
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

       private:
        HD void ask(const uint8_t* first, int row_width) {
            ahead = 0;
            if (32 * block() < row_width)
                ahead = *reinterpret_cast<const uint32_t*>(first + 4 * block());
        }
    };

    // Eight rows are kept until an eighth of the threads can sum each.
    struct RowSums {
        static constexpr int kRows = 8;
        static constexpr int kPitch = 16 * 17;  // 16 blocks of 16 lanes; rows begin half the banks
                                                // apart
        static constexpr int kRoom = kRows * kPitch;
        // Floats of shared memory that a factored moment has: this room, and two for each column.
        static constexpr int kShared = kRoom + 2 * kTileCols;

        float *to, *room;
        int last;
        F pairs;

        HD void begin(int moment) { begin_in(shared_room + moment * kShared); }
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
            reinterpret_cast<float4*>(room + row % kRows * kPitch)[thread()] = four(pairs);
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

    // A number for each of a tile's columns.  Each thread keeps its own elements in shared memory:
    // registers are what limits the number of warps.
    struct Kept {
        float4* at;

        HD void begin(F*, int moment, int which = 1) {
            at = reinterpret_cast<float4*>(shared_room + moment * RowSums::kShared +
                                           RowSums::kRoom + which * kTileCols) +
                 thread();
        }
        HD void put(int i, F x) { at[i * kTileThreads] = four(x); }
        HD F load(int i) const {
            const float4 four = at[i * kTileThreads];
            F x;
            x.r[0] = four.x, x.r[1] = four.y, x.r[2] = four.z, x.r[3] = four.w;
            return x;
        }
    };

    // A vector that runs along the columns: a tile's part of it, read once.
    struct AlongColumns {
        Kept values;

        HD void begin_tile(const float* from, int width, int moment) {
            values.begin(nullptr, moment, 0);
            UNROLLED for (int i = 0; i < kSpan; ++i)
                values.put(i, load_f32(from + column(i), lanes(i, width)));
        }
        // The tensor's last row may end early.
        HD void begin_row(const float*, int width, int width_of_tile) {
            if (width == width_of_tile) return;
            UNROLLED for (int i = 0; i < kSpan; ++i)
                values.put(i, only(lane_index() < U(uint32_t(lanes(i, width))), values.load(i)));
        }
        HD F load(int i, int, int) const { return values.load(i); }
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
};

}  // namespace ENGINE_ISA
}  // namespace engine
