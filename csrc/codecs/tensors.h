// Gradients and weights, as their dtypes store them.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

HD int dtype_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

HD F load_as(int32_t dtype, const char* from, int64_t at, int n) {
    if (dtype == kFloat32) return load_f32(reinterpret_cast<const float*>(from) + at, n);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from) + at;
    return dtype == kBFloat16 ? load_bf16(halves, n) : from_fp16(load_uint(halves, n));
}

// Rounds to nearest.
HD void store_as(int32_t dtype, char* at, int col, F x, int n) {
    if (dtype == kFloat32) return store_f32(reinterpret_cast<float*>(at) + col, x, n);
    U code = dtype == kBFloat16 ? to_bf16(x) : to_fp16(x);
    store_uint(reinterpret_cast<uint16_t*>(at) + col, code, n);
}

// Decodes a tile's rows, of any dtype.
struct AnyRows {
    Exec::Row<const float> wide;
    Exec::Row<const uint16_t> narrow;

    HD void start(const Place& p, int32_t dtype, uint64_t data) {
        if (dtype == kFloat32) return wide.start(p, pointer<const float>(data));
        narrow.start(p, pointer<const uint16_t>(data));
    }
    // f(i, x) for all vectors x of a row.
    template <class Function>
    HD void each(const Place& p, int32_t dtype, uint64_t data, int64_t row, int width,
                 Function&& f) {
        if (dtype == kFloat32) {
            wide.begin(p, pointer<const float>(data), row, width);
            return Exec::each(width,
                              [&](int i, int col, int n) INLINED { f(i, wide.f32(i, col, n)); });
        }
        narrow.begin(p, pointer<const uint16_t>(data), row, width);
        if (dtype == kBFloat16)
            return Exec::each(width,
                              [&](int i, int col, int n) INLINED { f(i, narrow.bf16(i, col, n)); });
        Exec::each(width,
                   [&](int i, int col, int n) INLINED { f(i, from_fp16(narrow.uint(i, col, n))); });
    }
};

// Unusable elements of a gradient (NaN, infinite, too large to be squared) count as zero.
HD F usable(F g, Mask& ok) {
    ok = abs(g) <= F(kLargestGrad);
    return RARELY(!all(ok)) ? select(ok, g, F(0.f)) : g;
}

// kAhead: columns of later rows are prefetched.
template <bool kAhead = true>
struct Bf16Grad {
    const Place& place;
    const uint16_t *data, *at;
    int64_t cols;
    bool known_clean;

    HD Bf16Grad(const Place& p, F* = nullptr, bool known_clean = false)
        : place(p),
          data(pointer<uint16_t>(p.tensor.grad)),
          cols(p.cols()),
          known_clean(known_clean) {}

    HD void begin_row(int64_t row, int) { at = data + row * cols + place.col; }
    // Whether all elements of the row are usable.
    HD bool clean(int width) const {
        return known_clean || !any_beyond(at, width, kLargestGradBf16);
    }
    HD F load(int, int col, int n) const {
        if (kAhead) Exec::prefetch(at, cols, col);
        return load_bf16(at + col, n);
    }
    HD float element(int col) const { return float_of_bf16(at[col]); }
};

// A gradient of any dtype.
struct AnyGrad {
    const Place& place;
    const uint64_t data;
    const int32_t dtype;
    F* values;
    AnyRows rows;

    HD AnyGrad(const Place& p, F* room)
        : place(p), data(p.tensor.grad), dtype(p.tensor.grad_dtype), values(room) {
        rows.start(p, dtype, data);
    }

    HD_CALL void begin_row(int64_t row, int width) {
        rows.each(place, dtype, data, row, width, [&](int i, F x) INLINED { values[i] = x; });
    }
    HD bool clean(int) const { return false; }
    HD F load(int i, int, int) const { return values[i]; }
    HD float element(int col) const { return Exec::element(values, col); }
};

// Weights of any dtype and rounding, with their Kahan compensation.
template <class DrawsT>
struct AnyWeightOf {
    const Place& place;
    const uint64_t data, compensation;
    int32_t dtype;
    bool compensated, stochastic;
    int64_t row_at_hand;
    F* values;
    AnyRows rows, lost_rows;
    DrawsT draws;

    HD AnyWeightOf(const Place& p, F* room)
        : place(p),
          data(p.tensor.weight),
          compensation(p.tensor.compensation),
          dtype(p.tensor.weight_dtype),
          compensated(compensation != 0),
          stochastic(has(p.hyper, kStochastic)),
          values(room),
          draws(p.hyper.key, 0, p.words_or(nullptr)) {
        rows.start(p, dtype, data);
        if (compensated) lost_rows.start(p, dtype, compensation);
    }

    HD_CALL void begin_row(int64_t row, int width) {
        row_at_hand = row;
        draws.begin_row(row, place.cols(), place.col);
        rows.each(place, dtype, data, row, width, [&](int i, F x) INLINED { values[i] = x; });
        if (compensated)
            lost_rows.each(place, dtype, compensation, row, width,
                           [&](int i, F x) INLINED { values[i] = values[i] + x; });
    }
    HD F load(int i, int, int) const { return values[i]; }
    HD float element(int col) const { return Exec::element(values, col); }
    HD void store(int i, int, int, F w) { values[i] = w; }

    HD_CALL void end_row(int width) {
        if (dtype == kFloat32) {
            Exec::Row<float> row;
            row.open(place, pointer<float>(data), row_at_hand, width);
            Exec::each(width,
                       [&](int i, int col, int n) INLINED { row.put_f32(i, col, n, values[i]); });
            return row.end(place);
        }
        Exec::Row<uint16_t> row, lost;
        row.open(place, pointer<uint16_t>(data), row_at_hand, width);
        lost.open(place, pointer<uint16_t>(compensation), row_at_hand, width);
        const bool bf16 = dtype == kBFloat16;
        Exec::each(width, [&](int i, int col, int n) INLINED {
            const F w = values[i];
            const U upper = bf16 && stochastic ? rounded_bf16(w, draws.next(i, col))
                                               : (bf16 ? to_bf16(w) : to_fp16(w)) << 16;
            row.put_upper(i, col, n, upper);
            if (!compensated) return;
            const U code = upper >> 16;
            const F rest = w - (bf16 ? from_bf16(code) : from_fp16(code));
            // Rounded to nearest, a small step would be lost, as it is without compensation.
            lost.put_uint(i, col, n, bf16 ? to_bf16(rest, draws.next(i, col)) : to_fp16(rest));
        });
        row.end(place);
        if (compensated) lost.end(place);
    }
};

using AnyWeight = AnyWeightOf<Exec::RowDraws>;

// bf16 weights with stochastic rounding, as in nearly every run.  kShared: the words of their draws
// are kept for the moments' draws.
template <bool kAhead = true, bool kShared = false>
struct Bf16Weight {
    const Place& place;
    uint16_t *data, *at;
    int64_t cols;
    Words words;
    U block;
    U* kept;

    HD Bf16Weight(const Place& p, U* kept)
        : place(p),
          data(pointer<uint16_t>(p.tensor.weight)),
          cols(p.cols()),
          words(p.hyper.key),
          kept(kept) {}

    HD void begin_row(int64_t row, int) {
        const int64_t first_col = place.col;
        at = data + row * cols + first_col;
        words.begin_row(row, cols, first_col);
    }
    HD F load(int, int col, int n) const {
        if (kAhead) Exec::prefetch(at, cols, col);
        return load_bf16(at + col, n);
    }
    HD float element(int col) const { return float_of_bf16(at[col]); }
    HD void store(int i, int col, int n, F w) {
        if (!(col & 16)) {
            block = words.next(col);
            if (kShared) kept[i / 2] = block;
        }
        store_bf16(at + col, w, draws_of<16>(block, col), n);
    }
    HD void end_row(int) {}
};
// The same for weights that are only read.
struct Bf16WeightRead : Bf16Weight<> {
    HD Bf16WeightRead(const Place& p, F*) : Bf16Weight(p, nullptr) {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
