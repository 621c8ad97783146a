// Arithmetic on lanes: the same bits on every machine.
//
// Multiply-adds are written fma and the compilers are told not to contract anything else; square
// roots and quotients are IEEE's; there is no call to a math library on tensor elements.
#pragma once

#include "core/lanes.h"

namespace engine {
namespace ENGINE_ISA {

// The largest usable gradient: the squares of 2^31 such elements still have a finite fp32 sum.
constexpr float kLargestGrad = 281474976710656.f;  // 2^48
constexpr int16_t kLargestGradBf16 = 0x5780;

HD F clamp(F x, float limit) { return max(min(x, F(limit)), F(-limit)); }

// magnitude >= 0 with the sign bit of `from`.
HD F with_sign(F magnitude, F from) {
    return as_float(as_bits(magnitude) | (as_bits(from) & U(0x80000000u)));
}
HD F sign(F x) { return select(x == F(0.f), F(0.f), with_sign(F(1.f), x)); }

// An integer comparison: the loops that make it for every vector have no float register to spare.
HD bool below_half(float weight) { return bits_of_float(weight) < bits_of_float(0.5f); }

// a + weight (b - a), 0 <= weight <= 1.
HD F lerp(F a, F b, float weight) {
    return below_half(weight) ? fma(F(weight), b - a, a) : fma(F(weight - 1.f), b - a, b);
}

// atan2(y, x) for x >= 0, within 2 ulp; atan2(0, 0) = 0.
//
// atan(q) / q on [0, 1] as a polynomial in q^2 (minimax of degree 8 by the Remez exchange, relative
// error 1.7e-8); above the diagonal atan2(y, x) = pi/2 - atan(x / y).
HD F atan2(F y, F x) {
    F height = abs(y);
    Mask steep = height > x;
    F over = select(steep, x, height), under = select(steep, height, x);
    F q = over / select(under == F(0.f), F(1.f), under), z = q * q;
    F p = F(0x1.7ed248p-9f);
    p = fma(p, z, F(-0x1.0c2c1ep-6f));
    p = fma(p, z, F(0x1.61fde2p-5f));
    p = fma(p, z, F(-0x1.3556b8p-4f));
    p = fma(p, z, F(0x1.b4e12cp-4f));
    p = fma(p, z, F(-0x1.230adcp-3f));
    p = fma(p, z, F(0x1.9978f4p-3f));
    p = fma(p, z, F(-0x1.5554dcp-2f));
    F angle = fma(p * z, q, q);
    angle = select(steep, F(1.57079637f) - angle, angle);
    return with_sign(angle, y);
}

// fp16 <-> fp32, exact and to nearest even, subnormals, infinities and NaN included.  A pack holds
// a half in the low 16 bits of a lane.
HD F from_fp16(U half) {
    U magnitude = (half & U(0x7FFFu)) << 13;
    U normal = magnitude + U(112u << 23);                          // moves the exponent's bias
    F small = as_float(magnitude | U(0x38800000u)) - F(0x1p-14f);  // no subnormal on the way
    U special = magnitude | U(0x7F800000u);
    U result = select(magnitude < U(0x00800000u), as_bits(small), normal);
    result = select(magnitude >= U(0x0F800000u), special, result);
    return as_float(result | ((half & U(0x8000u)) << 16));
}
HD U to_fp16(F x) {
    U sign = (as_bits(x) >> 16) & U(0x8000u), magnitude = as_bits(x) & U(0x7FFFFFFFu);
    U normal = (magnitude + U(0xFFFu) + ((magnitude >> 13) & U(1u)) - U(112u << 23)) >> 13;
    U small = as_bits(as_float(magnitude) + F(0.5f)) - U(0x3F000000u);  // ulp(0.5) is fp16's least
    U result = select(magnitude < U(0x38800000u), small, normal);
    result = select(magnitude >= U(0x477FF000u), U(0x7C00u), result);
    return select(magnitude > U(0x7F800000u), U(0x7E00u), result) | sign;
}

HD F from_bf16(U x) { return as_float(x << 16); }
HD F load_bf16(const uint16_t* from, int n) { return as_float(load_upper(from, n)); }

// fp32 -> bf16, to nearest even.
HD U to_bf16(F x) {
    U bits = as_bits(x);
    U rounded = bits + U(0x7FFFu) + ((bits >> 16) & U(1u));
    return select((bits & U(0x7FFFFFFFu)) > U(0x7F800000u), bits | U(0x400000u), rounded) >> 16;
}

// fp32 -> bf16, up with probability (distance to the lower neighbour) / (spacing); draws are 16
// bits. Infinities and NaN stay, and no finite value becomes infinite.
//
// The lower halves of the result must be dropped.
HD U rounded_bf16(F x, U draws) {
    U rounded = as_bits(x) + draws;
    if (RARELY(any(as_bits(x), 0x40000000u))) {   // |x| >= 2: check more closely
        Mask ordinary = abs(x) < F(0x1.fep127f);  // one bf16 below the last finite one
        U quiet = select(x == x, as_bits(x), as_bits(x) | U(0x400000u));
        rounded = select(ordinary, rounded, quiet);
    }
    return rounded;
}
HD U to_bf16(F x, U draws) { return rounded_bf16(x, draws) >> 16; }
HD void store_bf16(uint16_t* to, F x, U draws, int n) {
    store_upper(to, rounded_bf16(x, draws), n);
}

}  // namespace ENGINE_ISA
}  // namespace engine
