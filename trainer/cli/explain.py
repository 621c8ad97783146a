"""One line for a mistake on the command line.

Hydra's own messages name the key but not the nearest valid one; `explain` composes what was valid
and adds it.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import MISSING, fields

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import ListConfig, OmegaConf

from optim.options import unknown
from trainer import config
from trainer.cli.choices import composition, group_choices, is_of_sweep, options_of, parsable
from trainer.cli.wrong_key import explain_key
from trainer.config import choices_of, group_names, key_of

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


def explain(error: BaseException, arguments: list[str]) -> str:
    """One line for an error of composition: the key at fault, the nearest name, the remedy."""
    if isinstance(error, OSError) and error.filename:
        folder = "hydra.sweep.dir" if is_of_sweep(arguments) else "hydra.run.dir"
        return f"{error.filename}: {error.strerror}; name another folder with {folder}=..."
    text = "\n".join(dict.fromkeys(str(e) for e in _chain(error)))
    with suppress(HydraException):  # users' own choices (--config-dir) are unknown here
        for pattern, answer in _ANSWERS:
            if (match := re.search(pattern, text)) and (line := answer(match, arguments)):
                return line
        if line := _value_at_fault(arguments):
            return line
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def _no_such_choice(match: re.Match[str], arguments: list[str]) -> str:
    group, choice = match.groups()
    line = f"{group}={choice}: {unknown(f'{group} choice', choice, choices_of(group))}"
    if any(argument.startswith("resume=") for argument in arguments):
        line += "; a run with choices of its own is resumed with the same --config-dir"
    return line


def _no_such_choice_of_hydra(match: re.Match[str], arguments: list[str]) -> str:
    group, choice, there = match.groups()
    known = _PLUGINS.get(group, {})
    given = f"hydra/{group}={choice}"
    if package := known.get(choice):
        return f"{given} needs {package}, which is not installed: pip install {package} --upgrade"
    return f"{given}: {unknown(f'hydra/{group} choice', choice, {*there.split(), *known})}"


def _several_choices(match: re.Match[str], arguments: list[str]) -> str:
    return f"{match[1]} takes one choice; to sweep over several, use {match[1]}=A,B with -m"


def _several_values(match: re.Match[str], arguments: list[str]) -> str:
    key, value = match.groups()
    chosen = next(group_choices([a for a in parsable(arguments) if key_of(a) != key]))
    present = OmegaConf.select(composition(chosen), key)
    if isinstance(present, str):
        quoted = _shell_quoted(f'{key}="{value}"')
        return f"{key}={value}: text with commas must be quoted twice: {quoted}"
    sweep = f"{key}={value}: to sweep over these values, add -m"
    if isinstance(present, ListConfig | list) or key == "experiment":  # list: interpolated
        return f"{sweep}; as a list, {_shell_quoted(f'{key}=[{value}]')}"
    if key == "data.resolution":  # elsewhere a width and a height
        sides = list(dict.fromkeys(value.split(",")))
        several = f", or for several 'data.resolutions=[{','.join(sides)}]'" if sides[1:] else ""
        side = f"{key} is one number, the side of a square of a picture's area"
        return f"{side}; write {key}={sides[0]}{several}; to sweep over them, add -m"
    return f"{sweep}; {'the group' if key in group_names() else 'the option'} takes one"


def _no_key_of_item(match: re.Match[str], arguments: list[str]) -> str | None:
    """An unknown key in an item of a list, such as data.sources=[{...}]."""
    key, name, node = match.groups()
    if name in key.split(".") or not hasattr(config, node):
        return None
    siblings = [option.name for option in fields(getattr(config, node))]
    return f"{key}: {unknown(f'option of {key}', name, siblings)}"


def _wrong_value(match: re.Match[str], arguments: list[str]) -> str:
    """A value that its key cannot have, or a key that a preset sets and the choice lacks."""
    reason, key = match[1].strip(), match[2]
    overrides = parsable(arguments)
    given = [a.partition("=")[2] for a in overrides if a.lstrip("+").startswith(f"{key}=")]
    presets = [a for a in overrides if a.startswith("experiment=")]
    if presets and "In 'experiment/" in match.string and reason.startswith("Key "):
        group = key.partition(".")[0]
        return (
            f"{presets[0]} sets {key}, which the chosen {group} does not have; leave out "
            f"{group}=..., or choose another experiment"
        )
    if "is not a ListConfig" in reason:
        value = given[-1] if given else "..."
        return f"{key} is a list; write {_shell_quoted(f'{key}=[{value}]')}"
    return f"{key}: {reason[:1].lower()}{reason[1:]}; `--help {key}` explains it"


def _no_whole_number(match: re.Match[str], arguments: list[str]) -> str | None:
    """A share or a number of epochs where steps are counted."""
    value, key = match.groups()
    if key != "schedule.warmup_steps":
        return None
    line = f"{key}={value}: it is a whole number of optimizer steps"
    schedule = composition([a for a in parsable(arguments) if key_of(a) != key]).schedule
    with suppress(ValueError):
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        if 0 < share < 1 and schedule.epochs is None:
            steps = round(share * schedule.steps)
            return f"{line}; {share:g} of schedule.steps={schedule.steps} is {key}={steps}"
    return f"{line}; leave it out for 20, or a tenth of a run of less than 200"


def _no_such_key(match: re.Match[str], arguments: list[str]) -> str:
    return explain_key(match[1], parsable(arguments))


def _plain_value(match: re.Match[str], arguments: list[str]) -> str:
    """A plain value where there are options: data.sources=[/a], method.ema=true."""
    argument, node, place = match.groups()
    key = argument.partition("=")[0]
    nested = [k.removeprefix(f"{key}.") for k in options_of(arguments) if k.startswith(f"{key}.")]
    if nested:
        return f"{argument}: it is a mapping; write '{key}={{{nested[0]}: ...}}'"
    if "[" not in place:
        return f"{argument}: {key} has options of its own; choose its group first ({_where(key)})"
    needed = [option for option in fields(getattr(config, node)) if option.default is MISSING]
    item = ", ".join(f"{option.name}: ..." for option in needed)
    return f"{argument}: each item is a mapping; write '{key}=[{{{item}}}]'"


def _no_option(match: re.Match[str], arguments: list[str]) -> str:
    """A word that is not key=value, and may belong to the argument before it."""
    word = match[1]
    at = arguments.index(word) if word in arguments else 0
    before = arguments[at - 1] if at else ""
    if "=" not in before:
        return f"{word} is not an option; options are key=value, and choices group=choice"
    together = _shell_quoted(f"{before} {word}")
    return f"{word} is not an option; if it belongs to {before}, write {together}"


# Patterns of Hydra's and OmegaConf's messages, and their explanations; None leaves it to the next.
_ANSWERS: tuple[tuple[str, Callable[[re.Match[str], list[str]], str | None]], ...] = (
    (r"raised while resolving interpolation: (.*)", lambda match, _: match[1]),
    (
        r"(?s)Could not find 'hydra/(\w+)/([^']+)'.*Available options in '[^']*':\n((?:\t.*\n)*)",
        _no_such_choice_of_hydra,
    ),
    (r"Could not (?:find|load) '(\w+)/([^']+)'", _no_such_choice),
    (r"Multiple values for (?:schema/)?(\w+)", _several_choices),
    (r"Ambiguous value for argument '([^=']+)=([^']*)'", _several_values),
    (r"(?s)Could not override '([^']+)'.*Key '(\w+)' not in '(\w+)'", _no_key_of_item),
    (r"Could not (?:override|append|delete|add)[^']*'([^']+)'", _no_such_key),
    (
        r"override (.*)\n.* is not a subclass of (\w+)\..*\n\s*full_key: (.*)",
        _plain_value,
    ),
    (
        r"override (method\.rules)=.*\nCannot assign",
        lambda match, _: f"{match[1]}: each rule is a mapping: {{pattern: attn2, lr_scale: 0.1}}",
    ),
    (
        r"override ~(.*)\n.*does not support deletion",
        lambda match, _: f"~{match[1]}: an option cannot be removed; give it a value",
    ),
    (
        r"missing \d+ required keyword-only arguments?: '(\w+)'",
        lambda match, _: f"{match[1]} has no value; leave ~{match[1]} out",
    ),
    (
        r"override (.*)\n.* is not Optional",
        lambda match, _: f"{match[1]}: it must have a value; leave it out for the default",
    ),
    (
        r"Value '(.*)' of type '\w+' could not be converted to Integer\n\s*full_key: ([\w.]+)",
        _no_whole_number,
    ),
    (r"(.*)\n\s*full_key: ([\w.\[\]]+)", _wrong_value),
    (r"Error parsing override '(.*)'\s+missing EQUAL", _no_option),
)


def _value_at_fault(arguments: list[str]) -> str | None:
    """What is wrong with the arguments themselves, when Hydra's message does not say."""
    overrides = parsable(arguments)
    broken = [a for a in arguments if "=" in a and a not in overrides]
    if broken and broken[0][0] in "'\"":
        return (
            f"{broken[0]}: remove the quotes around the whole argument: no shell has removed them"
        )
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


def _shell_quoted(argument: str) -> str:
    """This argument, quoted so that a shell takes it as one."""
    return f'"{argument}"' if "'" in argument else f"'{argument}'"
