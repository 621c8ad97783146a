// APOLLO on a GPU, besides the matrix products and the engine's own steps: P is drawn, P G is
// checked (or computed, if it has few rows), and the lengths of its channels are compared with
// those of the step computed from it.
//
// A block has kChannels neighbouring channels of one tensor: if memory runs along the channels, its
// lanes are the channels and its warps share the other dimension.  Sums are taken in a fixed order.
#pragma once

#include "engine/projected.h"

namespace engine {
namespace ENGINE_ISA {
namespace projected {

constexpr int kWarps = 8;  // of a block
constexpr int kThreads = 32 * kWarps;
// Elements of P are at least 2^-8 if they are not 0, so an element of G that is too large to be
// used (2^48) adds at least 2^40 to a row of P G.  To go undetected it must be cancelled by others
// to one part in 2^8, in every one of more than kWarps rows.
constexpr float kLargestProduct = 0x1p32f;

HD int lane_of_warp() { return int(threadIdx.x) % 32; }
HD int warp_of_block() { return int(threadIdx.x) / 32; }
// One bit of each lane.
HD uint32_t bits_of_warp(bool mine) {
    uint32_t bits = uint32_t(mine) << lane_of_warp();
    UNROLLED for (int apart = 16; apart > 0; apart /= 2) bits |=
        __shfl_xor_sync(0xFFFFFFFFu, bits, apart);
    return bits;
}
template <class T>
HD T sum_of_warp(T x) {
    UNROLLED for (int apart = 16; apart > 0; apart /= 2) x =
        x + __shfl_xor_sync(0xFFFFFFFFu, x, apart);
    return x;
}

// A pack's first lane, where only that one is needed: the compiler leaves out the others.
HD float first_lane(F x) { return x.r[0]; }
HD uint32_t first_lane(U x) { return x.r[0]; }

template <int32_t kDtype>
HD float element(const void* from, int64_t at) {
    if (kDtype == kFloat32) return static_cast<const float*>(from)[at];
    const uint16_t half = static_cast<const uint16_t*>(from)[at];
    return kDtype == kBFloat16 ? float_of_bf16(half) : first_lane(from_fp16(U(uint32_t(half))));
}
// x is exact in bf16.
template <int32_t kDtype>
HD void put_element(void* to, int64_t at, float x) {
    if (kDtype == kFloat32) {
        static_cast<float*>(to)[at] = x;
    } else {
        const uint32_t half =
            kDtype == kBFloat16 ? bits_of_float(x) >> 16 : first_lane(to_fp16(F(x)));
        static_cast<uint16_t*>(to)[at] = uint16_t(half);
    }
}

// False for NaN.
HD bool within(float x, float limit) { return x <= limit && x >= -limit; }

// An element of a gradient, 0 if it is not usable; `some` becomes true if it is.
template <int32_t kDtype>
HD float usable_element(const void* grad, int64_t at, bool& some) {
    const float g = element<kDtype>(grad, at);
    const bool ok = within(g, kLargestGrad);
    some |= ok;
    return ok ? g : 0.f;
}

// An element of P G, NaN in a channel without a usable element.
HD float product(float sum, bool some) { return some ? sum : __uint_as_float(0x7FC00000u); }

// Draws P for the next step.
template <int32_t kDtype, bool kSigns>
__global__ __launch_bounds__(kThreads, 1) void draw_kernel(const Projections* launch) {
    const Part part = launch->draws[blockIdx.x];
    const Projection& t = launch->tensors[part.tensor];
    const uint64_t key = key_of(t);
    const int64_t first = int64_t(part.number) * kDraws, count = t.rank * t.width;
    const int64_t row = first / t.width;
    void* const to = t.p;
    const uint32_t width = uint32_t(t.width), col = uint32_t(first - row * t.width);
    for (int i = int(threadIdx.x); i < kDraws && first + i < count; i += kThreads) {
        const uint32_t at = col + uint32_t(i);
        const float x = kSigns
                            ? first_lane(signs(key, uint64_t(row + at / width), at % width, width))
                            : first_lane(normals(key, first + i));
        put_element<kDtype>(to, first + i, x);
    }
}

// P G in a channel that has unusable elements, from the usable ones.
template <int32_t kDtype>
HD void project_again(const Projection& t, const void* grad, int64_t channel) {
    const int64_t apart = t.tall ? 1 : t.length, first = t.tall ? channel * t.width : channel;
    bool some = true;  // until the first row has found that there is none
    for (int64_t row = warp_of_block(); row < t.rank; row += kWarps) {
        float sum = 0.f;
        bool found = false;
        for (int64_t d = lane_of_warp(); some && d < t.width; d += 32) {
            const float g = usable_element<kDtype>(grad, first + d * apart, found);
            sum = __fmaf_rn(element<kDtype>(t.p, row * t.width + d), g, sum);
        }
        sum = sum_of_warp(sum);
        some = bits_of_warp(found) != 0;
        if (lane_of_warp() == 0) t.low[row * t.length + channel] = product(sum, some);
    }
}

// Repairs P G from a library, which ignores usability: with an unusable element it is very large or
// not finite, and is computed again.
template <int32_t kDtype>
__global__ __launch_bounds__(kThreads, 1) void mend_kernel(const Projections* launch) {
    __shared__ uint32_t of_warps[kWarps];
    const Part part = launch->channels[blockIdx.x];
    const Projection& t = launch->tensors[part.tensor];
    const int64_t first = int64_t(part.number) * kChannels, channel = first + lane_of_warp();
    bool ordinary = true;
    if (channel < t.length) {
        _Pragma("unroll 4") for (int64_t row = warp_of_block(); row < t.rank; row += kWarps)
            ordinary &= within(t.low[row * t.length + channel], kLargestProduct);
    }
    const uint32_t odd = bits_of_warp(!ordinary);
    if (lane_of_warp() == 0) of_warps[warp_of_block()] = odd;
    __syncthreads();
    uint32_t suspects = 0;
    UNROLLED for (int warp = 0; warp < kWarps; ++warp) suspects |= of_warps[warp];
    const void* grad = reinterpret_cast<const void*>(launch->grads[part.tensor]);
    for (int i = 0; i < kChannels; ++i)
        if (suspects >> i & 1u) project_again<kDtype>(t, grad, first + i);
}

// P G of at most kRows rows, with one read of G; here memory runs along the channels.
template <int32_t kDtype, int kRows>
HD void project_along(const Projection& t, const void* grad, int64_t first) {
    __shared__ float sums_of_warps[kWarps][kRows][kChannels];
    __shared__ uint32_t some_of_warps[kWarps];
    const int lane = lane_of_warp(), warp = warp_of_block();
    const int64_t channel = first + lane;
    float sums[kRows] = {};
    bool some = false;
    if (channel < t.length) {
        _Pragma("unroll 4") for (int64_t d = warp; d < t.width; d += kWarps) {
            const float g = usable_element<kDtype>(grad, d * t.length + channel, some);
            UNROLLED for (int row = 0; row < kRows; ++row) if (row < t.rank) sums[row] =
                __fmaf_rn(element<kDtype>(t.p, row * t.width + d), g, sums[row]);
        }
    }
    UNROLLED for (int row = 0; row < kRows; ++row) sums_of_warps[warp][row][lane] = sums[row];
    const uint32_t usable = bits_of_warp(some);
    if (lane == 0) some_of_warps[warp] = usable;
    __syncthreads();
    if (warp >= t.rank || channel >= t.length) return;
    float sum = 0.f;  // of this warp's row
    uint32_t usables = 0;
    UNROLLED for (int other = 0; other < kWarps; ++other) {
        sum = sum + sums_of_warps[other][warp][lane];
        usables |= some_of_warps[other];
    }
    t.low[warp * t.length + channel] = product(sum, (usables >> lane & 1u) != 0);
}

// The same, if memory runs across the channels.
template <int32_t kDtype, int kRows>
HD void project_across(const Projection& t, const void* grad, int64_t first) {
    constexpr int kOwn = kChannels / kWarps;
    const int64_t own = first + warp_of_block() * kOwn;
    float sums[kRows][kOwn] = {};
    bool some[kOwn] = {};
    _Pragma("unroll 2") for (int64_t d = lane_of_warp(); d < t.width; d += 32) {
        float g[kOwn];
        UNROLLED for (int i = 0; i < kOwn; ++i) g[i] =
            own + i < t.length ? usable_element<kDtype>(grad, (own + i) * t.width + d, some[i])
                               : 0.f;
        UNROLLED for (int row = 0; row < kRows; ++row) if (row < t.rank) {
            const float p = element<kDtype>(t.p, row * t.width + d);
            UNROLLED for (int i = 0; i < kOwn; ++i) sums[row][i] = __fmaf_rn(p, g[i], sums[row][i]);
        }
    }
    UNROLLED for (int i = 0; i < kOwn; ++i) {
        const bool usable = bits_of_warp(some[i]) != 0;
        UNROLLED for (int row = 0; row < kRows; ++row) if (row < t.rank) {
            const float sum = sum_of_warp(sums[row][i]);
            if (lane_of_warp() == 0 && own + i < t.length)
                t.low[row * t.length + own + i] = product(sum, usable);
        }
    }
}

// The 2 is the number of blocks that a multiprocessor holds, whose loads overlap.
template <int32_t kDtype, int kRows>
__global__ __launch_bounds__(kThreads, 2) void few_kernel(const Projections* launch) {
    static_assert(kRows <= kWarps, "a warp sums a row");
    const Part part = launch->channels[blockIdx.x];
    const Projection& t = launch->tensors[part.tensor];
    const void* grad = reinterpret_cast<const void*>(launch->grads[part.tensor]);
    const int64_t first = int64_t(part.number) * kChannels;
    if (t.tall) return project_across<kDtype, kRows>(t, grad, first);
    project_along<kDtype, kRows>(t, grad, first);
}

// The factors of channels; or, for a tensor with a single factor, the sums of its parts.
template <bool kPerTensor>
__global__ __launch_bounds__(kThreads, 1) void lengths_kernel(const Projections* launch) {
    __shared__ double of_warps[kWarps][2][kChannels];
    const Part part = launch->channels[blockIdx.x];
    const Projection& t = launch->tensors[part.tensor];
    const int lane = lane_of_warp(), warp = warp_of_block();
    const int64_t channel = int64_t(part.number) * kChannels + lane;
    double step_sq = 0, low_sq = 0;
    if (channel < t.length) {
        _Pragma("unroll 4") for (int64_t row = warp; row < t.rank; row += kWarps) {
            const double step = t.step[row * t.length + channel];
            const float x = t.low[row * t.length + channel];
            const double low = x == x ? x : 0.f;
            step_sq += step * step;
            low_sq += low * low;
        }
    }
    of_warps[warp][0][lane] = step_sq;
    of_warps[warp][1][lane] = low_sq;
    __syncthreads();
    if (warp != 0) return;
    step_sq = low_sq = 0;
    UNROLLED for (int other = 0; other < kWarps; ++other) {
        step_sq += of_warps[other][0][lane];
        low_sq += of_warps[other][1][lane];
    }
    if (!kPerTensor) {
        if (channel < t.length) t.factors[channel] = ratio(step_sq, low_sq, t.gain);
        return;
    }
    step_sq = sum_of_warp(step_sq);
    low_sq = sum_of_warp(low_sq);
    double* sums = launch->sums + 2 * (t.first_part + part.number);
    if (lane == 0) sums[0] = step_sq, sums[1] = low_sq;
}

// The one factor of each tensor, a block for each.  (A template, so that it is compiled only where
// its name is asked for.)
template <int = 0>
__global__ __launch_bounds__(kThreads, 1) void whole_kernel(const Projections* launch) {
    const Projection& t = launch->tensors[blockIdx.x];
    const double* sums = launch->sums + 2 * t.first_part;
    const int64_t parts = (t.length + kChannels - 1) / kChannels;
    double step_sq = 0, low_sq = 0;  // the same in every warp
    for (int64_t part = lane_of_warp(); part < parts; part += 32) {
        step_sq += sums[2 * part];
        low_sq += sums[2 * part + 1];
    }
    const float x = ratio(sum_of_warp(step_sq), sum_of_warp(low_sq), t.gain);
    for (int64_t i = threadIdx.x; i < t.length; i += kThreads) t.factors[i] = x;
}

}  // namespace projected
}  // namespace ENGINE_ISA
}  // namespace engine
