// The kernels of a GPU.  NVRTC compiles the template instances that a run needs (optim/gpu.py).
//
// A bucket holds tensors of one kind: the same rule, codecs, dtypes and flags.  So these are
// constants here, and kernels contain nothing that a run does not use.
#pragma once

#define ENGINE_CUDA
#define ENGINE_ISA cuda
#include "core/types.h"
#include "engine/projected_cuda.h"
#include "engine/tensor.h"
#include "engine/tile.h"

namespace engine {
namespace cuda {

// optim/plan.py mirrors these.
static_assert(sizeof(Options) == 160 && sizeof(Tensor) == 392 && sizeof(Launch) == 96 &&
                  sizeof(Hyper) == 176 && sizeof(TileSums) == 64,
              "optim/plan.py has other structs");

// Whether Kind::kBlocks leaves the factored kernels and adamw8bit's enough registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kBlocksFit = false;
#else
constexpr bool kBlocksFit = true;
#endif

// Gradients and weights of a known dtype and rounding.  Elements are decoded on access: that takes
// an instruction, while keeping them decoded takes a register each.
template <int32_t kDtype, int kAhead = 1>
struct Elements {
    static constexpr bool kWide = kDtype == kFloat32;
    using T = Choice<kWide, const float, const uint16_t>;
    const Place& place;
    T* const data;
    Exec::Row<T, kAhead> row;

    HD Elements(const Place& p, uint64_t address, bool exist = true)
        : place(p), data(pointer<T>(address)) {
        if (exist) row.start(p, data);
    }
    HD void begin(int64_t at, int width) { row.begin(place, data, at, width); }
    HD F load(int i, int col, int n) const {
        if constexpr (kWide)
            return row.f32(i, col, n);
        else if constexpr (kDtype == kBFloat16)
            return row.bf16(i, col, n);
        else
            return from_fp16(row.uint(i, col, n));
    }
};
template <int32_t kDtype, int kAhead>
struct GradOf {
    Elements<kDtype, kAhead> elements;

    HD GradOf(const Place& p, F*) : elements(p, p.tensor.grad) {}
    HD void begin_row(int64_t row, int width) { elements.begin(row, width); }
    HD F load(int i, int col, int n) const { return elements.load(i, col, n); }
    // Checks the thread's elements.  Nearly always all are below 2, which is quickly tested;
    // otherwise, if their sum is usable, each of them is.
    HD bool clean(int) const {
        if (elements.row.all_below_two()) return true;
        F of_lanes(0.f);
        UNROLLED for (int i = 0; i < Exec::kSpan; ++i) of_lanes =
            of_lanes + abs(load(i, Exec::column(i), kLanes));
        return sum(of_lanes) <= kLargestGrad;
    }
};
template <int32_t kDtype, bool kCompensated, bool kRoundsByDraws>
struct WeightOf : AnyWeight {
    Elements<kDtype> elements, lost;

    HD WeightOf(const Place& p, F* room)
        : AnyWeight(p, room),
          elements(p, p.tensor.weight),
          lost(p, p.tensor.compensation, kCompensated) {
        dtype = kDtype;
        compensated = kCompensated;
        stochastic = kRoundsByDraws;
    }
    HD void begin_row(int64_t row, int width) {
        row_at_hand = row;
        draws.begin_row(row, place.cols(), place.col);
        elements.begin(row, width);
        if (kCompensated) lost.begin(row, width);
    }
    HD F load(int i, int col, int n) const {
        const F x = elements.load(i, col, n);
        return kCompensated ? x + lost.load(i, col, n) : x;
    }
};

template <class SlotT>
constexpr int32_t kCodecOf = kAbsent;
template <>
constexpr int32_t kCodecOf<DenseSlot> = kDense;
template <>
constexpr int32_t kCodecOf<Bf16Slot> = kBf16;
template <>
constexpr int32_t kCodecOf<SignedFloat8Slot> = kSignedFloat8;
template <>
constexpr int32_t kCodecOf<Float8Slot> = kFloat8;
template <>
constexpr int32_t kCodecOf<FactoredSlot<false>> = kFactored;
template <>
constexpr int32_t kCodecOf<FactoredSlot<true>> = kFactoredSign;
template <>
constexpr int32_t kCodecOf<GivenSlot> = kGiven;

template <class SlotT>
constexpr bool kSumsRows = kCodecOf<SlotT> == kFactored || kCodecOf<SlotT> == kFactoredSign;

// A kind of tensor, as an access (engine/tile.h); optim/gpu.py writes its name.  kAhead: rows of
// its gradient that are loaded while one is computed.
template <class RuleT, class FastT, class SlowT, class SquareT, int32_t kWeightDtype,
          int32_t kGradDtype, int64_t kFlags_, bool kCompensated, int kAhead = 1>
struct Kind : ByRow {
    using R = RuleT;
    using Grad = GradOf<kGradDtype, kAhead>;
    // For the passes that write no tensor: they compute little and have registers to spare.
    using Read =
        Kind<RuleT, FastT, SlowT, SquareT, kWeightDtype, kGradDtype, kFlags_, kCompensated, 2>;
    static constexpr bool kMoves = false, kFlagsKnown = true;
    static constexpr bool kRoundsWithin =
        is_same<FastT, Bf16Slot> || is_same<SlowT, Bf16Slot> || is_same<SquareT, Bf16Slot>;
    static constexpr int64_t kFlags = kFlags_;
    static constexpr uint32_t kStorage =
        storage_of(kCodecOf<FastT>, kCodecOf<SlowT>, kCodecOf<SquareT>);
    // The kinds with a loop of their own on a CPU (engine/kernels.h) use the same arithmetic here.
    static constexpr bool kPlain = kWeightDtype == kBFloat16 && kGradDtype == kBFloat16 &&
                                   !kCompensated && (kFlags & kStochastic) != 0 &&
                                   (kFlags & ~(kPlainFlags | RuleT::kOwnFlags)) == 0 &&
                                   (RuleT::kPlainLoops & kStorage) != 0;
    // The least number of blocks of a multiprocessor, where using a few registers less makes room
    // for one more warp per scheduler: with 6 of these blocks a thread has 168, with 8 it has 128.
    static constexpr bool kAdams = is_same<RuleT, Adam> || is_same<RuleT, Adopt>;
    static constexpr int kBlocks = !kPlain || !kAdams || !kBlocksFit ? 1
                                   : kStorage == kFactoredPair       ? 6
                                   : kStorage == kCodedPair          ? 8
                                                                     : 1;
    static constexpr bool factored_sign =
        is_same<FastT, FactoredSlot<true>> || is_same<SlowT, FactoredSlot<true>>;
    Grad grad;
    WeightOf<kWeightDtype, kCompensated, (kFlags_ & kStochastic) != 0> weight;
    FastT fast;
    Kept<SlowT, RuleT::kSlowStored> slow;
    Kept<SquareT, RuleT::kSquareStored> square;

    HD Kind(Place& p, Scratch& s)
        : grad(p, s.grad),
          weight(p, s.weight),
          fast(p, kFast, s.slots[kFast]),
          slow(p, kSlow, s.slots[kSlow]),
          square(p, kSquare, s.slots[kSquare]) {
        if constexpr (R::kRoot) square.begin_roots();
    }

    // Shared memory for a pass's own sums of rows: that of a factored moment that the pass does not
    // store, if there is one.
    template <bool kStores>
    HD float* room_for_rows() const {
        if constexpr (kSumsRows<SquareT> && !(kStores && R::kSquareStored))
            return Exec::RowSums::room_of(square.number());
        else if constexpr (kSumsRows<SlowT> && !(kStores && R::kSlowStored))
            return Exec::RowSums::room_of(slow.number());
        else if constexpr (kSumsRows<FastT> && !kStores)
            return Exec::RowSums::room_of(fast.number());
        else
            return Exec::RowSums::room_of_none();
    }
};

// The tile of a block.
struct TileOf {
    const Launch& launch;
    const int64_t number;
    const bool by_vectors;

    HD TileOf(const Launch* l)
        : launch(*l), number(blockIdx.x), by_vectors(can_use_vectors(launch, number)) {}
    HD const Hyper& hyper() const { return launch.hypers[launch.tiles[number].tensor]; }
};

// The passes over a bucket's tiles, a block for each.  The 1 tells the compiler to use registers
// rather than memory.
template <class GradT, class WeightT>
__global__ __launch_bounds__(kTileThreads, 1) void measure_kernel(const Launch* launch) {
    const TileOf tile(launch);
    measure<GradT, WeightT>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void factor_kernel(const Launch* launch) {
    const TileOf tile(launch);
    factor<typename KindT::Read::Grad, KindT::kFlags>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void norm_kernel(const Launch* launch) {
    const TileOf tile(launch);
    if (wants_norm(tile.hyper()))
        norm<typename KindT::Read, false>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void residual_kernel(const Launch* launch) {
    const TileOf tile(launch);
    residual<typename KindT::Read>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void limit_kernel(const Launch* launch) {
    const TileOf tile(launch);
    norm<typename KindT::Read, true>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, 1) void align_kernel(const Launch* launch) {
    const TileOf tile(launch);
    if (wants_align(tile.hyper()))
        align<typename KindT::Read>(tile.launch, tile.number, tile.by_vectors);
}
template <class KindT>
__global__ __launch_bounds__(kTileThreads, KindT::kBlocks) void apply_kernel(const Launch* launch) {
    const TileOf tile(launch);
    apply<KindT>(tile.launch, tile.number, tile.by_vectors);
}

// The phases of a bucket's tensors, a block for each.
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
