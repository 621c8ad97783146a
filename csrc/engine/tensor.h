// What is computed for a tensor between the passes over its tiles: scalars and factors only.
//
// Sums of tiles are added in the tiles' order, in fp64, so the result does not depend on which
// thread computed them.
#pragma once

#include "codecs/float8.h"
#include "rules/all.h"

namespace engine {
namespace ENGINE_ISA {

// The Hyper of a tensor's step t.
HD Hyper derive(const Options& o, const Tensor& tensor, int64_t t, int32_t rule) {
    Hyper h{};
    h.t = t;
    h.flags = o.flags;
    h.key = mix(o.seed, uint64_t(tensor.index), uint64_t(t));
    h.beta2 = o.beta2;
    h.weight1 = float(1 - o.beta1);
    h.weight2 = float(1 - o.beta2);
    h.eps = float(o.eps);
    h.direction_scale = h.settled_scale = h.update_scale = h.growth_scale = h.cautious_scale = 1.f;
    h.coefficient = float(o.coefficient);
    h.lr = float(o.lr);
    h.decay = float(o.lr * o.weight_decay);
    if (o.distance) h.d = float(*pointer<double>(o.distance));
    if (tensor.samples.weight_sum) h.weight_sum = *pointer<double>(tensor.samples.weight_sum);
    Rules::visit(rule, false, [&](auto r) INLINED { r.prepare(o, h); });
    if (has(h, kRelativeStep) && o.lr > 0) {
        double bound = 1 / (::sqrt(double(t)) * o.lr);
        if (bound < 1) h.lr = float(o.lr * bound);
    }
    return h;
}

// The row and column vectors of a factored moment, as the workspace and the state hold them.
struct Factors {
    const Moment& moment;
    int64_t rows, cols;
    float *row, *col;

    HD Factors(const Launch& launch, int64_t member, const Tensor& tensor, SlotId slot)
        : moment(tensor.moments[slot]), rows(tensor.rows), cols(tensor.cols) {
        row = launch.workspace + launch.vectors[member] + moment.vectors;
        col = row + padded(rows);
    }

    HD static bool exist(const Tensor& tensor, SlotId slot) {
        int32_t codec = tensor.moments[slot].codec;
        return codec == kFactored || codec == kFactoredSign;
    }

    // State -> workspace, padded with zeros.
    HD void read() const {
        read(row, rows, moment.parts[0], moment.parts[2]);
        read(col, cols, moment.parts[1], moment.parts[3]);
    }

    // Workspace -> state, rounded if they are stored as codes.
    HD void write(const Hyper& h) const {
        uint64_t key = mix(h.key, uint64_t(moment.salt));
        write(row, rows, moment.parts[0], moment.parts[2], mix(key, 'r'));
        write(col, cols, moment.parts[1], moment.parts[3], mix(key, 'c'));
    }

    HD static double mean(const float* x, int64_t length) {
        return Exec::sum_of(length, [&](int64_t i) INLINED { return double(x[i]); }) /
               double(length);
    }

    HD static void read(float* to, int64_t length, uint64_t from, uint64_t tops) {
        Exec::each_pack(padded(length), [&](int64_t at, int lanes) INLINED {
            const int64_t left = length - at;
            const int n = left < 0 ? 0 : left < lanes ? int(left) : lanes;
            F x;
            if (tops) {
                int32_t top = n ? pointer<int8_t>(tops)[at / kFloat8Block] : 0;
                x = Unsigned8::decode(load_uint(pointer<uint8_t>(from) + at, n),
                                      U(Unsigned8::base(top + 127)));
            } else {
                x = load_f32(pointer<float>(from) + at, n);
            }
            store_f32(to + at, x, lanes);
        });
    }

    HD static void write(const float* from, int64_t length, uint64_t to, uint64_t tops,
                         uint64_t key) {
        if (!tops) {
            Exec::each_index(length, [&](int64_t i) INLINED { pointer<float>(to)[i] = from[i]; });
            return;
        }
        Exec::each_run(length, kFloat8Block, [&](int64_t block, int64_t first, int run) INLINED {
            Draws draws(key, 0);
            draws.begin_row(0, length, first);
            const int32_t exponent = float8_exponent(Exec::largest_of(from + first, run));
            if (Exec::leads_warp()) pointer<int8_t>(tops)[block] = int8_t(exponent - 127);
            Exec::each_pack_of_run(run, [&](int at, int n) INLINED {
                U code = Unsigned8::encode(load_f32(from + first + at, n), draws.at<kFloat8Cut>(at),
                                           U(Unsigned8::base(exponent)));
                store_saturated(pointer<uint8_t>(to) + first + at, code, n);
            });
        });
    }
};

// What the phases need to know about a tensor's rule (`Rule` in core/features.h).
struct Traits {
    bool counts, square_first, has_residual, slow_stored, square_stored;
};
HD Traits traits_of(const Tensor& tensor, int32_t rule) {
    Traits traits{};
    Rules::visit(rule, Factors::exist(tensor, kSquare), [&](auto r) INLINED {
        traits = {r.kCounts, r.kSquareFirst, r.kHasResidual, r.kSlowStored, r.kSquareStored};
    });
    return traits;
}

// Adds the tiles' row and column sums of a factored moment: row(i, mean) and col(j, mean) receive
// the means.
template <class RowFunction, class ColFunction>
HD void reduce(const Launch& launch, int64_t member, const Tensor& tensor, SlotId slot,
               RowFunction&& row, ColFunction&& col) {
    const int64_t first = launch.first_tile[member];
    const int64_t chunks = (tensor.cols + kTileCols - 1) / kTileCols;
    const int64_t strips = (tensor.rows + kTileRows - 1) / kTileRows;
    auto partials = [&](int64_t strip, int64_t chunk) INLINED {
        return launch.workspace + launch.tiles[first + strip * chunks + chunk].partials +
               tensor.moments[slot].partials;
    };
    Exec::each_pack(tensor.rows, [&](int64_t at, int n) INLINED {
        D sum(0.0);
        UNROLLED_BY_8 for (int64_t chunk = 0; chunk < chunks; ++chunk) sum =
            sum + widen(load_f32(partials(at / kTileRows, chunk) + at % kTileRows, kLanes));
        Exec::each_lane(
            sum, n, [&](int lane, double x) INLINED { row(at + lane, x / double(tensor.cols)); });
    });
    Exec::each_pack(tensor.cols, [&](int64_t at, int n) INLINED {
        D sum(0.0);
        const int64_t j = kTileRows + at % kTileCols;
        UNROLLED_BY_8 for (int64_t strip = 0; strip < strips; ++strip) sum =
            sum + widen(load_f32(partials(strip, at / kTileCols) + j, kLanes));
        Exec::each_lane(
            sum, n, [&](int lane, double x) INLINED { col(at + lane, x / double(tensor.rows)); });
    });
    Exec::sync();
}

// The sum of f(sums) over a tensor's tiles.
template <class Function>
HD double total(const Launch& launch, int64_t member, Function&& f) {
    const int64_t first = launch.first_tile[member];
    return Exec::sum_of(launch.first_tile[member + 1] - first,
                        [&](int64_t i) INLINED { return double(f(launch.sums[first + i])); });
}

// Counts the step (if the rule counts as one), derives its Hyper and decodes the factors, with rows
// divided by their mean.
HD void begin(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    if (Exec::leads()) {
        const Options& o = launch.options[tensor.group];
        int64_t& step = *pointer<int64_t>(tensor.step);
        if (traits_of(tensor, launch.rule).counts) ++step;
        Hyper& h = launch.hypers[member];
        h = derive(o, tensor, step, launch.rule);
        if (has(h, kClipLagged)) {
            double ratio = *pointer<float>(tensor.update_rms) / o.clip_threshold;
            if (ratio > 1) h.update_scale = float(1 / ratio);
        }
    }
    for (int slot = 0; slot < kSlots; ++slot) {
        if (!Factors::exist(tensor, SlotId(slot))) continue;
        Factors factors(launch, member, tensor, SlotId(slot));
        factors.read();
        Exec::sync();
        double mean = Factors::mean(factors.row, factors.rows);
        Exec::each_index(factors.rows, [&](int64_t i) INLINED {
            factors.row[i] = mean > 0 ? float(factors.row[i] / mean) : 0.f;
        });
    }
}

HD bool wants_measure_of_grad(const Hyper& h) { return has(h, kOrthograd | kGradClip); }
HD bool wants_measure_of_weight(const Hyper& h) { return has(h, kOrthograd | kScaleParameter); }
HD bool wants_measure(const Hyper& h) {
    return wants_measure_of_grad(h) || wants_measure_of_weight(h);
}
HD bool wants_factor(const Tensor& tensor, int32_t rule) {
    return traits_of(tensor, rule).square_first && Factors::exist(tensor, kSquare);
}
HD bool wants_residual(const Tensor& tensor, int32_t rule) {
    return traits_of(tensor, rule).has_residual && Factors::exist(tensor, kSlow);
}
// Whether a factored moment's new factors are computed from what `apply` has stored.
HD bool wants_new_factors(const Tensor& tensor, SlotId slot, int32_t rule) {
    const Traits traits = traits_of(tensor, rule);
    return Factors::exist(tensor, slot) && (slot != kSquare || traits.square_stored) &&
           (slot != kSlow || traits.slow_stored);
}
HD bool wants_norm(const Hyper& h) { return !h.passive && has(h, kGrowthLimit | kClipExact); }
HD bool wants_limit(const Hyper& h) { return has(h, kGrowthSettled); }
HD bool wants_align(const Hyper& h) { return !h.passive && has(h, kCautious); }

HD void after_measure(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    const Options& o = launch.options[tensor.group];
    Hyper& h = launch.hypers[member];
    if (!wants_measure(h)) return;
    auto sum = [&](bool asked, double TileSums::*field) INLINED {
        if (!asked) return 0.0;
        return total(launch, member, [=](const TileSums& x) INLINED { return x.*field; });
    };
    const double grad_sq = sum(wants_measure_of_grad(h), &TileSums::grad_sq),
                 weight_grad = sum(has(h, kOrthograd), &TileSums::weight_grad),
                 weight_sq = sum(wants_measure_of_weight(h), &TileSums::weight_sq);
    if (!Exec::leads()) return;
    double coefficient = o.coefficient;
    if (has(h, kGradClip)) {
        double length = coefficient * ::sqrt(grad_sq);
        if (length > o.grad_clip) coefficient *= o.grad_clip / length;
    }
    if (has(h, kOrthograd)) {
        // What is left of a gradient parallel to w is rounding noise, and is not scaled up.
        double rho = weight_grad / (weight_sq + 1e-30);
        double rest_sq = grad_sq - 2 * rho * weight_grad + rho * rho * weight_sq;
        coefficient *= rest_sq > 1e-12 * grad_sq ? ::sqrt(grad_sq / rest_sq) : 0.0;
        h.rho = float(rho);
        h.rho_low = float(rho - double(h.rho));
    }
    h.coefficient = float(coefficient);
    if (has(h, kScaleParameter) && tensor.numel > 0) {
        double rms = ::sqrt(weight_sq / double(tensor.numel));
        h.lr *= float(rms > o.eps_scale ? rms : o.eps_scale);
    }
}

// The new means of a factored moment that was summed in a pass of its own, and from them the
// factors of 1 / sqrt of the bias-corrected moment, with eps added to its factors.
HD void average(const Launch& launch, int64_t member, SlotId slot, double beta, double inv_bias,
                double eps) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    Factors f(launch, member, tensor, slot);
    // The decoded moment's own row means: if the means are codes, the mean of the columns is not
    // exactly that of the rows.
    double col_mean = Factors::mean(f.col, f.cols), any = Factors::mean(f.row, f.rows) > 0 ? 1 : 0;
    reduce(
        launch, member, tensor, slot,
        [&](int64_t i, double mean) {
            f.row[i] = float(beta * col_mean * f.row[i] + (1 - beta) * mean);
        },
        [&](int64_t j, double mean) {
            f.col[j] = float(beta * any * f.col[j] + (1 - beta) * mean);
        });
    f.write(launch.hypers[member]);
    double row_mean = Factors::mean(f.row, f.rows) * inv_bias + eps;
    Exec::sync();
    Exec::each_index(f.rows, [&](int64_t i) INLINED {
        f.row[i] = float(::sqrt(row_mean / (f.row[i] * inv_bias + eps)));
    });
    Exec::each_index(f.cols, [&](int64_t j) INLINED {
        f.col[j] = float(1 / ::sqrt(f.col[j] * inv_bias + eps));
    });
}

HD void after_factor(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    if (!wants_factor(tensor, launch.rule)) return;
    const Hyper& h = launch.hypers[member];
    average(launch, member, kSquare, h.beta2, h.inv_bias2, launch.options[tensor.group].eps);
}

HD void after_residual(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    if (!wants_residual(tensor, launch.rule)) return;
    const Options& o = launch.options[tensor.group];
    average(launch, member, kSlow, o.beta3, 1, o.eps_scale);
}

// Fira's limiter (Chen et al. 2024, arXiv 2410.01623): the factor of an update of this length.
HD double limited(const Tensor& tensor, const Options& o, double length) {
    float& previous = *pointer<float>(tensor.update_norm);
    double scale = 1;
    if (previous > 1e-6f && length > previous * o.growth_limit)
        scale = previous * o.growth_limit / length;
    previous = float(length * scale);
    return scale;
}

// The limiter, then Adafactor's clip of its result.
HD void after_norm(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    const Options& o = launch.options[tensor.group];
    Hyper& h = launch.hypers[member];
    if (!wants_norm(h)) return;
    const double update_sq =
        total(launch, member, [](const TileSums& x) INLINED { return x.update_sq; });
    if (!Exec::leads()) return;
    double length = double(h.direction_scale) * ::sqrt(update_sq), scale = 1;
    if (has(h, kGrowthLimit)) {
        scale = limited(tensor, o, length);
        h.growth_scale = float(scale);
    }
    if (has(h, kClipExact) && tensor.numel > 0) {
        double ratio = length * scale / ::sqrt(double(tensor.numel)) / o.clip_threshold;
        if (ratio > 1) scale /= ratio;
    }
    h.update_scale *= float(scale);
}

// The limiter for a settled update.
HD void after_limit(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    Hyper& h = launch.hypers[member];
    if (!wants_limit(h)) return;
    const double update_sq =
        total(launch, member, [](const TileSums& x) INLINED { return x.update_sq; });
    if (Exec::leads())
        h.settled_scale *= float(limited(tensor, launch.options[tensor.group], ::sqrt(update_sq)));
}

HD void after_align(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    Hyper& h = launch.hypers[member];
    if (!wants_align(h) || tensor.numel == 0) return;
    const double aligned =
        total(launch, member, [](const TileSums& x) INLINED { return x.aligned; });
    double share = aligned / double(tensor.numel);
    if (Exec::leads()) h.cautious_scale = float(1 / (share > 1e-3 ? share : 1e-3));
}

// The new factors of the moments, the count of unusable elements, the tensor's shares of d, and the
// RMS for the next step's lagged clip.
HD void finish(const Launch& launch, int64_t member) {
    const Tensor& tensor = launch.tensors[launch.members[member]];
    const Hyper& h = launch.hypers[member];
    for (int slot = 0; slot < kSlots; ++slot) {
        if (!wants_new_factors(tensor, SlotId(slot), launch.rule)) continue;
        Factors f(launch, member, tensor, SlotId(slot));
        reduce(
            launch, member, tensor, SlotId(slot),
            [&](int64_t i, double mean) { f.row[i] = float(mean); },
            [&](int64_t j, double mean) { f.col[j] = float(mean); });
        f.write(h);
    }
    const double nonfinite =
        total(launch, member, [](const TileSums& x) INLINED { return x.nonfinite; });
    if (Exec::leads()) *pointer<int64_t>(tensor.nonfinite) += int64_t(nonfinite);
    if (tensor.samples.numerator && h.learns) {
        const double progress =
            total(launch, member, [](const TileSums& x) INLINED { return x.progress; });
        const double distance =
            total(launch, member, [](const TileSums& x) INLINED { return x.distance; });
        double& numerator = *pointer<double>(tensor.samples.numerator);
        if (Exec::leads() && int64_t(nonfinite) < tensor.numel) {  // else nothing was learned
            numerator =
                launch.options[tensor.group].beta3 * numerator + h.progress_weight * progress;
            *pointer<double>(tensor.samples.denominator) = distance;
            if (tensor.samples.weight_sum)
                *pointer<double>(tensor.samples.weight_sum) = h.weight_sum;
        }
    }
    if (has(h, kClipLagged) && tensor.numel > 0) {
        const double update_sq =
            total(launch, member, [](const TileSums& x) INLINED { return x.update_sq; });
        double rms = ::sqrt(update_sq / double(tensor.numel));
        if (Exec::leads())
            *pointer<float>(tensor.update_rms) =
                float(double(h.direction_scale) * h.growth_scale * rms);
    }
}

}  // namespace ENGINE_ISA
}  // namespace engine
