"""The command line: Hydra's schema, the help page, mistakes, and the options that a resumed run
inherits."""

import argparse
import itertools
import math
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

import optim
from trainer import config, resolvers
from trainer.config import (
    ALTERNATIVES,
    Config,
    ExternalConfig,
    choices_of,
    group_names,
    key_of,
    optimizer_schema,
    peer_schema,
)
from trainer.errors import UserError
from trainer.explain import composition, explain, options_of
from trainer.resuming import latest_run, overrides_of

_HELP = """\
Fine-tune SDXL, full or LoRA, with low-memory optimizers.

The demo: a tiny SDXL learns 24 emoji, on a CPU, in minutes; as a full fine-tune and as a LoRA:
  python -m trainer optim=adafactor8bit
  python -m trainer method=lora optim=adamw optim.lr=5e-3
Your own model and pictures, as a LoRA and as a full fine-tune:
  python -m trainer experiment=sdxl_lora model.path=/models/sdxl.safetensors data.path=/pictures
  python -m trainer experiment=sdxl model.path=/models/sdxl.safetensors data.path=/pictures
Before a run: check the pictures, and whether there is enough memory:
  python -m trainer.doctor experiment=sdxl_lora data.path=/pictures
  python -m trainer.planner experiment=sdxl --card 8
Sweeps, with tables of the runs at the end: over seeds, over rates, and of the whole family; and the
tables of several sweeps together:
  python -m trainer -m optim=adafactor8bit,adamw seed=0,1
  python -m trainer -m optim=adamw,lion optim.lr=1e-4,3e-4,1e-3
  python -m trainer sweep=optimizers log=wandb
  python -m trainer.sweep runs/sweep-DATE1 runs/sweep-DATE2 --out compared
Resuming the newest run with its options:
  python -m trainer resume=latest

Options to set first:
  data.path=/pictures       pictures and captions, with data=folder
  model.path=/models/sdxl   a .safetensors file, a diffusers folder or a name on the hub
  optim.lr=1e-5             the learning rate
  schedule.steps=2000       length in optimizer steps; or schedule.epochs=10
  data.batch_size=4         pictures per micro-batch; runtime.accumulation=2 doubles the effective
                            batch

Choices (group=choice; several experiments as experiment=[low_memory,smoke]):
{groups}
To print all options (key=value) of these choices with their values, add `--cfg job`, or
`--cfg job --package optim` for one group.  Options are explained in
  {schema}
and those of optimizers in the docstrings of
  {optimizers}
A run writes its checkpoints, pictures, metrics.jsonl and the trained model to runs/DATE/TIME-NAME.
"""

# Flags of Hydra that take a value.
_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
}
# Options that a resumed run does not inherit.
_ONCE = {"resume", "runtime.allow_config_change"}


def register() -> None:
    """Give Hydra the schema and the resolvers that `conf/` refers to.

    Safe to call again.
    """
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, nodes in ALTERNATIVES.items():
        for node in nodes:
            store.store(group=f"schema/{group}", name=node.name, node=node)
    for name in optim.FAMILY:
        store.store(group="schema/optim", name=name, node=optimizer_schema(name))
    store.store(group="schema/optim", name="external", node=ExternalConfig)
    for name in choices_of("optim/peer"):
        store.store(group="schema/optim/peer", name=name, node=peer_schema(f"peer/{name}"))
    resolvers.register()


def with_resumed(arguments: list[str]) -> list[str]:
    """The command line, preceded by the options of the run that it resumes, except those that it
    sets itself and those meant for one session.

    `latest` is replaced by that run's folder, so that everything after this reads the same run even
    if another one saves meanwhile.
    """
    given = {key_of(a): a.partition("=")[2] for a in arguments if not a.startswith("-")}
    resume = given.get("resume", "").strip("'\"")
    if resume in ("", "null"):
        return arguments
    if resume == "latest":
        with suppress(UserError):  # the run will report it
            resume = str(latest_run())
            now = f"resume={_hydra_quoted(resume)}"
            arguments = [now if key_of(a) == "resume" else a for a in arguments]
    inherited = [a for a in lasting(overrides_of(resume)) if key_of(a) not in given]
    inherited = _without_orphans(inherited, arguments)
    at = next(i for i, a in enumerate(arguments) if key_of(a) == "resume")  # not between flags
    return arguments[:at] + inherited + arguments[at:]


def lasting(overrides: Iterable[str]) -> list[str]:
    """The options that a resumed run inherits, and by which a sweep identifies a run."""
    return [override for override in overrides if key_of(override) not in _ONCE]


def _without_orphans(inherited: list[str], given: list[str]) -> list[str]:
    """The inherited options except those that no longer exist because their group has another
    choice: log.wandb.project with log=jsonl."""
    anew = {key_of(a) for a in given if "=" in a} & set(group_names())
    suspects = {key_of(a) for a in inherited if anew.intersection(key_of(a).split(".")[:-1])}
    if suspects:
        with suppress(Exception):  # a wrong choice, which Hydra reports
            suspects -= set(options_of([*inherited, *given]))
            return [a for a in inherited if key_of(a) not in suspects]
    return inherited


def refuse_repeated(arguments: list[str]) -> None:
    """Raise UserError if a group is chosen twice: Hydra would use the last choice."""
    for group in group_names():
        choices = [a.partition("=")[2] for a in arguments if a.startswith(f"{group}=")]
        if len(set(choices)) > 1:
            both = ",".join(choices)
            remedy = f"write {group}=[{both}]" if group == "experiment" else "leave one out"
            raise UserError(
                f"{group} is given more than once ({both}), and only the last counts; {remedy}"
            )


def flags_last(arguments: list[str]) -> list[str]:
    """The command line with its options first, in their order, then its flags: Hydra accepts no
    flag between options."""
    options, flags = list[str](), list[str]()
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            options.append(argument)
            continue
        flags.append(argument)
        if argument in _WITH_VALUE:
            flags += [value] if (value := next(rest, None)) is not None else []
    return options + flags


def refuse_dashes(arguments: list[str]) -> None:
    """Raise UserError for an option with dashes, as in other programs: --seed=1."""
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and equals and name not in _WITH_VALUE:
            without = argument.lstrip("-")
            try:
                composition([without])
            except Exception as error:  # Hydra and OmegaConf raise many kinds
                raise UserError(
                    f"{argument}: options have no dashes, and {explain(error, [without])}"
                ) from error
            raise UserError(f"{argument}: options have no dashes; write {without}")


def _hydra_quoted(text: str) -> str:
    """This text, which may have spaces, as one word of Hydra's grammar."""
    return "'" + text.replace("'", r"\'") + "'"


def composed(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The configuration that the command line would compose, for commands other than the run.

    with_hydra: include Hydra's own node, whose `runtime.choices` has the choices of all groups.

    Raises UserError for a wrong override.
    """
    register()
    refuse_repeated(overrides)
    try:
        return composition(overrides, with_hydra)
    except Exception as error:  # Hydra and OmegaConf raise many kinds
        raise UserError(explain(error, overrides)) from error


def runs_of(overrides: list[str]) -> list[list[str]]:
    """The options of each run of a sweep, in the order in which Hydra runs them.

    Raises UserError for a wrong override.
    """
    overrides = with_swept_groups(overrides)
    fixed = [o for o in overrides if not _is_swept(o, overrides)]
    params = composed(fixed, with_hydra=True).hydra.sweeper.params or {}  # of sweep=
    given = {key_of(o) for o in overrides}
    swept = [f"{key}={value}" for key, value in params.items() if key not in given]
    try:
        choices = {  # the last of repeated keys, as in Hydra
            (key := o.get_key_element()): [f"{key}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [f"{key}={o.get_value_element_as_str()}"]
            for o in OverridesParser.create().parse_overrides([*swept, *overrides])
        }
    except HydraException as error:  # glob() and interval(), which only a sweeper can expand
        raise UserError(f"{error}; the planner supports lists, choice() and range()") from error
    return [list(run) for run in itertools.product(*choices.values())]


def with_swept_groups(arguments: list[str]) -> list[str]:
    """A sweep's command line, with the options of a swept group written as choices of one value:
    Hydra checks fixed options against the group's default, which may not have them."""
    if any(key_of(a) == "resume" and _is_swept(a, [a]) for a in arguments):
        raise UserError(
            "resume= cannot be swept over, because a sweep's runs are known by their other "
            "options; start a run for each checkpoint"
        )
    swept = {key for a in arguments if (key := key_of(a)) in group_names() and _is_swept(a, [a])}
    if any(a.startswith("sweep=") for a in arguments):
        swept.add("optim")
    return [_as_choice(a) if key_of(a).split(".")[0] in swept else a for a in arguments]


def _as_choice(override: str) -> str:
    """optim.eps=1e-6 -> optim.eps=choice(1e-6); swept options and other words are unchanged."""
    key, _, value = override.partition("=")
    is_fixed = "." in key and value and not _is_swept(override, [override])
    return f"{key}=choice({value})" if is_fixed else override


def _is_swept(override: str, overrides: list[str]) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException as error:
        raise UserError(explain(error, overrides)) from error


def with_published_model(overrides: list[str]) -> list[str]:
    """The options, with the published architecture if model.path is not given: enough for commands
    that read no weights."""
    from trainer.formats import architectures  # takes seconds, so only when needed

    given = composed(overrides, with_hydra=True)
    kind = given.hydra.runtime.choices.model
    if not OmegaConf.is_missing(given.model, "path") or kind not in architectures.PUBLISHED:
        return overrides
    return [f"model.path={architectures.folder(kind)}", *overrides]


def help_page() -> str:
    """The text of `--help`.  Hydra's own would take seconds."""
    groups = "".join(f"  {group:<11}{', '.join(choices_of(group))}\n" for group in group_names())
    schema, optimizers = config.__path__[0], optim.__path__[0]
    return _HELP.format(groups=groups, schema=schema, optimizers=optimizers)


def positive(text: str) -> float:
    """An argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {text!r}") from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def end_with_the_reader() -> None:
    """From now on, end silently when nobody reads the output any more: `... | head`."""
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def fail(message: str) -> NoReturn:
    """Print an error for the user and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
