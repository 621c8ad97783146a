// The lane type of a GPU: four floats that a thread computes one after another, without a branch in
// between, so that each one's latency is hidden by the others'.
//
// Each function returns the same bits per lane as in core/lanes_cpu.h; optim/gpu.py forbids
// contraction.  Loads and stores take the number n of lanes that exist; those beyond read
// as zero.
#pragma once

#include "core/types.h"

#define HD __device__ __forceinline__
#define INLINED __attribute__((always_inline))  // of a lambda
#define HD_CALL __device__ __forceinline__
#define UNROLLED _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define UNROLLED_BY_8 _Pragma("unroll 8")  // so that eight loads are in flight

namespace engine {
namespace ENGINE_ISA {

template <bool kFirst, class A, class B>
struct ChoiceOf {
    using Type = A;
};
template <class A, class B>
struct ChoiceOf<false, A, B> {
    using Type = B;
};
template <bool kFirst, class A, class B>
using Choice = typename ChoiceOf<kFirst, A, B>::Type;

constexpr int kLanes = 4;

template <class Lane>
struct Pack {
    Lane r[kLanes];

    Pack() = default;  // not initialised
    HD Pack(Lane x) : r{x, x, x, x} {}
};
using F = Pack<float>;
using U = Pack<uint32_t>;
using D = Pack<double>;
using Mask = Pack<bool>;

// To{f(i-th lanes of the operands) for all i}.
template <class To, class Function, class... From>
HD To map(Function f, const From&... from) {
    static_assert(kLanes == 4, "written out: NVRTC takes 1.6 times as long to unroll loops");
    To to;
    to.r[0] = f(from.r[0]...);
    to.r[1] = f(from.r[1]...);
    to.r[2] = f(from.r[2]...);
    to.r[3] = f(from.r[3]...);
    return to;
}

#define LANES_OPERATOR(To, T, op)                                    \
    HD To operator op(T a, T b) {                                    \
        return map<To>([](auto x, auto y) { return x op y; }, a, b); \
    }
LANES_OPERATOR(F, F, +)
LANES_OPERATOR(F, F, -)
LANES_OPERATOR(F, F, *)
LANES_OPERATOR(D, D, +)
LANES_OPERATOR(D, D, -)
LANES_OPERATOR(D, D, *)
LANES_OPERATOR(U, U, +)
LANES_OPERATOR(U, U, -)
LANES_OPERATOR(U, U, *)
LANES_OPERATOR(U, U, &)
LANES_OPERATOR(U, U, |)
LANES_OPERATOR(U, U, ^)
LANES_OPERATOR(Mask, F, <)
LANES_OPERATOR(Mask, F, <=)
LANES_OPERATOR(Mask, F, >)
LANES_OPERATOR(Mask, F, ==)
LANES_OPERATOR(Mask, F, !=)
LANES_OPERATOR(Mask, U, <)
LANES_OPERATOR(Mask, U, >)
LANES_OPERATOR(Mask, U, >=)
LANES_OPERATOR(Mask, U, ==)
#undef LANES_OPERATOR

HD U operator<<(U x, int by) {
    return map<U>([by](uint32_t x) { return x << by; }, x);
}
HD U operator>>(U x, int by) {
    return map<U>([by](uint32_t x) { return x >> by; }, x);
}

HD U as_bits(F x) {
    return map<U>([](float x) { return __float_as_uint(x); }, x);
}
HD F as_float(U bits) {
    return map<F>([](uint32_t x) { return __uint_as_float(x); }, bits);
}
HD float float_of_bf16(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
HD uint32_t bits_of_float(float x) { return __float_as_uint(x); }

HD F select(Mask mask, F yes, F no) {
    return map<F>([](bool m, float y, float n) { return m ? y : n; }, mask, yes, no);
}
HD U select(Mask mask, U yes, U no) {
    return map<U>([](bool m, uint32_t y, uint32_t n) { return m ? y : n; }, mask, yes, no);
}
HD F only(Mask mask, F x) { return select(mask, x, F(0.f)); }
HD U only(Mask mask, U x) { return select(mask, x, U(0u)); }

HD F fma(F a, F b, F c) {
    return map<F>([](float a, float b, float c) { return __fmaf_rn(a, b, c); }, a, b, c);
}

HD F abs(F x) {
    return map<F>([](float x) { return ::fabsf(x); }, x);
}

// a < b ? a : b and a > b ? a : b, NaN included.
HD F min(F a, F b) { return select(a < b, a, b); }
HD F max(F a, F b) { return select(a > b, a, b); }
HD U min(U a, U b) { return select(a < b, a, b); }
HD U max(U a, U b) { return select(a > b, a, b); }

// Approximations of 1 / x and 1 / sqrt(x), for normal numbers.
#if defined(__CUDACC_RTC__)
HD float about_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
HD float about_rsqrt(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
HD float about_reciprocal(float x) { return 1.f / x; }
HD float about_rsqrt(float x) { return 1.f / sqrtf(x); }
#endif

// IEEE's quotients and roots, by a Newton step and the remainder's correction (Markstein 1990); the
// compiler's own quotients have two corrections.  For approximations that are right to a unit in
// the last place, a search of the hard cases has found one quotient, 1 / (2 - 2^-23), for which one
// of them would need the second, and two mantissas with such a root.  The remainder is exact unless
// it underflows; an overflow on the way, or a NaN operand, gives NaN or a quotient of zero.  So all
// lanes are checked once, together, for being large enough.
HD float corrected_quotient(float x, float y, float inverse) {
    inverse = __fmaf_rn(inverse, __fmaf_rn(-y, inverse, 1.f), inverse);
    const float about = x * inverse;
    return __fmaf_rn(inverse, __fmaf_rn(-y, about, x), about);
}
HD float about_quotient(float x, float y) { return corrected_quotient(x, y, about_reciprocal(y)); }
HD float about_root(float x) {
    const float inverse = about_rsqrt(x), about = x * inverse;
    return __fmaf_rn(__fmaf_rn(-about, about, x), inverse * 0.5f, about);
}
HD F operator/(F a, F b) {
    F q;
    bool large = true;
    UNROLLED for (int i = 0; i < kLanes; ++i) {
        q.r[i] = about_quotient(a.r[i], b.r[i]);
        large = large & (::fabsf(a.r[i]) >= 0x1p-100f) & (::fabsf(q.r[i]) >= 0x1p-100f);
    }
    if (RARELY(!large)) {
        UNROLLED for (int i = 0; i < kLanes; ++i) q.r[i] = __fdiv_rn(a.r[i], b.r[i]);
    }
    return q;
}
HD F sqrt(F x) {
    F root;
    bool large = true;
    UNROLLED for (int i = 0; i < kLanes; ++i) {
        root.r[i] = about_root(x.r[i]);
        large &= root.r[i] >= 0x1p-50f;
    }
    if (RARELY(!large)) {
        UNROLLED for (int i = 0; i < kLanes; ++i) root.r[i] = __fsqrt_rn(x.r[i]);
    }
    return root;
}
// a / (sqrt(x) + b), b >= 0.  If root and quotient are large enough, so is a.
HD F over_root(F a, F x, float b) {
    F q;
    bool large = true;
    UNROLLED for (int i = 0; i < kLanes; ++i) {
        const float root = about_root(x.r[i]);
        q.r[i] = about_quotient(a.r[i], root + b);
        large = large & (root >= 0x1p-50f) & (::fabsf(q.r[i]) >= 0x1p-50f);
    }
    if (RARELY(!large)) {
        UNROLLED for (int i = 0; i < kLanes; ++i) q.r[i] =
            __fdiv_rn(a.r[i], __fsqrt_rn(x.r[i]) + b);
    }
    return q;
}

HD F to_float(U x) {  // of lanes in two's complement
    return map<F>([](uint32_t x) { return __int2float_rn(int(x)); }, x);
}
HD D widen(F x) {
    return map<D>([](float x) { return double(x); }, x);
}

// One bit a lane, lane 0 lowest.
HD uint32_t bits_of(Mask mask) {
    uint32_t bits = 0;
    UNROLLED for (int i = 0; i < kLanes; ++i) bits |= mask.r[i] ? 1u << i : 0u;
    return bits;
}
// x with the other sign in the lanes whose bit is set.
HD F flipped(F x, uint32_t bits) {
    U to = as_bits(x);
    UNROLLED for (int i = 0; i < kLanes; ++i) to.r[i] ^= bits << (31 - i) & 0x80000000u;
    return as_float(to);
}
HD bool all(Mask mask) { return mask.r[0] && mask.r[1] && mask.r[2] && mask.r[3]; }
// Whether some lane has some bit of `bits`.
HD bool any(U x, uint32_t bits) { return ((x.r[0] | x.r[1] | x.r[2] | x.r[3]) & bits) != 0; }
HD int count(Mask mask) { return mask.r[0] + mask.r[1] + mask.r[2] + mask.r[3]; }

// 0, 1, 2, ... over the lanes.
HD U lane_index() {
    U x;
    UNROLLED for (int i = 0; i < kLanes; ++i) x.r[i] = uint32_t(i);
    return x;
}

// The sum of the lanes: halves are added until one lane is left.
HD float sum(F x) { return (x.r[0] + x.r[2]) + (x.r[1] + x.r[3]); }
HD double sum(D x) { return (x.r[0] + x.r[2]) + (x.r[1] + x.r[3]); }
// The larger of two numbers.  (Of a number and NaN, the number.)
HD float largest(float a, float b) { return ::fmaxf(a, b); }
HD float largest(F x) { return largest(largest(x.r[0], x.r[2]), largest(x.r[1], x.r[3])); }

template <class To, class T>
HD Pack<To> load_lanes(const T* from, int n) {
    Pack<To> x;
    UNROLLED for (int i = 0; i < kLanes; ++i) x.r[i] = i < n ? To(from[i]) : To(0);
    return x;
}
template <class T, class From>
HD void store_lanes(T* to, Pack<From> x, int n) {
    UNROLLED for (int i = 0; i < kLanes; ++i) if (i < n) to[i] = T(x.r[i]);
}
HD F load_f32(const float* from, int n) { return load_lanes<float>(from, n); }
HD void store_f32(float* to, F x, int n) { store_lanes(to, x, n); }
template <class T>
HD U load_uint(const T* from, int n) {
    return load_lanes<uint32_t>(from, n);
}
template <class T>
HD void store_uint(T* to, U x, int n) {
    store_lanes(to, x, n);
}
HD U load_upper(const uint16_t* from, int n) { return load_uint(from, n) << 16; }
HD void store_upper(uint16_t* to, U x, int n) { store_uint(to, x >> 16, n); }
HD void store_saturated(uint8_t* to, U x, int n) { store_uint(to, min(x, U(255u)), n); }

// The upper halves of two words, as one.
HD uint32_t upper_halves(uint32_t low, uint32_t high) { return __byte_perm(low, high, 0x7632); }
// The lowest byte of each lane, as one word.
HD uint32_t word_of_bytes(U x) {
    return __byte_perm(__byte_perm(x.r[0], x.r[1], 0x40), __byte_perm(x.r[2], x.r[3], 0x40),
                       0x5410);
}

// One, two or four consecutive words, aligned to their total size.
HD void load_words(const void* from, uint32_t (&words)[1]) {
    words[0] = *static_cast<const uint32_t*>(from);
}
HD void load_words(const void* from, uint32_t (&words)[2]) {
    const uint2 x = *static_cast<const uint2*>(from);
    words[0] = x.x, words[1] = x.y;
}
HD void load_words(const void* from, uint32_t (&words)[4]) {
    const uint4 x = *static_cast<const uint4*>(from);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
}
HD void store_words(void* to, const uint32_t (&words)[1]) {
    *static_cast<uint32_t*>(to) = words[0];
}
HD void store_words(void* to, const uint32_t (&words)[2]) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
HD void store_words(void* to, const uint32_t (&words)[4]) {
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

// Each thread checks its own gradients of a row instead (engine/cuda.h).
HD bool any_beyond(const uint16_t*, int, int16_t) { return true; }

}  // namespace ENGINE_ISA
}  // namespace engine
