"""Lines, dots and text on a picture that is drawn at a larger scale and then reduced."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, pairwise

from PIL import ImageColor, ImageDraw, ImageFont

_INK = "#1f2937"
_SIZE = 13  # of letters, in pixels
_CLEAR = 44  # of 255: the opacity of a filled shape
# Okabe and Ito's, and three more; after the last they repeat, with other dashes.
_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#111827",
    "#8c564b",
    "#7f7f7f",
    "#6a3d9a",
)
_DASHES = ((), (9, 5), (2, 4), (11, 4, 2, 4))  # pixels, alternately drawn and skipped

Point = tuple[float, float]  # in pixels of the finished picture


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a line is drawn.  dashes: pixels, alternately drawn and skipped; () is solid."""

    colour: str
    dashes: Sequence[float] = ()


def style(place: int) -> Style:
    """The style of the entry at this place of a legend; the first forty are distinct."""
    return Style(
        colour=_COLOURS[place % len(_COLOURS)],
        dashes=_DASHES[place // len(_COLOURS) % len(_DASHES)],
    )


@dataclass(frozen=True)
class Pen:
    """Draws on a picture whose pixels are `scale` times finer."""

    canvas: ImageDraw.ImageDraw
    scale: int

    def stroke(self, path: Sequence[Point], style: Style, width: float) -> None:
        """A line through these points."""
        for piece in _pieces(path, style.dashes) if style.dashes else [path]:
            self._line(piece, style.colour, width)

    def fill(self, outline: Sequence[Point], colour: str) -> None:
        """A translucent shape."""
        rgb = ImageColor.getrgb(colour)[:3]
        self.canvas.polygon(self._scaled(outline), fill=(*rgb, _CLEAR))

    def dot(self, at: Point, colour: str) -> None:
        for radius, shade in ((3.5, "white"), (3.0, colour)):
            (x, y), r = self._scaled([at])[0], radius * self.scale
            self.canvas.ellipse([x - r, y - r, x + r, y + r], fill=shade)

    def cross(self, at: Point, colour: str) -> None:
        (x, y), arm = at, 5.0
        for width, shade in ((5.0, "white"), (2.5, colour)):
            self._line([(x - arm, y - arm), (x + arm, y + arm)], shade, width)
            self._line([(x - arm, y + arm), (x + arm, y - arm)], shade, width)

    def write(
        self, at: Point, words: str, anchor: str, size: int = _SIZE, colour: str = _INK
    ) -> None:
        """Text at a point; `anchor` says, as in Pillow, which point of the text that is."""
        font = _font(size * self.scale)
        self.canvas.text(self._scaled([at])[0], words, font=font, fill=colour, anchor=anchor)

    def _line(self, path: Sequence[Point], colour: str, width: float) -> None:
        thick = round(width * self.scale)
        self.canvas.line(self._scaled(path), fill=colour, width=thick, joint="curve")

    def _scaled(self, path: Sequence[Point]) -> list[Point]:
        return [(x * self.scale, y * self.scale) for x, y in path]


def text_width(words: str) -> int:
    """The width in pixels of text of the usual size."""
    return math.ceil(_font(_SIZE * 4).getlength(words) / 4)


def _pieces(path: Sequence[Point], dashes: Sequence[float]) -> Iterator[list[Point]]:
    """The dashes of a path, each following its corners."""
    turns = cycle(zip(dashes, cycle((True, False)), strict=False))
    left, is_drawn = next(turns)
    piece = [path[0]]
    for start, end in pairwise(path):
        done, length = 0.0, math.dist(start, end)
        while length - done > left:
            done += left
            at = _between(start, end, done / length)
            if is_drawn:
                yield [*piece, at]
            piece, (left, is_drawn) = [at], next(turns)
        left -= length - done
        piece.append(end)
    if is_drawn and len(piece) > 1:
        yield piece


def _between(a: Point, b: Point, share: float) -> Point:
    return a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
