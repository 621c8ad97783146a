// A GPU thread's part of a tile's sums and factors, over rows and along columns: in shared memory,
// because registers limit the number of warps.
#pragma once

#include "engine/rows_cuda.h"

namespace engine {
namespace ENGINE_ISA {

#if !defined(shared_room)
// RowSums::kShared for each factored moment; read in vectors of 16 bytes.
extern __shared__ __align__(16) float shared_room[];
#endif

struct ThreadSums : ThreadRows {
    // Eight rows are collected; then an eighth of the threads sums each.
    struct RowSums {
        static constexpr int kRows = 8;
        static constexpr int kPitch = 16 * 17;  // 16 blocks of 16 lanes; rows begin half the banks
                                                // apart
        static constexpr int kRoom = kRows * kPitch;
        // Floats of shared memory that a factored moment uses: this room, one for each column, and
        // one for each row.
        static constexpr int kShared = kRoom + kTileCols + kTileRows;

        float *to, *room;
        float4* mine;  // the thread's part of `room`
        int last;
        F pairs;

        HD static float* room_of(int moment) { return shared_room + moment * kShared; }
        HD static float* room_of_none() {
            alignas(16) __shared__ float room_of_rows[kRoom];
            return room_of_rows;
        }

        HD void begin(int moment) { begin_in(room_of(moment)); }
        HD void begin_in(float* where) {
            room = where;
            mine = reinterpret_cast<float4*>(where) + thread();
            last = -1;
        }
        HD void begin_row(float* first) {
            to = first;
            pairs = F(0.f);
        }
        HD void add(int i, F x) { pairs = i ? pairs + x : x; }
        HD void add_square(int i, F x) { pairs = i ? fma(x, x, pairs) : x * x; }
        HD void end_row(int row, int) {
            mine[unsigned(row) % kRows * (kPitch / 4)] = four(pairs);
            last = row;
            if (unsigned(row) % kRows == kRows - 1) flush();
        }
        HD void end() {
            if (unsigned(last) % kRows != kRows - 1) flush();
        }

       private:
        // A thread adds up two neighbouring lanes.
        HD void flush() {
            __syncthreads();
            const int which = thread() / 8, row = last / kRows * kRows + which;
            const float* from = room + which * kPitch + thread() % 8 * 2;
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

    // A number for each of a tile's columns.  Each thread keeps its own elements in shared memory,
    // because registers limit the number of warps.
    struct Kept {
        float4* at;

        // For the one moment whose roots are needed.
        HD void begin(F*) {
            alignas(16) __shared__ float roots_of_columns[kTileCols];
            begin_in(roots_of_columns);
        }
        HD void begin_in(float* where) { at = reinterpret_cast<float4*>(where) + thread(); }
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
            values.begin_in(RowSums::room_of(moment) + RowSums::kRoom);
            UNROLLED for (int i = 0; i < kSpan; ++i)
                values.put(i, load_f32(from + column(i), lanes(i, width)));
        }
        // The tensor's last row may end early.
        template <class PlaceT>
        HD void begin_row(const PlaceT& place, const float*, int width) {
            if (place.by_vectors || width == place.width()) return;
            UNROLLED for (int i = 0; i < kSpan; ++i)
                values.put(i, only(lane_index() < U(uint32_t(lanes(i, width))), values.load(i)));
        }
        HD F load(int i, int, int) const { return values.load(i); }
    };

    // A vector that runs along the rows: the same.
    struct AlongRows {
        const float* values;

        template <class PlaceT>
        HD void start(const PlaceT& place, const float* vector, int moment) {
            float* room = RowSums::room_of(moment) + RowSums::kRoom + kTileCols;
            values = room;
            static_assert(kTileRows <= kTileThreads, "a thread reads one");
            if (thread() < place.num_rows()) room[thread()] = vector[place.first_row() + thread()];
            __syncthreads();
        }
        template <class PlaceT>
        HD float begin(const PlaceT& place, int64_t) const {
            return values[place.at_row];
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
};

}  // namespace ENGINE_ISA
}  // namespace engine
