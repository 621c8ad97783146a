// The only loops over elements.
//
// A step is up to seven passes over a bucket's tiles, each a loop over the rows of a strip of them
// (engine/place.h), the tiles of a row and the vectors of a tile's row.  The later passes evaluate
// the rule again instead of storing its results:
//
//   measure  sums of g^2, w g, w^2     if clipping, OrthoGrad or parameter scaling need them
//   factor   row and column sums of g^2   if the rule needs its new factors before its update
//   norm     sum of u^2                if the growth limiter or the RMS clip needs it
//   residual row and column sums of the clipped update's residual   if the rule has one
//   limit    sum of u^2, settled       if the growth limiter needs that of the settled update
//   align    how many u agree with g   if `cautious` needs it
//   apply    moments and weights
//
// An update is the rule's direction() of the conditioned gradient, times factors that belong to the
// tensor as a whole: fields of Hyper, which the phases between the passes set (engine/tensor.h).
//
//   factor                 set by, in which phase                           1 without
//   ---------------------  -----------------------------------------------  ---------------------
//   atan2_numerator_scale  Adam's prepare, kBegin: its bias corrections     (kAtan2 alone reads it)
//   square_scale           Adafactor's prepare, kBegin: 1 / (1 - beta2^t)   kFixedBeta2
//   direction_scale        Adam's prepare, kBegin: its bias corrections;    Adam, kAtan2
//                          Adam's and Prodigy's: with kAtan2, 4 / pi
//   update_scale           begin(), kBegin: the lagged RMS clip             kClipLagged,
//                          *= after_norm(), kAfterNorm: growth limiter,     kGrowthLimit,
//                          and the exact RMS clip of what that leaves       kClipExact
//   growth_scale           after_norm(), kAfterNorm: the limiter's part     kGrowthLimit
//                          of update_scale
//   settled_scale          Adafactor's prepare, kBegin: 1 / (1 - beta1^t)   kFirstMoment,
//                          *= after_limit(), kAfterLimit: growth limiter    kGrowthSettled
//   cautious_scale         after_align(), kAfterAlign: 1 / (the share of    kCautious
//                          u that agrees with g)
//
// The first two are within direction().  growth_scale is no factor of the update: finish() keeps
// the RMS for the next lagged clip, which is that of the limited update before the clip.  With
// these, and w the weights before the step:
//
//   general:  settled = settled_scale * settled(direction_scale * update_scale * direction(g))
//             u       = settled; 0 where g is, if a moment has sign bits, which have no zero
//             w      <- w - decay * w - lr * aligned(u)   (grams, cautious: core/features.h)
//
//   plain:    settled = direction(g), u the same
//             w      <- w - decay * w - step * u,
//             step    = lr * settled_scale * (direction_scale * update_scale)
//
// A plain step (core/features.h) has no features between the direction and the weights, and its
// rule's settled() returns its argument: all factors are one number, and an element is multiplied
// once.  So Evaluation's `settled` and `u` are unscaled there, and no pass may take them for the
// update.  The sums of `norm` are of the unscaled direction in either case; what reads them
// multiplies by direction_scale.
#pragma once

#include "codecs/any.h"
#include "codecs/tensors.h"
#include "engine/samples.h"

namespace engine {
namespace ENGINE_ISA {

// Buffers for one row of a tile, separate from the slots so that those can stay in registers.
struct Scratch {
    F grad[Exec::kSpan], weight[Exec::kSpan], update[Exec::kSpan];
    SlotScratch slots[kSlots];
    U words[Exec::kSpan / 2];
};

// A tensor's Hyper for the loops over elements.  From the access, the compiler knows some of it and
// drops the checks.
template <class Access>
HD Hyper hyper_of(const Place& p) {
    Hyper h = p.hyper;
    h.flags = Access::kFlagsKnown ? Access::kFlags : h.flags & Access::kFlags;
    if (Access::kMoves) h.passive = 0;
    if (Access::kFlagsKnown) {  // factors that are 1
        constexpr int64_t kOfUpdate = kGrowthLimit | kClipExact | kClipLagged,
                          kOfSettled = kGrowthSettled | kFirstMoment;
        if (!Access::R::kOwnScale) h.direction_scale = 1.f;
        if (!has(h, kOfUpdate)) h.update_scale = 1.f;
        if (!has(h, kOfSettled)) h.settled_scale = 1.f;
    }
    return h;
}

// The gradient as the rule sees it: only OrthoGrad reads the weights for it.
template <class WeightT>
HD F conditioned(const Hyper& h, F raw, const WeightT& weight, int i, int col, int n) {
    if (!has(h, kOrthograd)) return raw * h.coefficient;
    return conditioned(h, raw, weight.load(i, col, n));
}

// kWrites: whether the pass reads and writes the weights in any case.
template <bool kWrites, class Access>
HD void begin_row(const Place& p, Access& a, const Hyper& h, int64_t row, int width) {
    Exec::knowing(p, [&]() INLINED {
        a.grad.begin_row(row, width);
        if (kWrites || Access::R::kWeight || has(h, kOrthograd)) a.weight.begin_row(row, width);
        a.fast.begin_row(row, width);
        a.slow.begin_row(row, width);
        a.square.begin_row(row, width);
    });
}

// Calls f(clean) with a constant: whether all gradient elements of the row are known to be usable,
// so that its vectors need no check, and the rule's usual case holds.
template <class GradT, class Function>
HD void with_row(const GradT& grad, bool usual, int width, Function&& f) {
    if (usual && grad.clean(width)) return f(Constant<true>());
    f(Constant<false>());
}

// One vector of a row: its gradient in memory and as the rule sees it, its update on the way from
// the rule's direction (see above), its moments before and after, and which of its elements are
// usable (not set if all are known to be).
struct Evaluation {
    F raw, g, direction, settled, u;
    Moments before, after;
    Mask ok;
};

template <bool kClean, class Access>
HD Evaluation evaluate(Access& a, const Hyper& h, int i, int col, int n) {
    if (kClean) TRUST(Access::R::is_usual(h));
    Evaluation e;
    e.raw = a.grad.load(i, col, n);
    if (!kClean) e.raw = usable(e.raw, e.ok);
    if (Access::kPlain)
        e.g = e.raw * h.coefficient;
    else
        e.g = conditioned(h, e.raw, a.weight, i, col, n);
    if (!Access::kPlain && !kClean) e.g = select(e.ok, e.g, F(0.f));
    e.before = {a.fast.load(i, col, n), a.slow.load(i, col, n), a.square.load(i, col, n), F(0.f),
                F(0.f)};
    if constexpr (Access::R::kRoot) e.before.root = a.square.root(i, e.before.square);
    if constexpr (Access::R::kWeight) e.before.weight = a.weight.load(i, col, n);
    e.after = e.before;
    e.direction = Access::R::direction(h, e.g, e.after);
    if (Access::kPlain)
        e.settled = e.direction;  // unscaled: `step` of apply() has all factors
    else
        e.settled =
            Access::R::settled(h, e.direction * (h.direction_scale * h.update_scale), e.after) *
            h.settled_scale;
    e.u = a.factored_sign ? only(e.raw != F(0.f), e.settled) : e.settled;
    return e;
}

// How a pass takes its rows: one by one.  Each access to operands has such a base; on a CPU there
// is another (engine/lines.h).
struct ByRow {
    using Totals = typename Exec::RowTotals;  // of a tile
    using Sums = FactoredSlot<false>;         // a factored moment of which a pass computes the sums

    template <class Function>
    HD static void each_row(Place& p, Function&& f) {
        p.each_row(f);
    }
};

// In place of an operand that a pass does not read.
struct Unread {
    HD Unread(const Place&, F*) {}
    HD void begin_row(int64_t, int) {}
};

// The sums of squares of what is read, and <g, w> if both are.
template <class GradT, class WeightT>
HD void measure(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    constexpr bool kGrad = !is_same<GradT, Unread>, kWeight = !is_same<WeightT, Unread>;
    Place p(launch, first_tile, by_vectors);
    Scratch scratch;
    GradT grad(p, scratch.grad);
    WeightT weight(p, scratch.weight);
    struct {
        D gg = D(0.0), wg = D(0.0), ww = D(0.0);
    } of_tiles[Exec::kStripTiles];
    p.each_row([&](int64_t row, int width) INLINED {
        auto sums = of_tiles[p.at()];
        Exec::knowing(p, [&]() INLINED {
            grad.begin_row(row, width);
            weight.begin_row(row, width);
        });
        Exec::each(width, [&](int i, int col, int n) INLINED {
            D g(0.0), w(0.0);
            if constexpr (kGrad) {
                Mask ok;
                g = widen(usable(grad.load(i, col, n), ok));
                sums.gg = sums.gg + g * g;
            }
            if constexpr (kWeight) {
                w = widen(weight.load(i, col, n));
                sums.ww = sums.ww + w * w;
            }
            if constexpr (kGrad && kWeight) sums.wg = sums.wg + w * g;
        });
        of_tiles[p.at()] = sums;
    });
    p.each_tile([&]() INLINED {
        const auto& sums = of_tiles[p.at()];
        TileSums& to = p.sums();
        auto put = [](double& total, D of_lanes) INLINED {
            const double x = Exec::total(of_lanes);
            if (Exec::leads()) total = x;
        };
        if constexpr (kGrad) put(to.grad_sq, sums.gg);
        if constexpr (kWeight) put(to.weight_sq, sums.ww);
        if constexpr (kGrad && kWeight) put(to.weight_grad, sums.wg);
    });
}

// An element without a usable gradient contributes its old average, and is counted.
template <class GradT, int64_t kFlags = ~int64_t(0), class By = ByRow>
HD void factor(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    Place p(launch, first_tile, by_vectors);
    Hyper h = p.hyper;
    h.flags &= kFlags;
    Scratch scratch;
    GradT grad(p, scratch.grad);
    AnyWeight weight(p, scratch.weight);
    typename By::Sums square(p, kSquare, scratch.slots[kSquare]);
    typename Exec::Count nonfinite;
    p.each_tile([&]() INLINED {
        nonfinite.begin(p.sums().nonfinite);
        square.begin();
    });
    By::each_row(p, [&](int64_t row, int width) INLINED {
        Exec::knowing(p, [&]() INLINED {
            grad.begin_row(row, width);
            if (has(h, kOrthograd)) weight.begin_row(row, width);
            square.begin_row(row, width);
        });
        with_row(grad, true, width, [&](auto clean) INLINED {
            constexpr bool kClean = decltype(clean)::kValue;
            Exec::each(width, [&](int i, int col, int n) INLINED {
                Mask ok;
                F g = grad.load(i, col, n);
                if (!kClean) g = usable(g, ok);
                g = conditioned(h, g, weight, i, col, n);
                F g2 = g * g;
                if (!kClean && RARELY(!all(ok))) {
                    nonfinite.add(p.sums().nonfinite, kLanes - count(ok));
                    g2 = select(ok, g2, square.load(i, col, n));
                }
                square.store(i, col, n, g2);
            });
        });
        square.end_row(row, width);
    });
    p.each_tile([&]() INLINED {
        square.end();
        nonfinite.end(p.sums().nonfinite);
    });
}

// As `factor`, for the rule's residual and the slow moment.
template <class Access>
HD void residual(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    Place p(launch, first_tile, by_vectors);
    const Hyper h = hyper_of<Access>(p);
    const bool usual = Access::R::is_usual(h);
    Scratch scratch;
    Access a(p, scratch);
    typename Access::Sums average(p, kSlow, scratch.slots[kSlow]);
    p.each_tile([&]() INLINED { average.begin(); });
    Access::each_row(p, [&](int64_t row, int width) INLINED {
        begin_row<false>(p, a, h, row, width);
        average.begin_row(row, width);
        with_row(a.grad, usual, width, [&](auto clean) INLINED {
            constexpr bool kClean = decltype(clean)::kValue;
            Exec::each(width, [&](int i, int col, int n) INLINED {
                Evaluation e = evaluate<kClean>(a, h, i, col, n);
                F x = Access::R::residual(e.direction * (h.direction_scale * h.update_scale),
                                          e.after);
                if (!kClean && RARELY(!all(e.ok))) x = select(e.ok, x, e.before.slow);
                average.store(i, col, n, x);
            });
        });
        average.end_row(row, width);
    });
    p.each_tile([&]() INLINED { average.end(); });
}

// kSettled: of the settled update instead of the direction.
template <class Access, bool kSettled>
HD void norm(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    Place p(launch, first_tile, by_vectors);
    const Hyper h = hyper_of<Access>(p);
    const bool usual = Access::R::is_usual(h);
    Scratch scratch;
    Access a(p, scratch);
    typename Access::Totals squares;
    p.each_tile([&]() INLINED { squares.template begin<false>(p.sums().update_sq, a); });
    Access::each_row(p, [&](int64_t row, int width) INLINED {
        begin_row<false>(p, a, h, row, width);
        squares.begin_row();
        with_row(a.grad, usual, width, [&](auto clean) INLINED {
            constexpr bool kClean = decltype(clean)::kValue;
            Exec::each(width, [&](int i, int col, int n) INLINED {
                Evaluation e = evaluate<kClean>(a, h, i, col, n);
                F u = kSettled ? e.settled : e.direction;
                if (!kClean && RARELY(!all(e.ok))) u = select(e.ok, u, F(0.f));
                squares.add_square(i, u);
            });
        });
        squares.end_row(p.sums().update_sq, int(row - p.first_row()), width);
    });
    p.each_tile([&]() INLINED { squares.end(p.sums().update_sq, p.num_rows()); });
}

template <class Access>
HD void align(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    Place p(launch, first_tile, by_vectors);
    const Hyper h = hyper_of<Access>(p);
    Scratch scratch;
    Access a(p, scratch);
    typename Exec::Count aligned;
    p.each_tile([&]() INLINED { aligned.begin(p.sums().aligned); });
    Access::each_row(p, [&](int64_t row, int width) INLINED {
        int64_t of_row = 0;
        begin_row<false>(p, a, h, row, width);
        Exec::each(width, [&](int i, int col, int n) INLINED {
            Evaluation e = evaluate<false>(a, h, i, col, n);
            of_row += count(agrees(e.u, e.g));
        });
        aligned.add(p.sums().aligned, of_row);
    });
    p.each_tile([&]() INLINED { aligned.end(p.sums().aligned); });
}

template <class Access>
HD void apply(const Launch& launch, int64_t first_tile, bool by_vectors = false) {
    Place p(launch, first_tile, by_vectors);
    const Hyper h = hyper_of<Access>(p);
    const bool usual = Access::R::is_usual(h);
    Scratch scratch;
    Access a(p, scratch);
    typename Exec::Count nonfinite;
    typename Access::Totals squares;
    SamplesOf<Access::R::kSampled> samples(p);
    const bool lagged = has(h, kClipLagged);
    const float step =
        Access::kPlain ? h.lr * h.settled_scale * (h.direction_scale * h.update_scale) : h.lr;
    p.each_tile([&]() INLINED {
        nonfinite.begin(p.sums().nonfinite);
        if (lagged) squares.template begin<true>(p.sums().update_sq, a);
        a.fast.begin();
        a.slow.begin();
        a.square.begin();
    });
    Access::each_row(p, [&](int64_t row, int width) INLINED {
        begin_row<true>(p, a, h, row, width);
        samples.row(h, row, width, a.grad, a.weight);
        if (lagged) squares.begin_row();
        if (Access::kRoundsWithin) p.make_words(row);
        with_row(a.grad, usual, width, [&](auto clean) INLINED {
            constexpr bool kClean = decltype(clean)::kValue;
            // The step of a vector's weights, once its update is known.
            auto write = [&](int i, int col, int n, F u) INLINED {
                F before = a.weight.load(i, col, n);
                F kept = Access::kPlain ? fma(F(-h.decay), before, before) : decayed(h, before, u);
                F w = fma(F(-step), u, kept);
                if (!kClean) {
                    Mask ok;
                    usable(a.grad.load(i, col, n), ok);
                    w = select(ok, w, before);
                }
                a.weight.store(i, col, n, w);
            };
            Exec::each(width, [&](int i, int col, int n) INLINED {
                Evaluation e = evaluate<kClean>(a, h, i, col, n);
                F u = Access::kPlain ? e.u : aligned(h, e.u, e.g);
                if (lagged) squares.add_square(i, e.direction);
                if (!kClean && RARELY(!all(e.ok))) {
                    nonfinite.add(p.sums().nonfinite, kLanes - count(e.ok));
                    e.after.fast = select(e.ok, e.after.fast, e.before.fast);
                    e.after.slow = select(e.ok, e.after.slow, e.before.slow);
                    e.after.square = select(e.ok, e.after.square, e.before.square);
                }
                a.fast.store(i, col, n, e.after.fast);
                a.slow.store(i, col, n, e.after.slow);
                a.square.store(i, col, n, e.after.square);
                if (Exec::kWeightsLater)
                    scratch.update[i] = u;
                else
                    write(i, col, n, u);
            });
            if (Exec::kWeightsLater)
                Exec::each(width, [&](int i, int col, int n)
                                      INLINED { write(i, col, n, scratch.update[i]); });
        });
        if (!Access::kRoundsWithin) p.make_words(row);  // late, as they occupy registers
        a.fast.end_row(row, width);
        a.slow.end_row(row, width);
        a.square.end_row(row, width);
        if (!h.passive) a.weight.end_row(width);
        if (lagged) squares.end_row(p.sums().update_sq, int(row - p.first_row()), width);
    });
    p.each_tile([&]() INLINED {
        a.fast.end();
        a.slow.end();
        a.square.end();
        samples.end();
        nonfinite.end(p.sums().nonfinite);
        if (lagged) squares.end(p.sums().update_sq, p.num_rows());
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
