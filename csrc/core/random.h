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
// multiplied by kStride, with the key's low half added; `link` has the upper halves.
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

// Nearly normal draws of a key, from the first'th on: sums of twelve bytes each.
HD F normals(uint64_t key, int64_t first) {
    U pairs(0u);
    for (int word = 0; word < 3; ++word) {
        const uint64_t base = 3 * uint64_t(first) + word;
        const U offsets = lane_index() * U(3u);
        U links = linked(base, uint32_t(key >> 32));
        if (RARELY(uint32_t(base) > ~uint32_t(3 * kLanes)))  // some upper halves are the next
            links = select(offsets > U(~uint32_t(base)),
                           linked(base + 3 * kLanes, uint32_t(key >> 32)), links);
        const U drawn =
            scrambled((offsets + U(uint32_t(base))) * U(kStride) + U(uint32_t(key)), links);
        pairs = pairs + (drawn & U(0xFF00FFu)) + ((drawn >> 8) & U(0xFF00FFu));
    }
    const U total = (pairs & U(0xFFFFu)) + (pairs >> 16);
    return (to_float(total) - F(1530.f)) * F(0x1.0000800060004p-8f);
}

// The rounding draws of one row of a matrix view: 16 bits an element, two of them in a hash word.
// A block of 32 columns takes 16 words: its first 16 columns their low halves, the rest their high.
struct Draws {
    uint32_t low, high;
    uint64_t row_base;  // counter of the row's first word
    uint32_t last;      // offset from it of the last with the same upper half
    U start, link;      // what the counters of the next words, or of all of the row, come to
    U words;

    HD Draws(uint64_t key) : low(uint32_t(key)), high(uint32_t(key >> 32)), row_base(0) {}

    // Columns are counted from first_col, a multiple of 32, in a row of `cols`.
    HD void begin_row(int64_t row, int64_t cols, int64_t first_col) {
        row_base = (uint64_t(row) * uint64_t((cols + 31) / 32) + uint64_t(first_col / 32)) * 16;
        start = lane_index() * U(kStride) + U(uint32_t(row_base) * kStride + low);
        link = linked(row_base, high);
        last = ~uint32_t(row_base);
    }

    // The draws of the lanes from column col on; a pack of sixteen begins at a multiple of 16.
    HD U at(int col) const {
        uint32_t offset = uint32_t(col / 32 * 16 + (col & 15));
        return half(hash(start + U(offset * kStride), offset), col);
    }

    // The same for a row whose columns are asked for in order: the halves of a block of 32 share
    // their words.  (A thread of a GPU has some of the blocks; it counts anew in each.)
    HD U next(int col) {
        if (col & 16) return half(words, col);
        const uint32_t offset = uint32_t(col / 32 * 16 + (col & 15));
        if (kLanes == 1) {
            words = hash(start + U(offset * kStride), offset);
        } else {
            words = hash(start, offset);
            start = start + U(16 * kStride);
        }
        return half(words, col);
    }

    // The draws of lanes from any column on.
    HD U anywhere(int col) const {
        const U cols = lane_index() + U(uint32_t(col));
        const U offsets = ((cols >> 5) << 4) | (cols & U(15u));
        U links = link;
        if (RARELY(uint32_t(col + kLanes) / 2 + 16 > last))
            links = select(offsets > U(last), linked(row_base + last + 1, high), link);
        const U x = offsets * U(kStride) + U(uint32_t(row_base) * kStride + low);
        const U drawn = scrambled(x, links);
        return select((cols & U(16u)) == U(0u), drawn & U(0xFFFFu), drawn >> 16);
    }

   private:
    HD static U half(U words, int col) { return col & 16 ? words >> 16 : words & U(0xFFFFu); }

    // Of the counters row_base + offset + lane, which come to x and of which the sixteen of a
    // vector do not cross 2^32.
    HD U hash(U x, uint32_t offset) const {
        return scrambled(x, RARELY(offset > last) ? linked(row_base + offset, high) : link);
    }
};

}  // namespace ENGINE_ISA
}  // namespace engine
