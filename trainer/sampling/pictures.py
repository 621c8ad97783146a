"""Saving and loading pictures, and grids of them, with one column per caption."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

_LABEL = 14  # pixels from a line of text to the next
_MARGIN = 64  # pixels: the minimal width of the titles at the left
COLUMNS = 8  # pictures side by side in a band
_SMALLEST_TILE = 96  # pixels: the side of a picture in a grid
_LARGEST_TILE = 256  # where the font has _POINTS
_CAPTION_LINES = 3  # at most
_ANY_WIDTH = 1 << 16  # pixels
ORIGINALS = "original"  # the folder of the captions' own pictures, next to those of drawn ones
_CAPTION = "caption"  # the key of a PNG's text
_POINTS = 11  # font size
# Linux's fonts for other scripts, searched for in its font folders; Pillow's own font is ASCII.
_OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc")

Row = Sequence[Image.Image | None]  # a picture for each caption, or None
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def save(folder: Path, pictures: Row, captions: list[str]) -> None:
    """Write 00.png, 01.png, ..., each with its caption in the metadata; none where None is."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        if picture is None:
            continue
        text = PngInfo()
        text.add_itxt(_CAPTION, caption)
        picture.save(folder / f"{number:02d}.png", pnginfo=text)


def load(folder: Path, captions: list[str]) -> list[Image.Image]:
    """The pictures that `save` wrote; [] if any is missing or has another caption."""
    found = []
    for number, caption in enumerate(captions):
        path = folder / f"{number:02d}.png"
        if not path.exists():
            return []
        with Image.open(path) as picture:
            picture.load()
            if picture.info.get(_CAPTION) != caption:
                return []
            found.append(picture.convert("RGB"))
    return found


def captions(folder: Path) -> list[str]:
    """The captions of the pictures that `save` wrote."""
    found = []
    numbered = [path for path in folder.glob("*.png") if path.stem.isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.stem)):
        with Image.open(path) as picture:
            picture.load()
            found.append(str(picture.info.get(_CAPTION, "")))
    return found


def of_pixels(pixels: Tensor) -> Image.Image:
    """fp32 (3, h, w) in [-1, 1] -> a picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def grid(
    rows: Mapping[str, Row], captions: list[str], largest_tile: int = _LARGEST_TILE
) -> Image.Image:
    """Labelled pictures: {row title: one picture per caption} -> bands of eight columns, with
    captions on top and titles (which may have several lines) at the left.

    largest_tile: pixels of a side.
    """
    count = len(captions)
    largest = max(max(picture.size) for row in rows.values() for picture in row if picture)
    tile = min(max(largest, _SMALLEST_TILE), largest_tile)
    points = max(_POINTS, tile * _POINTS // _LARGEST_TILE)
    titles = [_label(title.split("\n"), points, _ANY_WIDTH) for title in rows]
    labels = [_label([caption], points, tile - points, _CAPTION_LINES) for caption in captions]
    label = points + _LABEL - _POINTS  # pixels from line to line
    header = label * max(len(lines) for lines, _ in labels)
    bands = -(-count // COLUMNS)
    band_height = header + len(rows) * tile + 6
    widths = (font.getlength(line) for lines, font in titles for line in lines)
    margin = max(_MARGIN, math.ceil(max(widths)) + 12)
    sheet = Image.new("RGB", (margin + min(count, COLUMNS) * tile, bands * band_height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (lines, font) in enumerate(labels):
        left, top = margin + number % COLUMNS * tile, number // COLUMNS * band_height
        for line, text in enumerate(reversed(lines), start=1):
            pen.text((left + 2, top + header - line * label), text, fill="black", font=font)
        for row, pictures in enumerate(rows.values()):
            if picture := pictures[number]:
                padded = ImageOps.pad(picture, (tile, tile), Image.Resampling.BICUBIC, "white")
                sheet.paste(padded, (left, top + header + row * tile))
    for band in range(bands):
        for row, (lines, font) in enumerate(titles):
            place = (4, band * band_height + header + row * tile + tile // 2)
            pen.text(place, "\n".join(lines), fill="black", font=font, anchor="lm")
    return sheet


def _label(
    paragraphs: Sequence[str], points: int, width: int, most: int = 1
) -> tuple[list[str], Font]:
    """Each paragraph in at most `most` lines of this width in pixels, and the font for them."""
    font = written("".join(paragraphs))[1]
    if isinstance(font, ImageFont.FreeTypeFont):
        font = font.font_variant(size=points)
    texts = (written(paragraph)[0] for paragraph in paragraphs)
    return [line for text in texts for line in _wrapped(text, font, width, most)], font


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in lines that break between words; what does not fit in `most` is left out."""
    lines: list[str] = []
    line, *rest = text.split(" ")
    while rest and len(lines) < most - 1:
        if font.getlength(f"{line} {rest[0]}") <= width:
            line += f" {rest.pop(0)}"
        else:
            lines.append(line)
            line = rest.pop(0)
    return [_fit(line, font, width) for line in [*lines, " ".join([line, *rest])]]


def written(text: str) -> tuple[str, Font]:
    """A text as it can be drawn, and the font: the one with most of its characters.  The others
    become escapes (\\u732b), since a font draws the same box for all that it lacks."""
    font = max(_fonts(), key=lambda font: sum(_has(font, c) for c in text))
    return "".join(c if _has(font, c) else ascii(c)[1:-1] for c in text), font


@cache
def _fonts() -> list[Font]:
    found: list[Font] = [ImageFont.load_default(_POINTS)]
    for name in _OTHER_FONTS:
        with suppress(OSError):
            found.append(ImageFont.truetype(name, _POINTS))
    return found


@cache
def _has(font: Font, character: str) -> bool:
    """Whether a font has the character: it is not drawn as the box of U+FFFF, a noncharacter."""
    box = "\uffff"
    return character.isprintable() and bytes(font.getmask(character)) != bytes(font.getmask(box))


def _fit(text: str, font: Font, width: int) -> str:
    """As much of the text as fits this width in pixels."""
    if font.getlength(text[:width]) <= width:
        return text[:width]
    end = next(n for n in range(width, 0, -1) if font.getlength(text[:n] + "…") <= width)
    return text[:end] + "…"
