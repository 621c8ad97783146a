"""Low-memory optimizers, usable in any trainer: `from optim import Adafactor8bit`, or
`optim.build("adafactor8bit", params)`.

This package imports nothing from `trainer`.  The table below is the list of the family; an
optimizer's options are its class's signature and `Features`, with defaults written nowhere else:
`conf/optim/*.yaml` and `build` take them from there.
"""

from collections.abc import Iterable
from typing import Any, get_type_hints

from optim.adafactor import Adafactor, Adafactor8bit
from optim.adam import AdamW, AdamW8bit, AdamWFactored, AdEMAMix, AdEMAMixFactored
from optim.adopt import Adopt, AdoptFactored, AdoptFactoredAdEMAMix
from optim.apollo import Adafactor8bitApollo, Apollo, ApolloMini
from optim.backend import SlowBackend
from optim.backward import fuse_backward
from optim.came import CAME, CAME8bit
from optim.features import Features
from optim.fused import FusedOptimizer
from optim.idle import IdleOption
from optim.lion import Lion, Lion8bit, LionFactored
from optim.lomo import AdaLomo, Lomo
from optim.muon import Muon, Muon8bit, MuonFactored
from optim.options import unknown, unknown_option
from optim.prodigy import LionProdigy, Prodigy, ProdigyFactored
from optim.schedule_free import (
    AdamW8bitScheduleFree,
    AdamWFactoredScheduleFree,
    AdamWScheduleFree,
    ProdigyFactoredScheduleFree,
    ProdigyScheduleFree,
)
from optim.sgd import SGD
from optim.sophia import Sophia

FAMILY: dict[str, type[FusedOptimizer]] = {
    "sgd": SGD,
    "adamw": AdamW,
    "adamw8bit": AdamW8bit,
    "adamw_factored": AdamWFactored,
    "ademamix": AdEMAMix,
    "ademamix_factored": AdEMAMixFactored,
    "adamw_schedulefree": AdamWScheduleFree,
    "adamw8bit_schedulefree": AdamW8bitScheduleFree,
    "adamw_factored_schedulefree": AdamWFactoredScheduleFree,
    "adopt": Adopt,
    "adopt_factored": AdoptFactored,
    "adopt_factored_ademamix": AdoptFactoredAdEMAMix,
    "lion": Lion,
    "lion8bit": Lion8bit,
    "lion_factored": LionFactored,
    "adafactor": Adafactor,
    "adafactor8bit": Adafactor8bit,
    "lomo": Lomo,
    "adalomo": AdaLomo,
    "came": CAME,
    "came8bit": CAME8bit,
    "apollo": Apollo,
    "apollo_mini": ApolloMini,
    "adafactor8bit_apollo": Adafactor8bitApollo,
    "muon": Muon,
    "muon8bit": Muon8bit,
    "muon_factored": MuonFactored,
    "prodigy": Prodigy,
    "prodigy_factored": ProdigyFactored,
    "lion_prodigy": LionProdigy,
    "prodigy_schedulefree": ProdigyScheduleFree,
    "prodigy_factored_schedulefree": ProdigyFactoredScheduleFree,
    "sophia": Sophia,
}

__all__ = [
    "FAMILY",
    "Features",
    "FusedOptimizer",
    "IdleOption",
    "SlowBackend",
    "build",
    "fuse_backward",
    "options_of",
    *sorted(cls.__name__ for cls in FAMILY.values()),
]


def build(name: str, params: Iterable[Any], **overrides: Any) -> FusedOptimizer:
    """Make an optimizer of the family by name, with its defaults and these options.

    Raises ValueError for an unknown name, TypeError for an option it does not have, ValueError for
    an impossible value.
    """
    known = options_of(name)
    for option in overrides:
        if option not in known:
            raise TypeError(unknown_option(name, option, known))
    return FAMILY[name](params, **overrides)


def options_of(name: str) -> dict[str, tuple[Any, Any]]:
    """The options of an optimizer: {name: (type, default)}."""
    if name not in FAMILY:
        raise ValueError(unknown("optimizer", name, FAMILY))
    cls = FAMILY[name]
    types = get_type_hints(Features) | get_type_hints(cls.__init__)
    return {key: (types[key], default) for key, default in cls.default_options().items()}
