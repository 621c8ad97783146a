"""What a command of kohya's scripts, or a file with their options, asks for."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.kohya import script

_ALSO = {  # misspelt in old versions, or shortened as their command line allows -> the option
    "caption_extention": "caption_extension",
    "max_train_epoch": "max_train_epochs",
}


@dataclass(kw_only=True)
class ScriptOptions:
    """A script's options.  What a script takes for not given (false, an empty text) is left out."""

    script: str = ""  # its name, if it is known: sdxl_train_network.py
    options: dict[str, Any] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an option, which is then known to have been seen to."""
        self.taken.add(name)
        return self.options.get(name, default)

    def take_on(self, name: str) -> Any:
        """The value of an option for which 0 is off; None if it is."""
        value = self.take(name)
        return None if _off(value) else value

    @property
    def others(self) -> list[str]:
        """The options that nobody took, without those that are off, which 0 is for these."""
        return [name for name, x in self.options.items() if name not in self.taken and not _off(x)]


def read(file: Path) -> ScriptOptions:
    """The options in a file: a .toml as for `--config_file`, or a script with the command.

    Raises UserError if it is neither.
    """
    if file.suffix == ".toml":
        tables = toml(file)
        if "datasets" in tables:
            raise UserError(
                f"{file} says only where pictures are; give the command that has it as "
                "--dataset_config, or the .toml of --config_file"
            )
        return ScriptOptions(options=_present(_flat(tables)))
    if file.suffix not in script.SUFFIXES:
        raise UserError(
            f"{file}: give the .toml that kohya's scripts read with --config_file, or a script "
            "(.sh, .bat) with their command"
        )
    words, commands = script.words_of(file, _text(file))
    given = parse(words)
    if commands > 1:
        given.notes.append(f"{file.name}: the first of its {commands} commands is translated")
    return given


def parse(words: Sequence[str]) -> ScriptOptions:
    """The options of a command: accelerate launch sdxl_train_network.py --network_dim 32 ..."""
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), -1)
    options: dict[str, Any] = {}
    name = ""
    for word in words[place + 1 :]:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            options[name] = value if has_value else True
        elif name:
            before = options[name]
            options[name] = word if before is True else [*_listed(before), word]
        else:
            raise UserError(f"{word}: an option of kohya's scripts begins with --")
    script_name = re.split(r"[\\/]", words[place])[-1] if place >= 0 else ""
    given = _present(options)
    file = given.pop("config_file", None)
    if file is not None:
        path = Path(file if str(file).endswith(".toml") else f"{file}.toml")
        given = read(path).options | given
    return ScriptOptions(script=script_name, options=given)


def toml(file: Path) -> dict[str, Any]:
    """A TOML file.  Raises UserError if it cannot be read."""
    try:
        return tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file}: not valid TOML: {error}") from error


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _flat(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of all sections together, as the scripts read them."""
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        flat |= value if isinstance(value, Mapping) else {key: value}
    return flat


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        _ALSO.get(name, name): value
        for name, value in options.items()
        if value is not False and value not in (None, "", [])
    }


def _off(value: Any) -> bool:
    try:
        return value is None or float(value) == 0
    except (TypeError, ValueError):
        return False


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
