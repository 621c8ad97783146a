"""Who is measured: this package's optimizers, and whatever peers are installed.

Peers get the options that make them comparable with ours (an external learning rate, no extra
statistic of the weights) and otherwise their defaults.  torchao is left out: it compiles a kernel
for each of the 44 shapes before it makes a step.
"""

import ast
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch

import optim
from bench.workload import LR

Build = Callable[[list[Any]], torch.optim.Optimizer]

# Variants of one optimizer that are measured by default, where its options allow it.
VARIANTS = ("adafactor8bit:clip_norm=lagged", "adafactor8bit:clip_threshold=none")

PEERS: dict[str, Callable[[ModuleType, list[Any]], torch.optim.Optimizer]] = {
    "torch/adamw-fused": lambda m, p: m.optim.AdamW(p, lr=LR, fused=True),  # the reference itself
    "torch/adamw-foreach": lambda m, p: m.optim.AdamW(p, lr=LR, foreach=True),
    "torch/adafactor": lambda m, p: m.optim.Adafactor(p, lr=LR),
    "transformers/adafactor": lambda m, p: m.Adafactor(
        p, lr=LR, scale_parameter=False, relative_step=False
    ),
    "bitsandbytes/adamw8bit": lambda m, p: m.optim.AdamW8bit(p, lr=LR),
    "adv_optm/adamw-factored": lambda m, p: m.AdamW_adv(p, lr=LR, nnmf_factor=True),
    "adv_optm/adopt-factored": lambda m, p: m.Adopt_adv(p, lr=LR, nnmf_factor=True),
    "adafactor8bit/adafactor8bit": lambda m, p: m.Adafactor8Bit(
        p, lr=LR, scale_parameter=False, relative_step=False
    ),
    "came_pytorch/came": lambda m, p: m.CAME(p, lr=LR),
    "lion_pytorch/lion": lambda m, p: m.Lion(p, lr=LR),
    "pytorch_optimizer/ademamix": lambda m, p: m.AdEMAMix(p, lr=LR),
    "pytorch_optimizer/adopt": lambda m, p: m.ADOPT(p, lr=LR),
    "pytorch_optimizer/stableadamw": lambda m, p: m.StableAdamW(p, lr=LR),
}


@dataclass(kw_only=True)
class Candidate:
    """An optimizer to measure: `build(params)` makes it."""

    name: str
    ours: bool
    build: Build
    version: str = ""  # of a peer's package


class UnknownCandidate(ValueError):
    """A name or an option that nobody has; the message lists those there are."""


def ours(specs: list[str] | None, backend: str) -> list[Candidate]:
    """Ours by `NAME` or `NAME:OPTION=VALUE,...`; all of the family and VARIANTS by default.

    Raises UnknownCandidate for a name, an option or a backend that does not exist.
    """
    if specs is None:
        specs = [*optim.FAMILY, *(spec for spec in VARIANTS if _possible(spec))]
    return [_our(spec, backend) for spec in specs]


def peers(names: list[str] | None) -> tuple[list[Candidate], dict[str, str]]:
    """Peers by `PACKAGE/NAME` or `PACKAGE`, all by default -> those that can be imported, and why
    the others cannot.

    Raises UnknownCandidate for a name that is not in the list.
    """
    chosen = [peer for peer in PEERS if names is None or {peer, peer.split("/")[0]} & set(names)]
    for name in names or ():
        if name != "none" and not any(name in (peer, peer.split("/")[0]) for peer in PEERS):
            raise UnknownCandidate(f"no peer {name!r}; there are: none, {', '.join(PEERS)}")
    found, missing = [], {}
    for peer in chosen:
        package = peer.split("/")[0]
        try:
            module = importlib.import_module(package)
        except Exception as error:  # a peer may fail in any way; the rest goes on
            missing[peer] = f"{_first_line(error)} (pip install {package})"
            continue
        build = _peer_builder(peer, module)
        found.append(Candidate(name=peer, ours=False, build=build, version=version(package)))
    return found, missing


def engine(optimizer: torch.optim.Optimizer) -> str:
    """What runs the loop of one of ours: native, or plain PyTorch where there is no kernel."""
    from optim import dispatch

    has_kernel = (
        isinstance(optimizer, optim.FusedOptimizer)
        and optimizer.backend == "native"
        and dispatch.has_rule(type(optimizer).rule)
    )
    return "native" if has_kernel else "plain PyTorch"


def native_isa() -> str | None:
    """The instruction set of our native module, or None where there is no module."""
    try:
        from optim import native

        return native.isa()
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None


def _our(spec: str, backend: str) -> Candidate:
    name, options = _parse(spec)
    known = _options_of(name)
    if backend != "auto":
        options["backend"] = backend
    for option in options:
        if option not in known:
            raise UnknownCandidate(f"{name} has no option {option!r}; it has: {', '.join(known)}")

    def build(params: list[Any]) -> torch.optim.Optimizer:
        return optim.build(name, params, lr=LR, **options)

    return Candidate(name=spec.replace(":", " "), ours=True, build=build)


def _options_of(name: str) -> list[str]:
    if name not in optim.FAMILY:
        raise UnknownCandidate(f"no optimizer {name!r}; there are: {', '.join(optim.FAMILY)}")
    return list(optim.options_of(name))


def _possible(spec: str) -> bool:
    name, options = _parse(spec)
    return name in optim.FAMILY and set(options) <= set(optim.options_of(name))


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """`name:a=1,b=none` -> name, {a: 1, b: None}."""
    name, _, rest = spec.partition(":")
    pairs = (pair.partition("=")[::2] for pair in rest.split(",") if pair)
    return name, {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _peer_builder(peer: str, module: ModuleType) -> Build:
    return lambda params: PEERS[peer](module, params)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
