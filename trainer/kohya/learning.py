"""The optimizer, the learning rate along a run, and the loss."""

from typing import Any

import optim
from optim.options import unknown_option
from trainer.kohya.reading import ScriptOptions
from trainer.kohya.translation import Translation, arguments_of, number, rate_of

# optimizer_type in lower case -> (optim=, its options)
_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {}),
    "adamw8bit": ("adamw8bit", {}),
    "pagedadamw": ("adamw", {}),
    "pagedadamw8bit": ("adamw8bit", {}),
    "pagedadamw32bit": ("adamw", {}),
    "lion": ("lion", {}),
    "lion8bit": ("lion8bit", {}),
    "pagedlion8bit": ("lion8bit", {}),
    "sgdnesterov": ("sgd", {"nesterov": True}),
    "sgdnesterov8bit": ("sgd", {"nesterov": True, "storage": "8bit"}),
    "adafactor": ("adafactor8bit", {"beta2": None}),
    "prodigy": ("prodigy", {"slice_p": 1}),
    "came": ("came", {}),
    "came8bit": ("came8bit", {}),
    "adamwschedulefree": ("adamw_schedulefree", {}),
    "prodigyplusschedulefree": ("prodigy_schedulefree", {"betas": (0.9, 0.99)}),
}
_CALLED = {  # optimizer_args -> ours
    "use_bias_correction": "bias_correction",
    "use_orthograd": "orthograd",
}
# optimizer_args that need not be said
_ALWAYS = {"decouple": True, "bias_correction": False, "split_groups": False}
_DECAYING = ("adamw", "adamw8bit")  # theirs decay weights by 0.01 unless told otherwise
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "adafactor": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "polynomial": "polynomial",
    "warmup_stable_decay": "wsd",
}


def optimizer(given: ScriptOptions, made: Translation) -> None:
    """Which optimizer, its rate and its options."""
    kind = str(given.take("optimizer_type") or "AdamW")
    kind = "AdamW8bit" if given.take("use_8bit_adam") else kind
    kind = "Lion" if given.take("use_lion_optimizer") else kind
    arguments = arguments_of("optimizer_args", given.take("optimizer_args", []))
    name, options = _OPTIMIZERS.get(kind.rpartition(".")[2].lower(), ("", {}))
    rate: Any = given.take("learning_rate", 2e-6)
    rate = given.take_on("unet_lr") or rate
    if not name:
        made.note(f"optimizer_type={kind}: not translated; choose one with optim=")
        made.set("optim.lr", rate_of(rate))
        return
    options = {**options}
    if name == "prodigy_schedulefree":
        if not arguments.pop("use_schedulefree", True):
            name = "prodigy"
        elif "d_coef" in arguments:  # 1 there is 2 here, the defaults
            arguments["d_coef"] = 2 * number("d_coef", arguments["d_coef"])
    if name == "adafactor8bit":
        options["scale_parameter"] = bool(arguments.pop("scale_parameter", True))
        if not arguments.get("warmup_init", True):
            del arguments["warmup_init"]
        if arguments.pop("relative_step", True):
            options["relative_step"], rate = True, 1e-2
    made.choose(f"optim={name}")
    made.set("optim.lr", rate_of(rate))
    known = optim.options_of(name)
    decay = 0.01 if name in _DECAYING else 0.0
    arguments.setdefault("weight_decay", decay)
    if arguments["weight_decay"] == known["weight_decay"][1]:
        del arguments["weight_decay"]
    for theirs, value in (options | arguments).items():
        key = _CALLED.get(theirs, theirs)
        if key in known:
            made.set(f"optim.{key}", value)
        elif _ALWAYS.get(key) != value:
            made.note(f"optimizer_args {key}: {unknown_option(name, key, known)}")


def length(given: ScriptOptions, made: Translation) -> None:
    """The length of the run, and the rate along it."""
    epochs, steps = given.take("max_train_epochs"), given.take("max_train_steps", 1600)
    kind = str(given.take("lr_scheduler", "constant"))
    if str(given.take("optimizer_type") or "").lower().endswith("schedulefree"):
        kind = "constant"  # as theirs, which judge by the name: the weights are averaged instead
    if (replaced := given.take("lr_scheduler_type")) is not None:  # by a class
        kind = str(replaced)
        given.take("lr_scheduler_args")
    schedule = _SCHEDULES.get(kind)
    if schedule is None:
        made.note(f"lr_scheduler={kind}: not translated; choose one with schedule=")
    made.choose(f"schedule={schedule or 'constant'}")
    if epochs is None:
        made.set("schedule.steps", steps)
    else:
        made.set("schedule.epochs", epochs)
    cycles, power = given.take("lr_scheduler_num_cycles", 1), given.take("lr_scheduler_power", 1)
    least, decay = given.take("lr_scheduler_min_lr_ratio"), given.take("lr_decay_steps", 0)
    if schedule == "cosine_restarts":
        made.set("schedule.cycles", cycles)
    if schedule == "polynomial":
        made.set("schedule.power", power)
    if schedule == "wsd":
        made.set("schedule.shape", "cosine")
    if least is not None and kind in ("cosine_with_min_lr", "warmup_stable_decay"):
        made.set("schedule.final_scale", least)
    warmup = number("lr_warmup_steps", given.take("lr_warmup_steps", 0))
    if schedule == "wsd":
        share = number("lr_decay_steps", decay)
        made.set("schedule.decay", share if share < 1 else share / number("", steps))
    if kind == "constant":
        warmup = 0
    if 0 < warmup < 1 and epochs is not None:
        made.note(f"lr_warmup_steps={warmup:g}: set schedule.warmup_steps to that share of the run")
    else:
        made.set(
            "schedule.warmup_steps",
            round(warmup * number("max_train_steps", steps) if warmup < 1 else warmup),
        )


def objective(given: ScriptOptions, made: Translation) -> None:
    """The loss, its weights, and kinds of noise."""
    kind = given.take("loss_type", "l2")
    delta, rule = given.take("huber_c", 0.1), given.take("huber_schedule", "snr")
    if kind in ("huber", "smooth_l1"):
        made.choose("loss=huber")
        made.set("loss.delta", delta)
        made.set("loss.schedule", rule)
        made.note(f"loss_type={kind}: Huber's loss, whose scale is not theirs; the rate may differ")
    elif kind != "l2":
        made.note(f"loss_type={kind}: there is no such loss here; this is the squared error")
    if given.take("flow_model"):
        _flow(given, made)
    if (gamma := given.take_on("min_snr_gamma")) is not None:
        made.set("loss.weighting", "min_snr")
        made.set("loss.gamma", gamma)
    discount = given.take("multires_noise_discount", 0.3)
    if given.take_on("multires_noise_iterations") is not None:
        made.set("noise.pyramid", discount)


def _flow(given: ScriptOptions, made: Translation) -> None:
    """Flow matching for SDXL, which forks of the scripts have (67372a/sd-scripts, pull request
    223)."""
    made.choose("noise=flow_matching")
    for option in ("min_snr_gamma", "debiased_estimation_loss"):
        if given.options.pop(option, None):
            made.note(f"{option}: left out, as theirs ignores it with flow_model; loss.weighting")
    drawn = str(given.take("flow_timestep_distribution", "logit_normal"))
    mean, std = given.take("flow_logit_mean", 0.0), given.take("flow_logit_std", 1.0)
    made.set("noise.timesteps", drawn)
    if drawn == "logit_normal":
        made.set("noise.logit_mean", mean)
        made.set("noise.logit_std", std)
    made.set("noise.timestep_shift", given.take_on("flow_uniform_static_ratio") or 1.0)
