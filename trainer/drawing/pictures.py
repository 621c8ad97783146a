"""Saving and loading pictures, and grids of them, with one column per caption."""

import math
from contextlib import suppress
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

_LABEL = 14  # pixels: the height of a caption above its pictures
_MARGIN = 64  # pixels: the minimal width of the titles at the left
COLUMNS = 8  # pictures side by side in a band
_SMALLEST_TILE = 96  # pixels: the side of a picture in a grid
_LARGEST_TILE = 256
ORIGINALS = "original"  # the folder of the captions' own pictures, next to those of drawn ones
_CAPTION = "caption"  # the key of a PNG's text
_POINTS = 11  # font size
# Linux's fonts for other scripts, searched for in its font folders; Pillow's own font is ASCII.
_OTHER_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc")

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


def save(folder: Path, pictures: list[Image.Image], captions: list[str]) -> None:
    """Write 00.png, 01.png, ..., each with its caption in the metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
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


def grid(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """Labelled pictures: {row title: one picture per caption} -> bands of eight columns, with
    captions on top and titles (which may have several lines) at the left."""
    count = len(captions)
    largest = max(max(picture.size) for row in rows.values() for picture in row)
    tile = min(max(largest, _SMALLEST_TILE), _LARGEST_TILE)
    bands = -(-count // COLUMNS)
    band_height = _LABEL + len(rows) * tile + 6
    margin = max(_MARGIN, *(_width(title) + 12 for title in rows))
    sheet = Image.new("RGB", (margin + min(count, COLUMNS) * tile, bands * band_height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, caption in enumerate(captions):
        left, top = margin + number % COLUMNS * tile, number // COLUMNS * band_height
        text, font = written(caption)
        pen.text((left + 2, top), _fit(pen, text, font, tile), fill="black", font=font)
        for row, pictures in enumerate(rows.values()):
            sheet.paste(
                ImageOps.pad(pictures[number], (tile, tile), Image.Resampling.BICUBIC, "white"),
                (left, top + _LABEL + row * tile),
            )
    for band in range(bands):
        for row, title in enumerate(rows):
            pen.text(
                (4, band * band_height + _LABEL + row * tile + tile // 2),
                title,
                fill="black",
                font=_fonts()[0],
                anchor="lm",
            )
    return sheet


def _width(text: str) -> int:
    """The width in pixels of its widest line."""
    return math.ceil(max(map(_fonts()[0].getlength, text.split("\n"))))


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


def _fit(pen: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """As much of the text as fits a tile."""
    if pen.textlength(text[:width], font=font) <= width - 4:
        return text[:width]
    end = next(
        n for n in range(width, 0, -1) if pen.textlength(text[:n] + "…", font=font) <= width - 4
    )
    return text[:end] + "…"
