"""What a scheduler's configuration says of the noise that a model is trained on, how it is changed,
and how single files and LoRAs say the same."""

import inspect
import logging
import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import diffusers

from trainer.errors import UserError

log = logging.getLogger(__name__)

EPSILON, V, FLOW = "epsilon", "v_prediction", "flow_prediction"  # as diffusers names predictions
V_PRED, ZTSNR = "v_pred", "ztsnr"  # empty tensors that ComfyUI looks for
_PREDICTION_TYPE = "modelspec.prediction_type"
_FLOW_SHIFT = "ss_discrete_flow_shift"  # of kohya's scripts for FLUX and SD3
# modelspec defines `epsilon` and `v`, and leaves other names open.  SwarmUI, by modelspec's author,
# takes `sd3` for a flow, and hands names that it does not know to a node that refuses them.
_SHORT = {EPSILON: "epsilon", V: "v", FLOW: "sd3"}
_IN_WORDS = {EPSILON: "noise", V: "v", FLOW: "a flow"}
EULER = "FlowMatchEulerDiscreteScheduler"  # always of flow matching, whatever else it says

_BETAS = {  # the keys that define the noise, and their defaults
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": EPSILON,
    "rescale_betas_zero_snr": False,
}


def is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether the model of this scheduler is one of flow matching, which has no betas."""
    return scheduler.get("_class_name") == EULER or scheduler.get("prediction_type") == FLOW


def noise(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a scheduler's configuration that defines the noise a model is trained on."""
    if is_flow(scheduler):
        count = scheduler.get("num_train_timesteps", _BETAS["num_train_timesteps"])
        return {"num_train_timesteps": count, "prediction_type": FLOW}
    return {key: scheduler.get(key, default) for key, default in _BETAS.items()}


def zero_snr(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The changes that give a scheduler's configuration zero terminal SNR (Lin et al. 2023,
    arXiv 2305.08891): betas rescaled, sampling from the last timestep on ("trailing").

    A class that cannot rescale, such as PNDM, becomes DDIM, which by default, unlike the others,
    clips predicted latents to [-1, 1]; that is turned off.
    """
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    options = inspect.signature(getattr(diffusers, scheduler["_class_name"])).parameters
    if "rescale_betas_zero_snr" in options:
        return changes
    return changes | {"_class_name": "DDIMScheduler", "clip_sample": False}


def flow(scheduler: Mapping[str, Any], shift: float = 1.0) -> dict[str, Any]:
    """A scheduler of flow matching in place of `scheduler`, unless it is one that the pipelines of
    Stable Diffusion can use (as FlowMatchEulerDiscreteScheduler and dynamic shifts are not).

    Euler's method, which is DPM-Solver++'s first order, from sigma = 1 to 0: sigma is s u / (1 +
    (s - 1) u) for evenly spaced u (Esser et al. 2024, arXiv 2403.03206, eq. 23).  s = `flow_shift`
    is that of `scheduler`, or `shift` if that is of another noise.
    Raises UserError for one of flow matching whose numbers make no sense.
    """
    count = noise(scheduler)["num_train_timesteps"]
    if is_flow(scheduler):
        is_euler = scheduler.get("_class_name") == EULER
        key = "shift" if is_euler else "flow_shift"
        shift = scheduler.get(key, 1.0)
        for name, value in (("num_train_timesteps", count), (key, shift)):
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UserError(
                    f"the {name} of the model's scheduler, {scheduler['_class_name']}, is "
                    f"{value!r}; correct its scheduler/scheduler_config.json"
                )
        is_dynamic = scheduler.get("use_dynamic_shifting")  # by a number that pipelines must pass
        if scheduler.get("use_flow_sigmas") and not (is_euler or is_dynamic):
            return {**scheduler, "flow_shift": shift}
    return {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": count,
        "prediction_type": FLOW,
        "use_flow_sigmas": True,
        "flow_shift": shift,
        "solver_order": 1,
    }


def usable(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler that the pipelines of Stable Diffusion use for a model with this one: the same,
    unless it is one of flow matching that they cannot use.  Raises UserError as `flow` does."""
    return flow(scheduler) if is_flow(scheduler) else {**scheduler}


def marks(scheduler: Mapping[str, Any]) -> list[str]:
    """The empty tensors that mark a single file's prediction type and terminal SNR.  (There is none
    for flow matching.)"""
    of = noise(scheduler)
    if of["prediction_type"] != V:
        return []
    return [V_PRED, ZTSNR] if of["rescale_betas_zero_snr"] else [V_PRED]


def marked(
    scheduler: dict[str, Any], names: Container[str], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """`scheduler` with the changes that a file's marks imply.

    `v_pred` and `ztsnr` are empty tensors; `modelspec.prediction_type` is `epsilon`, `v` or `sd3`
    (a flow).
    """
    kind = metadata.get(_PREDICTION_TYPE, "")
    if kind == _SHORT[FLOW]:
        return scheduler if is_flow(scheduler) else flow(scheduler)
    if V_PRED not in names and not kind.startswith("v"):
        return scheduler
    changed = scheduler | {"prediction_type": V}
    return changed | zero_snr(scheduler) if ZTSNR in names else changed


def described(scheduler: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file on the noise it was trained with: modelspec's key."""
    return {_PREDICTION_TYPE: _SHORT[noise(scheduler)["prediction_type"]]}


def described_lora(scheduler: Mapping[str, Any]) -> dict[str, str]:
    """A LoRA's metadata on the noise it was trained with, which whoever loads it must set: the keys
    of modelspec and of kohya's scripts."""
    of = noise(scheduler)
    shift = {_FLOW_SHIFT: str(flow(scheduler)["flow_shift"])} if is_flow(scheduler) else {}
    return (
        described(scheduler)
        | shift
        | {
            "ss_v_parameterization": str(of["prediction_type"] == V),
            "ss_zero_terminal_snr": str(bool(of.get("rescale_betas_zero_snr"))),
        }
    )


def with_lora(lora: Path, described: Mapping[str, str], own: dict[str, Any]) -> dict[str, Any]:
    """The scheduler of a model with a LoRA: the model's `own`, changed to the noise that the LoRA
    was trained with if its metadata, `described`, says that it predicts v or a flow."""
    trained, predicts = _trained(described), noise(own)["prediction_type"]
    if trained is None or (trained == predicts and trained != V):
        return own
    if trained == EPSILON or predicts == FLOW:
        log.warning(
            "%s was trained to predict %s, and its model predicts %s; the model's scheduler is "
            "used",
            lora,
            _IN_WORDS[trained],
            _IN_WORDS.get(predicts, predicts),
        )
        return own
    if trained == FLOW:
        changed = flow(own, _shift(lora, described))
    else:
        is_zero = described.get("ss_zero_terminal_snr") == "True"
        changed = marked(own, [V_PRED, ZTSNR] if is_zero else [V_PRED], {})
    if noise(changed) == noise(own):
        return own
    name = "v-prediction" if trained == V else "flow matching"
    log.info("%s: with the scheduler that the LoRA was trained with (%s)", lora, name)
    return changed


def _trained(described: Mapping[str, str]) -> str | None:
    """What a LoRA was trained to predict, by its metadata; None if it does not say."""
    kind = described.get(_PREDICTION_TYPE)
    if kind == _SHORT[FLOW]:
        return FLOW
    says = described.get("ss_v_parameterization", kind)
    if says is None:
        return None
    return V if says in ("True", "v") else EPSILON


def _shift(lora: Path, described: Mapping[str, str]) -> float:
    """The shift of a LoRA of flow matching, by its metadata; 1 if it does not say."""
    told = described.get(_FLOW_SHIFT, "1")
    try:
        shift = float(told)
    except ValueError:
        shift = math.nan
    if 0 < shift < math.inf:
        return shift
    log.warning("%s: its %s is %r, which is no shift; 1 is used", lora, _FLOW_SHIFT, told)
    return 1.0
