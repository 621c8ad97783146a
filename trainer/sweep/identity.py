"""The identity of a run: the options that affect its result, however they were written.

`optim.lr=1e-3` and `0.001`, a default that is spelled out, another order, another logger: all of
these are the same run.  So runs are compared by their resolved configurations.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config import OUTPUTS, flatten, is_in, key_of

# Options that do not identify a run: name, start, reporting, and what it keeps and writes.  Seeds
# are compared separately.
_AROUND = (
    "seed",
    "name",
    "resume",
    "log",
    "runtime.allow_config_change",
    "runtime.keep_checkpoints",
    "runtime.save_every",
    *OUTPUTS,
)
_MEASURED = "log.eval_points"  # an exception in `log`: it affects eval/loss
_SHIPPED = "/trainer/assets/"  # what precedes it depends on the machine


def settings_of(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A run's options by name, without those in _AROUND.  For a run that left no configuration, {},
    they are those of its command line."""
    options = flatten(config) or {key_of(o): o.partition("=")[2] for o in overrides}
    known = {key: value for key, value in options.items() if value is not None}
    return {key: _anywhere(value) for key, value in known.items() if is_setting(key)}


def is_setting(key: str) -> bool:
    """Whether an option, or a group, affects a run's result."""
    return key == _MEASURED or not is_in(key, _AROUND)


def below(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The options of a group, or a single one."""
    return {name: value for name, value in settings.items() if is_in(name, [key])}


def canonical(settings: Mapping[str, Any], *without: str) -> str:
    """A text that is equal for settings that are equal except for the options in `without`."""
    kept = {name: value for name, value in settings.items() if name not in without}
    return json.dumps(kept, sort_keys=True, default=str)


def _anywhere(value: Any) -> Any:
    """The value; for a path of a shipped asset, the part that is the same on every machine."""
    return value.rpartition(_SHIPPED)[2] if isinstance(value, str) else value
