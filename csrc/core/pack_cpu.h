// The lane types of the CPU, with their operators: sixteen floats that are computed side by side.
//
// The width is sixteen for every instruction set, because it is part of the result: it fixes the
// order of sums.  A pack is one AVX-512 register, two of AVX2, or four of SSE2 or NEON, each of
// them the compiler's vector type; what the vector extension does not offer or compiles badly is
// spelled out. A comparison gives a Mask: all bits of a lane set, or none.
#pragma once

#include <math.h>
#include <string.h>

#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/types.h"

#define HD inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))    // of a lambda
#define HD_CALL inline __attribute__((noinline))  // compiled once, called once a row
#define UNROLLED
#define UNROLLED_BY_8

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
constexpr int kEach = kBytes / 4;  // lanes of a register

typedef float FloatRegister __attribute__((vector_size(kBytes)));
typedef int32_t IntRegister __attribute__((vector_size(kBytes)));
typedef uint32_t UintRegister __attribute__((vector_size(kBytes)));
typedef double DoubleRegister __attribute__((vector_size(kBytes)));
typedef float FloatMemory __attribute__((vector_size(kBytes), aligned(4), may_alias));

template <class Register_, class Lane, int kCount>
struct Pack {
    using Register = Register_;
    using Indices = std::make_integer_sequence<int, kCount>;
    Register r[kCount];

    Pack() = default;                                     // not initialised
    HD Pack(Lane x) { fill(Indices{}, x - Register{}); }  // x + 0 would not be folded: -0 + 0 is 0

    template <int... I>
    HD void fill(std::integer_sequence<int, I...>, Register x) {
        ((r[I] = x), ...);
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

// To{f(i-th registers of the operands) for all i}.  The indices are constants: with a loop variable
// the compiler would keep packs in memory.
template <int I, class Function, class... From>
HD auto apply_at(Function f, const From &...from) {
    return f(from.r[I]...);
}
template <class To, class Function, int... I, class... From>
HD To map_at(std::integer_sequence<int, I...>, Function f, const From &...from) {
    To to;
    ((to.r[I] = (typename To::Register)apply_at<I>(f, from...)), ...);
    return to;
}
template <class To, class Function, class... From>
HD To map(Function f, const From &...from) {
    return map_at<To>(typename To::Indices{}, f, from...);
}
// To{f(0), f(1), ...}, where the arguments are constants too.
template <class To, class Function, int... I>
HD To generate_at(std::integer_sequence<int, I...>, Function f) {
    To to;
    ((to.r[I] = (typename To::Register)f(I)), ...);
    return to;
}
template <class To, class Function>
HD To generate(Function f) {
    return generate_at<To>(typename To::Indices{}, f);
}

#define LANES_OPERATOR(T, op)                                               \
    HD T operator op(T a, T b) {                                            \
        return map<T>([](auto x, auto y) INLINED { return x op y; }, a, b); \
    }
LANES_OPERATOR(F, +)
LANES_OPERATOR(F, -)
LANES_OPERATOR(F, *)
LANES_OPERATOR(F, /)
LANES_OPERATOR(D, +)
LANES_OPERATOR(D, -)
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
#define LANES_COMPARISON(T, op, intrinsic, cast, code)                         \
    HD Mask operator op(T a, T b) {                                            \
        return map<Mask>([](auto x, auto y) INLINED { return x op y; }, a, b); \
    }
#endif
LANES_COMPARISON(F, <, _mm512_cmp_ps_mask, __m512, _CMP_LT_OQ)
LANES_COMPARISON(F, <=, _mm512_cmp_ps_mask, __m512, _CMP_LE_OQ)
LANES_COMPARISON(F, >, _mm512_cmp_ps_mask, __m512, _CMP_GT_OQ)
LANES_COMPARISON(F, ==, _mm512_cmp_ps_mask, __m512, _CMP_EQ_OQ)
LANES_COMPARISON(F, !=, _mm512_cmp_ps_mask, __m512, _CMP_NEQ_UQ)
LANES_COMPARISON(U, <, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_LT)
LANES_COMPARISON(U, >, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_NLE)
LANES_COMPARISON(U, >=, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_NLT)
LANES_COMPARISON(U, ==, _mm512_cmp_epu32_mask, __m512i, _MM_CMPINT_EQ)
#undef LANES_COMPARISON

HD U operator<<(U x, int by) {
    return map<U>([by](auto x) INLINED { return x << by; }, x);
}
HD U operator>>(U x, int by) {
    return map<U>([by](auto x) INLINED { return x >> by; }, x);
}

}  // namespace ENGINE_ISA
}  // namespace engine
