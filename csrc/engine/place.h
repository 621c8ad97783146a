// Where a tile is: what every codec needs to find its elements.
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
    const Tile& tile;
    const Tensor& tensor;
    const Hyper& hyper;

    HD Place(const Launch& l, const Tile& t)
        : launch(l), tile(t), tensor(l.tensors[l.members[t.tensor]]), hyper(l.hypers[t.tensor]) {}

    HD int64_t rows() const { return tensor.rows; }
    HD int64_t cols() const { return tensor.cols; }
    HD int64_t end_row() const {
        return tile.row + kTileRows < rows() ? tile.row + kTileRows : rows();
    }

    // Columns of the tile, and of those the ones a row has: the last row may end early.
    HD int width() const {
        return int(cols() - tile.col < kTileCols ? cols() - tile.col : kTileCols);
    }
    HD int width(int64_t row) const {
        int64_t left = tensor.numel - row * cols() - tile.col;
        return left >= width() ? width() : left > 0 ? int(left) : 0;
    }
};

// Room for one row of a moment: its values, those still to be encoded, and its blocks' grids.
struct SlotScratch {
    F values[Exec::kSpan], encoded[Exec::kSpan];
    F scale[kTileCols / 128];
    U base[kTileCols / 128];
    const U* words = nullptr;  // of SharedDraws
};

// What the slots of all codecs have in common.  A slot serves one moment over one tile: begin; for
// each row begin_row, load and store for each vector i (n of its lanes exist), end_row; end.  A
// pass that only reads leaves out begin, store, end_row and end.  A rule that asks for the
// root of its second moment gets root(i, what load gave), after begin_roots before the rows.
struct Slot {
    const Moment& moment;
    int64_t cols, first_col;
    int width;

    HD Slot(const Place& p, SlotId slot, SlotScratch&)
        : moment(p.tensor.moments[slot]), cols(p.cols()), first_col(p.tile.col), width(p.width()) {}

    HD void begin_roots() {}
    HD F root(int, F x) { return sqrt(x); }

    template <class T>
    HD T* part(int index) const {
        return pointer<T>(moment.parts[index]);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
