"""Pictures on the disk, and side by side: rows of the same captions from different steps."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

_TILE, _LABEL, _MARGIN, _COLUMNS = 96, 14, 64, 8  # pixels; pictures a band


def save(folder: Path, pictures: list[Image.Image]) -> None:
    """Write 00.png, 01.png, ... in the order of the captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:02d}.png")


def load(folder: Path, count: int) -> list[Image.Image]:
    """What `save` wrote; empty when there are not `count` pictures."""
    paths = [folder / f"{number:02d}.png" for number in range(count)]
    return [Image.open(p).convert("RGB") for p in paths] if all(p.exists() for p in paths) else []


def of_pixels(pixels: Tensor) -> Image.Image:
    """fp32 (3, h, w) in [-1, 1] -> a picture."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def grid(rows: dict[str, list[Image.Image]], captions: list[str]) -> Image.Image:
    """Labelled pictures: {row title: one picture per caption} -> bands of eight columns, captions
    on top, titles at the left."""
    count = len(captions)
    bands = -(-count // _COLUMNS)
    band_height = _LABEL + len(rows) * _TILE + 6
    sheet = Image.new("RGB", (_MARGIN + min(count, _COLUMNS) * _TILE, bands * band_height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, caption in enumerate(captions):
        left, top = _MARGIN + number % _COLUMNS * _TILE, number // _COLUMNS * band_height
        pen.text((left + 2, top), _fit(pen, caption, font), fill="black", font=font)
        for row, pictures in enumerate(rows.values()):
            sheet.paste(
                ImageOps.pad(pictures[number], (_TILE, _TILE), Image.Resampling.BICUBIC, "white"),
                (left, top + _LABEL + row * _TILE),
            )
    for band in range(bands):
        for row, title in enumerate(rows):
            pen.text(
                (4, band * band_height + _LABEL + row * _TILE + _TILE // 2 - 6),
                title,
                fill="black",
                font=font,
            )
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont) -> str:
    """As much of the text as a tile is wide."""
    if pen.textlength(text[:_TILE], font=font) <= _TILE - 4:
        return text[:_TILE]
    end = next(
        n for n in range(_TILE, 0, -1) if pen.textlength(text[:n] + "…", font=font) <= _TILE - 4
    )
    return text[:end] + "…"
