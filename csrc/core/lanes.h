// The lane type of the CPU: sixteen floats that are computed side by side.
//
// The width is sixteen for every instruction set, because it is part of the result: it fixes the order
// of sums.  A pack is one AVX-512 register, two of AVX2, or four of SSE2 or NEON, each of them the
// compiler's vector type; what the vector extension does not offer or compiles badly is spelled out.
// A comparison gives a Mask: all bits of a lane set, or none.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define HD inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))    // of a lambda
#define HD_CALL inline __attribute__((noinline))  // compiled once, called once a row

namespace engine {
namespace ENGINE_ISA {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kBytes = 64;  // of a register
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kRegisters = 64 / kBytes;

typedef float FloatRegister __attribute__((vector_size(kBytes)));
typedef int32_t IntRegister __attribute__((vector_size(kBytes)));
typedef uint32_t UintRegister __attribute__((vector_size(kBytes)));
typedef double DoubleRegister __attribute__((vector_size(kBytes)));

template <class Register, class Lane, int kCount>
struct Pack {
    Register r[kCount];

    HD Pack() : r{} {}
    HD Pack(Lane x) {
        for (Register& part : r) part = x - Register{};  // x + 0 would not be folded: -0 + 0 is 0
    }
    HD Lane lane(int i) const {
        constexpr int kEach = sizeof(Register) / sizeof(Lane);
        return r[i / kEach][i % kEach];
    }
};

using F = Pack<FloatRegister, float, kRegisters>;
using U = Pack<UintRegister, uint32_t, kRegisters>;
#if defined(__AVX512F__)
struct Mask {
    __mmask16 bits;
};
#else
using Mask = Pack<IntRegister, int32_t, kRegisters>;
#endif
using D = Pack<DoubleRegister, double, 2 * kRegisters>;

#define LANES_OPERATOR(T, op)                                       \
    HD T operator op(T a, T b) {                                    \
        for (int i = 0; i < int(sizeof(T)) / kBytes; ++i) a.r[i] = a.r[i] op b.r[i]; \
        return a;                                                   \
    }
LANES_OPERATOR(F, +)
LANES_OPERATOR(F, -)
LANES_OPERATOR(F, *)
LANES_OPERATOR(F, /)
LANES_OPERATOR(D, +)
LANES_OPERATOR(D, *)
LANES_OPERATOR(U, +)
LANES_OPERATOR(U, -)
LANES_OPERATOR(U, *)
LANES_OPERATOR(U, &)
LANES_OPERATOR(U, |)
LANES_OPERATOR(U, ^)
#undef LANES_OPERATOR

#if defined(__AVX512F__)
#define LANES_COMPARISON(T, op, intrinsic, cast, code) \
    HD Mask operator op(T a, T b) { return {intrinsic((cast)a.r[0], (cast)b.r[0], code)}; }
#else
#define LANES_COMPARISON(T, op, intrinsic, cast, code)                     \
    HD Mask operator op(T a, T b) {                                        \
        Mask mask;                                                         \
        for (int i = 0; i < kRegisters; ++i) mask.r[i] = a.r[i] op b.r[i]; \
        return mask;                                                       \
    }
#endif
LANES_COMPARISON(F, <, _mm512_cmp_ps_mask, __m512, _CMP_LT_OQ)
LANES_COMPARISON(F, <=, _mm512_cmp_ps_mask, __m512, _CMP_LE_OQ)
LANES_COMPARISON(F, >, _mm512_cmp_ps_mask, __m512, _CMP_GT_OQ)
LANES_COMPARISON(F, ==, _mm512_cmp_ps_mask, __m512, _CMP_EQ_OQ)
LANES_COMPARISON(U, <, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_LT)
LANES_COMPARISON(U, >, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_NLE)
LANES_COMPARISON(U, >=, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_NLT)
LANES_COMPARISON(U, ==, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_EQ)
#undef LANES_COMPARISON

HD U operator<<(U x, int by) {
    for (UintRegister& part : x.r) part <<= by;
    return x;
}
HD U operator>>(U x, int by) {
    for (UintRegister& part : x.r) part >>= by;
    return x;
}

HD U as_bits(F x) {
    U bits;
    for (int i = 0; i < kRegisters; ++i) bits.r[i] = (UintRegister)x.r[i];
    return bits;
}
HD F as_float(U bits) {
    F x;
    for (int i = 0; i < kRegisters; ++i) x.r[i] = (FloatRegister)bits.r[i];
    return x;
}

HD F select(Mask mask, F yes, F no) {
#if defined(__AVX512F__)
    yes.r[0] = (FloatRegister)_mm512_mask_blend_ps(mask.bits, (__m512)no.r[0], (__m512)yes.r[0]);
    return yes;
#else
    for (int i = 0; i < kRegisters; ++i) yes.r[i] = mask.r[i] ? yes.r[i] : no.r[i];
    return yes;
#endif
}
HD U select(Mask mask, U yes, U no) { return as_bits(select(mask, as_float(yes), as_float(no))); }

HD F fma(F a, F b, F c) {
    for (int i = 0; i < kRegisters; ++i) {
#if defined(__AVX512F__)
        c.r[i] = (FloatRegister)_mm512_fmadd_ps((__m512)a.r[i], (__m512)b.r[i], (__m512)c.r[i]);
#elif defined(__AVX2__)
        c.r[i] = (FloatRegister)_mm256_fmadd_ps((__m256)a.r[i], (__m256)b.r[i], (__m256)c.r[i]);
#else
        for (int j = 0; j < kBytes / 4; ++j) c.r[i][j] = __builtin_fmaf(a.r[i][j], b.r[i][j], c.r[i][j]);
#endif
    }
    return c;
}

HD F sqrt(F x) {
    for (FloatRegister& part : x.r) {
#if defined(__AVX512F__)
        part = (FloatRegister)_mm512_sqrt_ps((__m512)part);
#elif defined(__AVX2__)
        part = (FloatRegister)_mm256_sqrt_ps((__m256)part);
#else
        for (int j = 0; j < kBytes / 4; ++j) part[j] = __builtin_sqrtf(part[j]);
#endif
    }
    return x;
}

HD F to_float(U x) {  // x < 2^31
    F y;
    for (int i = 0; i < kRegisters; ++i) y.r[i] = __builtin_convertvector((IntRegister)x.r[i], FloatRegister);
    return y;
}
HD F truncated(F x) {  // towards zero, |x| < 2^31
    for (FloatRegister& part : x.r)
        part = __builtin_convertvector(__builtin_convertvector(part, IntRegister), FloatRegister);
    return x;
}

// One bit a lane, lane 0 lowest, and back.
HD uint32_t bits_of(Mask mask) {
#if defined(__AVX512F__)
    return mask.bits;
#else
    uint32_t bits = 0;
#if defined(__AVX2__)
    for (int i = 0; i < 2; ++i) bits |= uint32_t(_mm256_movemask_ps((__m256)mask.r[i])) << 8 * i;
#else
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(mask.lane(i) & 1) << i;
#endif
    return bits;
#endif
}
HD Mask mask_of(uint32_t bits) {
#if defined(__AVX512F__)
    return {__mmask16(bits)};
#else
    Mask mask;
    for (int i = 0; i < kRegisters; ++i) {
        constexpr int kEach = kBytes / 4;
        IntRegister lane_bit;
        for (int j = 0; j < kEach; ++j) lane_bit[j] = 1 << (i * kEach + j);
        mask.r[i] = ((IntRegister{} + int32_t(bits)) & lane_bit) != 0;
    }
    return mask;
#endif
}
HD bool all(Mask mask) { return bits_of(mask) == (1u << kLanes) - 1; }
HD int count(Mask mask) { return __builtin_popcount(bits_of(mask)); }

// 0, 1, 2, ... over the lanes.
HD U lane_index() {
    U x;
    for (int i = 0; i < kLanes; ++i) x.r[i / (kBytes / 4)][i % (kBytes / 4)] = uint32_t(i);
    return x;
}

// Sums of the lanes, in one order everywhere: halves are added until one lane is left.
template <class P, class Lane>
HD Lane fold(P x, Lane*) {
    Lane lanes[kLanes];
    memcpy(lanes, &x.r, sizeof(x));
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}
HD float sum(F x) { return fold(x, (float*)nullptr); }
HD double sum(D x) { return fold(x, (double*)nullptr); }

HD D widen(F x) {
    D y;
#if defined(__AVX512F__)
    y.r[0] = (DoubleRegister)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x.r[0]));
    y.r[1] = (DoubleRegister)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x.r[0], 1));
#elif defined(__AVX2__)
    for (int i = 0; i < 2; ++i) {
        y.r[2 * i] = (DoubleRegister)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x.r[i]));
        y.r[2 * i + 1] = (DoubleRegister)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x.r[i], 1));
    }
#else
    for (int i = 0; i < kLanes; ++i) y.r[i / (kBytes / 8)][i % (kBytes / 8)] = x.lane(i);
#endif
    return y;
}

HD float largest(F x) {
    float lanes[kLanes];
    memcpy(lanes, &x.r, sizeof(x));
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}
HD uint32_t bits_of_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

// Loads of n lanes (those beyond are zero) and stores of n lanes.  The narrow integers of memory are
// 32 bits wide in a pack.
HD F load_f32(const float* from, int n) {
    F x;
    memcpy(&x.r, from, size_t(n < kLanes ? n : kLanes) * 4);
    return x;
}
HD void store_f32(float* to, F x, int n) { memcpy(to, &x.r, size_t(n < kLanes ? n : kLanes) * 4); }

template <class T>
HD U load_narrow(const T* from) {
    U x;
    for (int i = 0; i < kRegisters; ++i) {
        const T* at = from + i * (kBytes / 4);
#if defined(__AVX512F__)
        if (sizeof(T) == 2) x.r[i] = (UintRegister)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
        if (sizeof(T) == 1) x.r[i] = (UintRegister)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
#elif defined(__AVX2__)
        if (sizeof(T) == 2) x.r[i] = (UintRegister)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
        if (sizeof(T) == 1) x.r[i] = (UintRegister)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
        for (int j = 0; j < kBytes / 4; ++j) x.r[i][j] = at[j];
#endif
    }
    return x;
}
template <class T>
HD void store_narrow(T* to, U x) {
#if defined(__AVX512F__)
    if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)x.r[0]));
    if (sizeof(T) == 1) _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x.r[0]));
#elif defined(__AVX2__)
    const __m256i low = _mm256_set1_epi32(sizeof(T) == 2 ? 0xFFFF : 0xFF);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)x.r[0], low), _mm256_and_si256((__m256i)x.r[1], low));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)to, words);
    if (sizeof(T) == 1)
        _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = T(x.lane(i));
#endif
}
template <class T>
HD U load_uint(const T* from, int n) {
    if (n >= kLanes) return load_narrow(from);
    T lanes[kLanes] = {};
    memcpy(lanes, from, size_t(n) * sizeof(T));
    return load_narrow(lanes);
}
template <class T>
HD void store_uint(T* to, U x, int n) {
    if (n >= kLanes) return store_narrow(to, x);
    T lanes[kLanes];
    store_narrow(lanes, x);
    memcpy(to, lanes, size_t(n) * sizeof(T));
}

// Signed bytes, as floats.
HD F load_s8(const int8_t* from, int n) {
    U x = load_uint(reinterpret_cast<const uint8_t*>(from), n);
    F y;
    for (int i = 0; i < kRegisters; ++i)
        y.r[i] = __builtin_convertvector((IntRegister)(x.r[i] << 24) >> 24, FloatRegister);
    return y;
}
HD void store_s8(int8_t* to, F x, int n) {  // |x| <= 127, whole
    U y;
    for (int i = 0; i < kRegisters; ++i) y.r[i] = (UintRegister)__builtin_convertvector(x.r[i], IntRegister);
    store_uint(reinterpret_cast<uint8_t*>(to), y, n);
}

}  // namespace ENGINE_ISA
}  // namespace engine
