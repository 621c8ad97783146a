"""What is recorded at every step: means and spikes; counts survive a resume."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from helpers import QUICK, deterministic, rows

from trainer.objective import noise
from trainer.phases import micro_batches, stepping
from trainer.reporting.clock import OptimizerClock
from trainer.reporting.watch import Watch
from trainer.run import begin, run
from trainer.streams import Stream


def watched(losses, norms=None, watch=None, before=math.nan):
    watch = watch or Watch()
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        watch.step(loss, norm, loss, before)
    return watch


@pytest.mark.parametrize(
    ("losses", "spikes"),
    [
        ([1.0] * 20 + [2.9], 0),
        ([1.0] * 20 + [3.1], 1),
        ([1.0] * 20 + [3.1, 1.0, 9.0], 2),
        ([1.0] * 9 + [9.0], 0),  # too few for a median
        ([1.0] * 20 + [math.nan, math.inf], 0),  # counted by the guard
        ([1.0] * 20 + [5.0] * 100, 20),  # until half of the previous losses are as large
    ],
)
def test_a_spike_is_a_loss_of_three_times_the_median_before_it(losses, spikes):
    assert watched(losses).loss_spikes == spikes


@pytest.mark.parametrize(
    ("losses", "before", "spikes"),
    [
        ([9.0, 90.0, 90.0] + [1.0] * 7, 1.0, 3),
        ([9.0, 90.0, 90.0] + [1.0] * 7, 4.0, 2),
        ([9.0, 90.0, 90.0] + [1.0] * 7, math.nan, 0),
        ([1.0] * 10 + [9.0], 100.0, 1),  # the median is known by then
    ],
)
def test_the_first_losses_are_told_by_the_loss_before_the_first_step(losses, before, spikes):
    watch = Watch()
    for loss in losses:
        watch.step(loss, 1.0, loss, before)
    assert watch.loss_spikes == spikes


@pytest.mark.parametrize(
    ("norms", "ratio"),
    [
        ([2.0] * 20 + [9.0, 2.0, 4.0], 4.5),
        ([1.0] * 9, None),
        ([1.0, 8.0] + [2.0] * 8, 4.0),  # the first ten, by their own median
        ([100.0 * 0.9**step for step in range(60)], 100 / (50 * (0.9**4 + 0.9**5))),
        ([0.0] * 10 + [6.0] * 12, 2.0),  # a median of 0 is no reference
    ],
)
def test_the_largest_gradient_norm_is_told_by_the_median_before_it(norms, ratio):
    found = watched([1.0] * len(norms), norms).grad_norm_over_median
    assert found == (ratio if ratio is None else pytest.approx(ratio))


def test_norms_that_fall_are_no_less_than_their_median():
    for share in (0.5, 0.9, 0.99):
        norms = [share**step for step in range(100)]
        assert watched([1.0] * 100, norms).grad_norm_over_median >= 1


@pytest.mark.parametrize(
    ("relative", "found"),
    [
        ([4.0] * 4, None),  # too few steps
        ([2.9] * 5, None),
        ([3.1] * 5, (5, 3.1)),
        ([1.0] * 5 + [9.0] * 20, (20, 9.0)),
        # Everything that was learned is lost, to no more than the loss before the first step.
        ([0.1] * 50 + [0.9] * 30, (50, 0.58)),
        ([0.1] * 50 + [0.9] * 20, None),
        ([0.1] * 50 + [0.4] * 50, None),  # some of it, as after a restart of the rate
        ([0.1] * 30 + [0.9] * 60, None),  # nothing was low for as many steps
    ],
)
def test_a_run_diverges_far_above_the_loss_before_the_first_step_or_the_lowest(relative, found):
    shown = watched([2 * loss for loss in relative], before=2.0).divergence()
    assert (shown and (shown.steps, pytest.approx(shown.relative_loss))) == found


def test_timesteps_alone_are_no_divergence():
    """Losses of batch 1 that fall a hundredfold over the timesteps, and vary with the picture."""
    for seed in range(20):
        torch.manual_seed(seed)
        t = torch.rand(2000)
        usual = 0.8 * 0.01**t
        quarters = torch.stack([usual[(4 * t).long() == q].mean() for q in range(4)])
        seen, watch = usual * torch.exp(0.35 * torch.randn(2000)), Watch()
        for loss, expected in zip(seen.tolist(), quarters[(4 * t).long()].tolist(), strict=True):
            watch.step(loss, 1.0, loss, expected)
            assert watch.divergence() is None


@pytest.mark.parametrize(
    ("lowest", "then", "is_well"),
    [
        (1.0, [], True),
        (1.0, [1.0] * 50, True),
        (1.0, [1.0] * 40 + [9.0] * 10, False),
        (0.1, [0.3] * 50, True),  # after a restart of the rate, or at its end
        (0.1, [0.1] * 43 + [0.9] * 7, False),
    ],
)
def test_a_checkpoint_is_well_unless_a_divergence_may_have_begun(lowest, then, is_well):
    assert watched([lowest] * 60 + [9.0] * 60).was_well(then) is is_well
    assert watched([]).was_well(then)


def test_a_run_that_diverges_says_so_once_and_its_first_steps_are_spikes(quick):
    options = ["optim=sgd", "optim.lr=5", "schedule=constant", "schedule.steps=8"]
    folder = quick("run", *options)
    said = (folder / "train.log").read_text()
    assert said.count("the run diverges; stop it, and lower optim.lr=5") == 1
    assert json.loads((folder / "summary.json").read_text())["loss_spikes"] > 0


def test_a_step_is_judged_by_what_evaluation_found_in_its_quarters_of_the_timesteps(
    composed, tmp_path
):
    state = begin(composed(*QUICK), tmp_path)
    quarters = ("000_250", "250_500", "500_750", "750_1000")
    state.losses_before = {f"loss_t{edges}": 1.0 + n for n, edges in enumerate(quarters)}
    assert state.losses_are_relative
    drawn = micro_batches.of_step(state)
    drawn[0].rows = [0] * 40
    t = noise.timesteps(state.config.noise, 1000, state.config.seed, drawn[0].number, 40)
    expected = 1 + (t // 250).float().mean().item()
    assert micro_batches.error_before(state, drawn) == pytest.approx(expected)
    state.losses_before.popitem()  # no point was in the last quarter
    assert not state.losses_are_relative
    assert math.isnan(micro_batches.error_before(state, drawn))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "options", [["loss=huber"], ["loss.weighting=debiased"], ["data.batch_size=3"]]
)
def test_what_is_judged_is_the_squared_error_whatever_the_loss(
    composed, tmp_path, monkeypatch, options, accumulation
):
    """Of the mean over the samples of all micro-batches, one of which may be short."""
    seen = []
    monkeypatch.setattr(Watch, "step", lambda self, *a: seen.append(a))
    options = [*QUICK, "optim=adamw", f"runtime.accumulation={accumulation}", *options]
    state = begin(composed(*options), tmp_path)
    drawn = micro_batches.of_step(state)
    made = [micro_batches._predicted(state, batch.number) for batch in drawn]
    errors = [(prediction - batch.target).square().flatten(1) for batch, prediction in made]
    stepping.take(state)
    assert seen[0][2] == pytest.approx(torch.cat(errors).mean().item())


def test_noise_that_evaluation_does_not_have_may_add_to_the_loss_from_the_first_step(
    composed, tmp_path
):
    """Of a sound run: late losses are much smaller than the variance of an offset of 0.3."""
    unusual = ("noise.pyramid=0.4", "noise.offset=0.3", "noise.input_perturbation=0.2")
    state = begin(composed(*QUICK, *unusual), tmp_path)
    quarters = ("000_250", "250_500", "500_750", "750_1000")
    state.losses_before = {f"loss_t{edges}": 0.01 for edges in quarters}
    expected = micro_batches.error_before(state, micro_batches.of_step(state))
    assert expected == pytest.approx(0.01 + 0.4**2 + 0.3**2 + 0.2**2)
    # Coarse noise has at most that part of the variance.
    for discount in (0.4, 0.8):
        config = composed(f"noise.pyramid={discount}").noise
        drawn = torch.stack([noise.draw(config, torch.zeros(4, 32, 32), 0, n, 0) for n in range(9)])
        white = torch.stack([noise.normal((4, 32, 32), Stream.NOISE, 0, n, 0) for n in range(9)])
        share = (drawn * white).mean() / white.square().mean()
        assert 0 < 1 - share**2 <= noise.unforeseen(config)


def test_a_report_has_the_mean_loss_and_the_largest_norm_since_the_one_before():
    watch = watched([1.0, 2.0, math.nan, 6.0], [5.0, 7.0, 1.0, 6.0])
    assert watch.lately() == {"loss": 3.0, "grad_norm_max": 7.0}
    watched([1.0], [0.5], watch)
    assert watch.lately() == {"loss": 1.0, "grad_norm_max": 0.5}
    assert all(map(math.isnan, watch.lately().values()))


def test_what_was_watched_goes_on_where_it_was_saved():
    losses = [1.0 + step % 7 / 3 for step in range(40)] + [9.0, 1.0, 8.0]
    norms = [2.0 + step % 5 for step in range(43)]
    for cut in (5, 30, 41):
        half = watched(losses[:cut], norms[:cut])
        again = Watch(**json.loads(json.dumps(asdict(half))))
        assert watched(losses[cut:], norms[cut:], again) == watched(losses, norms)


def test_a_line_of_metrics_is_the_mean_of_its_steps_through_a_resume_too(composed, tmp_path):
    """Steps 3 and 4 share a line; the run is resumed between them."""
    every = ("runtime.save_every=3", "runtime.keep_checkpoints=9", "optim=adamw")
    run(composed(*QUICK, *every), tmp_path / "each")
    run(composed(*QUICK, *every, "log.every=2"), tmp_path / "two")
    single, double = (
        [row for row in rows(tmp_path / name) if "train/loss" in row] for name in ("each", "two")
    )
    losses = [row["train/loss"] for row in single]
    norms = [row["train/grad_norm"] for row in single]
    assert [row["train/loss"] for row in double] == [sum(losses[:2]) / 2, sum(losses[2:]) / 2]
    assert [row["train/grad_norm_max"] for row in double] == [max(norms[:2]), max(norms[2:])]
    assert [row["train/grad_norm"] for row in double] == norms[1::2]

    checkpoint = f"resume={tmp_path}/two/checkpoints/step-000003"
    run(composed(*QUICK, *every, "log.every=2", checkpoint), tmp_path / "fork")
    assert deterministic(tmp_path / "fork")[-2:] == deterministic(tmp_path / "two")[-2:]


def test_the_optimizers_own_time_is_part_of_its_step(finished):
    folder = finished("run", "optim=adamw")
    told = [row for row in rows(folder) if "perf/optimizer_seconds_per_step" in row]
    assert [row["step"] for row in told] == [2, 3, 4]  # a session's first step is not measured
    for row in told:
        assert 0 < row["perf/optimizer_seconds_per_step"] < row["perf/seconds_per_step"]
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["optimizer_seconds_per_step"] < summary["seconds_per_step"]
    assert summary["lr"] > 0
    assert summary["optimizer"] == "adamw"


def test_a_fused_backwards_optimizer_has_no_time_of_its_own(quick):
    folder = quick("run", "optim=lomo")
    assert not any("perf/optimizer_seconds_per_step" in row for row in rows(folder))
    assert json.loads((folder / "summary.json").read_text())["optimizer_seconds_per_step"] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_optimizers_time_is_measured_by_events():
    clock, work = OptimizerClock(torch.device("cuda"), False), torch.ones(2048, 2048, device="cuda")
    for _ in range(3):
        with clock.measuring():
            work @ work
    torch.cuda.synchronize()
    assert 0 < clock.lately()["optimizer_seconds_per_step"] < 1
    assert clock.lately() == {}
