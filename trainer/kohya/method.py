"""Which weights are trained: adapters of which layers and ranks, text encoders; and the gradients'
clip."""

from typing import Any

from trainer.errors import UserError
from trainer.kohya.reading import ScriptOptions
from trainer.kohya.translation import Translation, arguments_of, number

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# All layers of a transformer block's module, which their LoRAs adapt.
_TRANSFORMER = (*_ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_RESNETS = (
    *("resnets.*conv1", "resnets.*conv2", "conv_shortcut", "time_emb_proj"),
    *("downsamplers.0.conv", "upsamplers.0.conv"),
)
_PRESETS = {  # of LyCORIS -> whether its resnets are adapted
    **dict.fromkeys(("full", "unet-only"), True),
    **dict.fromkeys(("attn-mlp", "unet-transformer-only"), False),
}
_METHODS = {  # kohya's modules and LyCORIS's algorithms -> method=
    **dict.fromkeys(("networks.lora", "lora", "locon"), "lora"),
    **dict.fromkeys(("networks.lokr", "lokr"), "lokr"),
    **dict.fromkeys(("networks.loha", "loha"), "loha"),
}
_WHOLE = 10_000  # a rank with which every factor of a LoKr is whole
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def method(given: ScriptOptions, made: Translation) -> None:
    """Which parts are trained, and by which adapters."""
    encoders = ["text_encoder", "text_encoder_2"] if made.family == "sdxl" else ["text_encoder"]
    if made.is_lora:
        _network(given, made)
    rates = _text_rates(given, made, encoders)
    unet_rate = given.options.get("unet_lr" if made.is_lora else "learning_rate", 1)
    rate_of_part = {"unet": unet_rate} | rates
    trained = [
        part
        for part in _trained(given, made, encoders)
        if number("learning_rate", rate_of_part.get(part, 1)) != 0
    ] or ["unet"]
    if trained != ["unet"]:
        made.set("method.train", trained)
        if made.is_lora:
            made.set("method.text_targets", [*_TEXT])
        # The last one first: the pattern of the first is found in its name, too.
        rules = [
            {"pattern": part, "lr": rates[part]} for part in reversed(trained) if part in rates
        ]
        usual = given.options.get("unet_lr", given.options.get("learning_rate"))
        if any(str(rule["lr"]) != str(usual) for rule in rules):
            made.set("method.rules", rules)
    if not given.take("gradient_checkpointing"):
        made.set("runtime.gradient_checkpointing", False)
    _clip(given, made)


def _trained(given: ScriptOptions, made: Translation, encoders: list[str]) -> list[str]:
    if made.is_lora:
        only_unet, only_text = (
            given.take(f"network_train_{part}_only") for part in ("unet", "text_encoder")
        )
        return encoders if only_text else ["unet"] if only_unet else ["unet", *encoders]
    # train_db.py trains the text encoder without being asked.
    trains_text = given.take("train_text_encoder") or given.script == "train_db.py"
    return ["unet", *(encoders if trains_text else [])]


def _text_rates(given: ScriptOptions, made: Translation, encoders: list[str]) -> dict[str, Any]:
    """The learning rate of each text encoder that has another one than the UNet."""
    rates = given.take("text_encoder_lr")
    if rates is None and "unet_lr" in given.options:
        rates = given.options.get("learning_rate")
    if rates is not None and made.is_lora:
        listed = rates if isinstance(rates, list) else [rates]
        return dict(zip(encoders, listed * len(encoders), strict=False))
    each = [given.take("learning_rate_te1", given.take("learning_rate_te"))]
    each.append(given.take("learning_rate_te2"))
    pairs = zip(encoders, each, strict=False)
    return {encoder: rate for encoder, rate in pairs if rate is not None}


def _network(given: ScriptOptions, made: Translation) -> None:
    module = given.take("network_module", "networks.lora")
    arguments = arguments_of("network_args", given.take("network_args", []))
    is_lycoris = module == "lycoris.kohya"
    kind = str(arguments.pop("algo", "lora")).lower() if is_lycoris else module
    if kind not in _METHODS:
        raise UserError(
            f"network_module={module}: {kind} cannot be trained here; networks.lora, lokr and loha "
            "and LyCORIS's algo=lora, locon, lokr and loha can"
        )
    chosen = _METHODS[kind]
    if chosen != "lora":
        made.choose(f"method={chosen}")
        # Their LoKr and LoHa ignore it.
        given.options.pop("network_dropout", None)
        arguments.pop("dropout", None)
    rank = given.take_on("network_dim") or 4
    given.options.setdefault("network_alpha", 1)
    alpha = given.take_on("network_alpha") or rank  # 0 is the rank
    if chosen == "lokr" and arguments.pop("full_matrix", False):
        rank = alpha = _WHOLE
        arguments |= {"conv_dim": 0, "conv_alpha": 0}
    if given.take("dim_from_weights"):
        made.note("dim_from_weights: set method.rank and method.alpha to the file's")
    made.set("method.rank", rank)
    made.set("method.alpha", alpha)
    if chosen == "lokr":
        _factors(arguments, made)
    conv_rank = arguments.pop("conv_dim", 0)
    conv_alpha = arguments.pop("conv_alpha", 0 if is_lycoris else 1)
    if is_lycoris:
        preset = str(arguments.pop("preset", "full"))
        if preset not in _PRESETS:
            made.note(f"network_args preset={preset}: not translated; set method.targets")
        if preset.startswith("unet"):
            given.options["network_train_unet_only"] = True
        if not _PRESETS.get(preset, True):
            conv_rank = 0
        else:
            conv_rank, conv_alpha = conv_rank or rank, conv_alpha or alpha
            made.note(
                "network_args preset: conv_in, conv_out and time_embedding are not adapted here"
            )
    if conv_rank:
        sizes = {"rank": conv_rank, "alpha": conv_alpha or conv_rank}
        made.set("method.ranks", [{"pattern": "resnets.*conv[12]|samplers"} | sizes])
    made.set("method.targets", [*_TRANSFORMER, *(_RESNETS if conv_rank else ())])
    if dropout := arguments.pop("dropout", 0):
        made.set("method.dropout", dropout)
    if chosen == "lora" and arguments.pop("dora_wd", False):
        made.set("method.dora", True)
    for name, value in arguments.items():
        if not _is_off(value):
            made.note(f"network_args {name}: there is no such option here")


def _factors(arguments: dict[str, Any], made: Translation) -> None:
    """A LoKr's factors."""
    factor = int(number("network_args factor", arguments.pop("factor", -1)))
    made.set("method.factor", factor if factor > 0 else None)
    if arguments.pop("decompose_both", False):
        made.set("method.decompose_both", True)


def _is_off(value: Any) -> bool:
    """Whether a network argument changes nothing: 0, False, or factors of 1."""
    factors = value if isinstance(value, tuple) else (value,)
    return not value or all(factor == 1 and factor is not True for factor in factors)


def _clip(given: ScriptOptions, made: Translation) -> None:
    limit = given.take("max_grad_norm", 1.0)
    is_fused = bool(given.take("fused_backward_pass")) and not made.is_lora
    if is_fused and number("max_grad_norm", limit) != 0:
        made.note(
            "fused_backward_pass: there it clips each tensor by max_grad_norm; here nothing is "
            "clipped, as Adafactor bounds its own updates (method.clip=exact clips by the norm of "
            "all gradients)"
        )
    if is_fused or number("max_grad_norm", limit) == 0:
        made.set("method.clip", "none")
    else:
        made.set("method.clip", "global")
        made.set("method.max_grad_norm", limit)
    if not made.is_lora and not is_fused:
        made.set("runtime.fused_backward", False)
