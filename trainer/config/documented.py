"""What is said of options in the schema and in `conf/`.

    #: Explains the option below it,
    #: in several lines.
    steps: int = within(1)
    every: int = within(1)  #: or the one before it

Comments that begin with `#:` are documentation, as Sphinx has it; `--help` shows them.
"""

import inspect
import re
from dataclasses import is_dataclass

from trainer.config.files import conf_dir

_BEFORE = re.compile(r" +#: (.*)")
_FIELD = re.compile(r" {4}(\w+): [^#]*(?:#: (.*))?")


def of_fields(schema: type) -> dict[str, str]:
    """{option: its documentation} of a dataclass and its bases, without options that have none."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if is_dataclass(base) and base.__module__ != "types":  # which make_dataclass made
            found |= _of_source(inspect.getsource(base))
    return found


def of_choice(group: str, choice: str) -> list[str]:
    """What a choice of a group is: the lines of the comment that its YAML file begins with."""
    lines = (conf_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8").splitlines()
    words = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            words.append(line.removeprefix("#").strip())
    return words


def _of_source(source: str) -> dict[str, str]:
    found, before = dict[str, str](), list[str]()
    for line in source.splitlines():
        if comment := _BEFORE.fullmatch(line):
            before.append(comment[1])
            continue
        if option := _FIELD.fullmatch(line):
            found[option[1]] = " ".join([*before, *filter(None, [option[2]])])
        before = []
    return {name: text for name, text in found.items() if text}
