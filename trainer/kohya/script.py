"""The command in a script: .sh, .bat, .cmd or .ps1.

Nothing is run: variables and arrays that the file sets once are put in, and the others of the
environment.  What depends on more (conditions, commands, arguments) is an error that names it.
"""

import os
import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

SUFFIXES = {".sh", ".bat", ".cmd", ".ps1", ".txt", ""}
_KNOWN = re.compile(r"(?:sdxl_train_network|sdxl_train|train_network|fine_tune|train_db)\.py\b")
_OPTIONS = re.compile(r"""["']?\s+["']?[-$%@!]""")  # what follows a script's name in a command
_ANY = re.compile(r"\.py\b.* --\w|accelerate\S* launch|accelerate\.commands\.launch")
_SAID = re.compile(r"\s*@?(?:echo|printf|write-\w+)\b", re.IGNORECASE)
_END = re.compile(r"(?:\d?>|<|&|\||;|#).*")  # an operator, unquoted
_REST = re.compile(r""""?\$(?:[@*]|\{[@*]\})"?|%\*|[@$]args\b""")  # words given to the script: none


@dataclass(kw_only=True, frozen=True)
class _Shell:
    """How a shell writes things, as regular expressions."""

    comment: str
    continued: str
    assignment: str  # a line; groups: a name, and its value
    sets: str  # a variable, anywhere in a line
    reference: str  # groups: a name, and its default if it has one
    left: str  # a reference that is none of these
    word: str
    flags: re.RegexFlag = re.IGNORECASE  # as the names of variables


_SH = _Shell(
    comment=r"\s*#",
    continued=r"[\\^`][ \t]*\n",
    assignment=r"\s*(?:(?:export|readonly|local|declare)\s+(?:-\w+\s+)*)?(\w+)=(?!\()(.*)",
    sets=r"""(?<![\w$.'"/-])%s\+?=""",
    reference=r"\$\{(\w+)\}|\$(\w+)|\$\{(\w+):?-([^{}]*)\}",
    left=r"\$(?:\{[^}]*\}?|\(|[@*])",
    word=r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\\.|[^\s"'\\])+""",
    flags=re.NOFLAG,
)
_BAT = _Shell(
    comment=r"\s*@?(?:rem\b|::)",
    continued=r"\^[ \t]*\n",
    assignment=r'\s*@?set\s+(?:/a\s+)?"?(\w+)=(.*)',
    sets=r'\bset\s+(?:/\w\s+)?"?%s=',
    reference=r"%(\w+)%|!(\w+)!",
    left=r"%~?\w+",
    word=r'(?:"[^"]*"|[^\s"])+',
)
_PS1 = _Shell(
    comment=r"\s*#",
    continued=r"`[ \t]*\n",
    assignment=r"\s*\$(?:\w+:)?(\w+)\s*=\s*(.*)",
    sets=r"\$(?:\w+:)?%s\s*[-+*]?=",
    reference=r"\$\{(?:\w+:)?(\w+)\}|\$(?:env:)?(\w+)",
    left=r"\$\(|(?<![\w\"'])@\w+",
    word=r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""",
)
_ARRAY = re.compile(r"^([ \t]*)(\w+)(\+?)=\((.*?)\)[ \t]*$", re.MULTILINE | re.DOTALL)
_ELEMENTS = re.compile(r'"?\$\{(\w+)\[[@*]\]\}"?')
_TEXT = re.compile(r"""("[^"]*"|'[^']*'|[^\s#;"'(){}|]*)\s*;?\s*(?:#.*)?""")  # of PowerShell


def words_of(file: Path, text: str) -> tuple[list[str], int]:
    """-> the words of the first command that trains, from the script's name, and how many there
    are.  Raises UserError if there is none, or if its words are not known without running it."""
    shell = {".bat": _BAT, ".cmd": _BAT, ".ps1": _PS1}.get(file.suffix, _SH)
    kept = [line for line in text.splitlines() if not re.match(shell.comment, line, shell.flags)]
    joined = re.sub(shell.continued, " ", "\n".join(kept) + "\n")
    if shell is _SH:
        joined = _ARRAY.sub(lambda m: re.sub(r"\s#[^\n]*|\n", " ", m[0]), joined)
    lines = [line for line in joined.splitlines() if not _SAID.match(line)]
    trains = [i for i, line in enumerate(lines) if _script_in(line)]
    place = next((i for i, line in enumerate(lines) if _ANY.search(line)), None)
    place = trains[0] if trains else place
    if place is None:
        raise UserError(f"{file}: there is no command of a Python script with options in it")
    values = _values(shell, lines[:place])
    script = _script_in(lines[place])
    rest = lines[place][script.end() :].lstrip("\"'") if script else lines[place]
    try:
        found = _split(shell, _filled(shell, _REST.sub("", _command_in(shell, rest)), values))
    except KeyError as error:
        raise UserError(
            f"{file}: {error.args[0]} is not known without running it; give the command with its "
            "values after --, or set it in the environment"
        ) from None
    except ValueError as error:
        raise UserError(f"{file}: the command cannot be read: {error}") from error
    return [*([script[0]] if script else []), *found], len(trains)


def _command_in(shell: _Shell, line: str) -> str:
    """The line up to an operator."""
    for word in re.finditer(shell.word, line):
        if _END.fullmatch(word[0]):
            return line[: word.start()]
        if word[0].endswith(";") and shell is not _BAT:
            return line[: word.end() - 1]
    return line


def _script_in(line: str) -> re.Match[str] | None:
    return next((m for m in _KNOWN.finditer(line) if _OPTIONS.match(line, m.end())), None)


def _values(shell: _Shell, lines: list[str]) -> dict[str, str | None]:
    """What variables are at the end of these lines; None if that is not known."""
    environment: dict[str, str | None] = {_fold(shell, name): x for name, x in os.environ.items()}
    own: dict[str, str | None] = {}
    times: Counter[str] = Counter()
    for line in lines:
        array = _ARRAY.fullmatch(line) if shell is _SH else None
        scalar = re.fullmatch(shell.assignment, line, shell.flags)
        if array:
            name, value = array[2], _value(shell, array[4], environment | own, words=True)
            if array[3]:  # one in a block may not be reached
                before = None if array[1] else own.get(name)
                value = None if before is None or value is None else f"{before} {value}"
                own.pop(name, None)
        elif scalar:
            name, value = _fold(shell, scalar[1]), _value(shell, scalar[2], environment | own)
        else:
            continue
        times[name] += 1
        own[name] = value if own.get(name, value) == value else None
    for name in own:  # one that is set elsewhere in a line, too, depends on a condition
        sets = re.findall(shell.sets % name, "\n".join(lines), shell.flags)
        own[name] = own[name] if len(sets) <= times[name] else None
    return environment | own


def _value(
    shell: _Shell, text: str, values: dict[str, str | None], words: bool = False
) -> str | None:
    try:
        if shell is _PS1:
            match = _TEXT.fullmatch(text)
            return match and _filled(shell, match[1], values).strip("\"'")
        if shell is _BAT:
            text = text.rstrip()
            is_open = text.count('"') % 2  # the quote of `set "name=value"`
            return _filled(shell, text[: len(text) - is_open], values)
        filled = _filled(shell, text, values)
        return filled if words else next(iter(_split(shell, _command_in(shell, filled))), "")
    except (KeyError, ValueError):
        return None


def _filled(shell: _Shell, text: str, values: dict[str, str | None]) -> str:
    """The text with the values of variables.  Raises KeyError for one that is not known."""

    def value(match: re.Match[str]) -> str:
        name, *default = (group for group in match.groups() if group is not None)
        found = values.get(_fold(shell, name), default[0] if default else None)
        if found is None:
            raise KeyError(match[0].strip('"'))
        return found

    if shell is _SH:
        text = _ELEMENTS.sub(value, text)
    filled = re.sub(shell.reference, value, text)
    if left := re.search(shell.left, filled):
        raise KeyError(left[0])
    return filled


def _split(shell: _Shell, line: str) -> list[str]:
    """The words of a command, without quotes.  Raises ValueError for a quote left open."""
    if shell is _SH:
        shlex.split(line)
    elif line.count('"') % 2:
        raise ValueError("No closing quotation")
    words = [
        "".join(shlex.split(word)) if shell is _SH else word.replace('"', "")
        for word in re.findall(shell.word, line)
    ]
    return [word.strip("'") for word in words]


def _fold(shell: _Shell, name: str) -> str:
    return name if shell is _SH else name.lower()
