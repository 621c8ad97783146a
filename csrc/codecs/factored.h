// Rank-1 moments: the product of a row and a column factor, with a sign bit if they are signed.
//
// Shazeer & Stern 2018, section 3, for the factors; Park & Lee 2024 (SMMF, arXiv 2412.08894), Alg.
// 3 and 4, for the signs.  A tile reads the decoded factors from the workspace and writes its row
// and column sums there; the new factors are computed from them when all tiles are done
// (engine/tensor.h), as they are not needed before the next step.
#pragma once

#include "engine/place.h"

namespace engine {
namespace ENGINE_ISA {

template <bool kSigned, bool kStored = true>
struct FactoredSlot : Slot {
    const float* const factors;
    float* const workspace;
    uint8_t* const sign_bits;
    Exec::AlongRows row_factors;
    Exec::AlongColumns col_factors;
    Exec::Columns columns;
    Exec::RowSums rows;
    Exec::Bits signs;
    float row_factor;
    F row_root, *roots;
    Exec::Kept col_roots;

    HD FactoredSlot(const Place& p, SlotId slot, SlotScratch& s)
        : Slot(p, slot, s),
          factors(p.launch.workspace + p.launch.vectors[p.first->tensor] + moment.vectors),
          workspace(p.launch.workspace + moment.partials),
          sign_bits(part<uint8_t>(4)),
          roots(s.roots) {
        row_factors.start(p, factors, number());
        col_factors.begin_tile(cols_from(), p.width(), number());
        if (kSigned) signs.start(p, sign_bits);
    }
    HD int number() const { return int(moment.partials / kPartials); }  // among factored moments

    HD float* partials() const { return workspace + place.partials; }
    HD const float* cols_from() const { return factors + padded(place.rows()) + first_col(); }
    HD void find_cols(int width) {
        col_factors.begin_row(place, cols_from(), width);
        col_roots.begin(roots + place.at() * Exec::kSpan);
    }

    // The root of a product is the product of its factors' roots: one per row and one per column
    // instead of one per element.
    HD void begin_roots() {
        find_cols(place.width());
        Exec::each(place.width(), [&](int i, int col, int n) INLINED {
            col_roots.put(i, sqrt(col_factors.load(i, col, n)));
        });
    }

    HD void begin() {
        if (!kStored) return;
        rows.begin(number());
        columns.begin(partials() + kTileRows, place.width());
    }

    HD void begin_row(int64_t row, int width) {
        find_cols(width);
        row_factor = row_factors.begin(place, row);
        row_root = sqrt(F(row_factor));
        if (kSigned) row_factor = -row_factor;  // a set bit is a plus
        if (kStored) {
            rows.begin_row(partials());
            columns.begin_row(partials() + kTileRows);
        }
        if (kSigned) signs.begin(place, sign_bits, row, width);
    }

    HD F load(int i, int col, int n) {
        F x = col_factors.load(i, col, n) * row_factor;
        return kSigned ? flipped(x, signs.load(i, col, n)) : x;
    }

    HD F root(int i, F) { return row_root * col_roots.load(i); }

    HD void store(int i, int col, int n, F x) {
        if (!kStored) return;
        if (kSigned) {
            signs.store(i, col, n, bits_of(x > F(0.f)));
            x = abs(x);
        }
        rows.add(i, x);
        columns.add(i, col, x);
    }

    HD void end_row(int64_t row, int width) {
        if (!kStored) return;
        if (kSigned) signs.end();
        rows.end_row(int(row - place.first_row()), width);
    }

    HD void end() {
        if (!kStored) return;
        rows.end();
        columns.end(place.width());
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
