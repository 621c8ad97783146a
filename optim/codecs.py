"""How a moment is stored between steps: each codec turns an fp32 tensor into plain tensors and
back.

A codec is built for one parameter shape.  `encode` may round; where it does, it rounds
stochastically, because a moving average changes by less than one code per step and nearest rounding
would freeze it (after a tenfold drop of half of the gradients, an 8-bit second moment written with
nearest rounding stays 6x too large).
"""

import math
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.rng import mix, uniform_like

Parts = dict[str, Tensor]


class Codec(Protocol):
    """Storage of one moment.  `zeros`, `encode` and `decode` agree on part names, shapes and
    dtypes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def zeros(self, device: torch.device) -> Parts:
        """The stored form of an all-zero moment."""

    def encode(self, x: Tensor, key: int) -> Parts:
        """x fp32 of `shape` -> parts.  `key` seeds the rounding."""

    def decode(self, parts: Parts) -> Tensor:
        """parts -> fp32 of `shape`."""


@dataclass(frozen=True)
class Dense:
    """fp32, as it is: 4 bytes an element."""

    shape: tuple[int, ...]

    def zeros(self, device: torch.device) -> Parts:
        return {"": torch.zeros(self.shape, dtype=torch.float32, device=device)}

    def encode(self, x: Tensor, key: int) -> Parts:
        return {"": x}

    def decode(self, parts: Parts) -> Tensor:
        return parts[""]

    def project(self, x: Tensor) -> Tensor:
        """What is stored, without its rounding: all of it."""
        return x


@dataclass(frozen=True)
class Block8:
    """Signed 8-bit codes, one fp32 absolute maximum for every `block` elements: 1.016 bytes an
    element.

    code = round(127 x / absmax) in [-127, 127]: symmetric, so a moment and its negative are stored
    alike, and 0 is exact.
    """

    shape: tuple[int, ...]
    block: int = 256

    def zeros(self, device: torch.device) -> Parts:
        numel = prod(self.shape)
        return {
            "codes": torch.zeros(numel, dtype=torch.int8, device=device),
            "absmax": torch.zeros(-(-numel // self.block), dtype=torch.float32, device=device),
        }

    def encode(self, x: Tensor, key: int) -> Parts:
        blocks = _blocks(x, self.block)
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        scaled = blocks * torch.where(absmax > 0, 127 / absmax, 0.0)
        codes = torch.floor(scaled + uniform_like(scaled, key)).clamp_(-127, 127)
        return {"codes": codes.flatten()[: x.numel()].to(torch.int8), "absmax": absmax.flatten()}

    def decode(self, parts: Parts) -> Tensor:
        blocks = _blocks(parts["codes"].float(), self.block) * (parts["absmax"] / 127)[:, None]
        return blocks.flatten()[: prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class Log8:
    """Non-negative 8-bit codes on a fixed logarithmic grid of 16 codes an octave: 1.008 bytes an
    element.

    Code 0 is exactly 0; code q in 1..255 is 2^(top - (255 - q) / 16), where `top` is one int8
    exponent for every `block` elements.  Because `top` is an integer, all blocks at all times share
    one grid, {2^(k/16)}: a value that does not change is stored without any rounding, which a grid
    refitted to each block's range cannot do.  The range below the block's maximum is 15.9 octaves
    (a factor 249 in the gradient); smaller values are held at its lower end and never become 0.
    Rounding is stochastic and unbiased in the value, not in its logarithm.
    """

    shape: tuple[int, ...]
    block: int = 128

    def zeros(self, device: torch.device) -> Parts:
        numel = prod(self.shape)
        return {
            "codes": torch.zeros(numel, dtype=torch.uint8, device=device),
            "top": torch.full((-(-numel // self.block),), -126, dtype=torch.int8, device=device),
        }

    def encode(self, x: Tensor, key: int) -> Parts:
        blocks = _blocks(x, self.block)
        largest = blocks.amax(dim=1, keepdim=True).clamp_min(2.0**-126)
        top = torch.log2(largest).ceil().clamp(-126, 127)
        position = (torch.log2(blocks.clamp_min(2.0**-126)) - top) * 16 + 255
        below = position.floor().clamp(1, 255)
        low, high = torch.exp2(top + (below - 255) / 16), torch.exp2(top + (below - 254) / 16)
        up = uniform_like(blocks, key) * (high - low) < blocks - low
        codes = torch.where(blocks > 0, (below + up).clamp_max(255), 0.0)
        return {
            "codes": codes.flatten()[: x.numel()].to(torch.uint8),
            "top": top.flatten().to(torch.int8),
        }

    def decode(self, parts: Parts) -> Tensor:
        codes = _blocks(parts["codes"].float(), self.block)
        values = torch.exp2(parts["top"].float()[:, None] + (codes - 255) / 16)
        values = torch.where(codes > 0, values, 0.0)
        return values.flatten()[: prod(self.shape)].reshape(self.shape)


@dataclass(frozen=True)
class Factored:
    """A non-negative moment as its row and column means over a matrix view: x_ij ~ r_i c_j /
    mean(r).

    Shazeer & Stern 2018 (arXiv 1804.04235), section 3: the rank-1 matrix with the same row and
    column sums (the KL-optimal one).  `view` is the (R, C) matrix that the row-major elements are
    read as; when R*C exceeds the element count the tail is padding. `log8` stores both vectors as
    `Log8` codes instead of fp32.
    """

    shape: tuple[int, ...]
    view: tuple[int, int]
    log8: bool = False

    def zeros(self, device: torch.device) -> Parts:
        return join({name: codec.zeros(device) for name, codec in self._vectors().items()})

    def encode(self, x: Tensor, key: int) -> Parts:
        matrix = _to_view(x, self.view)
        means = {"row": matrix.mean(dim=1), "col": matrix.mean(dim=0)}
        return join(
            {
                name: codec.encode(means[name], mix(key, ord(name[0])))
                for name, codec in self._vectors().items()
            }
        )

    def decode(self, parts: Parts) -> Tensor:
        vectors = {
            name: codec.decode(split(parts, name)) for name, codec in self._vectors().items()
        }
        return _from_view(rank1(vectors["row"], vectors["col"]), self.shape)

    def project(self, x: Tensor) -> Tensor:
        """What is stored, without its rounding: the rank-1 part."""
        matrix = _to_view(x, self.view)
        return _from_view(rank1(matrix.mean(dim=1), matrix.mean(dim=0)), self.shape)

    def _vectors(self) -> dict[str, Codec]:
        rows, cols = self.view
        kind = Log8 if self.log8 else Dense
        return {"row": kind((rows,)), "col": kind((cols,))}


@dataclass(frozen=True)
class FactoredSign:
    """A signed moment as the factors of its magnitude and one sign bit an element: 0.13 bytes an
    element.

    Park & Lee 2024 (SMMF, arXiv 2412.08894), Alg. 3 and 4.  The signs of a row are packed eight to
    a byte, lowest bit first, each row padded to whole bytes.  A zero is stored as negative, so a
    rule must not move an element that has no gradient.
    """

    shape: tuple[int, ...]
    view: tuple[int, int]

    def zeros(self, device: torch.device) -> Parts:
        rows, cols = self.view
        sign = torch.zeros((rows, -(-cols // 8)), dtype=torch.uint8, device=device)
        return self._magnitude().zeros(device) | {"sign": sign}

    def encode(self, x: Tensor, key: int) -> Parts:
        return self._magnitude().encode(x.abs(), key) | {
            "sign": _pack_bits(_to_view(x, self.view) > 0)
        }

    def decode(self, parts: Parts) -> Tensor:
        positive = _from_view(_unpack_bits(parts["sign"], self.view[1]), self.shape)
        magnitude = self._magnitude().decode(parts)
        return torch.where(positive, magnitude, -magnitude)

    def _magnitude(self) -> Factored:
        return Factored(self.shape, self.view)


def signed(storage: str, shape: tuple[int, ...], factor_1d: bool = False) -> Codec:
    """The codec of a moment of either sign, for a class's `storage`: fp32, 8bit or factored."""
    if storage == "8bit":
        return Block8(shape)
    view = _factor_view(storage, shape, factor_1d)
    return Dense(shape) if view is None else FactoredSign(shape, view)


def nonnegative(storage: str, shape: tuple[int, ...], factor_1d: bool = False) -> Codec:
    """The codec of a moment that is never negative, for a class's `storage`."""
    if storage == "8bit":
        return Log8(shape)
    view = _factor_view(storage, shape, factor_1d)
    return Dense(shape) if view is None else Factored(shape, view)


def _factor_view(storage: str, shape: tuple[int, ...], factor_1d: bool) -> tuple[int, int] | None:
    return (
        square_view(prod(shape))
        if storage == "factored" and (len(shape) > 1 or factor_1d)
        else None
    )


def rank1(row: Tensor, col: Tensor) -> Tensor:
    """The matrix with these row and column means: row (R,), col (C,) -> (R, C).  All zero where the
    mean is zero."""
    mean = row.mean()
    # row / mean is at most R; 1 / mean would overflow for means of squares of tiny gradients.
    return torch.outer(torch.where(mean > 0, row / mean, 0.0), col)


def matrix_view(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The (R, C) matrix whose factors stand for a tensor of this shape, or None where factors would
    not be smaller.

    A convolution (O, I, kh, kw) is read as O x (I*kh*kw): factoring its last two dimensions, as
    torch and Hugging Face do, keeps 977 MB of factors for the SDXL UNet where this keeps 19 MB.
    """
    if len(shape) < 2:
        return None
    rows, cols = shape[0], prod(shape[1:])
    return (rows, cols) if rows + cols < rows * cols else None


def square_view(numel: int) -> tuple[int, int] | None:
    """The most nearly square (R, C) with R >= C and R*C >= numel, or None where factors would not
    be smaller.

    SMMF's square matricization: the largest divisor C <= sqrt(numel).  A count without a divisor
    near its root (a prime, say) is padded to a multiple of eight columns instead of being left as a
    single column.
    """
    root = math.isqrt(numel)
    cols = next((c for c in range(root, 0, -1) if numel % c == 0), 1)
    if cols * 4 < root:
        cols = -(-root // 8) * 8
    rows = -(-numel // max(cols, 1))
    return (rows, cols) if rows + cols < numel else None


def _blocks(x: Tensor, block: int) -> Tensor:
    """Row-major elements in zero-padded rows of `block`: x (*) -> (ceil(numel / block), block)."""
    flat = x.flatten()
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _to_view(x: Tensor, view: tuple[int, int]) -> Tensor:
    return F.pad(x.flatten(), (0, prod(view) - x.numel())).view(view)


def _from_view(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.flatten()[: prod(shape)].reshape(shape)


def _pack_bits(bits: Tensor) -> Tensor:
    """(R, C) bool -> (R, ceil(C / 8)) uint8, column j in bit j % 8 of byte j // 8."""
    bytes_ = F.pad(bits, (0, -bits.shape[1] % 8)).view(bits.shape[0], -1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (bytes_.to(torch.uint8) * weights).sum(dim=2, dtype=torch.uint8)


def _unpack_bits(packed: Tensor, cols: int) -> Tensor:
    """(R, ceil(cols / 8)) uint8 -> (R, cols) bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> shifts) & 1).bool().flatten(1)[:, :cols]


def join(parts: dict[str, Parts]) -> Parts:
    """{"row": {"codes": c}} -> {"row.codes": c}; a part named "" is its owner's only one: {"row":
    {"": r}} -> {"row": r}."""
    return {
        f"{name}.{key}" if key else name: x
        for name, inner in parts.items()
        for key, x in inner.items()
    }


def split(parts: Parts, name: str) -> Parts:
    """The inverse of `join` for one name."""
    return {
        key[len(name) + 1 :]: x
        for key, x in parts.items()
        if key == name or key.startswith(name + ".")
    }
