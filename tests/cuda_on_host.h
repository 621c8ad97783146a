// Runs CUDA kernels on a CPU: a block's threads are fibers that take turns and hand over at
// barriers.
//
// What it shows is what the kernels compute: indices, masks, the order of sums.  It knows nothing
// of races that need two threads to run at once.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ thread_local  // all fibers of a block are in one thread
#define __launch_bounds__(...)

namespace cuda_on_host {

struct Barrier {
    int waiting = 0, generation = 0;
};
struct Block {
    std::vector<ucontext_t> fibers;
    std::vector<char> done;
    std::vector<std::vector<char>> stacks;
    std::function<void()> kernel;
    ucontext_t caller;
    int size = 0;
    Barrier all, warps[32];
    alignas(8) unsigned char exchange[1024][8];
};
inline Block block;

}  // namespace cuda_on_host

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx;
alignas(16) inline float shared_memory[1 << 16];
#define shared_room shared_memory  // the one array whose size only the launch knows

namespace cuda_on_host {

// The next fiber's turn.
inline void yield() {
    const int mine = int(threadIdx.x);
    int next = mine;
    do next = (next + 1) % block.size;
    while (block.done[next] && next != mine);
    if (next == mine) return;
    threadIdx.x = unsigned(next);
    swapcontext(&block.fibers[mine], &block.fibers[next]);
}
inline void wait(Barrier& barrier, int size) {
    const int generation = barrier.generation;
    if (++barrier.waiting == size) {
        barrier.waiting = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) yield();
}

inline void thread_main() {
    block.kernel();
    const int mine = int(threadIdx.x);
    block.done[mine] = 1;
    int next = mine;
    for (int i = 0; i < block.size && block.done[next]; ++i) next = (next + 1) % block.size;
    if (block.done[next]) setcontext(&block.caller);
    threadIdx.x = unsigned(next);
    setcontext(&block.fibers[next]);
}

// kernel() for every thread of every block, one block after another.
inline void run(int grid, int threads, std::function<void()> kernel) {
    block.kernel = kernel;
    block.size = threads;
    block.fibers.resize(threads);
    block.stacks.resize(threads);
    for (auto& stack : block.stacks) stack.resize(1 << 17);
    for (int i = 0; i < grid; ++i) {
        block.done.assign(threads, 0);
        blockIdx.x = unsigned(i);
        for (int j = 0; j < threads; ++j) {
            getcontext(&block.fibers[j]);
            block.fibers[j].uc_stack.ss_sp = block.stacks[j].data();
            block.fibers[j].uc_stack.ss_size = block.stacks[j].size();
            block.fibers[j].uc_link = nullptr;
            makecontext(&block.fibers[j], thread_main, 0);
        }
        threadIdx.x = 0;
        swapcontext(&block.caller, &block.fibers[0]);
    }
}

}  // namespace cuda_on_host

inline void __syncthreads() {
    cuda_on_host::wait(cuda_on_host::block.all, cuda_on_host::block.size);
}
// Among all threads of a warp.
template <class T>
T __shfl_xor_sync(unsigned, T x, int apart) {
    auto& block = cuda_on_host::block;
    auto& barrier = block.warps[threadIdx.x / 32];
    memcpy(block.exchange[threadIdx.x], &x, sizeof(T));
    cuda_on_host::wait(barrier, 32);
    memcpy(&x, block.exchange[threadIdx.x ^ unsigned(apart)], sizeof(T));
    cuda_on_host::wait(barrier, 32);
    return x;
}
struct uint2 {
    uint32_t x, y;
};
struct uint4 {
    uint32_t x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
// Four of the eight bytes, chosen by a digit each.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t which) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t word = 0;
    for (int i = 0; i < 4; ++i) word |= uint32_t(bytes >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return word;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __int2float_rn(int x) { return float(x); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
