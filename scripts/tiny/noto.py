"""Captioned emoji: Noto's colour glyphs as pictures, emojibase's names as captions.

For both asset scripts, and nothing that needs torch. The three inputs come from packages, not from
this repository; a missing one is an error that names the package. Twenty-four emoji, `HELD_OUT`,
never enter the base model's training: a user's first fine-tuning run teaches it those.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BITMAP_PIXELS = 109  # the only size in Noto's bitmap table, "109 ppem": glyphs 136 wide, 128 high
CELL_PIXELS = 136  # the square that holds one glyph
PICTURE_PIXELS = 128  # what a rendered picture measures
MODEL_PIXELS = 64  # what the tiny model sees

# emojibase's groups that are pictures of things; people, symbols and flags stay out.
GROUPS = {0: "smileys", 3: "animals", 4: "food", 5: "travel", 6: "activities", 7: "objects"}

HELD_OUT = "😎🤖🐧🐯🐸🐙🦋🌻🌵🍕🍓🥑🍩🍉🚑🚀⛵🌋🏀🎸🎁💎👑💡"


@dataclass(kw_only=True)
class Emoji:
    character: str  # one code point
    label: str  # "penguin"
    tags: list[str]  # ["animal", "antarctica", ...]
    group: int  # a key of GROUPS
    picture: Image.Image  # RGB on white, PICTURE_PIXELS square


# --- where the inputs come from -------------------------------------------------------------------


class SourceError(ValueError):
    """An input is not there; the message names the package to get."""


@dataclass(kw_only=True)
class Sources:
    font: Path
    emojibase: Path  # the unpacked npm package
    bpe: Path | None  # None: the file inside the installed open_clip


def add_source_arguments(parser: argparse.ArgumentParser, *, bpe: bool) -> None:
    """Let a script's user say where the inputs lie; `bpe` for the one that needs a tokenizer."""
    parser.add_argument(
        "--emojibase",
        type=Path,
        required=True,
        metavar="DIR",
        help="unpacked npm package: npm pack emojibase-data@17.0.0 && tar xf emojibase-data-*.tgz",
    )
    parser.add_argument(
        "--font",
        type=Path,
        default=Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
        help="default: where Debian's fonts-noto-color-emoji puts it",
    )
    if bpe:
        parser.add_argument(
            "--bpe",
            type=Path,
            default=None,
            help="CLIP's bpe_simple_vocab_16e6.txt.gz; default: the installed open_clip_torch's",
        )


def sources(args: argparse.Namespace) -> Sources:
    """Check that the inputs exist.  Raises SourceError, which names the package to install."""
    if not args.font.is_file():
        raise SourceError(
            f"no font at {args.font}: apt-get install fonts-noto-color-emoji, or pass --font"
        )
    if not (args.emojibase / "en" / "data.json").is_file():
        raise SourceError(
            f"no en/data.json in {args.emojibase}: run `npm pack emojibase-data@17.0.0`, unpack it,"
            " and pass the package folder as --emojibase"
        )
    return Sources(font=args.font, emojibase=args.emojibase, bpe=getattr(args, "bpe", None))


# --- pictures and captions ------------------------------------------------------------------------


def read_emoji(source: Sources) -> list[Emoji]:
    """Every emoji of GROUPS that is one code point and can be drawn, in emojibase's order."""
    font = ImageFont.truetype(str(source.font), BITMAP_PIXELS)
    entries = json.loads((source.emojibase / "en" / "data.json").read_text(encoding="utf-8"))
    found: list[Emoji] = []
    not_in_font = render(font, "\U0010ffff")
    seen = {not_in_font.tobytes()}
    for entry in sorted(entries, key=lambda e: e.get("order", 0)):
        character = entry["emoji"].removesuffix("\ufe0f")
        if entry.get("group") not in GROUPS or len(character) != 1:
            continue
        picture = render(font, character)
        if picture.tobytes() in seen:  # missing, blank or a copy of an earlier one
            continue
        seen.add(picture.tobytes())
        found.append(
            Emoji(
                character=character,
                label=entry["label"],
                tags=[tag for tag in entry["tags"] if tag != entry["label"]],
                group=entry["group"],
                picture=picture,
            )
        )
    return found


def render(font: ImageFont.FreeTypeFont, character: str) -> Image.Image:
    """Draw one glyph on white, centred.  -> RGB, PICTURE_PIXELS square."""
    cell = Image.new("RGB", (CELL_PIXELS, CELL_PIXELS), "white")
    centre = (CELL_PIXELS / 2, CELL_PIXELS / 2)
    ImageDraw.Draw(cell).text(centre, character, font=font, embedded_color=True, anchor="mm")
    return cell.resize((PICTURE_PIXELS, PICTURE_PIXELS), Image.Resampling.LANCZOS)


def model_pixels(picture: Image.Image) -> np.ndarray:
    """As the trainer reads an image folder.  RGB of any size -> (3, 64, 64) float32 in [-1, 1]."""
    small = picture.resize((MODEL_PIXELS, MODEL_PIXELS), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def split_held_out(emoji: list[Emoji]) -> tuple[list[Emoji], list[Emoji]]:
    """-> (those that may be trained on, the held-out ones in the order of HELD_OUT)."""
    by_character = {e.character: e for e in emoji}
    missing = [c for c in HELD_OUT if c not in by_character]
    if missing:
        raise SourceError(
            f"this font or emojibase lacks {' '.join(missing)}: use the versions in LICENSES.md"
        )
    rest = [e for e in emoji if e.character not in HELD_OUT]
    return rest, [by_character[c] for c in HELD_OUT]


def choose_varied(emoji: list[Emoji], numbers: dict[int, int]) -> list[Emoji]:
    """The given number of emoji per group, as unlike each other as can be: of many clocks, one.

    Farthest-point selection on thumbnails: after the first, always the one farthest from all taken.
    """
    chosen = []
    for group, number in numbers.items():
        members = [e for e in emoji if e.group == group]
        thumbnails = np.stack(
            [np.asarray(e.picture.resize((16, 16)), dtype=np.float32) for e in members]
        )
        distances = np.full(len(members), np.inf)
        taken = [0]
        while len(taken) < min(number, len(members)):
            to_last = np.square(thumbnails - thumbnails[taken[-1]]).mean(axis=(1, 2, 3))
            distances = np.minimum(distances, to_last)
            taken.append(int(distances.argmax()))
        chosen += [members[i] for i in sorted(taken)]
    return chosen


def slug(label: str) -> str:
    """A file name for a caption: "T-Rex" -> "t-rex"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
