"""A command line as Hydra accepts it, preceded by the options of the run that it resumes."""

import os
from collections.abc import Iterable
from contextlib import suppress

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer.cli.choices import composition, is_of_sweep, options_of
from trainer.cli.explain import explain
from trainer.config import for_hydra, group_names, key_of
from trainer.errors import UserError
from trainer.storage.resuming import latest_run, overrides_of
from trainer.system import processes

# Flags of Hydra that take a value.
_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--info", "-i", "--experimental-rerun"),
}

# Options that a resumed run does not inherit.
_ONCE = {"resume", "runtime.allow_config_change"}


def prepared(arguments: list[str]) -> list[str]:
    """The command line of a run or a sweep as Hydra accepts it.  Raises UserError for what Hydra
    would misunderstand."""
    _refuse_dashes(arguments)
    refuse_repeated(arguments)
    arguments = _flags_last(with_resumed(_at_home(arguments)))
    if is_of_sweep(arguments):
        _refuse_shared_sweep()
        arguments = with_swept_groups(arguments)
    return arguments if processes.is_main() else _without_folder(arguments)


def _at_home(arguments: list[str]) -> list[str]:
    """The command line with ~ expanded in the folders that Hydra makes: it takes them literally."""
    expanded = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        path = value.strip("'\"")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and path.startswith("~"):
            argument = f"{key}={for_hydra(os.path.expanduser(path))}"
        expanded.append(argument)
    return expanded


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
            now = f"resume={for_hydra(resume)}"
            arguments = [now if key_of(a) == "resume" else a for a in arguments]
    inherited = [a for a in lasting(overrides_of(resume)) if key_of(a) not in given]
    inherited = _without_orphans(inherited, arguments)
    at = next(i for i, a in enumerate(arguments) if key_of(a) == "resume")  # not between flags
    return arguments[:at] + inherited + arguments[at:]


def _without_folder(arguments: list[str]) -> list[str]:
    """The command line of a process that leaves the run's folder to the main one: Hydra makes no
    folder, and writes nothing."""
    others = [a for a in arguments if key_of(a) not in ("hydra.run.dir", "hydra.output_subdir")]
    return ["hydra.run.dir=.", "hydra.output_subdir=null", *others]


def _refuse_shared_sweep() -> None:
    """Raise UserError for a sweep under torchrun."""
    if processes.world_size() > 1:
        raise UserError(
            "a sweep's runs cannot be shared by torchrun's processes; start the sweep without "
            "torchrun, once for each GPU with CUDA_VISIBLE_DEVICES=N and the same "
            "hydra.sweep.dir=...: each takes the runs that are left"
        )


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
            both = ",".join(choice.strip("[]") for choice in choices)
            remedy = f"write {group}=[{both}]" if group == "experiment" else "leave one out"
            raise UserError(
                f"{group} is given more than once ({both}), and only the last counts; {remedy}"
            )


def _flags_last(arguments: list[str]) -> list[str]:
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


def _refuse_dashes(arguments: list[str]) -> None:
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


def with_swept_groups(arguments: list[str]) -> list[str]:
    """A sweep's command line, with the options of a swept group written as choices of one value:
    Hydra checks fixed options against the group's default, which may not have them."""
    if any(key_of(a) == "resume" and is_swept(a, [a]) for a in arguments):
        raise UserError(
            "resume= cannot be swept over, because a sweep's runs are known by their other "
            "options; start a run for each checkpoint"
        )
    swept = {key for a in arguments if (key := key_of(a)) in group_names() and is_swept(a, [a])}
    if any(a.startswith("sweep=") for a in arguments):
        swept.add("optim")
    return [_as_choice(a) if key_of(a).split(".")[0] in swept else a for a in arguments]


def _as_choice(override: str) -> str:
    """optim.eps=1e-6 -> optim.eps=choice(1e-6); swept options and other words are unchanged."""
    key, _, value = override.partition("=")
    is_fixed = "." in key and value and not is_swept(override, [override])
    return f"{key}=choice({value})" if is_fixed else override


def is_swept(override: str, overrides: list[str]) -> bool:
    try:
        return OverridesParser.create().parse_override(override).is_sweep_override()
    except HydraException as error:
        raise UserError(explain(error, overrides)) from error
