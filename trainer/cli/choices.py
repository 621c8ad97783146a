"""What may be configured: the options under each choice of the groups."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigLoadError, ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from trainer.config import choices_of, conf_dir, flatten, group_names


def composition(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """The configuration that Hydra composes from these overrides, optionally with its own node,
    `hydra`.  Raises whatever Hydra and OmegaConf raise."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=overrides, return_hydra_config=with_hydra)


def options_of(overrides: list[str]) -> list[str]:
    """Every option under the group choices among these overrides."""
    return valid_keys(next(group_choices(parsable(overrides))))


def valid_keys(choices: list[str]) -> list[str]:
    """Every key of the configuration that these group choices compose."""
    options: Any = OmegaConf.to_container(composition(choices), resolve=False)
    return list(flatten(options))


def options_by_choice(group: str) -> dict[str, set[str]]:
    """The options of those choices of a group that have a schema of their own, by choice: much
    faster than to compose each.  Choices of a subfolder are left out."""
    store, found = ConfigStore.instance(), dict[str, set[str]]()
    for choice in choices_of(group):
        with suppress(ConfigLoadError):
            if "/" not in choice:
                found[choice] = {*store.load(f"schema/{group}/{choice}.yaml").node}
    return found


def group_choices(overrides: list[str]) -> Iterator[list[str]]:
    """The group choices of these overrides: in a sweep, the first choice of each group, then in
    turn every other choice of one group."""
    swept: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        group = override.key_or_group
        if group not in group_names() or override.is_delete():
            continue
        if override.is_sweep_override():
            swept.append([f"{group}={value}" for value in override.sweep_string_iterator()])
        else:
            swept.append([f"{group}={override.get_value_element_as_str()}"])
    first = [choices[0] for choices in swept]
    yield first
    for place, choices in enumerate(swept):
        for choice in choices[1:]:
            yield [*first[:place], choice, *first[place + 1 :]]


def is_of_sweep(arguments: list[str]) -> bool:
    """Whether this command line starts a sweep."""
    return bool({"-m", "--multirun"} & {*arguments}) or any(
        argument.startswith("sweep=") for argument in arguments
    )


def parsable(arguments: list[str]) -> list[str]:
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
