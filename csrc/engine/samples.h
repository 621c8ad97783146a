// What a rule keeps for every Options::slice'th element of a parameter: its initial weight, and a
// sum of its gradients.  A tile updates its own, row by row, before their weights move.
//
// Mishchenko & Defazio 2023 (Prodigy, https://arxiv.org/abs/2306.06101), Alg. 4, the lines of r and
// s.
#pragma once

#include "codecs/tensors.h"

namespace engine {
namespace ENGINE_ISA {

struct SampleRows {
    const Place& place;
    const Tensor& tensor;
    const Samples& kept;
    int64_t every;
    FlatDraws draws;
    typename Exec::Spread sums[Exec::kStripTiles];  // of progress and distance

    HD SampleRows(const Place& p)
        : place(p),
          tensor(p.tensor),
          kept(p.tensor.samples),
          every(p.launch.options[p.tensor.group].slice),
          draws(p.hyper.key, kept.sum.salt) {}

    template <class GradT, class WeightT>
    HD void row(const Hyper& h, int64_t row, int width, const GradT& grad, const WeightT& weight) {
        const int64_t begin = row * tensor.cols + place.col, from = (begin + every - 1) / every;
        const int64_t first = from * every - begin;  // its column in the tile
        if (first >= width || !(h.learns || h.t == 1)) return;
        const int step = every < kTileCols ? int(every) : kTileCols;
        char* starts = pointer<char>(kept.start) + from * dtype_bytes(tensor.weight_dtype);
        Exec::each_sample(
            int(first), step, width, grad, weight, [&](int at, int col, int n, F raw, F w) INLINED {
                if (h.t == 1) store_as(tensor.weight_dtype, starts, at, w, n);
                if (!h.learns) return;
                Mask ok;
                F g = usable(raw, ok);
                g = select(ok, conditioned(h, g, w), F(0.f));
                F start = load_as(tensor.weight_dtype, starts, at, n);
                F before = load_sum(from + at, n);
                F after = select(ok, fma(F(h.sum_decay), before, g * h.sum_weight), before);
                store_sum(from + at, after, n);
                sums[place.at()].add(col, step, n, widen(g) * (widen(start) - widen(w)),
                                     widen(abs(after)));
            });
    }

    HD void end() {
        double progress, distance;
        sums[place.at()].total(progress, distance);
        TileSums& to = place.sums();
        if (Exec::leads()) to.progress = progress, to.distance = distance;
    }

   private:
    HD F load_sum(int64_t at, int n) const {
        if (kept.sum.codec == kDense) return load_f32(pointer<float>(kept.sum.parts[0]) + at, n);
        return load_bf16(pointer<uint16_t>(kept.sum.parts[0]) + at, n);
    }
    HD void store_sum(int64_t at, F x, int n) const {
        if (kept.sum.codec == kDense)
            return store_f32(pointer<float>(kept.sum.parts[0]) + at, x, n);
        store_bf16(pointer<uint16_t>(kept.sum.parts[0]) + at, x, draws.from(at), n);
    }
};

// For a rule that keeps nothing.
struct NoSamples {
    HD NoSamples(const Place&) {}
    template <class GradT, class WeightT>
    HD void row(const Hyper&, int64_t, int, const GradT&, const WeightT&) {}
    HD void end() {}
};

template <bool kSampled>
struct SamplesOf : NoSamples {
    using NoSamples::NoSamples;
};
template <>
struct SamplesOf<true> : SampleRows {
    using SampleRows::SampleRows;
};

}  // namespace ENGINE_ISA
}  // namespace engine
