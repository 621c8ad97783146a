"""How a moment is stored between steps: each codec turns an fp32 tensor into plain tensors and
back.

A codec is built for one parameter shape.  `encode` may round; where it does, it rounds
stochastically, because a moving average changes by less than one code per step and nearest rounding
would freeze it (after a tenfold drop of half of the gradients, an 8-bit second moment written with
nearest rounding stays 7 to 37 times too large: docs/LOG.md, 2026-11-22).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from optim.rng import draws, mix, round_stochastic_bf16

Parts = dict[str, Tensor]

_BLOCK = 128  # elements of a row that share an exponent in 8-bit floats
_CUT = 20  # low bits of an fp32 that these drop, and bits of a draw


class Codec(Protocol):
    """Storage of one moment.  `zeros`, `encode` and `decode` agree on part names, shapes and
    dtypes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def zeros(self, device: torch.device) -> Parts:
        """The stored form of an all-zero moment."""

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        """x fp32 of `shape` -> parts.  `key` seeds the rounding; moments of one
        parameter share it and have a salt each, from 1 (`optim/rng.py`)."""

    def decode(self, parts: Parts) -> Tensor:
        """parts -> fp32 of `shape` (`Exact`: its dtype)."""


@dataclass(frozen=True)
class Exact:
    """Values stored in `dtype`: a copy of weights in their dtype, a sum in fp64.

    They are decoded in that dtype; what it cannot represent is rounded to nearest.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self, device: torch.device) -> Parts:
        return {"": torch.zeros(self.shape, dtype=self.dtype, device=device)}

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        return {"": x.to(self.dtype)}

    def decode(self, parts: Parts) -> Tensor:
        return parts[""]


@dataclass(frozen=True)
class Dense(Exact):
    """Plain fp32: 4 bytes an element."""

    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Bf16:
    """bf16, written with stochastic rounding: 2 bytes an element.

    `view` is the (R, C) matrix that the row-major elements are read as, here and in the codecs
    below; None reads them as one row.
    """

    shape: tuple[int, ...]
    view: tuple[int, int] | None = None

    def zeros(self, device: torch.device) -> Parts:
        return {"": torch.zeros(self.shape, dtype=torch.bfloat16, device=device)}

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        return {"": round_stochastic_bf16(x, key, self.view or (1, x.numel()), salt)}

    def decode(self, parts: Parts) -> Tensor:
        return parts[""].float()


@dataclass(frozen=True)
class Float8:
    """Non-negative 8-bit floats with 3 mantissa bits, exponents relative to the block's: 1.008
    bytes an element.

    Code 0 is exactly 0; code q in 1..255 is the fp32 with the bits (8 (top + 96) + q) << 20, where
    `top` is one int8 exponent for every 128 elements: codes 248..255 span one octave from 2^top.
    Because `top` is an integer, all blocks always share one grid, the floats with 3 mantissa bits:
    an unchanged value is stored again without rounding, which a grid fitted to each block's range
    cannot do.  Neighbouring codes are 1/8 to 1/16 of a value apart.  The range ends 31 octaves
    below the block's largest (a factor of 46,000 in the gradient); smaller values are clamped there
    and never become 0.  Rounding adds a draw below the cut and truncates, which is unbiased.
    """

    shape: tuple[int, ...]

    def zeros(self, device: torch.device) -> Parts:
        return _zeros8(prod(self.shape), -(-prod(self.shape) // _BLOCK), device)

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        view = (1, x.numel())
        blocks, drawn = _with_draws(x, view, key, salt)
        exponent = _exponent(blocks)
        codes = (((blocks.view(torch.int32) + drawn) >> _CUT) - (exponent - 31) * 8).clamp(1, 255)
        return _coded(torch.where(blocks == 0, 0, codes), exponent, view, x.numel())

    def decode(self, parts: Parts) -> Tensor:
        view = (1, prod(self.shape))
        codes, exponent = _uncoded(parts, view)
        bits = ((exponent - 31) * 8 + codes) << _CUT
        return _unblocked(torch.where(codes == 0, 0, bits).view(torch.float32), view, self.shape)


@dataclass(frozen=True)
class SignedFloat8:
    """8-bit floats of either sign: a sign bit, 3 mantissa bits, and exponents for 15 octaves below
    the block's largest; evenly spaced below those.  1.008 bytes an element.

    c = 2^(top - 14) is added to |x| before the cut, as in `Float8`, and subtracted after decoding.
    So codes are c / 8 apart where |x| < c, which is 2^-17 of the block's largest, and 1/8 to 1/16
    of a value apart where it is large.  A small value is rounded to either neighbouring code,
    without bias.  A moment and its negative are stored alike, and 0 is exact.

    One step of evenly spaced codes (127 x / absmax) exceeds every value of a block that is small
    compared with its largest.  Adam divides by the root of the element's own second moment, so one
    such step moved a weight by 18 learning rates where neighbours' gradients were 1000 times as
    large; these codes move it as fp32 does (docs/LOG.md, 2026-11-27).
    """

    shape: tuple[int, ...]
    view: tuple[int, int] | None = None

    def zeros(self, device: torch.device) -> Parts:
        rows, cols = self._view()
        return _zeros8(prod(self.shape), rows * -(-cols // _BLOCK), device)

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        blocks, drawn = _with_draws(x, self._view(), key, salt)
        exponent = _exponent(blocks.abs())
        zero = (exponent - 14) << 23
        bits = (blocks.abs() + zero.view(torch.float32)).view(torch.int32)
        codes = ((bits + drawn - zero) >> _CUT) | (torch.signbit(blocks).int() << 7)
        return _coded(codes, exponent, self._view(), x.numel())

    def decode(self, parts: Parts) -> Tensor:
        codes, exponent = _uncoded(parts, self._view())
        zero = (exponent - 14) << 23
        bits = ((codes & 127) << _CUT) + zero
        size = bits.view(torch.float32) - zero.view(torch.float32)
        return _unblocked(torch.where(codes < 128, size, -size), self._view(), self.shape)

    def _view(self) -> tuple[int, int]:
        return self.view or (1, prod(self.shape))


@dataclass(frozen=True)
class Factored:
    """A non-negative moment as its row and column means over a matrix view: x_ij ~ r_i c_j /
    mean(r).

    Shazeer & Stern 2018 (arXiv 1804.04235), section 3: the rank-1 matrix with the same row and
    column sums (the KL-optimal one).  Where R*C exceeds the element count the tail of the view is
    padding.  A view of more than two dimensions, (..., R, C), is a batch of matrices with factors
    of their own.  `float8` stores both vectors as `Float8` codes instead of fp32.
    """

    shape: tuple[int, ...]
    view: tuple[int, ...]
    float8: bool = False

    def zeros(self, device: torch.device) -> Parts:
        return join({name: codec.zeros(device) for name, codec in self._vectors().items()})

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        means = dict(zip(("row", "col"), self.means(x), strict=True))
        own = mix(key, salt)
        return join(
            {
                name: codec.encode(means[name], mix(own, ord(name[0])))
                for name, codec in self._vectors().items()
            }
        )

    def decode(self, parts: Parts) -> Tensor:
        vectors = {
            name: codec.decode(split(parts, name)) for name, codec in self._vectors().items()
        }
        return self.product(vectors["row"], vectors["col"])

    def means(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The means before rounding: x of `shape` -> row (..., R), col (..., C)."""
        matrix = _to_view(x, self.view)
        return matrix.mean(dim=-1), matrix.mean(dim=-2)

    def product(self, row: Tensor, col: Tensor) -> Tensor:
        """The moment that such means represent: row (..., R), col (..., C) -> fp32 of `shape`."""
        return _from_view(rank1(row, col), self.shape)

    def _vectors(self) -> dict[str, Codec]:
        *batch, rows, cols = self.view
        kind = Float8 if self.float8 else Dense
        return {"row": kind((*batch, rows)), "col": kind((*batch, cols))}


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

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        return self._magnitude().encode(x.abs(), key, salt) | {
            "sign": _pack_bits(_to_view(x, self.view) > 0)
        }

    def decode(self, parts: Parts) -> Tensor:
        positive = _from_view(_unpack_bits(parts["sign"], self.view[1]), self.shape)
        magnitude = self._magnitude().decode(parts)
        return torch.where(positive, magnitude, -magnitude)

    def _magnitude(self) -> Factored:
        return Factored(self.shape, self.view)


@dataclass(frozen=True)
class Given:
    """A factor for each row ("row") or each column ("col") of the view, an input that a step only
    reads: no state.  The engines decode it."""

    shape: tuple[int, ...]
    view: tuple[int, int]

    def zeros(self, device: torch.device) -> Parts:
        return {}

    def encode(self, x: Tensor, key: int, salt: int = 0) -> Parts:
        return {}

    def decode(self, parts: Parts) -> Tensor:
        factors = parts["row"][:, None] if "row" in parts else parts["col"][None]
        return _from_view(factors.expand(self.view), self.shape)


def signed(storage: str, shape: tuple[int, ...], view: tuple[int, int] | None = None) -> Codec:
    """The codec of a signed moment.

    `storage` is fp32, bf16, 8bit or factored; `view` is the matrix that its elements are read as;
    without one nothing is factored.
    """
    if storage == "factored" and view is not None:
        return FactoredSign(shape, view)
    kinds: dict[str, Codec] = {"bf16": Bf16(shape, view), "8bit": SignedFloat8(shape, view)}
    return kinds.get(storage, Dense(shape))


def nonnegative(storage: str, shape: tuple[int, ...], view: tuple[int, int] | None = None) -> Codec:
    """The codec of a moment that is never negative; arguments as in `signed`."""
    if storage == "factored" and view is not None:
        return Factored(shape, view)
    kinds: dict[str, Codec] = {"bf16": Bf16(shape, view), "8bit": Float8(shape)}
    return kinds.get(storage, Dense(shape))


def stored(
    shape: tuple[int, ...], group: dict[str, Any], *names: str, square: str | None = None
) -> dict[str, Codec]:
    """The codecs of a parameter of this shape, by its group's `storage`: of the signed moments
    `names`, then of the non-negative moment `square`."""
    shape, storage = tuple(shape), group["storage"]
    view = smmf_view(storage, shape, group["factor_1d"])
    codecs = {name: signed(storage, shape, view) for name in names}
    return codecs if square is None else codecs | {square: nonnegative(storage, shape, view)}


def salts(codecs: Iterable[str]) -> dict[str, int]:
    """A salt for each moment of a parameter, by name, so that their random bits differ."""
    return {name: salt for salt, name in enumerate(codecs, start=1)}


def layout(codecs: Iterable[Codec], shape: tuple[int, ...]) -> tuple[int, int]:
    """The (R, C) matrix that addresses the draws of a parameter of this shape: the view of its
    codecs, which have at most one, or a single row.  Moments of another shape (a projection's) have
    views of their own."""
    views = {getattr(codec, "view", None) for codec in codecs if codec.shape == shape}
    matrices = [view for view in views if view is not None and len(view) == 2]
    assert len(matrices) <= 1, matrices
    return matrices[0] if matrices else (1, prod(shape))


def rank1(row: Tensor, col: Tensor) -> Tensor:
    """The matrix with these row and column means: row (..., R), col (..., C) -> (..., R, C).  All
    zero where the mean is zero."""
    mean = row.mean(dim=-1, keepdim=True)
    # row / mean is at most R; 1 / mean would overflow for means of squares of tiny gradients.
    return torch.where(mean > 0, row / mean, 0.0)[..., :, None] * col[..., None, :]


def smmf_view(storage: str, shape: tuple[int, ...], factor_1d: bool) -> tuple[int, int] | None:
    """The matrix of a moment that SMMF factors, or None if it is not factored: 1-D tensors are few
    and important, so they are only factored on request."""
    if storage == "factored" and (len(shape) > 1 or factor_1d):
        return square_view(prod(shape))
    return None


def matrix_view(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The (R, C) matrix that a tensor of this shape is factored as, or None if factors would not be
    smaller.

    A convolution (O, I, kh, kw) is read as O x (I*kh*kw): factoring its last two dimensions, as
    torch and Hugging Face do, keeps 977 MB of factors for the SDXL UNet instead of 19 MB.
    """
    if len(shape) < 2:
        return None
    rows, cols = shape[0], prod(shape[1:])
    return (rows, cols) if rows + cols < rows * cols else None


def square_view(numel: int) -> tuple[int, int] | None:
    """The most nearly square (R, C) with R*C >= numel, or None where factors would not be smaller.

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


def _zeros8(codes: int, blocks: int, device: torch.device) -> Parts:
    """The stored form of all-zero 8-bit floats."""
    return {
        "codes": torch.zeros(codes, dtype=torch.uint8, device=device),
        "top": torch.full((blocks,), 32 - 127, dtype=torch.int8, device=device),
    }


def _with_draws(x: Tensor, view: tuple[int, int], key: int, salt: int) -> tuple[Tensor, Tensor]:
    """x in blocks, and a draw for each element: (*, _BLOCK) both."""
    drawn = draws(key, view, x.numel(), x.device, salt, _CUT)
    return _blocks(x, view, _BLOCK), _blocks(drawn, view, _BLOCK)


def _exponent(sizes: Tensor) -> Tensor:
    """The biased exponent of each block's largest value, with room for it to round up into the next
    octave; at least 32, so that values 31 octaves below are normal: (*, _BLOCK) -> int32 (*, 1)."""
    bits = sizes.view(torch.int32).amax(dim=1, keepdim=True)
    return ((bits + (1 << _CUT) - 1) >> 23).clamp(32, 254)


def _coded(codes: Tensor, exponent: Tensor, view: tuple[int, int], numel: int) -> Parts:
    return {
        "codes": _unblocked(codes.to(torch.uint8), view, (numel,)),
        "top": (exponent - 127).flatten().to(torch.int8),
    }


def _uncoded(parts: Parts, view: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The inverse of `_coded`: codes int32 (*, _BLOCK), exponents int32 (*, 1)."""
    codes = _blocks(parts["codes"].to(torch.int32), view, _BLOCK)
    return codes, parts["top"].to(torch.int32)[:, None] + 127


def _blocks(x: Tensor, view: tuple[int, int], block: int) -> Tensor:
    """Row-major elements, each row of the view cut into zero-padded blocks: x (*) ->
    (R * ceil(C / block), block)."""
    matrix = _to_view(x, view)
    return F.pad(matrix, (0, -matrix.shape[1] % block)).reshape(-1, block)


def _unblocked(blocks: Tensor, view: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """The inverse of `_blocks` for a tensor of this shape."""
    rows, cols = view
    return _from_view(blocks.view(rows, -1)[:, :cols], shape)


def _to_view(x: Tensor, view: tuple[int, ...]) -> Tensor:
    return F.pad(x.flatten(), (0, prod(view) - x.numel())).view(view)


def _from_view(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    return matrix.flatten()[: prod(shape)].reshape(shape)


def _pack_bits(bits: Tensor) -> Tensor:
    """(R, C) bool -> (R, ceil(C / 8)) uint8, column j in bit j % 8 of byte j // 8."""
    bytes_ = F.pad(bits, (0, -bits.shape[1] % 8)).view(bits.shape[0], -1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bytes_.to(torch.uint8) << shifts).sum(dim=2, dtype=torch.uint8)


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
