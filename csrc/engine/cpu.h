// The CPU's driver: tensors one after another, where they are small or there is one thread; else
// phases one after another, tensors or tiles of a phase side by side.
#pragma once

#include <omp.h>

#include "engine/isa.h"

namespace engine {

// How many neighbours of `count` a thread takes at a time.
inline int64_t stretch_of(int64_t count, int num_threads) {
    const int64_t share = count / (8 * num_threads);
    return share < 1 ? 1 : share < 16 ? share : 16;
}

// A thread takes one tensor after another through all phases, while its cache holds it; in a
// workspace of its own, which its cache holds too, where the launch is of small tensors.  A phase
// looks at one tensor only, so the results are those of phases one after another.
inline void run_alone(const Isa& isa, const Launch& launch, int num_threads) {
    const int64_t stretch = stretch_of(launch.num_tensors, num_threads);
#pragma omp parallel num_threads(num_threads) if (launch.num_tensors > 1 && num_threads > 1)
    {
        Launch own = launch;
        own.workspace += int64_t(omp_get_thread_num()) * launch.alone;
#pragma omp for schedule(dynamic, stretch)
        for (int64_t i = 0; i < own.num_tensors; ++i) {
            isa.run_tensor(kBegin, own, i);
            for (int phase = kMeasure; phase <= kApply; phase += 2) {
                for (int64_t tile = own.first_tile[i]; tile < own.first_tile[i + 1]; ++tile)
                    isa.run_strip(Phase(phase), own, tile);
                isa.run_tensor(Phase(phase + 1), own, i);
            }
        }
    }
}

// One step of a bucket.  Threads take tiles as they come, each with the strip that it begins, if it
// begins one; every tile has sums of its own, so the result does not depend on who takes which.
inline void run(const Isa& isa, const Launch& launch, int num_threads) {
    if (launch.alone || num_threads == 1) return run_alone(isa, launch, num_threads);
    auto tensors = [&](Phase phase) {
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(num_threads) if (launch.num_tensors > 1 && num_threads > 1)
        for (int64_t i = 0; i < launch.num_tensors; ++i) isa.run_tensor(phase, launch, i);
    };
    // A stretch of neighbours to each thread: their rows of signs share cache lines, which two
    // threads side by side would take from each other at every row.
    const int64_t stretch = stretch_of(launch.num_tiles, num_threads);
    auto tiles = [&](Phase phase) {
#pragma omp parallel for schedule(dynamic, stretch) \
    num_threads(num_threads) if (launch.num_tiles > 1 && num_threads > 1)
        for (int64_t i = 0; i < launch.num_tiles; ++i) isa.run_strip(phase, launch, i);
    };
    tensors(kBegin);
    for (int phase = kMeasure; phase <= kApply; phase += 2) {
        if (!isa.wanted(Phase(phase), launch)) continue;
        tiles(Phase(phase));
        tensors(Phase(phase + 1));
    }
}

// The sum of squares of a bucket's gradients, for a norm over all of them.
inline double grad_sq(const Isa& isa, const Launch& launch, int num_threads) {
#pragma omp parallel for schedule(dynamic, 1) \
    num_threads(num_threads) if (launch.num_tiles > 1 && num_threads > 1)
    for (int64_t i = 0; i < launch.num_tiles; ++i) isa.run_strip(kMeasureAlone, launch, i);
    double sum = 0;
    for (int64_t i = 0; i < launch.num_tiles; ++i) sum += launch.sums[i].grad_sq;
    return sum;
}

}  // namespace engine
