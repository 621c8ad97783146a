// The CPU's driver: tensors one after another, if they are small or there is one thread; otherwise
// the strips of a few tensors at a time, pass after pass, by whichever thread is free.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "engine/isa.h"

namespace engine {

// Tensors with about this many tiles in total go through their passes together: several, so that a
// thread can do another tensor's tiles while the last ones of one are in progress; few, so that a
// cache holds their gradients from one pass to the next.
constexpr int64_t kWaveTiles = 128;

inline bool begins_strip(const Isa& isa, const Launch& launch, int64_t tile) {
    return launch.tiles[tile].col % (isa.strip_tiles * kTileCols) == 0;
}

// A pass over these tiles, which are whole strips of one tensor.
inline void run_strips(const Isa& isa, Phase pass, const Launch& launch, int64_t tile,
                       int64_t end) {
    for (; tile < end; ++tile)
        if (begins_strip(isa, launch, tile)) isa.run_strip(pass, launch, tile);
}

// How many tiles a thread takes at a time: as many as a full strip has, or fewer if there would be
// too few shares for all threads.
inline int64_t share_of(const Isa& isa, const Launch& launch, int num_threads) {
    return std::clamp<int64_t>(launch.num_tiles / (4 * num_threads), 1, isa.strip_tiles);
}

// The end of the share that begins with this tile: whole strips of one tensor, with at least
// `share` tiles in total if there are that many.
inline int64_t end_of_share(const Isa& isa, const Launch& launch, int64_t tile, int64_t share) {
    const int64_t end = launch.first_tile[launch.tiles[tile].tensor + 1];
    for (; tile < end; --share, ++tile)
        if (share <= 0 && begins_strip(isa, launch, tile)) break;
    return tile;
}

// A thread takes one tensor after another through all phases, while its cache holds it; in a launch
// of small tensors (workspace_per_thread) each thread has its own workspace, which its cache holds
// too.  A phase only
// reads one tensor, so the results are the same as phase by phase.
inline void run_alone(const Isa& isa, const Launch& launch, int num_threads) {
    const int64_t neighbours = std::clamp<int64_t>(launch.num_tensors / (8 * num_threads), 1, 16);
#pragma omp parallel num_threads(num_threads) if (launch.num_tensors > 1 && num_threads > 1)
    {
        Launch own = launch;
        own.workspace += int64_t(omp_get_thread_num()) * launch.workspace_per_thread;
#pragma omp for schedule(dynamic, neighbours)
        for (int64_t i = 0; i < own.num_tensors; ++i) {
            isa.run_tensor(kBegin, own, i);
            for (int pass = kMeasure; pass <= kApply; pass += 2) {
                if (!isa.wants(Phase(pass), own, i)) continue;
                run_strips(isa, Phase(pass), own, own.first_tile[i], own.first_tile[i + 1]);
                isa.run_tensor(Phase(pass + 1), own, i);
            }
        }
    }
}

// Threads walk the same sequence of items, each doing those that it is the first to claim.
class Turns {
   public:
    explicit Turns(std::atomic<int64_t>& taken) : taken_(taken), mine_(taken++) {}

    // Whether the current item is this thread's; done(), called after it, claims the next.
    bool mine() { return at_++ == mine_; }
    void done() { mine_ = taken_++; }

   private:
    std::atomic<int64_t>& taken_;
    int64_t mine_, at_ = 0;
};

// How far a tensor is in its step.
struct alignas(64) Progress {
    std::atomic<int64_t> tiles_left{0};  // of the current pass
    std::atomic<int> phase{-1};          // the last one that is complete

    void wait_for(int wanted) const {
        for (int tries = 0; phase.load(std::memory_order_acquire) < wanted;)
            if (tries < 1000)
                ++tries;
            else
                std::this_thread::yield();
    }
};

// One step of a bucket of large tensors, each of which has tiles.  Threads take shares in order,
// and the thread that completes a pass over a tensor runs the phase after it.  Every tile has sums
// of its own, so the result does not depend on which thread takes which share.  An item only waits
// for earlier ones, so there is always one that does not wait.
inline void run(const Isa& isa, const Launch& launch, int num_threads) {
    if (launch.workspace_per_thread || num_threads == 1) return run_alone(isa, launch, num_threads);
    std::vector<Progress> progress(launch.num_tensors);
    std::atomic<int64_t> taken{0};
    const int64_t share = share_of(isa, launch, num_threads);
    const int64_t wave = std::max<int64_t>(kWaveTiles, 2 * isa.strip_tiles * num_threads);

    // Runs a phase of a whole tensor, once its inputs are complete.  Passes that the tensor does
    // not want are complete with the one before them.
    auto complete = [&](int64_t i, Phase phase) {
        isa.run_tensor(phase, launch, i);
        progress[i].tiles_left = launch.first_tile[i + 1] - launch.first_tile[i];
        int done = phase;
        while (done < kFinish && !isa.wants(Phase(done + 1), launch, i)) done += 2;
        progress[i].phase.store(done, std::memory_order_release);
    };
    auto pass_over = [&](int64_t i, Phase pass, Turns& turns) {
        if (!isa.wants(pass, launch, i)) return;
        for (int64_t tile = launch.first_tile[i], end; tile < launch.first_tile[i + 1];
             tile = end) {
            end = end_of_share(isa, launch, tile, share);
            if (!turns.mine()) continue;
            progress[i].wait_for(pass - 1);
            run_strips(isa, pass, launch, tile, end);
            if ((progress[i].tiles_left -= end - tile) == 0) complete(i, Phase(pass + 1));
            turns.done();
        }
    };
#pragma omp parallel num_threads(num_threads)
    {
        Turns turns(taken);
        for (int64_t first = 0, end; first < launch.num_tensors; first = end) {
            for (end = first + 1; end < launch.num_tensors; ++end)
                if (launch.first_tile[end + 1] - launch.first_tile[first] > wave) break;
            for (int64_t i = first; i < end; ++i)
                if (turns.mine()) {
                    complete(i, kBegin);
                    turns.done();
                }
            for (int64_t i = first; i < end; ++i) progress[i].wait_for(kBegin);
            for (int pass = kMeasure; pass <= kApply; pass += 2)
                for (int64_t i = first; i < end; ++i) pass_over(i, Phase(pass), turns);
        }
    }
}

// The sum of squares of a bucket's gradients, for a norm over all of them.
inline double grad_sq(const Isa& isa, const Launch& launch, int num_threads) {
    std::atomic<int64_t> taken{0};
    const int64_t share = share_of(isa, launch, num_threads);
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
        Turns turns(taken);
        for (int64_t tile = 0, next; tile < launch.num_tiles; tile = next) {
            next = end_of_share(isa, launch, tile, share);
            if (!turns.mine()) continue;
            run_strips(isa, kMeasureAlone, launch, tile, next);
            turns.done();
        }
    }
    double sum = 0;
    for (int64_t i = 0; i < launch.num_tiles; ++i) sum += launch.sums[i].grad_sq;
    return sum;
}

// Runs `count` items of a step of a portion of projections, on whichever thread is free.
inline void project(const Isa& isa, ProjectionStep step, const Projections& launch, int64_t count,
                    int num_threads) {
#pragma omp parallel num_threads(num_threads) if (count > 1 && num_threads > 1)
    {
        std::vector<float> room;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            float* panel = nullptr;
            if (step == kProject) {  // aligned to a cache line
                const Projection& t = launch.tensors[launch.channels[i].tensor];
                const size_t size = size_t(t.width) * kChannels + 16;
                if (room.size() < size) room.resize(size);
                panel = room.data() + (64 - uint64_t(room.data()) % 64) / 4;
            }
            isa.run_projection(step, launch, i, panel);
        }
    }
}

}  // namespace engine
