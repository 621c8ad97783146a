"""`optim=`: the optimizer, of this family or any other.

The family's options are not listed here: `optimizer_schema` turns a class's signature
(`optim.options_of`) into a dataclass, so that each default has one home.
"""

from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_origin

import optim


@dataclass(kw_only=True)
class OptimizerConfig:
    """What every optimizer has."""

    name: str
    lr: float  #: learning rate


@dataclass(kw_only=True)
class ExternalConfig(OptimizerConfig):
    """Any torch optimizer, by dotted path."""

    name: str = "external"
    class_path: str  #: of its class, for example torch.optim.RAdam
    options: dict[str, Any] = field(default_factory=dict)  #: further arguments of the class


@dataclass(kw_only=True)
class PeerConfig(ExternalConfig):
    """An optimizer of another package, with options that make it comparable."""

    package: str  #: what pip installs; the run records its version


def peer_schema(choice: str) -> type[PeerConfig]:
    """PeerConfig for one file of conf/optim/peer, named after its choice: peer/hf_adafactor."""
    title = choice.replace("/", "_")
    return make_dataclass(title, [("name", str, choice)], bases=(PeerConfig,), kw_only=True)


def large_model_lr(name: str, default: float, share: float) -> float:
    """The learning rate to try first with a large model: this share (`share_of_rate` of a method)
    of an optimizer's default, or all of it if the optimizer finds its own rate."""
    return default * (1.0 if finds_rate(name) else share)


def finds_rate(name: str) -> bool:
    """Whether it is one of the family that estimates its own learning rate, as Prodigy does."""
    return name in optim.FAMILY and "d" in optim.FAMILY[name].shared


def estimates_curvature(name: str) -> bool:
    """Whether it is Sophia, or one of its kind."""
    return issubclass(optim.FAMILY.get(name, object), optim.Sophia)


def optimizer_schema(name: str) -> type[OptimizerConfig]:
    """A dataclass of this optimizer's options with the defaults of its class's signature, and its
    name.

    `seed` is left out: rounding uses the run's.
    """
    options = [
        (k, str if get_origin(kind) is Literal else kind, default)  # OmegaConf knows no Literal
        for k, (kind, default) in optim.options_of(name).items()
        if k != "seed"
    ]
    named = [("name", str, name), *options]
    return make_dataclass(f"{name}_options", named, bases=(OptimizerConfig,), kw_only=True)
