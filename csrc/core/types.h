// The plain data that Python, host and device share.
//
// optim/plan.py mirrors these structs with ctypes, and optim/compiled.py compares sizes when it
// loads the module; pointers are passed as 64-bit integers.  Nothing here owns memory.
#pragma once

#if defined(__CUDACC_RTC__)  // has no headers
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

namespace engine {

// A tile is the unit of work: at most kTileRows rows by kTileCols columns of a parameter's matrix
// view, read row by row in spans of at most kTileCols elements.  The numbers are part of the result
// (they fix the order of every sum), so they are the same for every instruction set and device.
constexpr int kTileRows = 64;
constexpr int kTileCols = 512;
constexpr int kPartials = kTileRows + kTileCols;  // sums of a factored moment in a tile
constexpr int kVectorPad = 32;  // row and column vectors in the workspace are padded to this

enum Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum CodecId : int32_t {
    kAbsent = 0,
    kDense = 1,         // parts: fp32
    kBf16 = 2,          // parts: bf16
    kSignedFloat8 = 3,  // parts: codes, top
    kFloat8 = 4,        // parts: codes, top
    kFactored = 5,      // parts: row, col, row_top, col_top (tops null: row and col are fp32)
    kFactoredSign = 6,  // parts: row, col, -, -, sign
    kGiven = 7,         // parts: row or col: fp32 factors that are only read
};

// Which moment a slot holds; kSquare is also Sophia's curvature, kSlow CAME's instability.
enum SlotId : int { kFast = 0, kSlow = 1, kSquare = 2, kSlots = 3 };

enum Flag : int64_t {
    kNesterov = 1 << 0,
    kAtan2 = 1 << 1,
    kGrams = 1 << 2,
    kCautious = 1 << 3,
    kCautiousDecay = 1 << 4,
    kOrthograd = 1 << 5,
    kGradClip = 1 << 6,     // clip each tensor's gradient to Options::grad_clip
    kGrowthLimit = 1 << 7,  // Fira's limiter
    kClipExact = 1 << 8,    // Adafactor's RMS clip, by this step's RMS
    kClipLagged = 1 << 9,   // ... by the previous step's
    kRelativeStep = 1 << 10,
    kScaleParameter = 1 << 11,
    kFixedBeta2 = 1 << 12,   // beta2 is given and bias-corrected; otherwise 1 - t^beta2_decay
    kStochastic = 1 << 13,   // bf16 weights are rounded stochastically
    kFirstMoment = 1 << 14,  // Adafactor keeps one
    kSlowMoment = 1 << 15,   // AdEMAMix
    kSafeguardWarmup = 1 << 16,
    kBiasCorrection = 1 << 17,  // Prodigy's choice
    kGrowthSettled = 1 << 18,   // Fira's limiter on what a rule makes of its clipped update
};

// The options of one parameter group, as numbers.
struct Options {
    double lr, weight_decay;
    double beta1, beta2, beta3;  // beta1 is SGD's momentum
    double beta2_decay;
    double eps, eps_scale;  // eps_scale: floor of RMS(w) for kScaleParameter; CAME's second eps
    double alpha, warmup_steps;
    double grad_clip, growth_limit, clip_threshold;
    double rho;          // Sophia's
    double d0;           // Prodigy's; its beta3 decays sums
    double coefficient;  // of every gradient, from global clipping
    int64_t flags;
    uint64_t seed;
    int64_t slice;      // Prodigy samples every slice'th element
    uint64_t distance;  // Prodigy's d, fp64
};

// How one moment of one parameter is stored.
struct Moment {
    int32_t codec;
    int32_t salt;  // of its rounding, whose key is the step's
    uint64_t parts[5];
    int64_t vectors;   // factored: offset of its decoded row and column in its tensor's vectors
    int64_t partials;  // factored: offset of its row and column sums in a tile's partials
};

// Prodigy's state for every Options::slice'th element of a parameter, in memory order.
struct Samples {
    uint64_t start;                   // the weights before the first step, in their dtype
    Moment sum;                       // of gradients: fp32 or bf16
    uint64_t numerator, denominator;  // of d: this parameter's shares, fp64 each
    uint64_t weight_sum;              // Schedule-Free's: of its average, fp64, or null
};

// One parameter: the addresses, dtypes and shape of its data.
struct Tensor {
    uint64_t weight, grad, compensation;
    uint64_t step, nonfinite;          // int64 each
    uint64_t update_norm, update_rms;  // fp32 each, or null
    int32_t weight_dtype, grad_dtype;
    int64_t numel, rows, cols;  // the matrix view; rows * cols >= numel
    int64_t index;              // of the parameter in the optimizer: seeds its rounding
    int64_t group;              // which Options
    Moment moments[kSlots];
    Samples samples;
};

// The work list of a bucket.
struct Tile {
    int32_t tensor;  // position in the bucket
    int32_t row, col;
    int32_t unused;
    int64_t partials;  // offset of its row and column sums in the workspace
};

// What one tile adds to its tensor's sums.
struct TileSums {
    double grad_sq, weight_grad, weight_sq;
    double update_sq;
    int64_t aligned, nonfinite;
    double progress, distance;  // of samples: <g, start - w> and |sum of gradients|_1
};

// The scalars of a tensor's step, derived from its Options and its step count; written in the
// phases of the whole tensor, read by every tile.
struct Hyper {
    int64_t t, flags;
    uint64_t key;                     // of this step's rounding
    double beta2, inv_bias2;          // Adafactor's, of this step
    float weight1, weight2, weight3;  // 1 - beta
    float momentum, eps, alpha, limit;
    float curvature;  // Sophia's: its factor
    // The factors of an update; the table in engine/tile.h says who sets them and where they are.
    float atan2_numerator_scale;  // Adam's, with kAtan2
    float square_scale;           // Adafactor's, of a vector's second moment
    float direction_scale;
    float settled_scale;
    float update_scale;           // growth limiter and RMS clip
    float growth_scale;           // growth limiter alone
    float coefficient;            // of the gradient
    float step_weight, pull;      // Schedule-Free's: of the update, and of the gap in it
    float gap_decay, gap_weight;  // of the gap, and of the update in it
    float step_decay;             // of the weight in the update
    float rho, rho_low;           // orthograd: g - (rho + rho_low) w
    float cautious_scale;
    float lr;         // including relative step and parameter scale
    float decay;      // lr * weight_decay, without them
    int32_t passive;  // the weights do not change in this step
    float d;          // Prodigy's: factor of the gradient
    float sum_decay, sum_weight;
    int32_t learns;  // lr > 0: the sums for d are updated
    double progress_weight;
    double weight_sum;  // Schedule-Free's: of its average, before the step, then after it
};

// The phases of a step, in order: passes over tiles, from kMeasure to kApply, alternate with phases
// of whole tensors.
enum Phase : int {
    kBegin,
    kMeasure,
    kAfterMeasure,
    kFactor,
    kAfterFactor,
    kNorm,
    kAfterNorm,
    kResidual,
    kAfterResidual,
    kLimit,
    kAfterLimit,
    kAlign,
    kAfterAlign,
    kApply,
    kFinish,
    kMeasureAlone  // not a phase of a step: measure all gradients unconditionally
};

// One launch: a bucket of tensors through all phases.
struct Launch {
    const Options* options;
    Tensor* tensors;            // all of the optimizer's
    const int32_t* members;     // (num_tensors) indices into `tensors`
    const Tile* tiles;          // (num_tiles), in tensor, row, column order
    const int64_t* first_tile;  // (num_tensors + 1)
    const int64_t* vectors;     // (num_tensors) offsets of their vectors in the workspace
    Hyper* hypers;              // (num_tensors)
    TileSums* sums;             // (num_tiles)
    float* workspace;           // vectors and partials
    int64_t num_tensors, num_tiles;
    int32_t rule;  // its number in rules/all.h
    // Floats of each thread's workspace, if it takes one tensor after another through all phases.
    // 0: all of the bucket's tensors share one workspace.
    int32_t workspace_per_thread;
};

}  // namespace engine
