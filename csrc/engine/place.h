// Where a tile is (`Place`): what every codec needs to find its elements.  (In Python a
// Place is a parameter with its group.)
//
// A pass takes the tiles of a strip together: up to Exec::kStripTiles of them side by side, row by
// row across all.  On a CPU that follows their layout in memory, so that the hardware prefetches
// the next row; a single tile is separate pieces of rows.  Sums are still kept for each tile, so
// that a strip's length does not affect the result.
#pragma once

#include "core/features.h"
#include "engine/exec.h"

namespace engine {
namespace ENGINE_ISA {

HD int64_t padded(int64_t length) { return (length + kVectorPad - 1) / kVectorPad * kVectorPad; }

template <class T>
HD T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

struct Place {
    const Launch& launch;
    const Tile* const first;  // of the strip
    const Tensor& tensor;
    const Hyper& hyper;
    const int64_t num_rows_all, num_cols, numel;  // the tensor's, copied: no store changes them
    const int64_t from_row, to_row;               // the strip's
    const Tile* tile;                             // the current one,
    int64_t col, partials;                        // its first column, its offset in the workspace,
    int number;                                   // and its number in the strip
    const bool by_vectors;                        // can_use_vectors(); not asked on a CPU
    // If a strip is one tile: its columns, its row's first element, and whether a row follows.
    const int first_width;
    int at_row;  // the current one of the tile's rows
    int64_t element;
    bool more;
    const uint64_t key;  // of the step's rounding
    U words;             // the row's random words of the thread's 32 columns: make_words()

    HD Place(const Launch& l, int64_t first_tile, bool by_vectors)
        : launch(l),
          first(l.tiles + first_tile),
          tensor(l.tensors[l.members[first->tensor]]),
          hyper(l.hypers[first->tensor]),
          num_rows_all(tensor.rows),
          num_cols(tensor.cols),
          numel(tensor.numel),
          from_row(first->row),
          to_row(from_row + kTileRows < num_rows_all ? from_row + kTileRows : num_rows_all),
          tile(first),
          col(first->col),
          partials(first->partials),
          number(0),
          by_vectors(by_vectors),
          first_width(width_from(col)),
          at_row(0),
          element(from_row * num_cols + col),
          more(num_rows() > 1),
          key(hyper.key) {}

    // Calls f() for each tile of the strip, with `tile` set to it.
    template <class Function>
    HD void each_tile(Function&& f) {
        if constexpr (Exec::kStripTiles == 1) return f();
        const int64_t left = (cols() - first->col + kTileCols - 1) / kTileCols;
        const int count = left < Exec::kStripTiles ? int(left) : Exec::kStripTiles;
        for (number = 0; number < count; ++number) {
            tile = first + number;
            col = tile->col;
            partials = tile->partials;
            f();
        }
    }
    // Calls f(row, width) for each tile of each row of the strip, row by row.
    template <class Function>
    HD void each_row(Function&& f) {
        int64_t row = first_row();
        for (at_row = 0; at_row < num_rows(); ++at_row, ++row, element += cols()) {
            more = at_row + 1 < num_rows();
            each_tile([&]() INLINED { f(row, width(row)); });
        }
    }

    HD void make_words(int64_t row) { Exec::make_words(words, key, row, cols(), col); }
    // The words for SharedDraws: these if a strip is one tile, or else `others`.
    HD const U* words_or(const U* others) const { return Exec::kStripTiles == 1 ? &words : others; }

    // `number`, which is a constant if a strip is one tile.
    HD int at() const { return Exec::kStripTiles == 1 ? 0 : number; }

    HD int64_t rows() const { return num_rows_all; }
    HD int64_t cols() const { return num_cols; }
    HD int64_t first_row() const { return from_row; }
    HD int64_t end_row() const { return to_row; }
    HD int num_rows() const { return int(end_row() - first_row()); }
    HD TileSums& sums() const { return launch.sums[tile - launch.tiles]; }

    // `element` of the next row, or of this one if none follows.
    HD int64_t next_element() const { return more ? element + cols() : element; }

    // Columns of the tile, and those that a row has: the last row may end early.
    HD int width() const { return Exec::kStripTiles == 1 ? first_width : width_from(col); }
    HD int width_from(int64_t column) const {
        return int(cols() - column < kTileCols ? cols() - column : kTileCols);
    }
    HD int width(int64_t row) const {
        if (by_vectors) return width();
        int64_t left = numel - row * cols() - col;
        return left >= width() ? width() : left > 0 ? int(left) : 0;
    }
};

// Whether a GPU may read and write a tile's rows as vectors (Exec::Row in engine/rows_cuda.h): all
// of them are complete blocks of 32 columns, and aligned for vectors of any width.
HD bool can_use_vectors(const Launch& launch, int64_t tile) {
    const Place p(launch, tile, false);
    uint64_t addresses = p.tensor.weight | p.tensor.grad | p.tensor.compensation;
    for (const Moment& moment : p.tensor.moments) addresses |= moment.parts[0] | moment.parts[4];
    return p.cols() % 32 == 0 && p.numel >= p.to_row * p.cols() && addresses % 16 == 0;
}

// Buffers for a tile's row of a moment: its values, those still to be encoded, and its blocks'
// grids; and for the roots of a strip's column factors.
struct SlotScratch {
    F values[Exec::kSpan], encoded[Exec::kSpan], roots[Exec::kStripTiles * Exec::kSpan];
    U base[kTileCols / 128];
    const U* words = nullptr;  // of SharedDraws
};

// What the slots of all codecs have in common.  A slot serves one moment over one strip: begin for
// each tile; for each row of one begin_row, load and store for each vector i (n of its lanes
// exist), end_row; end for each tile.  A pass that only reads leaves out begin, store, end_row and
// end.  A rule that needs the root of its second moment gets root(i, the loaded vector), after
// begin_roots for each tile before the rows.
struct Slot {
    const Place& place;
    const Moment& moment;
    int64_t cols;

    HD Slot(const Place& p, SlotId slot, SlotScratch&)
        : place(p), moment(p.tensor.moments[slot]), cols(p.cols()) {}

    HD int64_t first_col() const { return place.col; }

    HD void begin_roots() {}
    HD F root(int, F x) { return sqrt(x); }

    template <class T>
    HD T* part(int index) const {
        return pointer<T>(moment.parts[index]);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
