// Counter-based randomness; optim/rng.py is the same in Python and says why.
#pragma once

#include "core/numerics.h"

namespace engine {
namespace ENGINE_ISA {

// One link of the chain: splitmix64's finaliser (Steele, Lea, Flood 2014).
HD uint64_t chain(uint64_t state, uint64_t word) {
    state += word + 0x9E3779B97F4A7C15ull;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ull;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EBull;
    return state ^ (state >> 31);
}
HD uint64_t mix(uint64_t a, uint64_t b) { return chain(chain(0, a), b); }
HD uint64_t mix(uint64_t a, uint64_t b, uint64_t c) { return chain(mix(a, b), c); }

// A 32-bit xorshift-multiply hash (constants: Wellons 2018, lowbias32) of counters that were
// multiplied by kStride, with the key's low half added; `link` combines the upper halves.
constexpr uint32_t kStride = 0x9E3779B9u;
HD U scrambled(U x, U link) {
    x = (x ^ (x >> 16)) * U(0x7FEB352Du);
    x = x ^ (x >> 15) ^ link;
    x = x * U(0x846CA68Bu);
    return x ^ (x >> 16);
}
HD U linked(uint64_t counter, uint32_t high) {
    return U(high ^ (uint32_t(counter >> 32) * 0x85EBCA6Bu));
}

// Nearly normal draws of a key, from index `first` on: sums of twelve bytes each, rounded to bf16.
HD F normals(uint64_t key, int64_t first) {
    U pairs(0u);
    for (int word = 0; word < 3; ++word) {
        const uint64_t base = 3 * uint64_t(first) + word;
        const U offsets = lane_index() * U(3u);
        U links = linked(base, uint32_t(key >> 32));
        if (RARELY(uint32_t(base) > ~uint32_t(3 * kLanes)))  // some carry into the upper half
            links = select(offsets > U(~uint32_t(base)),
                           linked(base + 3 * kLanes, uint32_t(key >> 32)), links);
        const U drawn =
            scrambled((offsets + U(uint32_t(base))) * U(kStride) + U(uint32_t(key)), links);
        pairs = pairs + (drawn & U(0xFF00FFu)) + ((drawn >> 8) & U(0xFF00FFu));
    }
    const U total = (pairs & U(0xFFFFu)) + (pairs >> 16);
    return from_bf16(to_bf16((to_float(total) - F(1530.f)) * F(0x1p-8f)));
}

// -1 or 1: an element of a matrix with `cols` columns, the same in all lanes.
HD F signs(uint64_t key, uint64_t row, uint32_t col, uint32_t cols) {
    const uint64_t word = row * ((cols + 31) / 32) + col / 32;
    const U counter = U(uint32_t(word) * kStride + uint32_t(key));
    const U bit = (scrambled(counter, linked(word, uint32_t(key >> 32))) >> int(col % 32)) & U(1u);
    return to_float(bit + bit) - F(1.f);
}

// The hash words of one row of a matrix view; an element takes half a word.  A block of 32 columns
// takes 16 words: its first 16 columns their low halves, the rest their high halves.  A row begins
// at a multiple of 256, so the counters of a tile's span have the same upper half.
struct Words {
    uint32_t low, high;
    U start, link;  // the hash's inputs: x of the next words, and the row's link

    HD Words(uint64_t key) : low(uint32_t(key)), high(uint32_t(key >> 32)) {}

    // Columns are counted from first_col, a multiple of 32, in a row of `cols`.
    HD void begin_row(int64_t row, int64_t cols, int64_t first_col) {
        const uint64_t first =
            uint64_t(row) * uint64_t((cols + 511) / 512 * 256) + uint64_t(first_col / 32 * 16);
        start = lane_index() * U(kStride) + U(uint32_t(first) * kStride + low);
        link = linked(first, high);
    }

    // The words of the lanes from column col on; a pack of sixteen begins at a multiple of 16.
    HD U at(int col) const {
        return hash(start + U(uint32_t(col / 32 * 16 + (col & 15)) * kStride));
    }

    // The same for a row whose blocks of 32 columns are requested in order, once each.  (A thread
    // of a GPU has a part of one block.)
    HD U next(int col) {
        if (kLanes < 16) return at(col);
        U words = hash(start);
        start = start + U(16 * kStride);
        return words;
    }

   private:
    HD U hash(U x) const { return scrambled(x, link); }
};

// The factor of the words for the draws of the moment with this salt; optim/rng.py says why.
HD uint32_t factor_of(int32_t salt) {
    uint32_t factor = 1;
    for (int32_t i = 0; i < salt; ++i) factor *= 0x16AB7965u;
    return factor;
}

// The lowest kBits of the words for a block's first 16 columns, the highest for the rest.
template <int kBits>
HD U draws_of(U words, int col) {
    return col & 16 ? words >> (32 - kBits) : words & U((1u << kBits) - 1);
}

// The rounding draws of one row of a moment, or of the weights (salt 0).
struct Draws {
    Words words;
    uint32_t factor;
    U block;  // the multiplied words of the block of 32 columns that was requested last

    HD Draws(uint64_t key, int32_t salt, const U* = nullptr)
        : words(key), factor(factor_of(salt)) {}

    HD void begin_row(int64_t row, int64_t cols, int64_t first_col) {
        words.begin_row(row, cols, first_col);
    }
    template <int kBits = 16>
    HD U at(int col) const {
        return draws_of<kBits>(words.at(col) * U(factor), col);
    }
    // The same for a row whose columns are requested in order: the halves of a block share their
    // words.
    template <int kBits = 16>
    HD U next(int, int col) {
        if (!(col & 16)) block = words.next(col) * U(factor);
        return draws_of<kBits>(block, col);
    }
};

// The same, with words of a row that are computed once for all moments and kept in `kept`.
struct SharedDraws {
    const U* kept;
    uint32_t factor;
    U block;

    HD SharedDraws(uint64_t, int32_t salt, const U* kept) : kept(kept), factor(factor_of(salt)) {}

    HD void begin_row(int64_t, int64_t, int64_t) {}
    template <int kBits = 16>
    HD U next(int i, int col) {
        if (!(col & 16)) block = kept[i / 2] * U(factor);
        return draws_of<kBits>(block, col);
    }
};

// The rounding draws of a moment whose elements are a single row, from any element on.
struct FlatDraws {
    uint64_t key;
    uint32_t factor;

    HD FlatDraws(uint64_t key, int32_t salt) : key(key), factor(factor_of(salt)) {}

    HD U from(int64_t first) const {
        const U cols = lane_index() + U(uint32_t(first % 32));
        const U offsets = ((cols >> 5) << 4) | (cols & U(15u));
        const uint64_t base = uint64_t(first / 32) * 16;
        U links = linked(base, uint32_t(key >> 32));
        if (RARELY(uint32_t(base) > ~31u))  // some carry into the upper half
            links =
                select(offsets > U(~uint32_t(base)), linked(base + 31, uint32_t(key >> 32)), links);
        const U x = (offsets + U(uint32_t(base))) * U(kStride) + U(uint32_t(key));
        const U drawn = scrambled(x, links) * U(factor);
        return select((cols & U(16u)) == U(0u), draws_of<16>(drawn, 0), draws_of<16>(drawn, 16));
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
