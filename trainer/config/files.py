"""The YAML files: where they are, and the choices they offer."""

from functools import cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

_PACKAGE = Path(__file__).parents[1]
ASSETS = _PACKAGE / "assets"


def conf_dir() -> Path:
    """The folder of YAML files: inside the package if installed from a wheel, beside it in a source
    tree."""
    packaged = _PACKAGE / "conf"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "conf"


def group_names() -> list[str]:
    """The configuration's groups, as `conf/` has them."""
    return sorted(path.name for path in conf_dir().iterdir() if path.is_dir())


def choices_of(group: str) -> list[str]:
    """A group's choices, subfolders included: adamw, peer/hf_adafactor."""
    folder = conf_dir() / group
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


@cache
def values_of(group: str, choice: str) -> dict[str, Any]:
    """What a choice's file sets, on top of the choices that it is based on: as Hydra composes the
    group, without interpolations resolved."""
    path = conf_dir() / group / f"{choice}.yaml"
    own = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    values = OmegaConf.merge(*(values_of(group, base) for base in bases), own)
    return cast(dict[str, Any], OmegaConf.to_container(values))
