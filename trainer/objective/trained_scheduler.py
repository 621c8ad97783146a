"""The scheduler that a trained model is drawn with: its own, with the changes of `noise=`."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import diffusers

from trainer.config import NoiseConfig
from trainer.config.noise import contradiction
from trainer.errors import UserError
from trainer.formats import schedulers
from trainer.formats.schedulers import EPSILON, FLOW, V

log = logging.getLogger(__name__)

# diffusers' list of options that were not given; another class would use its own defaults for them.
_MARKS = "_use_default_values"
# These have betas, too, but can only be inspected if scipy or torchsde is installed.
_WITH_EXTRAS = ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")


def scheduler_config(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler's configuration after training: `model` (its scheduler_config.json), with the
    changes of `noise=`, if any.

    Raises UserError for a scheduler without betas that is not of flow matching, a prediction type
    that training does not know, and options that the prediction type excludes.
    """
    model = {k: v for k, v in model.items() if k != _MARKS}
    _must_be_known(model)
    wanted = config.prediction
    if wanted == "model":
        wanted = schedulers.noise(model)["prediction_type"]
    if wrong := contradiction(config, wanted):
        raise UserError(wrong)
    result = (_of_flow if wanted == FLOW else _of_betas)(config, model)
    for key, value in result.items():
        if model.get(key) != value:
            log.info("noise: the scheduler's %s: %s -> %s", key, model.get(key), value)
    return result


def _of_flow(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    result = schedulers.flow(model)
    if config.flow_shift is not None:
        result["flow_shift"] = config.flow_shift
    return result


def _of_betas(config: NoiseConfig, model: Mapping[str, Any]) -> dict[str, Any]:
    if schedulers.is_flow(model):
        raise UserError(
            f"the model is one of flow matching, and noise.prediction={config.prediction} needs "
            "betas, which its scheduler lacks; use noise.prediction=model"
        )
    changes: dict[str, Any] = {}
    if config.prediction != "model":
        changes["prediction_type"] = config.prediction
    if config.zero_terminal_snr:
        changes |= schedulers.zero_snr(model)
    elif config.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = False
    result = {**model, **changes}
    prediction = result.get("prediction_type", EPSILON)
    if prediction not in (EPSILON, V):
        raise UserError(
            f"the model's scheduler predicts {prediction!r}; epsilon, v_prediction and "
            "flow_prediction can be trained: set noise.prediction=v_prediction"
        )
    if prediction == EPSILON and result.get("rescale_betas_zero_snr"):
        raise UserError(
            "epsilon prediction has nothing to predict from at zero terminal SNR; set "
            "noise.prediction=v_prediction, or noise.zero_terminal_snr=false"
        )
    return result


def _must_be_known(model: Mapping[str, Any]) -> None:
    """Refuse a scheduler of another family (EDM, flow matching with other timesteps): its
    configuration lacks what training reads, and defaults would be used instead."""
    name = model["_class_name"]
    if name == schedulers.EULER:
        return
    scheduler = getattr(diffusers, name, None)
    options = inspect.signature(scheduler).parameters if scheduler else {}
    has_betas = name in _WITH_EXTRAS or {"beta_start", "prediction_type"} <= set(options)
    is_flow = "use_flow_sigmas" in options and bool(model.get("use_flow_sigmas"))
    if not has_betas or is_flow != schedulers.is_flow(model):
        predicts, sigmas = model.get("prediction_type"), model.get("use_flow_sigmas", False)
        told = f" with use_flow_sigmas={sigmas} and prediction_type={predicts}"
        raise UserError(
            f"the model's scheduler is {name}{told if has_betas else ''}, and only beta schedules, "
            "as of DDPMScheduler or EulerDiscreteScheduler, and flow matching "
            f"({schedulers.EULER}, or DPMSolverMultistepScheduler and the like with "
            "use_flow_sigmas=True and flow_prediction) can be trained; use a model with such a "
            "scheduler/scheduler_config.json"
        )
