// APOLLO on a CPU, besides the engine's own steps: P is drawn, P G is computed, and the lengths of
// its channels are compared with those of the step computed from it.
//
// Before they are multiplied by P, the channels of a part are packed into a panel: decoded, with 0
// for unusable elements, and side by side whatever their layout in memory.  The panel stays in a
// cache while all rows of P are multiplied by it.  A sum runs over its lines in a fixed order, in
// each pair the second first, as in the instruction for pairs of bf16.  So the result depends on
// neither threads nor portions, nor on the instruction set (except that the instruction for pairs
// treats values below 2^-126 as 0).
#pragma once

#include "codecs/tensors.h"
#include "engine/projected.h"

namespace engine {
namespace ENGINE_ISA {
namespace projected {

// Rows of P and packs of channels whose sums are in registers together.
#if defined(__AVX512F__)
constexpr int kRows = 12, kPacks = 2;
#elif defined(__AVX2__)
constexpr int kRows = 6, kPacks = 1;
#else
constexpr int kRows = 3, kPacks = 1;
#endif
constexpr int kPacksOfPart = kChannels / kLanes;
// The attribute of functions that multiply pairs of bf16.
#if defined(__AVX512F__) && (defined(__clang__) || __GNUC__ >= 10)
#define WITH_PAIRS __attribute__((target("avx512bf16")))
#endif

HD int at_most(int limit, int64_t n) { return n < limit ? int(n) : limit; }

HD void store_p(const Projections& launch, const Projection& t, int64_t at, F x, int n) {
    if (launch.p_dtype == kFloat32) return store_f32(static_cast<float*>(t.p) + at, x, n);
    store_upper(static_cast<uint16_t*>(t.p) + at, as_bits(x), n);
}

// Draws elements of P that are signs, one bit of a word each; see optim/rng.py.
inline void draw_signs(const Projections& launch, const Projection& t, int64_t at, int64_t end) {
    const uint64_t key = key_of(t);
    const int64_t words = (t.width + 31) / 32;
    for (int n; at < end; at += n) {
        const int64_t row = at / t.width, col = at % t.width;
        n = at_most(at_most(at_most(kLanes, 32 - col % 32), t.width - col), end - at);
        const uint64_t word = uint64_t(row * words + col / 32);
        const U counter = U(uint32_t(word) * kStride + uint32_t(key));
        const U bits = scrambled(counter, linked(word, uint32_t(key >> 32))) >> int(col % 32);
        store_p(launch, t, at, flipped(F(-1.f), uint32_t(bits.r[0][0]) & 0xFFFFu), n);
    }
}

// Draws a part of P for the next step.
inline void draw(const Projections& launch, int64_t number) {
    const Part part = launch.draws[number];
    const Projection& t = launch.tensors[part.tensor];
    const int64_t first = int64_t(part.number) * kDraws;
    const int64_t end = first + at_most(kDraws, t.rank * t.width - first);
    if (launch.signs) return draw_signs(launch, t, first, end);
    const uint64_t key = key_of(t);
    for (int64_t at = first; at < end; at += kLanes)
        store_p(launch, t, at, normals(key, at), at_most(kLanes, end - at));
}

// The channels of a part, and which of each pack have had a usable element so far.
struct Channels {
    const Projection& t;
    const char* const grad;
    const int32_t dtype;
    const int64_t first;
    uint32_t usable[kPacksOfPart] = {};

    Channels(const Projections& launch, const Part& part)
        : t(launch.tensors[part.tensor]),
          grad(pointer<const char>(launch.grads[part.tensor])),
          dtype(launch.grad_dtype),
          first(int64_t(part.number) * kChannels) {}

    HD F load(int64_t at, int n) const { return load_as(dtype, grad, at, n); }
    HD int64_t begin(int pack) const { return first + pack * kLanes; }
    // How many of a pack's channels exist.
    HD int count(int pack) const {
        return begin(pack) < t.length ? at_most(kLanes, t.length - begin(pack)) : 0;
    }
};

// Transposes a square.
HD void transposed(const F (&rows)[kLanes], F (&cols)[kLanes]) {
    alignas(64) float square[kLanes][kLanes], turned[kLanes][kLanes];
    for (int i = 0; i < kLanes; ++i) store_f32(square[i], rows[i], kLanes);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) turned[j][i] = square[i][j];
    for (int i = 0; i < kLanes; ++i) cols[i] = load_f32(turned[i], kLanes);
}

// Fills a panel: (width, kChannels).
inline void lay_out(Channels& c, float* panel) {
    const int64_t width = c.t.width;
    for (int pack = 0; pack < kPacksOfPart; ++pack) {
        const int n = c.count(pack);
        const int64_t first = c.begin(pack);
        auto put = [&](int64_t d, F g) INLINED {
            const Mask ok = abs(g) <= F(kLargestGrad);
            c.usable[pack] |= bits_of(ok);
            store_f32(panel + d * kChannels + pack * kLanes, only(ok, g), kLanes);
        };
        if (n == 0) {
            for (int64_t d = 0; d < width; ++d) put(d, F(0.f));
        } else if (!c.t.tall) {
            for (int64_t d = 0; d < width; ++d) put(d, c.load(d * c.t.length + first, n));
        } else {
            F channels[kLanes], lines[kLanes];
            for (int64_t d = 0; d < width; d += kLanes) {
                const int some = at_most(kLanes, width - d);
                for (int i = 0; i < kLanes; ++i) {
                    channels[i] = F(0.f);
                    if (i < n) channels[i] = c.load((first + i) * width + d, some);
                }
                transposed(channels, lines);
                for (int i = 0; i < some; ++i) put(d + i, lines[i]);
            }
        }
    }
}

// kExact: fp32 holds the product exactly, so that a multiplication and an addition give the same as
// a fused instruction, where there is one.
template <bool kExact>
HD F plus_product(F sum, F a, F b) {
#if defined(__FMA__) || defined(__ARM_NEON)
    if (kExact) return fma(a, b, sum);
#endif
    return sum + a * b;
}

// Stores elements of P G, NaN in a channel without a usable element.
HD void put_product(const Channels& c, int64_t row, int pack, F x) {
    const Mask usable = mask_of(c.usable[pack]);
    x = select(usable, x, as_float(U(0x7FC00000u)));
    if (const int n = c.count(pack)) store_f32(c.t.low + row * c.t.length + c.begin(pack), x, n);
}

// Sums of products of kCount rows of P and kPacks packs of channels.  The indices are constants;
// otherwise the compiler would keep the sums in memory.
template <int kCount>
struct Sums {
    using All = std::make_integer_sequence<int, kCount * kPacks>;
    F of[kCount * kPacks];

    template <int... I>
    HD void clear(std::integer_sequence<int, I...>) {
        ((of[I] = F(0.f)), ...);
    }
    // Adds a line; the elements of P are `stride` apart.
    template <bool kExact, int... I>
    HD void add(std::integer_sequence<int, I...>, const float* p, int64_t stride,
                const float* line) {
        F g[kPacks];
        for (int j = 0; j < kPacks; ++j) g[j] = load_f32(line + j * kLanes, kLanes);
        ((of[I] = plus_product<kExact>(of[I], F(p[I / kPacks * stride]), g[I % kPacks])), ...);
    }
#if defined(WITH_PAIRS)
    // Adds two lines, or one if P has no element for the second.
    template <int... I>
    WITH_PAIRS HD void add_pair(std::integer_sequence<int, I...>, const uint16_t* p, int64_t stride,
                                bool both, const float* line) {
        __m512bh g[kPacks];
        for (int j = 0; j < kPacks; ++j) g[j] = (__m512bh)_mm512_loadu_ps(line + j * kLanes);
        ((of[I].r[0] = (FloatRegister)_mm512_dpbf16_ps(
              (__m512)of[I].r[0],
              (__m512bh)_mm512_set1_epi32(pair_at(p + I / kPacks * stride, both)), g[I % kPacks])),
         ...);
    }
    HD static int pair_at(const uint16_t* p, bool both) {
        int pair = *p;
        if (both) memcpy(&pair, p, 4);
        return pair;
    }
#endif
    template <int... I>
    HD void put(std::integer_sequence<int, I...>, const Channels& c, int64_t row, int pack) {
        (put_product(c, row + I / kPacks, pack + I % kPacks, of[I]), ...);
    }
};

template <bool kExact>
struct Multiply {
    template <int kCount>
    static void rows(const Channels& c, int64_t row, const float* panel) {
        const int64_t width = c.t.width;
        const float* const p = static_cast<const float*>(c.t.p) + row * width;
        typename Sums<kCount>::All all;
        for (int pack = 0; pack < kPacksOfPart; pack += kPacks) {
            Sums<kCount> sums;
            sums.clear(all);
            const float* const lines = panel + pack * kLanes;
            int64_t d = 0;
            for (; d + 1 < width; d += 2) {
                sums.template add<kExact>(all, p + d + 1, width, lines + (d + 1) * kChannels);
                sums.template add<kExact>(all, p + d, width, lines + d * kChannels);
            }
            if (d < width) sums.template add<kExact>(all, p + d, width, lines + d * kChannels);
            sums.put(all, c, row, pack);
        }
    }
};

#if defined(WITH_PAIRS)
// The same, if both are bf16 and the machine multiplies pairs of them.
struct MultiplyPairs {
    template <int kCount>
    WITH_PAIRS static void rows(const Channels& c, int64_t row, const float* panel) {
        static_assert(kPacks == kPacksOfPart, "a row of pairs is a part's");
        const int64_t width = c.t.width;
        const uint16_t* const p = static_cast<const uint16_t*>(c.t.p) + row * width;
        typename Sums<kCount>::All all;
        Sums<kCount> sums;
        sums.clear(all);
        int64_t d = 0;
        for (; d + 1 < width; d += 2)
            sums.add_pair(all, p + d, width, true, panel + d / 2 * kChannels);
        if (d < width) sums.add_pair(all, p + d, width, false, panel + d / 2 * kChannels);
        sums.put(all, c, row, 0);
    }
};

// Combines pairs of lines, in bf16: a panel (ceil(width / 2), kChannels) with the second of each
// pair as the upper half.
inline void pair_up(float* panel, int64_t width) {
    for (int64_t d = 0; d < width; d += 2)
        for (int at = 0; at < kChannels; at += kLanes) {
            const float* const line = panel + d * kChannels + at;
            const U first = as_bits(load_f32(line, kLanes));
            const U second = d + 1 < width ? as_bits(load_f32(line + kChannels, kLanes)) : U(0u);
            const F pair = as_float((first >> 16) | second);
            store_f32(panel + d / 2 * kChannels + at, pair, kLanes);
        }
}
#endif

template <class By>
inline void multiply(const Channels& c, const float* panel) {
    int64_t row = 0;
    for (; row + kRows <= c.t.rank; row += kRows) By::template rows<kRows>(c, row, panel);
    for (; row + 2 <= c.t.rank; row += 2) By::template rows<2>(c, row, panel);
    for (; row < c.t.rank; ++row) By::template rows<1>(c, row, panel);
}

// Computes a part of P G.
inline void project(const Projections& launch, int64_t number, float* panel) {
    Channels c(launch, launch.channels[number]);
    lay_out(c, panel);
#if defined(WITH_PAIRS)
    if (launch.p_dtype == kBFloat16) {
        pair_up(panel, c.t.width);
        return multiply<MultiplyPairs>(c, panel);
    }
#endif
    if (c.dtype == kFloat32) return multiply<Multiply<false>>(c, panel);
    multiply<Multiply<true>>(c, panel);
}

// The factors of channels; or, for a tensor with a single factor, the sums of its parts.
inline void lengths(const Projections& launch, int64_t number) {
    const Part part = launch.channels[number];
    const Projection& t = launch.tensors[part.tensor];
    double* const sums = launch.sums + 2 * (t.first_part + part.number);
    sums[0] = sums[1] = 0;
    for (int64_t first = int64_t(part.number) * kChannels, end = first + kChannels; first < end;
         first += kLanes) {
        const int n = first < t.length ? at_most(kLanes, t.length - first) : 0;
        D step_sq = widen(F(0.f)), low_sq = step_sq;
        for (int64_t row = 0; n && row < t.rank; ++row) {
            const F x = load_f32(t.low + row * t.length + first, n);
            const D step = widen(load_f32(t.step + row * t.length + first, n));
            const D low = widen(only(x == x, x));
            step_sq = step_sq + step * step;
            low_sq = low_sq + low * low;
        }
        if (launch.per_tensor) {
            sums[0] += sum(step_sq);
            sums[1] += sum(low_sq);
            continue;
        }
        double each[2][kLanes];
        store_f64(each[0], step_sq);
        store_f64(each[1], low_sq);
        for (int i = 0; i < n; ++i) t.factors[first + i] = ratio(each[0][i], each[1][i], t.gain);
    }
}

// The one factor of a tensor.
inline void whole(const Projections& launch, int64_t number) {
    const Projection& t = launch.tensors[number];
    const double* const sums = launch.sums + 2 * t.first_part;
    double step_sq = 0, low_sq = 0;
    for (int64_t part = 0; part * kChannels < t.length; ++part) {
        step_sq += sums[2 * part];
        low_sq += sums[2 * part + 1];
    }
    const float x = ratio(step_sq, low_sq, t.gain);
    for (int64_t i = 0; i < t.length; ++i) t.factors[i] = x;
}

// Runs the number'th item of a step; `panel` is memory for a panel.
inline void run_projection(ProjectionStep step, const Projections& launch, int64_t number,
                           float* panel) {
    switch (step) {
        case kDraw:
            return draw(launch, number);
        case kProject:
            return project(launch, number, panel);
        case kLengths:
            return lengths(launch, number);
        default:
            return whole(launch, number);
    }
}

// Whether project() expects P in bf16 if the gradient is bf16.
inline bool multiplies_pairs() {
#if defined(WITH_PAIRS)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

}  // namespace projected
}  // namespace ENGINE_ISA
}  // namespace engine
