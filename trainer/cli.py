"""What Hydra shows a user: the help page, where a run is written, and one line instead of a
traceback.

Hydra's own messages name the key but not the nearest valid one; `explain` composes what was valid
and adds it.
"""

import difflib
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from optim.options import unknown
from trainer.checkpoint import run_folder_of
from trainer.config import conf_dir, flatten

_HELP = """\
Fine-tune SDXL, full or LoRA, with low-memory optimizers.

The demo: a tiny SDXL learns 24 emoji, on a CPU, in minutes; then the same as a LoRA:
  python -m trainer optim=adafactor8bit
  python -m trainer method=lora optim=adamw
Your own model and pictures:
  python -m trainer model=sdxl model.path=/models/sdxl data=folder data.path=/pictures optim.lr=1e-5
A sweep, with a table of the runs at the end; and going on with the newest run, bit for bit:
  python -m trainer -m optim=adafactor8bit,adamw seed=0,1
  python -m trainer resume=latest

Choices (group=choice):
{groups}
Options (key=value) and their values, for what was chosen: add `--cfg job`, or for one group
`--cfg job --package optim`.  What an option means is written beside it in trainer/config.py, and
for optimizers in the docstrings of optim/.  A run writes its checkpoints, pictures, metrics.jsonl
and the trained model to runs/DATE/TIME-NAME.
"""


def register() -> None:
    """Give Hydra the help page and the resolver of `hydra.run.dir`.  Safe to call again."""
    help_node = {
        "app_name": "trainer",
        "header": "",
        "footer": "",
        "template": _HELP.format(groups=_groups()),
    }
    ConfigStore.instance().store(group="hydra/help", name="trainer", node=help_node)
    OmegaConf.register_new_resolver("run_dir", _run_dir, replace=True, use_cache=True)


def explain(error: BaseException, arguments: list[str]) -> str:
    """One line for an error of composition: the key at fault, the nearest name, the remedy."""
    text = "\n".join(str(e) for e in _chain(error))
    overrides = _overrides(arguments)
    if found := re.search(r"raised while resolving interpolation: (.*)", text):
        return found[1]
    if found := re.search(r"Could not find '(\w+)/([^']+)'", text):
        group, choice = found.groups()
        return f"{group}={choice}: {unknown(f'{group} choice', choice, _choices(group))}"
    if found := re.search(r"Could not (?:override|append|delete|add)[^']*'([^']+)'", text):
        return _wrong_key(found[1], overrides)
    if found := re.search(r"(.*)\n\s*full_key: ([\w.\[\]]+)", text):
        reason, key = found[1].strip(), found[2]
        return f"{key}: {reason[:1].lower()}{reason[1:]}; `--cfg job` shows what it may look like"
    broken = [a for a in arguments if "=" in a and a not in overrides]
    if broken:
        key, _, value = broken[0].partition("=")
        return f"{broken[0]}: this value needs quotes; write '{key}=\"{value}\"'"
    for override in OverridesParser.create().parse_overrides(overrides):
        key, parent = override.key_or_group, override.key_or_group.rpartition(".")[0]
        if key in _group_names() and not override.value():
            return f"{key} has no choice; there is {', '.join(_choices(key))}"
        if parent in _valid_keys([]):
            return f"{key}: {parent} is not set here; choose its group first (log=wandb has one)"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


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


def _wrong_key(key: str, overrides: list[str]) -> str:
    """A key that cannot be set, against all keys of the configuration without it."""
    valid = _valid_keys([o for o in overrides if not o.lstrip("+~").startswith(key)])
    if key in valid or key in _group_names():
        return f"{key} exists; set it without + or ~: {key}=..."
    owner, _, name = key.rpartition(".")
    siblings = [k.removeprefix(f"{owner}.") for k in valid if owner and k.startswith(f"{owner}.")]
    if siblings:
        return f"{key}: {unknown(f'option of {owner}', name, siblings)}"
    if owner and difflib.get_close_matches(key, valid, n=1):
        return unknown("option", key, valid)
    top = {k.split(".")[0] for k in valid} | set(_group_names())
    return unknown("option or group", key, top)


def _valid_keys(overrides: list[str]) -> list[str]:
    """Every key of the configuration that these overrides' group choices compose (sweeps: their
    first choice)."""
    choices = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group in _group_names() and not override.is_delete():
            value = (
                next(override.sweep_string_iterator())
                if override.is_sweep_override()
                else override.value()
            )
            choices.append(f"{override.key_or_group}={value}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("config", overrides=choices)
    return list(flatten(OmegaConf.to_container(composed, resolve=False)))


def _run_dir(resume: str | None, name: str) -> str:
    """Where this run is written: where its checkpoint lies when it resumes, else a new folder."""
    if resume and (folder := run_folder_of(resume)):
        return str(folder)
    fresh = f"runs/{datetime.now():%Y-%m-%d/%H-%M-%S}-{name}"
    candidates = (fresh, *(f"{fresh}-{number}" for number in range(2, 1000)))
    return next(folder for folder in candidates if not Path(folder).exists())


def _group_names() -> list[str]:
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _groups() -> str:
    return "".join(f"  {group:<11}{', '.join(_choices(group))}\n" for group in _group_names())


def fail(message: str) -> None:
    """Print an error for the user and leave with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
