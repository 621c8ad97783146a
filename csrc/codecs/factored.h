// Rank-1 moments: the product of a row and a column factor, with a sign bit where they are signed.
//
// Shazeer & Stern 2018, section 3, for the factors; Park & Lee 2024 (SMMF, arXiv 2412.08894), Alg.
// 3 and 4, for the signs.  The tile reads the decoded factors from the workspace and leaves its row
// and column sums there; the new factors are made of them when all tiles are done
// (engine/tensor.h), which is soon enough: they are not needed before the next step.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

template <bool kSigned, bool kStored = true>
struct FactoredSlot : Slot {
    const float *row_factors, *col_factors;
    typename Exec::Columns columns;
    typename Exec::RowSums rows;
    uint8_t* signs;
    float row_factor;
    F row_root, *roots, *col_roots;

    HD FactoredSlot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s), roots(s.roots) {
        row_factors = p.launch.workspace + p.launch.vectors[p.first->tensor] + moment.vectors;
    }

    HD float* partials() const {
        return place.launch.workspace + place.tile->partials + moment.partials;
    }
    HD void find_cols() {
        col_factors = row_factors + padded(place.rows()) + first_col();
        col_roots = roots + place.at() * Exec::kSpan;
    }

    // The root of a product is that of its factors: one a row and one a column in place of one an
    // element.
    HD void begin_roots() {
        find_cols();
        Exec::each(place.width(), [&](int i, int col, int n) INLINED {
            col_roots[i] = sqrt(load_f32(col_factors + col, n));
        });
    }

    HD void begin() {
        if (!kStored) return;
        rows.begin(int(moment.partials / kPartials));
        columns.begin(partials() + kTileRows, place.width());
    }

    HD void begin_row(int64_t row, int) {
        find_cols();
        row_factor = kSigned ? -row_factors[row] : row_factors[row];  // a set bit is a plus
        row_root = sqrt(F(row_factors[row]));
        if (kStored) {
            rows.begin_row(partials());
            columns.begin_row(partials() + kTileRows);
        }
        if (kSigned) signs = part<uint8_t>(4) + row * ((cols + 7) / 8) + first_col() / 8;
    }

    HD F load(int, int col, int n) {
        F x = load_f32(col_factors + col, n) * row_factor;
        return kSigned ? flipped(x, Exec::load_bits(signs, col, n)) : x;
    }

    HD F root(int i, F) { return row_root * col_roots[i]; }

    HD void store(int i, int col, int n, F x) {
        if (!kStored) return;
        if (kSigned) {
            Exec::store_bits(signs, col, n, bits_of(x > F(0.f)));
            x = abs(x);
        }
        rows.add(i, x);
        columns.add(i, col, x);
    }

    HD void end_row(int64_t row, int width) {
        if (kStored) rows.end_row(int(row - place.first_row()), width);
    }

    HD void end() {
        if (!kStored) return;
        rows.end();
        columns.end(place.width());
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
