"""The prompts to draw: `log.prompts`, each with its own options as in kohya's prompt files.

`a cat on a roof --w 832 --h 1216 --n blurred --d 7 --l 5 --s 30`
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optim.options import unknown
from trainer.config import LogConfig
from trainer.data.buckets import Size
from trainer.errors import UserError

_SIDE = 8  # pixels per element of a latent; sides are multiples of it
# Option -> field of Prompt, and its type.
_OPTIONS: dict[str, tuple[str, type]] = {
    "w": ("width", int),
    "h": ("height", int),
    "n": ("negative", str),
    "d": ("seed", int),
    "l": ("guidance_scale", float),
    "s": ("steps", int),
}


@dataclass(frozen=True, kw_only=True)
class Usual:
    """What a prompt has that does not say otherwise."""

    negative: str
    guidance_scale: float
    steps: int
    seed: int = 0  # of the first prompt; the others' count on
    guidance_option: str = "log.guidance_scale=5"  # that turns guidance on, for errors


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A picture to draw."""

    line: str  # as it was given
    text: str
    negative: str  # guidance leads away from it
    width: int  # pixels
    height: int
    seed: int  # of its noise
    guidance_scale: float
    steps: int

    @property
    def size(self) -> Size:
        return self.height, self.width

    @property
    def is_guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def texts(self) -> list[str]:
        """The texts to encode for it."""
        return [self.text, self.negative] if self.negative else [self.text]


def read(path: str, option: str = "log.prompts_file") -> list[str]:
    """The prompts of a text file: one per line, without empty lines and those that begin with #.

    Raises a UserError that names `option` if it cannot be read, or has none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}={path} cannot be read: {error}") from error
    prompts = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{option}={path} has no prompt; write one on each line")
    return prompts


def of_config(config: LogConfig, side: int) -> list[Prompt]:
    """`log.prompts`, squares of `side` pixels unless they say otherwise; errors as in `of_lines`,
    which name the option."""
    try:
        return of_lines(config.prompts, usual(config), side)
    except UserError as error:
        file = config.prompts_file
        where = f"log.prompts_file={file}" if file else "log.prompts"
        raise UserError(f"{where}, {error}") from error


def usual(config: LogConfig) -> Usual:
    """What the prompts of a run have."""
    return Usual(
        negative=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        steps=config.sample_steps,
    )


def of_lines(lines: Sequence[str], usual: Usual, side: int) -> list[Prompt]:
    """Prompts with their options, squares of `side` pixels unless they say otherwise.

    Raises a UserError that names the prompt for an unknown option or an invalid value.
    """
    return [_of_line(line, place, usual, side) for place, line in enumerate(lines)]


def of_caption(caption: str, place: int, usual: Usual, size: Size) -> Prompt:
    """A prompt that is just a caption; its seed follows from its `place` among all that are
    drawn."""
    return Prompt(
        line=caption,
        text=caption,
        negative=usual.negative,
        height=size[0],
        width=size[1],
        seed=usual.seed + place,
        guidance_scale=usual.guidance_scale,
        steps=usual.steps,
    )


def _of_line(line: str, place: int, usual: Usual, side: int) -> Prompt:
    text, *options = re.split(r"(?:^|\s)--(?=[A-Za-z])", line)
    given = dict(_option(option, line) for option in options)
    plain = of_caption(text.strip(), place, usual, (side, side))
    prompt = replace(plain, line=line, **given)
    if wrong := _complaint(prompt, given, usual):
        raise UserError(f"{line!r}: {wrong}")
    return prompt


def _option(option: str, line: str) -> tuple[str, Any]:
    """`w 832` -> (width, 832)."""
    name, *rest = option.split(maxsplit=1)
    if name not in _OPTIONS:
        raise UserError(f"{line!r}: {unknown('option of a prompt', name, _OPTIONS)}")
    field, kind = _OPTIONS[name]
    try:
        return field, kind(rest[0].strip() if rest else "")
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{line!r}: --{name} takes {what}") from None


def _complaint(prompt: Prompt, given: dict[str, Any], usual: Usual) -> str | None:
    for letter, side in (("w", given.get("width")), ("h", given.get("height"))):
        if side is not None and (side < _SIDE or side % _SIDE):
            return f"--{letter} {side} is not a multiple of {_SIDE} pixels"
    if not 1 <= prompt.steps <= 1000:
        return f"--s {prompt.steps} must be from 1 to 1000 steps"
    if not 0 <= prompt.guidance_scale <= 100:
        return f"--l {prompt.guidance_scale} must be from 0 to 100"
    if not 0 <= prompt.seed < 2**64:
        return f"--d {prompt.seed} must be from 0 to 2^64 - 1"
    if given.get("negative") and not prompt.is_guided:
        return f"--n only has an effect with guidance: --l 5, or {usual.guidance_option}"
    return None
