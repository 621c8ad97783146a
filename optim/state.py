"""The state of an optimizer: allocated, labelled, compared with a saved one.

The state of a parameter is a flat dict of plain tensors with dtypes of their own (`step`, then
`moment` or `moment.part`), so that it passes through torch.save(weights_only), safetensors and
torch.distributed.checkpoint as it is.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optim.codecs import Codec, Parts, join

VERSION = 3
LABELS = ("state_version", "optimizer", "family")  # keys of saved groups
# The options that decide whether a moment is kept, and its shape; then those for other state.
_OPTIONS = ("storage", "beta1", "momentum", "factor_1d", "conv_view", "rank")
_OPTIONS_OF = {
    "compensation": ("rounding",),
    "update_norm": ("growth_limit",),
    "update_rms": ("clip_norm", "clip_threshold"),
    "start": ("slice_p",),
    "grad_sum": ("slice_p",),
}


def blank(
    param: Tensor,
    codecs: dict[str, Codec],
    compensated: bool,
    device: torch.device,
    counts_on: torch.device,
) -> dict[str, Tensor]:
    """The state of a parameter before its first step: everything zero.  `compensated`: it includes
    the rounding error of the weights."""
    state = {
        "step": torch.zeros((), dtype=torch.int64, device=counts_on),
        "nonfinite": torch.zeros((), dtype=torch.int64, device=device),
    }
    if compensated:
        state["compensation"] = torch.zeros(tuple(param.shape), dtype=param.dtype, device=device)
    return state | join({name: codec.zeros(device) for name, codec in codecs.items()})


def labelled(optimizer: str, family: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose groups name the version of the state's layout, the optimizer's class, and
    the class that its options and rule are from (perhaps a base).  They are in the groups because
    torch's own savers keep only `state` and `param_groups`, and some keep only a group's options.
    """
    label = {"state_version": VERSION, "optimizer": optimizer, "family": family}
    return state_dict | {"param_groups": [group | label for group in state_dict["param_groups"]]}


def unlabelled(group: dict[str, Any]) -> dict[str, Any]:
    """A saved group without its labels."""
    return {key: value for key, value in group.items() if key not in LABELS}


def check_keys(optimizer: str, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if this is not a state dict."""
    missing = [key for key in ("state", "param_groups") if key not in state_dict]
    if missing:
        raise ValueError(
            f"this is not a state of {optimizer}: it has no {' and no '.join(missing)}; pass what "
            "state_dict() returned"
        )


def check_groups(
    optimizer: str,
    family: str,
    groups: list[dict[str, Any]],
    options: set[str],
    shared: set[str],
    state_dict: dict[str, Any],
) -> None:
    """Raise ValueError, saying what differs, if a saved state's version or groups are not those of
    `optimizer` (its class's name; `family` as in `labelled`), which has these groups, options and
    shared numbers.

    A group without labels is judged by its keys; one with labels may lack an option that did not
    exist yet in the release that saved it.
    """
    for group in state_dict["param_groups"]:
        version = group.get("state_version", VERSION)
        if version != VERSION:
            raise ValueError(
                f"{optimizer} reads state version {VERSION}, and this state has {version}; "
                "it was saved by another optimizer or release"
            )
        owner = group.get("optimizer", optimizer)
        # Several rules have moments of the same names and shapes.
        if owner != optimizer and group.get("family") != family:
            raise ValueError(
                f"this is the state of {owner}, which cannot be loaded into {optimizer}"
            )
        stranger = _stranger(group, state_dict["state"].values())
        if stranger and "optimizer" not in group:
            raise ValueError(
                f"this seems to be a state of {stranger}, which cannot be loaded into {optimizer}: "
                "moments of other packages are not converted. Load it into the optimizer that made "
                f"it, or start {optimizer} without it"
            )
    sizes = [len(group["params"]) for group in state_dict["param_groups"]]
    own_sizes = [len(group["params"]) for group in groups]
    if sizes != own_sizes:
        raise ValueError(
            f"{optimizer} has parameter groups of {own_sizes} tensors, "
            f"and the saved state has {sizes}"
        )
    for own, group in zip(groups, state_dict["param_groups"], strict=True):
        owner, storage = group.get("optimizer", optimizer), group.get("storage")
        if owner != optimizer and storage != own.get("storage"):
            raise ValueError(
                f"this is the state of {owner} with storage={storage!r}, and this {optimizer} has "
                f"storage={own['storage']!r}; build it with storage={storage!r} to load this state"
            )
    for group in state_dict["param_groups"]:  # LR schedulers may have added keys of their own
        needed = shared if "optimizer" in group else options | shared
        if missing := sorted(needed - set(group)):
            raise ValueError(
                f"the saved state is not of {optimizer}: its groups lack {', '.join(missing)}"
            )


def _stranger(group: dict[str, Any], states: Iterable[Parts]) -> str:
    """The optimizer outside of this family whose state this may be, judged by the names in it: in
    words, or an empty string."""
    names = {name for parts in states for name in parts}
    if {"state1", "__bnb_optimizer_quant_state__"} & names or {"t_alpha", "t_beta3"} <= set(group):
        return "bitsandbytes"
    known = {*group, "decoupled_weight_decay"}  # torch tells Adam from AdamW by this
    counts: dict[str, int] = {}
    for name, cls in vars(torch.optim).items():
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer):
            options = set(inspect.signature(cls).parameters) - {"params"}
            if options and options <= known:
                counts[name] = len(options - {"decoupled_weight_decay"})
    nearest = sorted(name for name, count in counts.items() if count == max(counts.values()))
    return "torch.optim." + " or ".join(nearest) if nearest else ""


def check_parts(
    optimizer: str,
    index: int,
    param: Tensor,
    group: dict[str, Any],
    saved: Parts,
    wanted: Parts,
) -> None:
    """Raise ValueError if one parameter's saved state differs in a name, a shape or a dtype from
    `wanted` (tensors of any device), the state that this group's options need."""
    own, found = (
        {key: (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for key, x in parts.items()}
        for parts in (wanted, saved)
    )
    for key in sorted(own.keys() | found.keys()):
        if own.get(key) != found.get(key):
            names = _OPTIONS_OF.get(key.partition(".")[0], _OPTIONS)
            options = [f", {name}={group[name]!r}" for name in names if name in group]
            raise ValueError(
                f"the state of parameter {index} {tuple(param.shape)} does not fit {optimizer}: "
                f"{key!r} is {found.get(key, 'missing')} and should be {own.get(key, 'absent')} "
                f"for {param.dtype} weights{''.join(options)}. "
                f"{group.get('optimizer', optimizer)} made it with another dtype or option: "
                "go back to that, or begin with a new optimizer"
            )


def share_memory(some: Iterable[Parts], others: Iterable[Parts]) -> bool:
    """Whether a tensor of some states shares its storage with one of the others."""
    places, other_places = (
        {x.untyped_storage().data_ptr() for parts in each for x in parts.values()} - {0}
        for each in (some, others)
    )
    return not places.isdisjoint(other_places)


def room_for(saved: Tensor, device: torch.device, there: Tensor | None) -> Tensor:
    """A tensor to copy a saved one to: the existing one (`there`) if it fits, else a new one."""
    if there is not None and there.is_contiguous():
        kind = (there.shape, there.dtype, there.device)
        if kind == (saved.shape, saved.dtype, device):
            return there
    return torch.empty(saved.shape, dtype=saved.dtype, device=device)
