// Functions of the lane types besides their operators, with the instructions of each set.
#pragma once

#include "core/pack_cpu.h"

namespace engine {
namespace ENGINE_ISA {

HD U as_bits(F x) {
    return map<U>([](auto x) INLINED { return x; }, x);
}
HD F as_float(U bits) {
    return map<F>([](auto x) INLINED { return x; }, bits);
}

HD F select(Mask mask, F yes, F no) {
#if defined(__AVX512F__)
    yes.r[0] = (FloatRegister)_mm512_mask_blend_ps(mask.bits, (__m512)no.r[0], (__m512)yes.r[0]);
    return yes;
#elif defined(__AVX2__)
    auto blend = [](auto m, auto y, auto n)
                     INLINED { return _mm256_blendv_ps((__m256)n, (__m256)y, (__m256)m); };
    return map<F>(blend, mask, yes, no);
#else
    auto blend = [](auto m, auto y, auto n)
                     INLINED { return (m & (IntRegister)y) | (~m & (IntRegister)n); };
    return map<F>(blend, mask, yes, no);
#endif
}
HD U select(Mask mask, U yes, U no) { return as_bits(select(mask, as_float(yes), as_float(no))); }

// x where the mask is set, zero elsewhere.
HD F only(Mask mask, F x) {
#if defined(__AVX512F__)
    x.r[0] = (FloatRegister)_mm512_maskz_mov_ps(mask.bits, (__m512)x.r[0]);
    return x;
#else
    return as_float(map<U>([](auto m, auto x) INLINED { return m & (IntRegister)x; }, mask, x));
#endif
}
HD U only(Mask mask, U x) { return as_bits(only(mask, as_float(x))); }

#if defined(__AVX512F__)
HD F fma(F a, F b, F c) {
    c.r[0] = (FloatRegister)_mm512_fmadd_ps((__m512)a.r[0], (__m512)b.r[0], (__m512)c.r[0]);
    return c;
}
#elif defined(__AVX2__)
HD F fma(F a, F b, F c) {
    auto each = [](auto a, auto b, auto c)
                    INLINED { return _mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); };
    return map<F>(each, a, b, c);
}
#elif defined(__ARM_NEON)
HD F fma(F a, F b, F c) {
    for (int i = 0; i < kRegisters; ++i)
        for (int j = 0; j < kEach; ++j) c.r[i][j] = __builtin_fmaf(a.r[i][j], b.r[i][j], c.r[i][j]);
    return c;
}
#else
HD_CALL F fma(F a, F b, F c) {  // there is no instruction: a call to the C library for each lane
    float lanes[3][kLanes];
    memcpy(lanes[0], &a, sizeof(a));
    memcpy(lanes[1], &b, sizeof(b));
    memcpy(lanes[2], &c, sizeof(c));
    for (int i = 0; i < kLanes; ++i) lanes[2][i] = ::fmaf(lanes[0][i], lanes[1][i], lanes[2][i]);
    memcpy(&c, lanes[2], sizeof(c));
    return c;
}
#endif

HD F abs(F x) { return as_float(as_bits(x) & U(0x7FFFFFFFu)); }

HD F sqrt(F x) {
    auto root = [](auto x) INLINED {
#if defined(__AVX512F__)
        return _mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
        return _mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
        return _mm_sqrt_ps((__m128)x);
#else
        for (int j = 0; j < kEach; ++j) x[j] = __builtin_sqrtf(x[j]);
        return x;
#endif
    };
    return map<F>(root, x);
}

// A separate function because a GPU computes it differently.
HD F over_root(F a, F x, float b) { return a / (sqrt(x) + F(b)); }

// a < b ? a : b and a > b ? a : b, NaN included: that is how the instructions are defined.
#if defined(__AVX512F__)
#define LANES_CHOICE(T, name, op, cast, intrinsic)                                            \
    HD T name(T a, T b) {                                                                     \
        a.r[0] = (T::Register)_mm512_##intrinsic((__m512##cast)a.r[0], (__m512##cast)b.r[0]); \
        return a;                                                                             \
    }
#elif defined(__AVX2__)
#define LANES_CHOICE(T, name, op, cast, intrinsic)                                                \
    HD T name(T a, T b) {                                                                         \
        auto each = [](auto x, auto y)                                                            \
                        INLINED { return _mm256_##intrinsic((__m256##cast)x, (__m256##cast)y); }; \
        return map<T>(each, a, b);                                                                \
    }
#else
#define LANES_CHOICE(T, name, op, cast, intrinsic) \
    HD T name(T a, T b) { return select(a op b, a, b); }
#endif
LANES_CHOICE(F, min, <, , min_ps)
LANES_CHOICE(F, max, >, , max_ps)
LANES_CHOICE(U, min, <, i, min_epu32)
LANES_CHOICE(U, max, >, i, max_epu32)
#undef LANES_CHOICE

HD F to_float(U x) {  // of lanes in two's complement
    return map<F>(
        [](auto x) INLINED { return __builtin_convertvector((IntRegister)x, FloatRegister); }, x);
}

// One bit a lane, lane 0 lowest, and back.
HD uint32_t bits_of(Mask mask) {
#if defined(__AVX512F__)
    return mask.bits;
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps((__m256)mask.r[0])) |
           uint32_t(_mm256_movemask_ps((__m256)mask.r[1])) << 8;
#else
    uint32_t bits = 0;
#if defined(__SSE2__)
    for (int i = 0; i < kRegisters; ++i)
        bits |= uint32_t(_mm_movemask_ps((__m128)mask.r[i])) << kEach * i;
#else
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask.r[i / kEach][i % kEach] & 1) << i;
#endif
    return bits;
#endif
}
HD Mask mask_of(uint32_t bits) {
#if defined(__AVX512F__)
    return {__mmask16(bits)};
#else
    return generate<Mask>([bits](int i) INLINED {
        IntRegister lane_bit;
        for (int j = 0; j < kEach; ++j) lane_bit[j] = 1 << (i * kEach + j);
        return ((IntRegister{} + int32_t(bits)) & lane_bit) != 0;
    });
#endif
}
// x with the other sign in the lanes whose bit is set.
HD F flipped(F x, uint32_t bits) {
#if defined(__AVX512F__)
    __m512i sign = _mm512_set1_epi32(int(0x80000000u)), lanes = (__m512i)x.r[0];
    x.r[0] = (FloatRegister)_mm512_mask_xor_epi32(lanes, __mmask16(bits), lanes, sign);
    return x;
#elif defined(__AVX2__)
    U top = generate<U>([bits](int i) INLINED {  // a lane's own bit is shifted to the top
        IntRegister up;
        for (int j = 0; j < kEach; ++j) up[j] = 31 - (i * kEach + j);
        return _mm256_sllv_epi32(_mm256_set1_epi32(int(bits)), (__m256i)up);
    });
    return as_float(as_bits(x) ^ (top & U(0x80000000u)));
#else
    return as_float(as_bits(x) ^ only(mask_of(bits), U(0x80000000u)));
#endif
}
HD bool all(Mask mask) {
#if defined(__AVX512F__)
    return _kortestc_mask16_u8(mask.bits, mask.bits);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)(mask.r[0] & mask.r[1])) == 0xFF;
#else
    return bits_of(mask) == 0xFFFF;
#endif
}
// Whether some lane has some bit of `bits`.
HD bool any(U x, uint32_t bits) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x.r[0], _mm512_set1_epi32(int(bits))) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)(x.r[0] | x.r[1]), _mm256_set1_epi32(int(bits)));
#else
    return !all((x & U(bits)) == U(0u));
#endif
}
HD int count(Mask mask) { return __builtin_popcount(bits_of(mask)); }

// 0, 1, 2, ... over the lanes.
HD U lane_index() {
    return generate<U>([](int i) INLINED {
        UintRegister x;
        for (int j = 0; j < kEach; ++j) x[j] = uint32_t(i * kEach + j);
        return x;
    });
}

// x's lanes in another order: lane i is lane at[i], at[i] < kLanes.
HD F picked(F x, U at) {
#if defined(__AVX512F__)
    x.r[0] = (FloatRegister)_mm512_permutexvar_ps((__m512i)at.r[0], (__m512)x.r[0]);
    return x;
#elif defined(__AVX2__)
    return map<F>(
        [&](auto at) INLINED {
            __m256 low = _mm256_permutevar8x32_ps((__m256)x.r[0], (__m256i)at);
            __m256 high = _mm256_permutevar8x32_ps((__m256)x.r[1], (__m256i)at);
            return _mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)at, 28));
        },
        at);
#else
    float from[kLanes], to[kLanes];
    uint32_t lanes[kLanes];
    memcpy(from, &x, sizeof(x));
    memcpy(lanes, &at, sizeof(at));
    for (int i = 0; i < kLanes; ++i) to[i] = from[lanes[i]];
    memcpy(&x, to, sizeof(x));
    return x;
#endif
}

// The sum of the lanes, in one order everywhere: halves are added until one lane is left.
template <class Function>
HD float fold(F x, Function add) {
    typedef float Quad __attribute__((vector_size(16)));
    Quad q;
#if defined(__AVX512F__)
    __m256 low = _mm512_castps512_ps256((__m512)x.r[0]);
    __m256 half = add(low, _mm512_extractf32x8_ps((__m512)x.r[0], 1));
    q = add((Quad)_mm256_castps256_ps128(half), (Quad)_mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    __m256 half = add((__m256)x.r[0], (__m256)x.r[1]);
    q = add((Quad)_mm256_castps256_ps128(half), (Quad)_mm256_extractf128_ps(half, 1));
#else
    q = add((Quad)add(x.r[0], x.r[2]), (Quad)add(x.r[1], x.r[3]));
#endif
    Quad p = add(q, (Quad){q[2], q[3], 0, 0});
    return add(p[0], p[1]);
}
HD float sum(F x) {
    return fold(x, [](auto a, auto b) INLINED { return a + b; });
}
HD float largest(F x) {
    return fold(x, [](auto a, auto b) INLINED { return a > b ? a : b; });
}
HD double sum(D x) {
    double lanes[kLanes];
    memcpy(lanes, &x.r, sizeof(x));
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

HD D widen(F x) {
    D y;
#if defined(__AVX512F__)
    y.r[0] = (DoubleRegister)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x.r[0]));
    y.r[1] = (DoubleRegister)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x.r[0], 1));
#elif defined(__AVX2__)
    y.r[0] = (DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.r[0]));
    y.r[1] = (DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.r[0], 1));
    y.r[2] = (DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.r[1]));
    y.r[3] = (DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.r[1], 1));
#else
    for (int i = 0; i < kRegisters; ++i) {
        y.r[2 * i] = DoubleRegister{x.r[i][0], x.r[i][1]};
        y.r[2 * i + 1] = DoubleRegister{x.r[i][2], x.r[i][3]};
    }
#endif
    return y;
}
HD void store_f64(double *to, D x) { memcpy(to, &x.r, sizeof(x)); }

HD float float_of_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
HD uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace ENGINE_ISA
}  // namespace engine
