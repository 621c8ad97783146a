"""Captioned emoji: Noto's colour glyphs as pictures, emojibase's names as captions, CLIP's words.

What both asset scripts share, and nothing that needs torch. The three inputs come from packages,
not from this repository; a missing one is an error that names the package. Twenty-four emoji,
`HELD_OUT`, never enter the base model's training: a user's first fine-tuning run teaches it those.
"""

import argparse
import gzip
import importlib.util
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


def slug(label: str) -> str:
    """A file name for a caption: "T-Rex" -> "t-rex"."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


# --- the tokenizer --------------------------------------------------------------------------------


NUM_MERGES = 49152 - 256 - 2


@dataclass(kw_only=True)
class Bpe:
    vocabulary: dict[str, int]  # token to id, 49,408 entries
    merges: list[tuple[str, str]]  # 48,894 pairs


def read_bpe(path: Path | None) -> Bpe:
    """CLIP's byte-pair vocabulary.

    Ids count 256 bytes, the same 256 at a word's end, one per merge, then the two special tokens.
    """
    path = path or _installed_bpe()
    if not path.is_file():
        raise SourceError(
            f"no BPE vocabulary at {path}: pip install --no-deps open_clip_torch, or pass --bpe"
        )
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # After a version line the file has 262,144 merges, of which CLIP uses the first 48,894.
    merges = [tuple(line.split()) for line in lines[1 : 1 + NUM_MERGES]]
    alphabet = _byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return Bpe(vocabulary={token: index for index, token in enumerate(tokens)}, merges=merges)


def write_tokenizer(folder: Path, bpe: Bpe, *, pad: str) -> None:
    """A CLIPTokenizer folder in the classic files, a third of the size of tokenizer.json."""
    folder.mkdir(parents=True)
    vocabulary = json.dumps(bpe.vocabulary, ensure_ascii=False, separators=(",", ":"))
    merges = "\n".join(" ".join(pair) for pair in bpe.merges)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def _installed_bpe() -> Path:
    """Find open_clip's copy without importing open_clip, which needs torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SourceError(
            "open_clip is not installed: pip install --no-deps open_clip_torch, or pass --bpe"
        )
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of their ids: printable first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]
