"""Which tensors are stepped: a sample of the SDXL UNet's that keeps its mix, and 1680 tiny ones.

Ratios between optimizers depend on how large the tensors are and on how many are convolutions, so
the sample is systematic: the UNet's shapes sorted by kind and size, every k-th taken.  Which k and
which start is searched, so that the sample comes closest to the size asked for and to the shares of
1-D, linear and convolutional parameters in the whole.
"""

import json
import math
import re
from pathlib import Path

UNET = Path(__file__).parents[2] / "tests" / "data" / "sdxl_unet_shapes.json"

MIN_TENSORS = 16  # fewer are no sample
NUM_STARTS = 16
TINY_WIDTH = 64  # 1680 tensors of at most 64 x 64 or 32 x 32 x 3 x 3: 3.5M parameters

Shape = tuple[int, ...]


def unet() -> list[Shape]:
    """The shapes of the SDXL UNet's 1680 parameters, in its order."""
    return [tuple(shape) for _, shape in json.loads(UNET.read_text())]


def lora(rank: int) -> list[Shape]:
    """The matrices (rank, in) and (out, rank) of adapters on the UNet's attention projections."""
    ending = re.compile(r"attn[12]\.to_(q|k|v|out\.0)\.weight$")
    layers = [shape for name, shape in json.loads(UNET.read_text()) if ending.search(name)]
    return [matrix for out, inner in layers for matrix in ((rank, inner), (out, rank))]


def num_params(shapes: list[Shape]) -> int:
    return sum(map(math.prod, shapes))


def mix(shapes: list[Shape]) -> dict[str, float]:
    """Which share of the parameters is in 1-D, linear and convolution weights."""
    kinds = {"1-D": 1, "linear": 2, "convolution": 4}
    total = num_params(shapes)
    return {
        kind: num_params([s for s in shapes if len(s) == ndim]) / total
        for kind, ndim in kinds.items()
    }


def sample(wanted: float) -> list[Shape]:
    """About `wanted` parameters in real shapes; below 25M, in shapes with their widths cut.

    Raises ValueError for more than the UNet has.
    """
    shapes = unet()
    if not 0 < wanted <= num_params(shapes):
        raise ValueError(f"--params {wanted:g}: choose from 1 to {num_params(shapes):,}")
    least_params = num_params(shapes) / len(shapes) * MIN_TENSORS
    expected = MIN_TENSORS * wanted / least_params  # as many tensors as make up this size
    if expected < MIN_TENSORS:
        few = sample(least_params)
        widths = range(16, 10241, 16)
        return min(
            ([cut(shape, width) for shape in few] for width in widths),
            key=lambda cuts: abs(num_params(cuts) - wanted),
        )
    least, most = max(MIN_TENSORS, round(0.7 * expected)), min(len(shapes), round(1.4 * expected))
    picks = (
        _systematic(shapes, count, start / NUM_STARTS)
        for count in range(least, most + 1)
        for start in range(NUM_STARTS)
    )
    whole = mix(shapes)

    def distance(pick: list[Shape]) -> float:
        shares = mix(pick)
        return abs(num_params(pick) / wanted - 1) + sum(abs(shares[k] - whole[k]) for k in whole)

    return min(picks, key=distance)


def tiny(every: int = 1) -> list[Shape]:
    """The UNet's tensors cut to tiny ones, so that a step's time is its overhead per tensor."""
    return [cut(shape, TINY_WIDTH) for shape in unet()[::every]]


def cut(shape: Shape, width: int) -> Shape:
    """The shape with no dimension above `width`, in a convolution `width` / 2."""
    return tuple(min(size, width // 2 if len(shape) == 4 else width) for size in shape)


def _systematic(shapes: list[Shape], count: int, start: float) -> list[Shape]:
    """`count` of the shapes at equal distances in their order by kind and size, put back into
    theirs; `start` in [0, 1) shifts the comb by a part of its distance."""
    order = sorted(range(len(shapes)), key=lambda i: (len(shapes[i]), math.prod(shapes[i]), i))
    teeth = (int((tooth + start) * len(shapes) / count) for tooth in range(count))
    return [shapes[i] for i in sorted(order[tooth] for tooth in teeth)]
