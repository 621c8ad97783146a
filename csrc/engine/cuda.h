// The kernels of a GPU.  NVRTC compiles those that a run needs (optim/gpu.py), named by templates.
//
// A bucket holds tensors of one kind: the same rule, codecs, dtypes and flags.  So these are
// constants here, and what a run does not use is not in its kernels.
#pragma once

#define ENGINE_CUDA
#define ENGINE_ISA cuda
#include "core/types.h"
#include "engine/projected.h"
#include "engine/tensor.h"
#include "engine/tile.h"

namespace engine {
namespace cuda {

// optim/plan.py mirrors these.
static_assert(sizeof(Options) == 160 && sizeof(Tensor) == 384 && sizeof(Launch) == 96 &&
                  sizeof(Hyper) == 152 && sizeof(TileSums) == 64,
              "optim/plan.py has other structs");

// A moment whose row is loaded at once and stored at once, so that a thread's eight elements are
// under way together.
template <class SlotT, bool kStored>
struct Staged {
    SlotT slot;
    F values[Exec::kSpan];

    HD Staged(const Place& p, SlotId id, SlotScratch& s) : slot(p, id, s) {}
    HD void begin_roots() { slot.begin_roots(); }
    HD void begin() {
        if (kStored) slot.begin();
    }
    HD void begin_row(int64_t row, int width) {
        slot.begin_row(row, width);
        Exec::each(width, [&](int i, int col, int n) { values[i] = slot.load(i, col, n); });
    }
    HD F load(int i, int, int) { return values[i]; }
    HD F root(int i, F x) { return slot.root(i, x); }
    HD void store(int i, int, int, F x) { values[i] = x; }
    HD void end_row(int64_t row, int width) {
        if (!kStored) return;
        Exec::each(width, [&](int i, int col, int n) { slot.store(i, col, n, values[i]); });
        slot.end_row(row, width);
    }
    HD void end() {
        if (kStored) slot.end();
    }
};
template <bool kStored>
struct Staged<NoSlot, kStored> : NoSlot {
    using NoSlot::NoSlot;
};

// Gradients and weights of a known dtype and rounding.
template <int32_t kDtype>
struct GradOf : AnyGrad {
    HD GradOf(const Place& p, F* room) : AnyGrad(p, room) { dtype = kDtype; }
};
template <int32_t kDtype, bool kCompensated, bool kRoundsByDraws>
struct WeightOf : AnyWeight {
    HD WeightOf(const Place& p, F* room) : AnyWeight(p, room) {
        dtype = kDtype;
        compensated = kCompensated;
        stochastic = kRoundsByDraws;
    }
};

// A kind of tensor.
template <class RuleT, class FastT, class SlowT, class SquareT, int32_t kWeightDtype,
          int32_t kGradDtype, int64_t kFlags_, bool kCompensated>
struct Kind {
    using R = RuleT;
    using Grad = GradOf<kGradDtype>;
    static constexpr bool kMoves = false, kFlagsKnown = true;
    static constexpr int64_t kFlags = kFlags_;
    // Those that have a loop of their own on a CPU (engine/kernels.h): the same arithmetic here.
    static constexpr bool kFactoredPair =
        is_same<FastT, FactoredSlot<true>> && is_same<SquareT, FactoredSlot<false>>;
    static constexpr bool kCodes = is_same<FastT, Block8Slot> && is_same<SquareT, Float8Slot>;
    static constexpr bool kPlain =
        kWeightDtype == kBFloat16 && kGradDtype == kBFloat16 && !kCompensated &&
        (kFlags & kStochastic) != 0 && (kFlags & ~(kPlainFlags | RuleT::kOwnFlags)) == 0 &&
        ((is_same<RuleT, Adam> && (kFactoredPair || kCodes)) ||
         ((is_same<RuleT, Adopt> || is_same<RuleT, Prodigy>) && kFactoredPair) ||
         is_same<RuleT, AdafactorMatrix>);
    static constexpr bool factored_sign =
        is_same<FastT, FactoredSlot<true>> || is_same<SlowT, FactoredSlot<true>>;
    Grad grad;
    WeightOf<kWeightDtype, kCompensated, (kFlags_ & kStochastic) != 0> weight;
    Staged<FastT, true> fast;
    Staged<SlowT, RuleT::kSlowStored> slow;
    Staged<SquareT, RuleT::kSquareStored> square;

    HD Kind(Place& p, Scratch& s)
        : grad(p, s.grad),
          weight(p, s.weight),
          fast(p, kFast, s.slots[kFast]),
          slow(p, kSlow, s.slots[kSlow]),
          square(p, kSquare, s.slots[kSquare]) {
        if constexpr (R::kRoot) square.begin_roots();
    }
};

// The passes over a bucket's tiles, a block to each.  The 1 tells the compiler to spend registers
// rather than memory: every operand of a row is in one.
__global__ __launch_bounds__(kTileThreads, 1) void measure_kernel(const Launch* launch) {
    measure(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void factor_kernel(const Launch* launch) {
    factor<typename KindT::Grad, KindT::kFlags>(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void norm_kernel(const Launch* launch) {
    if (wants_norm(launch->hypers[launch->tiles[blockIdx.x].tensor]))
        norm<KindT, false>(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void residual_kernel(const Launch* launch) {
    residual<KindT>(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void limit_kernel(const Launch* launch) {
    norm<KindT, true>(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void align_kernel(const Launch* launch) {
    if (wants_align(launch->hypers[launch->tiles[blockIdx.x].tensor]))
        align<KindT>(*launch, blockIdx.x);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void apply_kernel(const Launch* launch) {
    apply<KindT>(*launch, blockIdx.x);
}

// The phases of a bucket's tensors, a block to each.
template <int kPhase>
__global__ __launch_bounds__(kTensorThreads, 1) void tensor_kernel(const Launch* launch) {
    const int64_t member = blockIdx.x;
    if (kPhase == kBegin) return begin(*launch, member);
    if (kPhase == kAfterMeasure) return after_measure(*launch, member);
    if (kPhase == kAfterFactor) return after_factor(*launch, member);
    if (kPhase == kAfterNorm) return after_norm(*launch, member);
    if (kPhase == kAfterResidual) return after_residual(*launch, member);
    if (kPhase == kAfterLimit) return after_limit(*launch, member);
    if (kPhase == kAfterAlign) return after_align(*launch, member);
    if (kPhase == kFinish) return finish(*launch, member);
}

}  // namespace cuda
}  // namespace engine
