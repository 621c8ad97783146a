"""One line for a mistake on the command line.

Hydra's own messages name the key but not the nearest valid one; `explain` composes what was valid
and adds it.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from optim.options import nearest, unknown
from trainer import config
from trainer.config import choices_of, conf_dir, flatten, group_names

# What other trainers (diffusers' scripts, kohya's) call our options.
_NAMES_ELSEWHERE = {
    "cache_latents_to_disk": "data.cache",
    "caption_dropout_rate": "data.caption_dropout",
    "conv_alpha": "method.ranks",
    "conv_dim": "method.ranks",
    "enable_bucket": "data.buckets",
    "flip_aug": "data.random_flip",
    "full_bf16": "model.dtype",
    "fused_backward_pass": "runtime.fused_backward",
    "gradient_accumulation_steps": "runtime.accumulation",
    "ip_noise_gamma": "noise.input_perturbation",
    "learning_rate": "optim.lr",
    "lr_scheduler": "schedule",
    "lr_warmup_steps": "schedule.warmup_steps",
    "max_train_epochs": "schedule.epochs",
    "max_train_steps": "schedule.steps",
    "min_snr_gamma": "loss.weighting=min_snr loss.gamma",
    "mixed_precision": "model.compute",
    "network_alpha": "method.alpha",
    "network_dim": "method.rank",
    "network_train_unet_only": "method.train",
    "noise_offset": "noise.offset",
    "num_train_epochs": "schedule.epochs",
    "optimizer": "optim",
    "optimizer_type": "optim",
    "output_dir": "hydra.run.dir",
    "output_name": "name",
    "pretrained_model_name_or_path": "model.path",
    "sample_every_n_steps": "log.sample_every",
    "sample_prompts": "log.prompts_file",
    "save_every_n_epochs": "method.export_every",
    "save_every_n_steps": "method.export_every",
    "shuffle_caption": "data.shuffle_tags",
    "snr_gamma": "loss.weighting=min_snr loss.gamma",
    "text_encoder_lr": "method.rules",
    "train_batch_size": "data.batch_size",
    "train_data_dir": "data.path",
    "train_text_encoder": "method.train",
    "unet_lr": "optim.lr",
    "v_parameterization": "noise.prediction",
}

# The packages that add choices to Hydra's own groups (hydra/launcher=...).
_PLUGINS = {
    "launcher": {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "ray_aws": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
        "submitit_local": "hydra-submitit-launcher",
        "submitit_slurm": "hydra-submitit-launcher",
    },
    "sweeper": {
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
        "optuna": "hydra-optuna-sweeper",
    },
    "job_logging": {"colorlog": "hydra-colorlog"},
    "hydra_logging": {"colorlog": "hydra-colorlog"},
}

_FEW = 3  # choices, at most, that are named as having an option


def explain(error: BaseException, arguments: list[str]) -> str:
    """One line for an error of composition: the key at fault, the nearest name, the remedy."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; name another folder with hydra.run.dir=..."
    text = "\n".join(dict.fromkeys(str(e) for e in _chain(error)))
    with suppress(HydraException):  # users' own choices (--config-dir) are unknown here
        for pattern, answer in _ANSWERS:
            if (found := re.search(pattern, text)) and (line := answer(found, arguments)):
                return line
        if line := _value_at_fault(arguments):
            return line
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def composition(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The configuration that Hydra composes from these overrides, optionally with its own node,
    `hydra`.  Raises whatever Hydra and OmegaConf raise."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=overrides, return_hydra_config=with_hydra)


def options_of(overrides: list[str]) -> list[str]:
    """Every option under the group choices among these overrides."""
    return _valid_keys(next(_compositions(_overrides(overrides))))


def _no_such_choice(found: re.Match[str], arguments: list[str]) -> str:
    group, choice = found.groups()
    return f"{group}={choice}: {unknown(f'{group} choice', choice, choices_of(group))}"


def _no_such_choice_of_hydra(found: re.Match[str], arguments: list[str]) -> str:
    group, choice, there = found.groups()
    known = _PLUGINS.get(group, {})
    given = f"hydra/{group}={choice}"
    if package := known.get(choice):
        return f"{given} needs {package}, which is not installed: pip install {package} --upgrade"
    return f"{given}: {unknown(f'hydra/{group} choice', choice, {*there.split(), *known})}"


def _several_choices(found: re.Match[str], arguments: list[str]) -> str:
    return f"{found[1]} takes one choice; to sweep over several, use {found[1]}=A,B with -m"


def _several_values(found: re.Match[str], arguments: list[str]) -> str:
    key, value = found.groups()
    if isinstance(OmegaConf.select(composition([]), key), str):
        quoted = _shell_quoted(f'{key}="{value}"')
        return f"{key}={value}: text with commas must be quoted twice: {quoted}"
    sweep = f"{key}={value}: to sweep over these values, add -m"
    takes_one = key in group_names() and key != "experiment"
    return sweep if takes_one else f"{sweep}; as a list, {key}=[{value}]"


def _no_key_of_item(found: re.Match[str], arguments: list[str]) -> str | None:
    """An unknown key in an item of a list, such as data.sources=[{...}]."""
    key, name, node = found.groups()
    if name in key.split(".") or not hasattr(config, node):
        return None
    siblings = [option.name for option in fields(getattr(config, node))]
    return f"{key}: {unknown(f'option of {key}', name, siblings)}"


def _no_such_key(found: re.Match[str], arguments: list[str]) -> str:
    return _wrong_key(found[1], _overrides(arguments))


def _wrong_value(found: re.Match[str], arguments: list[str]) -> str:
    """A value that its key cannot have, or a key that a preset sets and the choice lacks."""
    reason, key = found[1].strip(), found[2]
    overrides = _overrides(arguments)
    given = [a.partition("=")[2] for a in overrides if a.lstrip("+").startswith(f"{key}=")]
    presets = [a for a in overrides if a.startswith("experiment=")]
    if presets and not given:
        group = key.partition(".")[0]
        return (
            f"{presets[0]} sets {key}, which the chosen {group} does not have; leave out "
            f"{group}=..., or choose another experiment"
        )
    if "is not a ListConfig" in reason:
        value = given[-1] if given else "..."
        return f"{key} is a list; write {_shell_quoted(f'{key}=[{value}]')}"
    return f"{key}: {reason[:1].lower()}{reason[1:]}; `--cfg job` shows its present value"


def _no_option(found: re.Match[str], arguments: list[str]) -> str:
    """A word that is not key=value, and may belong to the argument before it."""
    word = found[1]
    at = arguments.index(word) if word in arguments else 0
    before = arguments[at - 1] if at else ""
    if "=" not in before:
        return f"{word} is not an option; options are key=value, and choices group=choice"
    together = _shell_quoted(f"{before} {word}")
    return f"{word} is not an option; if it belongs to {before}, write {together}"


# Patterns of Hydra's and OmegaConf's messages, and their explanations; None leaves it to the next.
_ANSWERS: tuple[tuple[str, Callable[[re.Match[str], list[str]], str | None]], ...] = (
    (r"raised while resolving interpolation: (.*)", lambda found, _: found[1]),
    (
        r"(?s)Could not find 'hydra/(\w+)/([^']+)'.*Available options in '[^']*':\n((?:\t.*\n)*)",
        _no_such_choice_of_hydra,
    ),
    (r"Could not find '(\w+)/([^']+)'", _no_such_choice),
    (r"Multiple values for (?:schema/)?(\w+)", _several_choices),
    (r"Ambiguous value for argument '([^=']+)=([^']*)'", _several_values),
    (r"(?s)Could not override '([^']+)'.*Key '(\w+)' not in '(\w+)'", _no_key_of_item),
    (r"Could not (?:override|append|delete|add)[^']*'([^']+)'", _no_such_key),
    (r"(.*)\n\s*full_key: ([\w.\[\]]+)", _wrong_value),
    (r"Error parsing override '(.*)'\s+missing EQUAL", _no_option),
)


def _value_at_fault(arguments: list[str]) -> str | None:
    """What is wrong with the arguments themselves, when Hydra's message does not say."""
    overrides = _overrides(arguments)
    broken = [a for a in arguments if "=" in a and a not in overrides]
    if broken:
        key, _, value = broken[0].partition("=")
        quoted = value.replace('"', r"\"")
        return f"{broken[0]}: this value needs quotes; write '{key}=\"{quoted}\"'"
    for override in OverridesParser.create().parse_overrides(overrides):
        key, parent = override.key_or_group, override.key_or_group.rpartition(".")[0]
        if key in group_names() and not override.value():
            return f"{key} has no choice; choose from {', '.join(choices_of(key))}"
        is_choice = isinstance(override.value(), str | list) or override.is_sweep_override()
        if key in group_names() and not is_choice:
            return f"{key} must be one of {', '.join(choices_of(key))}"
        if parent in options_of([]):
            return f"{key}: {parent} is not set here; choose its group first ({_where(parent)})"
    return None


def _where(node: str) -> str:
    """The choice that sets an option that is null by default: ema=bf16 for method.ema."""
    name = node.rpartition(".")[2]
    if name in group_names():
        return " or ".join(f"{name}={choice}" for choice in choices_of(name) if choice != "none")
    return "log=wandb has one"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _overrides(arguments: list[str]) -> list[str]:
    """The arguments that are overrides and can be parsed, without flags."""
    good = []
    for argument in arguments:
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            continue
        if not argument.startswith("-"):
            good.append(argument)
    return good


def _shell_quoted(argument: str) -> str:
    """This argument, quoted so that a shell takes it as one."""
    return f'"{argument}"' if "'" in argument else f"'{argument}'"


def _wrong_key(key: str, overrides: list[str]) -> str:
    """Explain a key that cannot be set, by the valid keys of the configuration without it (in a
    sweep, of the first run that lacks the key)."""
    others = [o for o in overrides if not o.lstrip("+~").startswith(key)]
    for choices in _compositions(others):
        valid = _valid_keys(choices)
        if key not in valid:
            break
    if key in valid or key in group_names():
        return f"{key} already exists; set it without + or ~: {key}=..."
    owner, _, name = key.rpartition(".")
    if ours := _NAMES_ELSEWHERE.get(key) or _NAMES_ELSEWHERE.get(name):
        return f"there is no option {key!r}; it is called {ours!r} here"
    if f"{owner}.class_path" in valid or owner.endswith(".options"):
        new = "NAME" if key == "optim.options" else name
        return f"{key}: add arguments of the class with a +: '+optim.options.{new}=...'"
    elsewhere = [k for k in valid if k.rpartition(".")[2] == name and "." in k]
    if elsewhere:
        return f"there is no option {key!r}; did you mean {' or '.join(map(repr, elsewhere))}?"
    siblings = [k.removeprefix(f"{owner}.") for k in valid if owner and k.startswith(f"{owner}.")]
    having = [] if nearest(name, siblings) else _choices_with(key, choices)
    if 0 < len(having) <= _FEW:
        verb = "has" if len(having) == 1 else "have"
        return f"there is no option {key!r} here; {', '.join(having)} {verb} it"
    if siblings:
        chosen = next((c for c in choices if c.startswith(f"{owner}=")), owner)
        return f"{key}: {unknown(f'option of {chosen}', name, siblings)}"
    if owner and difflib.get_close_matches(key, valid, n=1):
        return unknown("option", key, valid)
    top = {k.split(".")[0] for k in valid} | set(group_names())
    return unknown("option or group", key, top)


def _choices_with(key: str, chosen: list[str]) -> list[str]:
    """Other choices of the option's group that have it: method.rank -> method=lora."""
    group = key.partition(".")[0]
    if group not in group_names() or key.count(".") != 1:
        return []
    others = [c for c in choices_of(group) if f"{group}={c}" not in chosen and "/" not in c]
    having = []
    for choice in others:
        with suppress(Exception):  # one that cannot be composed by itself
            if key in _valid_keys([f"{group}={choice}"]):
                having.append(f"{group}={choice}")
    return having


def _compositions(overrides: list[str]) -> Iterator[list[str]]:
    """The group choices of these overrides: in a sweep, the first choice of each group, then in
    turn every other choice of one group."""
    swept: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        group = override.key_or_group
        if group not in group_names() or override.is_delete():
            continue
        is_sweep = override.is_sweep_override()
        one = override.get_value_element_as_str
        values = override.sweep_string_iterator() if is_sweep else [one()]
        swept.append([f"{group}={value}" for value in values])
    first = [choices[0] for choices in swept]
    yield first
    for place, choices in enumerate(swept):
        for choice in choices[1:]:
            yield [*first[:place], choice, *first[place + 1 :]]


def _valid_keys(choices: list[str]) -> list[str]:
    """Every key of the configuration that these group choices compose."""
    options: Any = OmegaConf.to_container(composition(choices), resolve=False)
    return list(flatten(options))
