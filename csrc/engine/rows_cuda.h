// How a thread of a GPU accesses a tile's rows in memory.
//
// A block of two warps (64 threads) runs a tile, row by row.  A row's 512 columns are spread over
// them so that each thread has two packs of four columns, and four threads share a block of 32
// columns: each has four neighbours of its first half and the four that are sixteen further.
//
//   column   0     4     8    12    16    20    24    28    32    36             504   508   512
//            |-----|-----|-----|-----|-----|-----|-----|-----|-----|-----|-- ... --|-----|-----|
//   thread   |  0  |  1  |  2  |  3  |  0  |  1  |  2  |  3  |  4  |  5  |   ...   | 62  | 63  |
//   pack i   |  0  |  0  |  0  |  0  |  1  |  1  |  1  |  1  |  0  |  0  |   ...   |  1  |  1  |
//            |      first half       |      second half      |
//            |--------- a block of 32 columns: block() -------|
//
//   warp 0: threads  0 to 31, columns   0 to 255, blocks 0 to 7
//   warp 1: threads 32 to 63, columns 256 to 511, blocks 8 to 15
//
// So the halves share words of random bits (core/random.h) within a thread, a row is two vectors,
// and a block of 128 or 256 columns stays within a warp.  Rows need no barrier except when their
// sums are taken, once in eight rows.
#pragma once

#include "core/random.h"
#include "core/types.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kTileThreads = 64;  // of a block that runs a tile

struct ThreadRows {
    static constexpr int kSpan = kTileCols / kTileThreads / kLanes;
    static constexpr int kWarpCols = kTileCols / (kTileThreads / 32);
    static constexpr int kThreadCols = kSpan * kLanes;
    static constexpr unsigned kWarp = 0xFFFFFFFFu;

    // Unsigned intermediate values, so that the compiler sees which bits of a column are known.
    HD static int thread() { return int(threadIdx.x); }
    HD static int warp() { return int(threadIdx.x / 32); }
    HD static int block() { return int(threadIdx.x / 4); }  // of 32 columns
    HD static int quarter() { return int(threadIdx.x % 4); }
    // The first column of the thread's pack i.
    HD static int column(int i) {
        return int(threadIdx.x / 4 * 32 | i * 16u | threadIdx.x % 4 * kLanes);
    }
    HD static int lanes(int i, int width) {
        const int left = width - column(i);
        return left < 0 ? 0 : left < kLanes ? left : kLanes;
    }

    HD static float4 four(F x) { return make_float4(x.r[0], x.r[1], x.r[2], x.r[3]); }

    // A thread uses four of a row's random words, which Place keeps.
    using RowDraws = SharedDraws;
    HD static void make_words(U& words, uint64_t key, int64_t row, int64_t cols, int64_t col) {
        Words of_row(key);
        of_row.begin_row(row, cols, col);
        words = of_row.at(column(0));
    }

    // Calls f, of which there are two copies.  The branches are equal on purpose: f is inlined into
    // both, and in each the compiler knows place.by_vectors.  So a row asks for it once, where each
    // of its streams (Row, Bits, AlongColumns) would ask by itself.
    template <class PlaceT, class Function>
    HD static void knowing(const PlaceT& place, Function&& f) {
        if (place.by_vectors)
            f();
        else
            f();
    }

    // A thread's elements of the rows of a tile in memory.  A row's are stored when all have been
    // put.  With place.by_vectors those of the next kAhead rows are loaded while one is computed,
    // and a thread has all of its columns or none; otherwise a row's elements are moved one by one.
    template <class T, int kAhead = 1>
    struct Row {
        static constexpr int kWords = int(sizeof(T)), kEach = 4 / kWords;  // elements of a word
        static constexpr int kBits = 8 * kWords;
        using Vectors = uint32_t[kSpan][kWords];
        using Element = Choice<kWords == 4, uint32_t, Choice<kWords == 2, uint16_t, uint8_t>>;

        T* mine;  // the thread's first element; place.element is added on access
        int width;
        Vectors read, ahead[kAhead], written;

        // Once a tile.
        template <class PlaceT>
        HD void start(const PlaceT& place, T* data) {
            mine = data + column(0);
            UNROLLED for (int n = 0; n < kAhead; ++n) {
                UNROLLED for (int i = 0; i < kSpan; ++i) {
                    UNROLLED for (int j = 0; j < kWords; ++j) ahead[n][i][j] = 0;
                }
                if (place.by_vectors) ask(place, n, ahead[n]);
            }
        }

        // To write a row.
        template <class PlaceT>
        HD void open(const PlaceT&, T* data, int64_t, int row_width) {
            mine = data + column(0);
            width = row_width;
        }
        // To read a row.
        template <class PlaceT>
        HD void begin(const PlaceT& place, T*, int64_t, int row_width) {
            width = row_width;
            if (!place.by_vectors) {
                const Element* from = row_of(place);
                UNROLLED for (int i = 0; i < kSpan; ++i) {
                    Element* own = room();
                    ROLLED for (int k = 0; k < kLanes; ++k) {
                        const int col = column(i) + k;
                        own[k] = col < width ? from[col] : 0;
                    }
                    load_words(own, read[i]);
                }
                return;
            }
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                UNROLLED for (int j = 0; j < kWords; ++j) {
                    read[i][j] = ahead[0][i][j];
                    UNROLLED for (int n = 1; n < kAhead; ++n) ahead[n - 1][i][j] = ahead[n][i][j];
                }
            }
            ask(place, kAhead, ahead[kAhead - 1]);
        }
        template <class PlaceT>
        HD void end(const PlaceT& place) {
            if (place.by_vectors) {
                if (column(0) >= width) return;
                UNROLLED for (int i = 0; i < kSpan; ++i)
                    store_words(mine + place.element + i * 16, written[i]);
                return;
            }
            Element* to = row_of(place);
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                Element* own = room();
                store_words(own, written[i]);
                ROLLED for (int k = 0; k < kLanes; ++k) {
                    const int col = column(i) + k;
                    if (col < width) to[col] = own[k];
                }
            }
        }

        // For fp32, bf16 and fp16: whether no exponent has its highest bit set.
        HD bool all_below_two() const {
            uint32_t bits = 0;
            UNROLLED for (int i = 0; i < kSpan; ++i) {
                UNROLLED for (int j = 0; j < kWords; ++j) bits |= read[i][j];
            }
            return (bits & (kWords == 4 ? 0x40000000u : 0x40004000u)) == 0;
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
        HD void put_u8(int i, int, int, U x) { written[i][0] = word_of_bytes(x); }

       private:
        // Loads the n'th row from this one on, or this one if the tile has no such row.
        template <class PlaceT>
        HD void ask(const PlaceT& place, int n, Vectors& words) {
            const bool exists = n == 1 ? place.more : place.at_row + n < place.num_rows();
            const T* from = mine + (exists ? place.element + n * place.cols() : place.element);
            if (column(0) >= place.width()) return;
            UNROLLED for (int i = 0; i < kSpan; ++i) load_words(from + i * 16, words[i]);
        }
        template <class PlaceT>
        HD Element* row_of(const PlaceT& place) const {
            return (Element*)(mine - column(0) + place.element);
        }
        // Where single elements are combined into words, and words split into elements.
        HD static Element* room() {
            alignas(16) __shared__ Element of_threads[kTileThreads * kLanes];
            return of_threads + thread() * kLanes;
        }
    };

    // The same for one bit per column, lowest first.
    struct Bits {
        uint8_t *at, *next;  // the thread's byte, of this row and of the one to be loaded
        int64_t pitch;
        int width;
        uint32_t read, ahead, written;  // the two packs' bits from 0 and 16 on

        template <class PlaceT>
        HD void start(const PlaceT& place, uint8_t* data) {
            pitch = (place.cols() + 7) / 8;
            next = data + place.first_row() * pitch + place.col / 8 + thread();
            ahead = 0;
            if (place.by_vectors && column(0) < place.width()) ahead = word_of(next);
        }
        template <class PlaceT>
        HD void begin(const PlaceT& place, uint8_t*, int64_t, int row_width) {
            width = row_width;
            written = 0;
            at = next;
            next += pitch;
            uint32_t word = 0;
            if (place.by_vectors) {
                word = ahead;
                if (place.more && column(0) < place.width()) ahead = word_of(next);
            } else {
                ROLLED for (int j = 0; j < 4; ++j) {
                    const int byte = 4 * block() + j;
                    if (8 * byte < width) word |= uint32_t(at[byte - thread()]) << 8 * j;
                }
            }
            read = word >> quarter() * kLanes;
        }
        HD uint32_t load(int i, int, int) const { return read >> 16 * i; }
        HD void store(int i, int, int, uint32_t bits) { written |= bits << 16 * i; }
        HD void end() {
            uint32_t word = written << quarter() * kLanes;
            UNROLLED for (int apart = 1; apart < 4; apart *= 2) word |=
                __shfl_xor_sync(kWarp, word, apart);
            if (8 * thread() < width) *at = uint8_t(word >> 8 * quarter());
        }

       private:
        HD static uint32_t word_of(const uint8_t* byte) {
            return *reinterpret_cast<const uint32_t*>(uint64_t(byte) & ~uint64_t(3));
        }
    };

    // A number for each block of kBlock columns of a row: the thread's, with that of the next row
    // loaded ahead.
    template <class T, int kBlock>
    struct PerBlock {
        T *at, *next;
        int64_t pitch;
        T value, ahead;

        template <class PlaceT>
        HD void start(const PlaceT& place, T* data) {
            pitch = (place.cols() + kBlock - 1) / kBlock;
            next = data + place.first_row() * pitch + place.col / kBlock + number();
            ahead = T(0);
            if (exists(place)) ahead = *next;
        }
        template <class PlaceT>
        HD void begin(const PlaceT& place, T*, int64_t) {
            at = next;
            next += pitch;
            value = ahead;
            if (place.more && exists(place)) ahead = *next;
        }
        HD T load(int) const { return value; }
        // Written by one of the threads that share the block, if it exists.
        HD void store(int, T x, int width) {
            if (thread() % (kBlock / kThreadCols) == 0 && number() * kBlock < width) *at = x;
        }

       private:
        HD static int number() { return block() * 32 / kBlock; }
        template <class PlaceT>
        HD static bool exists(const PlaceT& place) {
            return number() * kBlock < place.width();
        }
    };
};

}  // namespace ENGINE_ISA
}  // namespace engine
