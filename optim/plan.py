"""What the engine works on: parameters as descriptors, buckets of them as lists of tiles.

The structs mirror `csrc/core/types.h` and `csrc/engine/projection.h` field by field; addresses are
integers.  A descriptor is built once for a parameter; its gradient's address is updated at every
step.  A bucket is a set of parameters that one launch steps; its tiles only depend on shapes, so
they are built once too.
"""

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64
from typing import Any

import torch
from torch import Tensor

from optim.codecs import (
    Bf16,
    Codec,
    Dense,
    Factored,
    FactoredSign,
    Float8,
    Given,
    Parts,
    SignedFloat8,
)
from optim.features import DEFAULTS
from optim.options import learning_rate

TILE_ROWS, TILE_COLS, VECTOR_PAD = 64, 512, 32
PARTIALS = TILE_ROWS + TILE_COLS  # of a factored moment in a tile: its row and column sums
HYPER_BYTES, TILE_SUMS_BYTES = 176, 64  # sizes of structs that only the engine reads
TILE_BYTES = 24
CHANNELS, DRAWS = 32, 8192  # in a part of a projection: channels, or elements of P
NUM_SLOTS = 3
SLOTS = {  # SlotId
    "exp_avg": 0,
    "gap": 0,
    "exp_avg_slow": 1,
    "exp_avg_res": 1,
    "exp_avg_sq": 2,
    "hessian": 2,
    "scales": 2,
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Dtype
_RULES = (  # csrc/rules/all.h, in its order
    "sgd",
    "adam",
    "adopt",
    "lion",
    "adafactor",
    "sophia",
    "curved",
    "prodigy",
    "lion_prodigy",
    "came",
    "schedule_free",
    "prodigy_schedule_free",
    "scaled",
)
RULES = {name: number for number, name in enumerate(_RULES)}
# Rules that project matrices, and the rule that steps projections and other tensors.
PROJECTED = {"apollo": "adam", "adafactor_apollo": "adafactor"}
# Rules that orthogonalize the step "sgd" of matrices, and the rule that steps other tensors.
ORTHOGONALIZED = {"muon": "adam"}
# The rule of a curvature estimate, and the moments that it uses; no feature applies to it.
ESTIMATE, ESTIMATED = "curved", ("hessian",)
FLAGS = (  # Flag, from bit 0
    "nesterov",
    "atan2",
    "grams",
    "cautious",
    "cautious_decay",
    "orthograd",
    "grad_clip",
    "growth_limit",
    "clip_exact",
    "clip_lagged",
    "relative_step",
    "scale_parameter",
    "fixed_beta2",
    "stochastic",
    "first_moment",
    "slow_moment",
    "safeguard_warmup",
    "bias_correction",
    "growth_settled",
)
# CodecId, and the order of the parts; 0 is an absent moment.
_LAYOUT: dict[type, tuple[int, tuple[str, ...]]] = {
    Dense: (1, ("",)),
    Bf16: (2, ("",)),
    SignedFloat8: (3, ("codes", "top")),
    Float8: (4, ("codes", "top")),
    Factored: (5, ("row", "col")),
    FactoredSign: (6, ("row", "col", "", "", "sign")),
    Given: (7, ("row", "col")),
}


class Options(ctypes.Structure):
    """The options of one parameter group, as numbers."""

    _fields_ = [
        ("lr", c_double),
        ("weight_decay", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("beta3", c_double),
        ("beta2_decay", c_double),
        ("eps", c_double),
        ("eps_scale", c_double),
        ("alpha", c_double),
        ("warmup_steps", c_double),
        ("grad_clip", c_double),
        ("growth_limit", c_double),
        ("clip_threshold", c_double),
        ("rho", c_double),
        ("d0", c_double),
        ("coefficient", c_double),
        ("flags", c_int64),
        ("seed", c_uint64),
        ("slice", c_int64),
        ("distance", c_uint64),
    ]


class Moment(ctypes.Structure):
    """How one moment of one parameter is stored."""

    _fields_ = [
        ("codec", c_int32),
        ("salt", c_int32),
        ("parts", c_uint64 * 5),
        ("vectors", c_int64),
        ("partials", c_int64),
    ]


class Samples(ctypes.Structure):
    """Prodigy's state for some elements of a parameter."""

    _fields_ = [
        ("start", c_uint64),
        ("sum", Moment),
        ("numerator", c_uint64),
        ("denominator", c_uint64),
        ("weight_sum", c_uint64),
    ]


class Descriptor(ctypes.Structure):
    """One parameter: the addresses and shapes of its data (`Tensor` in C++)."""

    _fields_ = [
        ("weight", c_uint64),
        ("grad", c_uint64),
        ("compensation", c_uint64),
        ("step", c_uint64),
        ("nonfinite", c_uint64),
        ("update_norm", c_uint64),
        ("update_rms", c_uint64),
        ("weight_dtype", c_int32),
        ("grad_dtype", c_int32),
        ("numel", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("index", c_int64),
        ("group", c_int64),
        ("moments", Moment * NUM_SLOTS),
        ("samples", Samples),
    ]


class Launch(ctypes.Structure):
    """One launch: a bucket through all phases."""

    _fields_ = [
        ("options", c_uint64),
        ("tensors", c_uint64),
        ("members", c_uint64),
        ("tiles", c_uint64),
        ("first_tile", c_uint64),
        ("vectors", c_uint64),
        ("hypers", c_uint64),
        ("sums", c_uint64),
        ("workspace", c_uint64),
        ("num_tensors", c_int64),
        ("num_tiles", c_int64),
        ("rule", c_int32),
        ("workspace_per_thread", c_int32),
    ]


class Projection(ctypes.Structure):
    """One tensor whose gradient is projected."""

    _fields_ = [
        ("p", c_uint64),
        ("low", c_uint64),
        ("step", c_uint64),
        ("factors", c_uint64),
        ("count", c_uint64),
        ("seed", c_uint64),
        ("index", c_int64),
        ("update_gap", c_int64),
        ("rank", c_int64),
        ("width", c_int64),
        ("length", c_int64),
        ("first_part", c_int64),
        ("gain", c_float),
        ("tall", c_int32),
    ]


class Projections(ctypes.Structure):
    """One launch: a portion of projections."""

    _fields_ = [
        ("tensors", c_uint64),
        ("grads", c_uint64),
        ("draws", c_uint64),
        ("channels", c_uint64),
        ("sums", c_uint64),
        ("grad_dtype", c_int32),
        ("p_dtype", c_int32),
        ("signs", c_int32),
        ("per_tensor", c_int32),
    ]


def first_decay(group: dict[str, Any]) -> float | None:
    """The decay of a group's first moment, whatever the option is called; None if there is no such
    option or no first moment."""
    betas = group.get("betas", (None,))
    decay: float | None = group.get("momentum", group.get("beta1", betas[0]))
    return decay


def group_options(group: dict[str, Any], coefficient: float, rule: str) -> Options:
    """One group's options as the engine reads them for a rule; `coefficient` multiplies every
    gradient."""
    group = {**DEFAULTS, **group}  # a class may refuse some
    betas = tuple(group.get("betas", ()))
    beta2 = group.get("beta2", betas[1] if len(betas) > 1 else None)
    beta3 = group.get("beta3", betas[2] if len(betas) > 2 else None)
    if "d" in group and beta3 is None:
        beta3 = betas[1] ** 0.5
    eps = group.get("eps", 0.0)
    eps, eps_scale = eps if isinstance(eps, (tuple, list)) else (eps, 0.0)
    clips = group.get("clip_threshold") is not None
    clip_norm = group.get("clip_norm", "exact")
    limits = group.get("growth_limit") is not None
    if "rank" in group and rule != "scaled":  # an APOLLO only limits what it projects
        limits = False
    flags = {
        "nesterov": group.get("nesterov"),
        "atan2": group.get("atan2"),
        "grams": group["grams"],
        "cautious": group["cautious"],
        "cautious_decay": group["cautious_decay"],
        "orthograd": group["orthograd"],
        "grad_clip": group["grad_clip"] is not None,
        "growth_limit": limits and rule != "came",
        "clip_exact": clips and clip_norm == "exact",
        "clip_lagged": clips and clip_norm == "lagged",
        "relative_step": group.get("relative_step"),
        "scale_parameter": group.get("scale_parameter"),
        "fixed_beta2": beta2 is not None,
        "stochastic": group["rounding"] == "stochastic",
        "first_moment": group.get("beta1") is not None,
        "slow_moment": "alpha" in group,
        "safeguard_warmup": group.get("safeguard_warmup"),
        "bias_correction": group.get("bias_correction"),
        "growth_settled": limits and rule == "came",
    }
    return Options(
        lr=learning_rate(group["lr"]),
        weight_decay=group["weight_decay"],
        beta1=(betas[0] if rule == "adam" else first_decay(group)) or 0.0,
        beta2=beta2 or 0.0,
        beta3=beta3 or 0.0,
        beta2_decay=group.get("beta2_decay", 0.0),
        eps=eps,
        eps_scale=eps_scale,
        alpha=group.get("alpha", 0.0),
        warmup_steps=group.get("warmup_steps", 0),
        grad_clip=group["grad_clip"] or 0.0,
        growth_limit=group.get("growth_limit") or 0.0,
        clip_threshold=group.get("clip_threshold") or 0.0,
        rho=group.get("rho", 0.0),
        d0=group.get("d0", 0.0),
        coefficient=coefficient,
        flags=sum(1 << bit for bit, name in enumerate(FLAGS) if flags[name] and rule != ESTIMATE),
        seed=group["seed"] % (1 << 64),
        slice=group.get("slice_p", 1),
        distance=group["d"].data_ptr() if "d" in group else 0,
    )


def moment_of(codec: Codec, parts: Parts, salt: int) -> Moment:
    """How the engine finds a moment that `codec` stores in these tensors."""
    kind, order = _LAYOUT[type(codec)]
    if isinstance(codec, Factored) and codec.float8:
        order = ("row.codes", "col.codes", "row.top", "col.top")
    addresses = [parts[name].data_ptr() if name in parts else 0 for name in order]
    return Moment(codec=kind, salt=salt, parts=tuple(addresses + [0] * (5 - len(addresses))))


def matrix_of(view: tuple[int, int]) -> tuple[int, int]:
    """The matrix that is tiled for a view.

    A flat tensor, view (1, n), is folded into rows of a tile's width: the same elements in the same
    order, with tiles of a useful height.
    """
    rows, cols = view
    return (-(-cols // TILE_COLS), TILE_COLS) if rows == 1 else view


class Bucket:
    """The work list of some parameters: tiles in tensor, row, column order, and the workspace size.

    `vectors` holds the offset in the workspace of each member's decoded factors; the tiles' partial
    sums follow them.  Units are fp32 elements.  All members share one workspace; or, if each is
    stepped alone by one thread, every thread has one, of `workspace_per_thread` elements.
    """

    def __init__(
        self, members: list[int], descriptors: "ctypes.Array[Descriptor]", alone: bool = False
    ) -> None:
        matrices = [(descriptors[i].rows, descriptors[i].cols) for i in members]
        num_factored = [_num_factored(descriptors[i]) for i in members]
        self.num_tensors, self.members = len(members), _on_host(members, torch.int32)
        rows, cols = _on_host(matrices).reshape(-1, 2).unbind(1)
        factored = _on_host(num_factored)
        strips, chunks = _ceil_div(rows, TILE_ROWS), _ceil_div(cols, TILE_COLS)
        counts = strips * chunks
        self.first_tile = torch.zeros(len(members) + 1, dtype=torch.int64, device="cpu")
        self.first_tile[1:] = counts.cumsum(0)
        self.num_tiles = int(self.first_tile[-1])

        vector_sizes = factored * (_padded(rows) + _padded(cols))
        owner = torch.arange(len(members), device="cpu").repeat_interleave(counts)
        within = torch.arange(self.num_tiles, device="cpu") - self.first_tile[owner]
        partials = factored[owner] * PARTIALS
        if alone:
            room = _padded(vector_sizes + counts * factored * PARTIALS)
            self.workspace_per_thread, self.workspace_size = max(VECTOR_PAD, int(room.max())), 0
            self.vectors = torch.zeros_like(room)
            first_partials = vector_sizes[owner] + within * partials
        else:
            total_vectors = int(vector_sizes.sum())
            self.workspace_size = total_vectors + int(partials.sum())
            self.workspace_per_thread = 0
            self.vectors = vector_sizes.cumsum(0) - vector_sizes
            first_partials = total_vectors + partials.cumsum(0) - partials

        # Tile: int32 tensor, row, col, unused; int64 partials
        self.tiles = torch.zeros((self.num_tiles, TILE_BYTES // 8), dtype=torch.int64, device="cpu")
        words = self.tiles.view(torch.int32)
        words[:, 0] = owner.to(torch.int32)
        words[:, 1] = (within // chunks[owner] * TILE_ROWS).to(torch.int32)
        words[:, 2] = (within % chunks[owner] * TILE_COLS).to(torch.int32)
        self.tiles[:, 2] = first_partials


def num_tiles(descriptor: Descriptor) -> int:
    """How many tiles a parameter has."""
    return -(-descriptor.rows // TILE_ROWS) * -(-descriptor.cols // TILE_COLS)


def room_bytes(descriptor: Descriptor) -> int:
    """Bytes that a parameter takes in the workspace: decoded factors and partial sums."""
    vectors = vector_size(descriptor.rows, descriptor.cols)
    return _num_factored(descriptor) * 4 * (vectors + num_tiles(descriptor) * PARTIALS)


def _num_factored(descriptor: Descriptor) -> int:
    """How many moments of a parameter are factored."""
    kinds = (_LAYOUT[Factored][0], _LAYOUT[FactoredSign][0])
    return sum(moment.codec in kinds for moment in descriptor.moments)


def vector_size(rows: int, cols: int) -> int:
    """Workspace elements of one decoded pair of factors."""
    return sum(-(-length // VECTOR_PAD) * VECTOR_PAD for length in (rows, cols))


def _on_host(numbers: list[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers as a CPU tensor, whatever torch's default device is."""
    return torch.tensor(numbers, dtype=dtype, device="cpu")


def _ceil_div(x: Tensor, by: int) -> Tensor:
    return (x + by - 1) // by


def _padded(x: Tensor) -> Tensor:
    return _ceil_div(x, VECTOR_PAD) * VECTOR_PAD
