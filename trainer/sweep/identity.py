"""What a run is, whatever its command line says of it: the options that decide what comes of it.

`optim.lr=1e-3` and `0.001`, a default that is spelled out, another order, another logger: all of
these are one run.  So runs are compared by the configuration that they resolved to.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import flatten, key_of

# What a run is called, how it is begun and what it reports, keeps and writes.
_AROUND = (
    "seed",
    "name",
    "resume",
    "log",
    "runtime.allow_config_change",
    "runtime.keep_checkpoints",
    "runtime.save_every",
    "method.export",
    "method.export_dtype",
    "method.export_every",
    "data.cache",
)
_MEASURED = "log.eval_points"  # that eval/loss is the mean of
_SHIPPED = "/trainer/assets/"  # lies elsewhere on another machine


def settings_of(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A run's options by name, without its seed and without what is around it.  Of a run that left
    no configuration, {}, they are those of its command line."""
    options = flatten(config) or {key_of(o): o.partition("=")[2] for o in overrides}
    return {key: _anywhere(value) for key, value in options.items() if is_setting(key)}


def is_setting(key: str) -> bool:
    """Whether an option, or a group, decides what comes of a run."""
    return key == _MEASURED or not any(f"{key}.".startswith(f"{name}.") for name in _AROUND)


def below(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The options of a group, or a single one."""
    return {name: value for name, value in settings.items() if f"{name}.".startswith(f"{key}.")}


def canonical(settings: Mapping[str, Any], *without: str) -> str:
    """A text that is equal for equal settings, but for these options."""
    kept = {name: value for name, value in settings.items() if name not in without}
    return json.dumps(kept, sort_keys=True, default=str)


def _anywhere(value: Any) -> Any:
    """A path of what ships with the trainer, as it is on every machine."""
    return value.rpartition(_SHIPPED)[2] if isinstance(value, str) else value
