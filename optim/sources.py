"""The engine's sources: their folder, and a digest that identifies their version.

setup.py runs this file by itself (where a package is built there is no torch) and compiles the
digest into the module.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path


def folder() -> Path | None:
    """`csrc/`: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    return next((p for p in (package / "csrc", package.parent / "csrc") if p.is_dir()), None)


def of_module(root: Path) -> list[Path]:
    """The files that the module is compiled from: all but the headers that only GPU kernels
    include, which are compiled at first use."""
    files = (path for path in root.rglob("*") if path.suffix in (".h", ".cpp"))
    return [path for path in files if not path.name.endswith("cuda.h")]


def digest(root: Path, files: Iterable[Path]) -> str:
    """A digest of the files' names and contents, independent of their line endings."""
    contents = {file.relative_to(root).as_posix(): file.read_bytes() for file in files}
    summed = hashlib.sha256()
    for name, content in sorted(contents.items()):
        summed.update(name.encode() + b"\0" + content.replace(b"\r\n", b"\n") + b"\0")
    return summed.hexdigest()
