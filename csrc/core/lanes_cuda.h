// The lane type of a GPU: one float, for every thread is a lane.
//
// Each function gives the bits that core/lanes_cpu.h gives in each of its lanes.  Quotients and
// square roots are IEEE's as long as nobody asks the compiler for fast ones; optim/gpu.py does
// not, and forbids contraction.  Loads and stores take n = 1 where the element exists and 0 where
// it does not, which reads as zero.
#pragma once

#include "core/types.h"

#define HD __device__ __forceinline__
#define INLINED
#define HD_CALL __device__ __forceinline__
#define UNROLLED _Pragma("unroll")

namespace engine {
namespace ENGINE_ISA {

constexpr int kLanes = 1;

using F = float;
using U = uint32_t;
using D = double;
using Mask = bool;

HD U as_bits(F x) { return __float_as_uint(x); }
HD F as_float(U bits) { return __uint_as_float(bits); }
HD float float_of_bf16(uint16_t x) { return as_float(uint32_t(x) << 16); }
HD uint32_t bits_of_float(float x) { return __float_as_uint(x); }

HD F select(Mask mask, F yes, F no) { return mask ? yes : no; }
HD U select(Mask mask, U yes, U no) { return mask ? yes : no; }
HD F only(Mask mask, F x) { return mask ? x : 0.f; }
HD U only(Mask mask, U x) { return mask ? x : 0u; }

HD F fma(F a, F b, F c) { return __fmaf_rn(a, b, c); }
HD F sqrt(F x) { return __fsqrt_rn(x); }
HD F min(F a, F b) { return a < b ? a : b; }
HD F max(F a, F b) { return a > b ? a : b; }
HD U min(U a, U b) { return a < b ? a : b; }
HD U max(U a, U b) { return a > b ? a : b; }
HD F to_float(U x) { return __int2float_rn(int(x)); }
HD U round_to_int(F x) { return U(__float2int_rn(x)); }
HD U shifted_down(U x, int by) { return U(int(x) >> by); }

HD uint32_t bits_of(Mask mask) { return mask; }
HD F flipped(F x, uint32_t bits) { return as_float(as_bits(x) ^ (bits << 31)); }
HD bool all(Mask mask) { return mask; }
HD bool any(U x, uint32_t bits) { return (x & bits) != 0; }
HD int count(Mask mask) { return mask; }
HD U lane_index() { return 0; }
HD D widen(F x) { return x; }

HD F load_f32(const float* from, int n) { return n ? *from : 0.f; }
HD void store_f32(float* to, F x, int n) {
    if (n) *to = x;
}
template <class T>
HD U load_uint(const T* from, int n) {
    return n ? U(*from) : 0u;
}
template <class T>
HD void store_uint(T* to, U x, int n) {
    if (n) *to = T(x);
}
HD U load_upper(const uint16_t* from, int n) { return load_uint(from, n) << 16; }
HD void store_upper(uint16_t* to, U x, int n) { store_uint(to, x >> 16, n); }
HD F load_s8(const int8_t* from, int n) { return n ? F(*from) : 0.f; }
HD void store_s8(int8_t* to, U x, int n) {
    if (n) *to = int8_t(x);
}
HD void store_saturated(uint8_t* to, U x, int n) { store_uint(to, min(x, 255u), n); }

// A row's gradients are looked at one by one.
HD bool any_beyond(const uint16_t*, int, int16_t) { return true; }

}  // namespace ENGINE_ISA
}  // namespace engine
