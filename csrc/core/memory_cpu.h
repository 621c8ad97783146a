// Loads and stores of lanes: fp32, the narrow integers of codes, and bf16.
#pragma once

#include "core/lanes_cpu.h"

namespace engine {
namespace ENGINE_ISA {

// Loads of n lanes (those beyond are zero) and stores of n lanes.  Narrow integers are 32 bits wide
// in a pack.
#if defined(__AVX512F__)
HD __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
#endif
HD F load_f32(const float* from, int n) {
    float lanes[kLanes];
    if (RARELY(n < kLanes)) {
#if defined(__AVX512F__)
        F x;
        x.r[0] = (FloatRegister)_mm512_maskz_loadu_ps(first_lanes(n), from);
        return x;
#elif defined(__AVX2__)
        return generate<F>([from, n](int i) INLINED {
            IntRegister lane;
            for (int j = 0; j < kEach; ++j) lane[j] = i * kEach + j;
            return _mm256_maskload_ps(from + i * kEach, (__m256i)(lane < n));
        });
#endif
        memset(lanes, 0, sizeof(lanes));
        memcpy(lanes, from, size_t(n) * 4);
        from = lanes;
    }
    return generate<F>([from](int i) INLINED {
        return (FloatRegister) * reinterpret_cast<const FloatMemory*>(from + i * kEach);
    });
}
template <int... I>
HD void store_registers(std::integer_sequence<int, I...>, float* to, F x) {
    ((*reinterpret_cast<FloatMemory*>(to + I * kEach) = (FloatMemory)x.r[I]), ...);
}
HD void store_f32(float* to, F x, int n) {
    if (!RARELY(n < kLanes)) return store_registers(F::Indices{}, to, x);
#if defined(__AVX512F__)
    return _mm512_mask_storeu_ps(to, first_lanes(n), (__m512)x.r[0]);
#endif
    float lanes[kLanes];
    store_registers(F::Indices{}, lanes, x);
    memcpy(to, lanes, size_t(n) * 4);
}

template <class T>
HD U load_narrow(const T* from) {
    return generate<U>([from](int i) INLINED {
        const T* at = from + i * kEach;
#if defined(__AVX512F__)
        if constexpr (sizeof(T) == 2)
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at));
        else
            return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at));
#elif defined(__AVX2__)
        if constexpr (sizeof(T) == 2)
            return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at));
        else
            return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)at));
#else
        return UintRegister{at[0], at[1], at[2], at[3]};
#endif
    });
}
template <class T>
HD void store_narrow(T* to, U x) {
#if defined(__AVX512F__)
    if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)x.r[0]));
    if (sizeof(T) == 1) _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x.r[0]));
#elif defined(__AVX2__)
    const __m256i low = _mm256_set1_epi32(sizeof(T) == 2 ? 0xFFFF : 0xFF);
    __m256i words = _mm256_packus_epi32(_mm256_and_si256((__m256i)x.r[0], low),
                                        _mm256_and_si256((__m256i)x.r[1], low));
    words = _mm256_permute4x64_epi64(words, 0xD8);
    if (sizeof(T) == 2) _mm256_storeu_si256((__m256i*)to, words);
    if (sizeof(T) == 1)
        _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(_mm256_castsi256_si128(words),
                                                        _mm256_extracti128_si256(words, 1)));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = T(x.r[i / kEach][i % kEach]);
#endif
}
template <class T>
HD U load_uint(const T* from, int n) {
    if (!RARELY(n < kLanes)) return load_narrow(from);
#if defined(__AVX512F__)
    U x;
    if constexpr (sizeof(T) == 2)
        x.r[0] =
            (UintRegister)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), from));
    else
        x.r[0] = (UintRegister)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first_lanes(n), from));
    return x;
#endif
    T lanes[kLanes] = {};
    memcpy(lanes, from, size_t(n) * sizeof(T));
    return load_narrow(lanes);
}
template <class T>
HD void store_uint(T* to, U x, int n) {
    if (!RARELY(n < kLanes)) return store_narrow(to, x);
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2)
        return _mm512_mask_cvtepi32_storeu_epi16(to, first_lanes(n), (__m512i)x.r[0]);
    else
        return _mm512_mask_cvtepi32_storeu_epi8(to, first_lanes(n), (__m512i)x.r[0]);
#endif
    T lanes[kLanes];
    store_narrow(lanes, x);
    memcpy(to, lanes, size_t(n) * sizeof(T));
}

// Loads and stores of n 16-bit words as the upper halves of lanes, which are the bits of bf16.
HD U load_upper(const uint16_t* from, int n) {
    if (RARELY(n < kLanes)) return load_uint(from, n) << 16;
#if defined(__AVX512F__)
    const __m512i spread = (__m512i)(lane_index().r[0] << 16);
    __m512i words = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)from));
    U x;
    x.r[0] = (UintRegister)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, spread, words);
    return x;
#elif defined(__AVX2__)
    __m256i words = _mm256_loadu_si256((const __m256i*)from), zero = _mm256_setzero_si256();
    words = _mm256_permute4x64_epi64(words, 0xD8);
    U x;
    x.r[0] = (UintRegister)_mm256_unpacklo_epi16(zero, words);
    x.r[1] = (UintRegister)_mm256_unpackhi_epi16(zero, words);
    return x;
#else
    return load_narrow(from) << 16;
#endif
}
HD void store_upper(uint16_t* to, U x, int n) {
    if (RARELY(n < kLanes)) return store_uint(to, x >> 16, n);
#if defined(__AVX512F__)
    // The odd words, two to a lane; a permutation's indices are taken modulo 32.
    const __m512i gather = (__m512i)(lane_index().r[0] * 0x00040004u + 0x00030001u);
    __m512i words = _mm512_permutexvar_epi16(gather, (__m512i)x.r[0]);
    _mm256_storeu_si256((__m256i*)to, _mm512_castsi512_si256(words));
#elif defined(__AVX2__)
    __m256i words = _mm256_packus_epi32((__m256i)(x.r[0] >> 16), (__m256i)(x.r[1] >> 16));
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(words, 0xD8));
#else
    store_narrow(to, x >> 16);
#endif
}

// Whether some of n words, without its sign bit, is larger than `limit`.
HD bool any_beyond(const uint16_t* from, int n, int16_t limit) {
    typedef int16_t Words __attribute__((vector_size(kBytes), aligned(2), may_alias));
    constexpr int kWords = kBytes / 2;
    Words top = {};
    auto add = [&](const void* at) INLINED {
        Words x = *reinterpret_cast<const Words*>(at) & int16_t(0x7FFF);
        top = x > top ? x : top;
    };
    int i = 0;
    for (; i + kWords <= n; i += kWords) add(from + i);
    if (i < n) {
        uint16_t rest[kWords] = {};
        memcpy(rest, from + i, size_t(n - i) * 2);
        add(rest);
    }
#if defined(__AVX512F__)
    return _mm512_cmpgt_epi16_mask((__m512i)top, _mm512_set1_epi16(limit)) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)(top > limit)) != 0;
#else
    auto beyond = top > limit;
    uint64_t parts[kBytes / 8], some = 0;
    memcpy(parts, &beyond, sizeof(parts));
    for (uint64_t part : parts) some |= part;
    return some != 0;
#endif
}

// Stores bytes, saturated at 255; x < 2^15.
HD void store_saturated(uint8_t* to, U x, int n) {
    if (RARELY(n < kLanes)) return store_uint(to, min(x, U(255u)), n);
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtusepi32_epi8((__m512i)x.r[0]));
#elif defined(__AVX2__)
    __m256i words = _mm256_packus_epi32((__m256i)x.r[0], (__m256i)x.r[1]);
    // The two packings have left the sixteen bytes in quarters.
    const __m256i quarters = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words, words), quarters);
    _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(bytes));
#else
    store_narrow(to, min(x, U(255u)));
#endif
}

}  // namespace ENGINE_ISA
}  // namespace engine
