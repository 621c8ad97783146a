// APOLLO's projections: the data of a launch.  optim/plan.py mirrors these structs.
#pragma once

#include "core/types.h"

namespace engine {

// One tensor whose gradient G is (width, length), the smaller dimension first.
struct Projection {
    void* p;         // (rank, width), Projections::p_dtype: the draws, not divided by sqrt(rank)
    float* low;      // (rank, length): P G
    float* step;     // (rank, length): the optimizer's step for it
    float* factors;  // (length)
    const int64_t* count;  // of steps so far
    uint64_t seed;
    int64_t index, update_gap;
    int64_t rank, width, length;
    int64_t first_part;  // of its channels
    float gain;
    int32_t tall;  // whether memory holds G^T
};

// A unit of work, the number'th part of a tensor: kDraws elements of its P, or kChannels of its
// channels.
struct Part {
    int32_t tensor, number;
};

// One launch: a portion of tensors.
struct Projections {
    const Projection* tensors;
    const uint64_t* grads;  // the addresses of their gradients
    const Part *draws, *channels;
    double* sums;  // (parts of channels, 2): sums of squares, of the step and of P G
    int32_t grad_dtype, p_dtype;
    int32_t signs;       // whether P consists of signs
    int32_t per_tensor;  // whether a tensor has one factor, instead of one for each channel
};

static_assert(sizeof(Projection) == 104 && sizeof(Part) == 8 && sizeof(Projections) == 56,
              "optim/plan.py has other structs");

constexpr int kChannels = 32;
constexpr int kDraws = 8192;  // the key is computed once for all of them

// The steps of a portion, in order; the optimizer steps P G before kLengths.
enum ProjectionStep : int {
    kDraw = 0,     // P, a part of `draws` at a time
    kProject = 1,  // P G, a part of `channels` at a time
    kLengths = 2,  // the factors of channels, or their Projections::sums
    kWhole = 3,    // if per_tensor: the one factor of each tensor, a tensor at a time
};

}  // namespace engine
