"""`optim=`: the optimizer, of this family or any other.

The family's options are not listed here: `optimizer_schema` turns a class's signature
(`optim.options_of`) into a dataclass, so that each default has one home.
"""

from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal, get_origin

import optim


@dataclass(kw_only=True)
class ExternalConfig:
    """Any torch optimizer, by dotted path."""

    name: str = "external"
    class_path: str  # for example torch.optim.RAdam
    lr: float
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the class


@dataclass(kw_only=True)
class PeerConfig(ExternalConfig):
    """An optimizer of another package, with options that make it comparable."""

    package: str  # what pip installs; the run records its version


def peer_schema(choice: str) -> type:
    """PeerConfig for one file of conf/optim/peer, named after its choice: peer/hf_adafactor."""
    title = choice.replace("/", "_")
    return make_dataclass(title, [("name", str, choice)], bases=(PeerConfig,), kw_only=True)


def optimizer_schema(name: str) -> type:
    """A dataclass of this optimizer's options with the defaults of its class's signature, and its
    name.

    `seed` is left out: rounding uses the run's.
    """
    options = [
        (k, str if get_origin(kind) is Literal else kind, default)  # OmegaConf knows no Literal
        for k, (kind, default) in optim.options_of(name).items()
        if k != "seed"
    ]
    return make_dataclass(f"{name}_options", [("name", str, name), *options], kw_only=True)
