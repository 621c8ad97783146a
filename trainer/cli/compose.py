"""The configuration that a command line describes, or those of a sweep."""

import itertools
from functools import cache

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override

import optim
from trainer.cli import resolvers
from trainer.cli.arguments import is_swept, refuse_repeated, with_resumed, with_swept_groups
from trainer.cli.choices import composition
from trainer.cli.explain import explain
from trainer.config import (
    ALTERNATIVES,
    Config,
    ExternalConfig,
    choices_of,
    key_of,
    optimizer_schema,
    peer_schema,
)
from trainer.errors import UserError
from trainer.storage.resuming import find


def register() -> None:
    """Give Hydra the schema and the resolvers that `conf/` refers to.

    Safe to call again.
    """
    _register_schema()
    resolvers.register()


@cache  # takes as long as a composition
def _register_schema() -> None:
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


def resumed(overrides: list[str]) -> list[str]:
    """The overrides, preceded by those of the run that `resume=` names, for commands other than the
    run.  Raises UserError if there is no such run."""
    for override in overrides:
        key, _, folder = override.partition("=")
        if key == "resume" and folder not in ("", "null"):
            find(folder.strip("'\""))
    register()
    return with_resumed(overrides)


def runs_of(overrides: list[str]) -> list[list[str]]:
    """The options of each run of a sweep, in the order in which Hydra runs them.

    Raises UserError for a wrong override.
    """
    overrides = with_swept_groups(overrides)
    fixed = [o for o in overrides if not is_swept(o, overrides)]
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


def with_published_model(overrides: list[str]) -> tuple[list[str], DictConfig, DictConfig]:
    """The options, their configuration, and the choice of each group.  If model.path is not given,
    it is the published architecture: enough for commands that read no weights.

    Raises UserError for a wrong override.
    """
    from trainer.formats import architectures  # takes seconds, so only when needed

    made = composed(overrides, with_hydra=True)
    with flag_override(made, ["struct", "readonly"], False):
        choices = made.pop("hydra").runtime.choices
    if OmegaConf.is_missing(made.model, "path") and choices.model in architectures.PUBLISHED:
        made.model.path = str(architectures.folder(choices.model))
        overrides = [f"model.path={made.model.path}", *overrides]
    return overrides, made, choices
