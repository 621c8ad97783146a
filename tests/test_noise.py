"""Noise: timesteps and noise have the distributions of their sources; how a scheduler's
configuration is changed."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_snr,
)

from trainer.errors import UserError
from trainer.formats import schedulers
from trainer.objective import noise
from trainer.objective.batches import Inputs, noised
from trainer.objective.noise_schedule import training_schedule
from trainer.objective.trained_scheduler import scheduler_config

LIKE = torch.zeros(4, 16, 24)


def drawn_timesteps(config, size=8, batches=300):
    return torch.stack([noise.timesteps(config, 1000, 0, t, size) for t in range(batches)])


def draws(config, count=200, like=LIKE):
    return torch.stack([noise.draw(config, like, 0, number, 0) for number in range(count)])


def test_timesteps_are_stratified_and_uniform(noise_config):
    size = 8
    drawn = drawn_timesteps(noise_config(), size)
    strata = torch.arange(size) * 1000 // size
    assert ((drawn >= strata) & (drawn < strata + 1000 // size)).all()
    assert drawn.float().mean().item() == pytest.approx(499.5, abs=8)


def test_a_range_of_timesteps_is_covered_evenly_and_not_left(noise_config):
    drawn = drawn_timesteps(noise_config(timestep_low=200, timestep_high=300), batches=600)
    assert drawn.min() == 200
    assert drawn.max() == 299
    counts = torch.bincount(drawn.flatten() - 200, minlength=100)
    assert counts.min() > 24  # 48 on average
    assert counts.max() < 80


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.6)])
def test_logit_normal_timesteps_are_distributed_as_diffusers_draws_them(noise_config, mean, std):
    config = noise_config(timesteps="logit_normal", logit_mean=mean, logit_std=std)
    ours = drawn_timesteps(config, batches=1000).flatten()
    theirs = compute_density_for_timestep_sampling(
        "logit_normal",
        8000,
        logit_mean=mean,
        logit_std=std,
        generator=torch.Generator().manual_seed(0),
    )
    quantiles = torch.linspace(0.02, 0.98, 25)
    distance = (ours / 1000).quantile(quantiles) - theirs.quantile(quantiles)
    assert distance.abs().max() < 0.02


def test_logit_normal_timesteps_are_stratified_too(noise_config):
    drawn = drawn_timesteps(noise_config(timesteps="logit_normal"))
    assert (drawn.diff(dim=1) >= 0).all()


def test_draws_at_the_ends_are_timesteps_still(noise_config, monkeypatch):
    for value in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(noise.rng, "uniform", lambda *counters, value=value: value)
        for kind in ("uniform", "logit_normal"):
            config = noise_config(timesteps=kind, logit_std=10.0)
            drawn = noise.timesteps(config, 1000, 0, 0, 16)
            assert drawn.min() >= 0
            assert drawn.max() <= 999


def test_offset_noise_is_white_noise_and_a_constant_for_each_channel(noise_config):
    shift = draws(noise_config(offset=0.2)) - draws(noise_config())
    constant = shift.mean(dim=(2, 3))
    assert torch.allclose(shift, constant[:, :, None, None].expand_as(shift), atol=1e-6)
    assert constant.std().item() == pytest.approx(0.2, rel=0.1)
    assert constant.mean().item() == pytest.approx(0, abs=0.03)
    assert abs(torch.corrcoef(constant.T) - torch.eye(4)).max() < 0.3


def spectrum(noises):
    """The mean power at each distance from frequency zero, in rings one unit wide."""
    side = noises.shape[-1]
    power = torch.fft.fft2(noises).abs().square().mean(dim=(0, 1)) / side**2
    frequency = torch.fft.fftfreq(side) * side
    radius = (frequency[:, None].square() + frequency.square()).sqrt().round().long().flatten()
    return torch.zeros(side).index_add_(0, radius, power.flatten()) / torch.bincount(
        radius, minlength=side
    )


def test_pyramid_noise_has_more_power_at_coarse_scales_and_unit_deviation(noise_config):
    like = torch.zeros(4, 32, 32)
    white = draws(noise_config(), 100, like)
    flat, strong = (draws(noise_config(pyramid=d), 100, like) for d in (0.0, 0.8))
    assert torch.allclose(strong.std(dim=(1, 2, 3)), torch.ones(100), atol=1e-5)
    assert torch.equal(flat, white)  # 0 turns it off
    power = spectrum(strong)
    assert power[1] > 3 * power[4] > 3 * power[12]
    assert spectrum(white)[1:12].max() < 1.3


def test_pyramid_noise_fits_any_shape(noise_config):
    for shape in ((4, 1, 7), (4, 3, 2), (4, 5, 128)):
        drawn = noise.draw(noise_config(pyramid=0.5), torch.zeros(shape), 0, 0, 0)
        assert drawn.shape == shape
        assert drawn.isfinite().all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow_prediction"])
def test_input_perturbation_is_in_the_input_and_not_in_the_target(
    noise_config, make_schedule, prediction
):
    """Ning et al. 2023: y = a x + s (e + gamma xi), and the target still uses e."""
    noise_schedule = make_schedule(prediction_type=prediction)
    generator = torch.Generator().manual_seed(0)
    inputs = Inputs(
        latents=torch.randn(8, 4, 16, 16, generator=generator),
        prompt=torch.zeros(8, 1, 1),
        pooled=None,
        time_ids=None,
    )
    plain, perturbed = (
        noised(inputs, noise_schedule, noise_config(input_perturbation=gamma), 0, 0)
        for gamma in (0.0, 0.1)
    )
    assert torch.equal(plain.target, perturbed.target)
    s = noise_schedule.sigma[plain.timesteps].view(-1, 1, 1, 1)
    added = (perturbed.noisy - plain.noisy) / s
    assert added.std().item() == pytest.approx(0.1, rel=0.05)
    drawn = torch.stack([noise.draw(noise_config(), LIKE[:, :, :16], 0, 0, i) for i in range(8)])
    assert abs(torch.corrcoef(torch.stack([added.flatten(), drawn.flatten()]))[0, 1]) < 0.05


def test_every_kind_of_draw_has_a_stream_of_its_own(noise_config):
    kinds = noise_config(offset=0.3, input_perturbation=1.0)
    white = draws(noise_config(), 3)
    assert torch.equal(draws(kinds, 3), draws(noise_config(offset=0.3), 3))
    more = torch.stack([noise.perturbed(kinds, x, 0, n, 0) for n, x in enumerate(white)]) - white
    assert not torch.allclose(more, white, atol=0.1)


@pytest.mark.parametrize("terminal", [False, True])
def test_snr_is_that_of_diffusers_where_it_is_not_zero(make_schedule, make_ddpm, terminal):
    timesteps = torch.arange(1000)
    ratio = make_schedule(rescale_betas_zero_snr=terminal).snr(timesteps)
    expected = compute_snr(make_ddpm(rescale_betas_zero_snr=terminal), timesteps)
    assert torch.allclose(ratio, expected, rtol=1e-4, atol=1e-9)
    assert (ratio[-1] == 0) == terminal
    assert ratio.isfinite().all()


SDXL = {  # from its scheduler_config.json
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def test_without_options_the_scheduler_stays_as_it_is(noise_config):
    assert scheduler_config(noise_config(), SDXL) == SDXL
    older = {k: v for k, v in SDXL.items() if k != "prediction_type"}  # the default, epsilon
    assert scheduler_config(noise_config(), older) == older


def test_zero_terminal_snr_is_written_for_whoever_draws_with_the_model(noise_config):
    options = noise_config(prediction="v_prediction", zero_terminal_snr=True)
    written = scheduler_config(options, SDXL)
    changed = {k: v for k, v in written.items() if SDXL.get(k) != v}
    assert changed == {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    noise_schedule = training_schedule(written, options)
    assert noise_schedule.signal[-1] == 0
    euler = EulerDiscreteScheduler.from_config(written)
    euler.set_timesteps(10)
    assert euler.timesteps[0] == 999  # no signal at all there
    assert torch.allclose(euler.alphas_cumprod[:-1].sqrt(), noise_schedule.signal[:-1])


def test_zero_terminal_snr_can_be_taken_off(noise_config):
    model = SDXL | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    options = noise_config(prediction="epsilon", zero_terminal_snr=False)
    written = scheduler_config(options, model)
    noise_schedule = training_schedule(written, options)
    plain = DDPMScheduler.from_config(SDXL)
    assert torch.equal(noise_schedule.signal, plain.alphas_cumprod.sqrt())
    assert noise_schedule.prediction == "epsilon"


@pytest.mark.parametrize("name", ["PNDM", "DEISMultistep", "KDPM2Discrete"])
def test_a_scheduler_that_cannot_rescale_its_betas_becomes_one_that_can(noise_config, name):
    cls = getattr(diffusers, f"{name}Scheduler")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    model = {"_class_name": cls.__name__} | dict(cls(**betas).config)
    options = noise_config(prediction="v_prediction", zero_terminal_snr=True)
    written = scheduler_config(options, model)
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    assert scheduler.alphas_cumprod[-1] == 0
    assert not scheduler.config.clip_sample  # latents go beyond [-1, 1]
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[0] == 999


FLOWS = [
    SDXL | {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0},
    {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 2.0,
    },
]


OWN_FLOWS = [*FLOWS, {k: v for k, v in FLOWS[1].items() if k != "flow_shift"}]
OWN_FLOWS += [FLOWS[0] | {"flow_shift": 5.0, "use_flow_sigmas": True}]  # left by another class


def test_a_shift_that_pipelines_would_have_to_pass_becomes_a_constant_one(noise_config):
    written = scheduler_config(noise_config(), FLOWS[1] | {"use_dynamic_shifting": True})
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    scheduler.set_timesteps(8)  # without it
    assert written["flow_shift"] == 2.0


@pytest.mark.parametrize("model", OWN_FLOWS)
def test_a_model_of_flow_matching_is_trained_as_one(noise_config, model):
    written = scheduler_config(noise_config(), model)
    noise_schedule = training_schedule(written, noise_config())
    assert noise_schedule.prediction == "flow_prediction"
    assert written["flow_shift"] == (1.0 if model == OWN_FLOWS[2] else 2.0)
    if model["_class_name"].startswith("UniPC"):
        assert written == {"flow_shift": 1.0} | model
    told = schedulers.described_lora(model)
    assert told["ss_discrete_flow_shift"] == str(written["flow_shift"])
    assert scheduler_config(noise_config(flow_shift=4.0), model)["flow_shift"] == 4.0


def test_a_flow_is_a_straight_line_from_the_picture_to_noise(noise_config, make_schedule):
    """Lipman et al. 2023: x_t = (1 - s) x + s e, whose velocity is e - x; s = 1 is pure noise."""
    flow = make_schedule(prediction_type="flow_prediction", use_flow_sigmas=True)
    generator = torch.Generator().manual_seed(0)
    x, e = (torch.randn(1000, 4, 2, 2, generator=generator) for _ in range(2))
    every = torch.arange(1000)
    s = ((every + 1) / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(flow.noisy(x, e, every), torch.lerp(x, e, s), atol=1e-6)
    assert torch.equal(flow.noisy(x, e, every)[-1], e[-1])
    assert torch.equal(flow.target(x, e, every), e - x)
    assert torch.equal(flow.time(every), every + 1)  # 1000 s
    assert torch.allclose(flow.snr(every), ((1 - s) / s).square().flatten(), rtol=1e-4)


@pytest.mark.parametrize("model", [SDXL, *FLOWS])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_what_a_model_of_flow_matching_has_learned_is_what_its_scheduler_draws(
    noise_config, model, shift
):
    """A UNet that knows the one picture there is: from the noise, at the times it was trained at,
    sampling arrives at the picture."""
    options = noise_config(prediction="flow_prediction", flow_shift=shift)
    written = scheduler_config(options, model)
    flow = training_schedule(written, options)
    scheduler = getattr(diffusers, written["_class_name"]).from_config(written)
    scheduler.set_timesteps(8)
    picture = torch.linspace(-2, 2, 16).view(1, 1, 4, 4)
    x = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for time, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        step = (time - flow.time(torch.tensor(0))).clamp(min=0)
        assert flow.sigma[step].item() == pytest.approx(sigma.item(), abs=1.1e-3)
        x = scheduler.step((x - picture) / sigma, time, x).prev_sample
    assert torch.allclose(x, picture, atol=1e-5)


def test_another_noises_flow_shift_is_not_the_flows(noise_config):
    """diffusers writes one into every DPMSolverMultistepScheduler."""
    model = SDXL | {"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 1.0}
    assert schedulers.flow(model, 2.5)["flow_shift"] == 2.5


def test_a_shift_moves_timesteps_as_stable_diffusion_3_does(noise_config):
    """Esser et al. 2024, eq. 23, of evenly drawn shares."""
    plain = drawn_timesteps(noise_config(), batches=1000).flatten() / 1000
    moved = drawn_timesteps(noise_config(timestep_shift=3.0), batches=1000).flatten() / 1000
    assert torch.allclose(moved, 3 * plain / (1 + 2 * plain), atol=4e-3)
    assert moved.median().item() == pytest.approx(0.75, abs=0.01)


REFUSED = [
    # our options, the model's, parts of the message
    ({"zero_terminal_snr": True}, {}, ["noise.prediction=v_prediction", "zero_terminal_snr=false"]),
    (
        {"prediction": "epsilon"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        ["noise.zero_terminal_snr=false"],
    ),
    ({}, {"rescale_betas_zero_snr": True}, ["noise.prediction=v_prediction"]),
    ({}, {"prediction_type": "sample"}, ["'sample'", "noise.prediction=v_prediction"]),
    ({"flow_shift": 3.0}, {}, ["noise.flow_shift=3", "noise.prediction=flow_prediction"]),
    ({"prediction": "epsilon"}, FLOWS[0], ["flow matching", "noise.prediction=model"]),
    ({"zero_terminal_snr": True}, FLOWS[1], ["noise.zero_terminal_snr=true", "null"]),
    ({}, FLOWS[0] | {"shift": 0}, ["the shift of", "is 0;", "scheduler_config.json"]),
    ({"flow_shift": 2.0}, FLOWS[1] | {"flow_shift": None}, ["the flow_shift of", "is None;"]),
    ({}, FLOWS[0] | {"num_train_timesteps": None}, ["num_train_timesteps", "is None;"]),
]


@pytest.mark.parametrize(("options", "model", "says"), REFUSED)
def test_what_cannot_be_trained_is_refused_with_the_remedy(noise_config, options, model, says):
    with pytest.raises(UserError) as refused:
        scheduler_config(noise_config(**options), SDXL | model)
    for part in says:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("prediction", "option", "value"),
    [
        ("epsilon", "zero_terminal_snr", True),
        ("epsilon", "flow_shift", 2.0),
        ("v_prediction", "flow_shift", 2.0),
        ("flow_prediction", "zero_terminal_snr", False),
    ],
)
def test_options_that_a_prediction_excludes_are_refused_alike_whoever_names_the_prediction(
    noise_config, composed, prediction, option, value
):
    """noise.prediction, before a model is looked for, or the model."""
    model = {"flow_prediction": FLOWS[1]}.get(prediction, SDXL | {"prediction_type": prediction})
    with pytest.raises(UserError) as by_model:
        scheduler_config(noise_config(**{option: value}), model)
    with pytest.raises(UserError) as by_option:
        composed(f"noise.prediction={prediction}", f"noise.{option}={value}")
    assert str(by_option.value) == str(by_model.value)


BETAS = """DDIM DDPM DEISMultistep DPMSolverMultistep DPMSolverSDE DPMSolverSinglestep EulerDiscrete
EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete LCM LMSDiscrete PNDM TCD
UniPCMultistep"""


@pytest.mark.parametrize("name", BETAS.split())
def test_every_scheduler_of_betas_is_taken(noise_config, name):
    model = SDXL | {"_class_name": f"{name}Scheduler"}
    assert scheduler_config(noise_config(), model) == model


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("SchedulerOfSomebody", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}),
        (  # which has no flow sigmas
            "EulerDiscreteScheduler",
            {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
        ),
    ],
)
def test_a_scheduler_of_another_noise_is_refused_by_name(noise_config, name, options):
    with pytest.raises(UserError, match=name):
        scheduler_config(noise_config(), {"_class_name": name} | options)


def test_timesteps_that_the_model_does_not_have_are_refused(noise_config):
    for options in ({"timestep_high": 1001}, {"timestep_low": 1000}):
        (key,) = options
        with pytest.raises(UserError, match=rf"noise\.{key}=.*\[0, 1000\)"):
            training_schedule(SDXL, noise_config(**options))
    training_schedule(SDXL, noise_config(timestep_low=999, timestep_high=1000))
