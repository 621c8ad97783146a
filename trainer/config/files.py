"""The YAML files: where they are, and the choices they offer."""

from pathlib import Path

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
