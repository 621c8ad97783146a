// Several rows of a narrow matrix at a time, on a CPU.
//
// A row of a few elements takes as long as a vector of them, and what is done once a row takes
// longer than its elements.  But a tile of few columns is one piece of memory.  So a pass takes its
// rows as lines of up to kTileCols elements, whose vectors hold elements of several rows.  Factors
// and draws are looked up for a vector's lanes; sums are added from what the line leaves in L1, row
// by row, so that the results have the same bits.  (So any pass may take lines or rows, whatever
// the others take.)
//
//   memory:      a b c a b c a b c a b c a b c a b c a b c ...     three columns a, b, c
//   row          0     1     2     3     4     5     6
//   vector       |0 ............................ |1 ..........     sixteen lanes: 5 1/3 rows
//   Cursor       row 0, column a                 row 5, column b
//   Cycle        0 0 0 1 1 1 2 2 2 3 3 3 4 4 4 5 | 0 0 1 1 1 ...   lane's row - Cursor::row
//
// What this rests on:
//
//  1. is_narrow() holds: 1 to kNarrowCols columns, at least two rows, all complete.  So the tensor
//     has one tile across (its strips are single tiles, `col` is 0), the rows of a tile are one
//     piece of memory, and a line reads as one row of `width` elements, which begins where its
//     first row does: grads, weights and Scratch need no other code.
//  2. A line is complete rows of one tile: as many as fit into kTileCols elements, fewer at the
//     tile's end.  So a line begins at column 0, and only its last vector may be incomplete.
//  3. Words of random bits are counted with 256 (kWordsOfRow) for each row (core/random.h).  A tile
//     begins at a multiple of 64 rows, so its words are within an aligned block of 2^14: their
//     counters have the same upper half, and one `link` serves a line.  A vector's rows number at
//     most 16, so a word counted from its first row is below kUpper.
//  4. Cursors move on by one vector with each call: a pass calls load() of LineFactors, and next()
//     of LineDraws, once for each vector, in order.  (Weights draw once: for themselves or,
//     with compensation, for what they lose.)  Everything else is addressed by (i, col) and may be
//     read again.
//  5. Whole vectors are read and written, also where fewer lanes exist; nothing reads what is left
//     in the others.  The room for that:
//     - Cycle has kLanes numbers more than columns: a vector may begin with the last column.
//     - A vector that begins in the last row reads kLanes - 1 row factors too many.  The rows'
//       vector is padded to kVectorPad, and the columns' vector follows it (Factors in
//       engine/tensor.h), padded too: what is read is in the workspace, and `picked` for no lane
//       that exists.
//     - Line has kNarrowCols elements more than a line: the last row's last vector.  A row's last
//       vector also overwrites the beginning of the next row in a Line: rows are decoded in order.
//     - The column sums of a tile have room for kTileCols (kPartials).
//  6. Sums have the bits of Exec::RowSums, RowTotals and Columns in engine/exec_cpu.h: a row's
//     vectors begin at its first column, in order, zero beyond its end; rows follow in order, and
//     a total or a column's sum goes on from line to line.
//  7. A codec's slot knows one row at a time: LineSlot lets it begin each row twice, to decode it
//     before the line and to encode it after.
#pragma once

#include "engine/tile.h"

namespace engine {
namespace ENGINE_ISA {

constexpr int kNarrowCols = 64;  // wider rows gain little

// Whether a tensor's rows are taken as lines.  specialised: rows of its dtypes have a loop of their
// own, which is as fast where they take two vectors.
HD bool is_narrow(const Tensor& t, bool specialised) {
    return t.cols <= (specialised ? kLanes : kNarrowCols) && t.rows > 1 &&
           t.numel == t.rows * t.cols;
}

// A number for each column, repeated so that a vector of a line, whichever column it begins with,
// finds its lanes' numbers side by side (5 above).
template <class T>
struct Cycle {
    T of_lanes[kNarrowCols + kLanes];

    // f(column, how many rows further).
    template <class Function>
    HD void lay_out(int cols, Function&& f) {
        for (int at = 0, col = 0, row = 0; at < cols + kLanes; ++at) {
            of_lanes[at] = f(col, row);
            if (++col == cols) col = 0, ++row;
        }
    }
    HD F load(int col) const {
        return load_f32(reinterpret_cast<const float*>(of_lanes) + col, kLanes);
    }
};

// The row and the column with which a vector of a line begins.
struct Cursor {
    int cols, step_rows, step_cols;
    int64_t row;
    int col;

    HD Cursor(int64_t of_cols)
        : cols(int(of_cols)), step_rows(kLanes / cols), step_cols(kLanes % cols) {}
    HD void begin_row(int64_t line) { row = line, col = 0; }
    HD void next() {
        const bool over = col + step_cols >= cols;
        col += over ? step_cols - cols : step_cols;
        row += over ? step_rows + 1 : step_rows;
    }
};

// A factored moment that is only read, in the order of vectors.
struct LineFactors {
    const float* const rows;
    Cursor cursor;
    Cycle<float> cols;
    Cycle<uint32_t> row_of;  // a lane's row, counted from the vector's first

    HD LineFactors(const Place& p, SlotId id, SlotScratch& s)
        : rows(FactoredSlot<false>(p, id, s).factors), cursor(p.cols()) {
        const float* from = rows + padded(p.rows());
        cols.lay_out(cursor.cols, [&](int col, int) INLINED { return from[col]; });
        row_of.lay_out(cursor.cols, [&](int, int row) INLINED { return uint32_t(row); });
    }
    HD void begin_row(int64_t line, int) { cursor.begin_row(line); }
    // Of the next vector (4); the row factors that are read may reach into the columns' (5).
    HD F load(int, int, int) {
        const F of_rows = load_f32(rows + cursor.row, kLanes);
        const F x = cols.load(cursor.col) * picked(of_rows, as_bits(row_of.load(cursor.col)));
        cursor.next();
        return x;
    }
    HD void begin() {}
    HD void store(int, int, int, F) {}
    HD void end_row(int64_t, int) {}
    HD void end() {}
};

// The rounding draws of a line (`Draws` in core/random.h), whose words have one `link` (3).
struct LineDraws {
    static constexpr uint32_t kWordsOfRow = kTileCols / 2, kUpper = 1u << 31;
    const uint64_t key;
    const uint32_t factor;
    bool ready = false;
    Cursor cursor{1};
    Cycle<uint32_t> words;  // a lane's, counted from the vector's first row; kUpper: its upper half
    U link;

    HD LineDraws(uint64_t key, int32_t salt, const U* = nullptr)
        : key(key), factor(factor_of(salt)) {}

    HD void begin_row(int64_t row, int64_t cols, int64_t) {
        if (!ready) cursor = Cursor(cols);
        cursor.begin_row(row);
        link = linked(uint64_t(row) * kWordsOfRow, uint32_t(key >> 32));
    }
    HD U next(int, int) {
        if (RARELY(!ready)) lay_out();  // most passes draw nothing
        const U word = as_bits(words.load(cursor.col)), number = word & U(kUpper - 1);
        const U start(uint32_t(cursor.row) * kWordsOfRow * kStride + uint32_t(key));
        const U drawn = scrambled(number * U(kStride) + start, link) * U(factor);
        cursor.next();
        return select(word < U(kUpper), draws_of<16>(drawn, 0), draws_of<16>(drawn, 16));
    }

   private:
    HD_CALL void lay_out() {
        ready = true;
        words.lay_out(cursor.cols, [](int col, int row) INLINED {
            const uint32_t word = uint32_t(row) * kWordsOfRow + uint32_t(col / 32 * 16 + col % 16);
            return word | (col & 16 ? kUpper : 0);
        });
    }
};

// bf16 weights with stochastic rounding (`Bf16Weight` in codecs/tensors.h).
struct LineWeight {
    const Place& place;
    uint16_t *const data, *at;
    LineDraws draws;

    HD LineWeight(const Place& p, F*)
        : place(p), data(pointer<uint16_t>(p.tensor.weight)), draws(p.hyper.key, 0) {}

    HD void begin_row(int64_t row, int) {
        at = data + row * place.cols();
        draws.begin_row(row, place.cols(), 0);
    }
    HD F load(int, int col, int n) const { return load_bf16(at + col, n); }
    HD float element(int col) const { return float_of_bf16(at[col]); }
    HD void store(int i, int col, int n, F w) { store_bf16(at + col, w, draws.next(i, col), n); }
    HD void end_row(int) {}
};

// A number for each element of a line, with room for a vector that reaches beyond its end (5).
struct Line {
    float elements[kTileCols + kNarrowCols];

    HD F load(int col) const { return load_f32(elements + col, kLanes); }
    HD void put(int col, F x) { store_f32(elements + col, x, kLanes); }
    // n elements of a row, and zeros.
    HD F part(int col, int n) const { return load_f32(elements + col, n); }
};

// f(row, first) for the rows of a line that begins with row `row`: each begins at column `first`.
template <class Function>
HD void rows_of_line(int64_t row, int width, int cols, Function&& f) {
    for (int first = 0; first < width; first += cols, ++row) f(row, first);
}

// f(Vectors<count>) with the number of a row's vectors, so that loops over them are unrolled, and
// f(i, col, n) for those vectors.
template <int kCount_>
struct Vectors {
    static constexpr int kCount = kCount_;
};
template <int kCount = 1, class Function>
HD void with_vectors(int cols, Function&& f) {
    if constexpr (kCount * kLanes < kNarrowCols)
        if (cols > kCount * kLanes) return with_vectors<kCount + 1>(cols, f);
    f(Vectors<kCount>());
}
template <class VectorsT, class Function>
HD void each_vector(VectorsT, int cols, Function&& f) {
    constexpr int kLast = VectorsT::kCount - 1;
#pragma GCC unroll 4
    for (int i = 0; i < kLast; ++i) f(i, i * kLanes, kLanes);
    f(kLast, kLast * kLanes, cols - kLast * kLanes);
}

// The total of a tile, as Exec::RowTotals adds it (6).
struct LineTotals {
    int cols;
    Line values;

    template <bool, class Access>
    HD void begin(double& total, const Access& a) {
        cols = int(a.place.cols());
        total = 0;
    }
    HD void begin_row() {}
    HD void add_square(int i, F x) { values.put(i * kLanes, x); }
    HD void end_row(double& total, int, int width) {
        double sum = total;
        with_vectors(cols, [&](auto vectors) INLINED {
            rows_of_line(0, width, cols, [&](int64_t, int first) INLINED {
                Exec::RowSums row;
                float of_row;
                row.begin_row(&of_row);
                each_vector(vectors, cols, [&](int i, int col, int n) INLINED {
                    row.add_square(i, values.part(first + col, n));
                });
                row.end_row(0, cols);
                sum += of_row;
            });
        });
        total = sum;
    }
    HD void end(double&, int) {}
};

// A factored moment of which a pass computes the sums, as FactoredSlot adds them (6).
struct LineSums {
    FactoredSlot<false> slot;
    int64_t line;
    int cols;
    Line values;

    HD LineSums(const Place& p, SlotId id, SlotScratch& s) : slot(p, id, s), cols(int(p.cols())) {}
    HD void begin() { slot.begin(); }
    HD void begin_row(int64_t row, int) { line = row; }
    HD void store(int, int col, int, F x) { values.put(col, x); }
    HD void end_row(int64_t, int width) {
        float* const to = slot.partials();
        with_vectors(cols, [&](auto vectors) INLINED {
            F of_cols[kNarrowCols / kLanes];
            each_vector(vectors, cols, [&](int i, int col, int) INLINED {
                of_cols[i] = load_f32(to + kTileRows + col, kLanes);
            });
            rows_of_line(line - slot.place.first_row(), width, cols,
                         [&](int64_t row, int first) INLINED {
                             Exec::RowSums sums;
                             sums.begin_row(to);
                             each_vector(vectors, cols, [&](int i, int col, int n) INLINED {
                                 const F x = values.part(first + col, n);
                                 sums.add(i, x);
                                 of_cols[i] = of_cols[i] + x;
                             });
                             sums.end_row(int(row), cols);
                         });
            each_vector(vectors, cols, [&](int i, int col, int) INLINED {
                store_f32(to + kTileRows + col, of_cols[i], kLanes);
            });
        });
    }
    HD void end() { slot.end(); }

    // The moment before, which few vectors need.
    HD_CALL F load(int, int col, int n) {
        float old[kLanes] = {};
        const float *rows = slot.factors + line, *of_cols = slot.cols_from();
        for (int lane = 0; lane < n; ++lane) {
            const int at = col + lane;
            old[lane] = of_cols[at % cols] * rows[at / cols];
        }
        return load_f32(old, kLanes);
    }
};

// A moment of any codec, decoded and encoded row by row (7).
struct LineSlot : AnySlot {
    int cols;
    int64_t line;
    Line values;

    HD LineSlot(const Place& p, SlotId id, SlotScratch& s)
        : AnySlot(p, id, s, true), cols(int(p.cols())) {}

    HD_CALL void begin_row(int64_t row, int width) {
        line = row;
        visit([&](auto& slot) {
            rows_of_line(line, width, cols, [&](int64_t row, int first) INLINED {
                slot.begin_row(row, cols);
                Exec::each(cols, [&](int i, int col, int n)
                                     INLINED { values.put(first + col, slot.load(i, col, n)); });
            });
        });
    }
    HD F load(int, int col, int) { return codec == kAbsent ? F(0.f) : values.load(col); }
    HD void store(int, int col, int, F x) { values.put(col, x); }
    HD_CALL void end_row(int64_t, int width) {
        visit([&](auto& slot) {
            rows_of_line(line, width, cols, [&](int64_t row, int first) INLINED {
                slot.begin_row(row, cols);
                Exec::each(cols, [&](int i, int col, int n) INLINED {
                    slot.store(i, col, n, values.part(first + col, n));
                });
                slot.end_row(row, cols);
            });
        });
    }
};

// How a pass takes its rows: as `ByRow` in engine/tile.h.
struct ByLine {
    using Totals = LineTotals;
    using Sums = LineSums;

    template <class Function>
    HD static void each_row(Place& p, Function&& f) {
        const int64_t cols = p.cols(), rows = kTileCols / cols;
        for (int64_t row = p.first_row(); row < p.end_row(); row += rows) {
            const int64_t left = p.end_row() - row;
            f(row, int((left < rows ? left : rows) * cols));
        }
    }
};

// The operands of a matrix whose second moment, factored, was updated in a pass of its own.
// kPlainStep: as in PlainAccess (engine/access.h).  FastT: NoSlot if there is no other moment, or
// none is read.
template <class RuleT, bool kPlainStep, class FastT>
struct LineAccess : ByLine {
    using R = RuleT;
    static_assert(R::kSquareFirst && !R::kSquareStored && !R::kRoot, "square is only read");
    static constexpr bool kAlone = is_same<FastT, NoSlot>;  // no other moment is read
    static constexpr bool kPlain = kPlainStep, kMoves = kPlainStep, kFlagsKnown = kPlainStep;
    static constexpr bool kRoundsWithin = false;
    static constexpr int64_t kFlags =
        kPlain ? (kPlainFlags | R::kOwnFlags) & ~kSlowMoment : ~int64_t(0);
    const Place& place;
    const bool factored_sign;
    std::conditional_t<kPlain, Bf16Grad<false>, AnyGrad> grad;
    std::conditional_t<kPlain, LineWeight, AnyWeightOf<LineDraws>> weight;
    FastT fast;
    std::conditional_t<R::kHasResidual && !kAlone, LineFactors, NoSlot> slow;
    LineFactors square;

    HD LineAccess(Place& p, Scratch& s)
        : place(p),
          factored_sign(!kAlone && p.tensor.moments[kFast].codec == kFactoredSign),
          grad(p, s.grad),
          weight(p, s.weight),
          fast(p, kFast, s.slots[kFast]),
          slow(p, kSlow, s.slots[kSlow]),
          square(p, kSquare, s.slots[kSquare]) {}
};

}  // namespace ENGINE_ISA
}  // namespace engine
