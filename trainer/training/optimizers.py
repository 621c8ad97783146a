"""The optimizer of a run: the class that `optim=` names, from this family or elsewhere."""

import importlib
import importlib.util
import inspect
import io
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

import optim
from optim.options import unknown, unknown_option
from trainer.config import ExternalConfig, OptimizerConfig, PeerConfig
from trainer.config.method import MethodConfig
from trainer.errors import UserError
from trainer.storage import checkpoint
from trainer.training import groups, switching

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def build(
    config: OptimizerConfig, model: nn.Module, seed: int, rules: Sequence[groups.Rule] = ()
) -> torch.optim.Optimizer:
    """The configured optimizer for the trainable parameters of `model`, grouped by `rules`.

    Raises UserError for a class that cannot be imported, for options it does not have or values
    it refuses, and for a rule that matches nothing.
    """
    optimizer = _make(config, groups.parameter_groups(model, config.lr, rules), seed)
    for group in optimizer.param_groups:
        group["initial_lr"] = float(group["lr"])  # the peak that `set_lr` scales
    if isinstance(optimizer, optim.FusedOptimizer):
        optimizer.init_state()  # out of memory now rather than at the first step
        log.info("  stepped by %s", optimizer.engine())
        for line in optimizer.idle_options():
            log.warning("optim.%s", line)
    return optimizer


class Planned(NamedTuple):
    """Bytes that an optimizer will take."""

    state: int | None  # None if it is not known
    scratch: int  # besides, in its steps; 0 if it is not known


def planned(
    config: OptimizerConfig,
    model: nn.Module,
    seed: int,
    rules: Sequence[groups.Rule],
    device_type: str,
) -> Planned:
    """What `build`'s optimizer of such a model, which is on the meta device, will take on a device
    of this type; of another package's optimizer, the state that its first step allocates there,
    unless that step needs real values."""
    if isinstance(config, ExternalConfig):
        chosen = groups.parameter_groups(model, config.lr, rules)
        return Planned(_external_state_bytes(config, chosen), scratch=0)
    optimizer = build(config, model, seed, rules)
    assert isinstance(optimizer, optim.FusedOptimizer)
    return Planned(optimizer.state_bytes(), optimizer.scratch_bytes(device_type))


def _external_state_bytes(config: ExternalConfig, chosen: list[dict[str, Any]]) -> int | None:
    try:
        optimizer = _make_external(config, chosen)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()
    except UserError:
        raise
    except Exception:  # another package's code that needs real values may raise anything
        return None
    finally:
        for group in chosen:
            for p in group["params"]:
                p.grad = None
    tensors = [x for s in optimizer.state.values() for v in s.values() for x in _plain_tensors(v)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


def try_out(
    config: OptimizerConfig, rules: Sequence[groups.Rule] = (), device: torch.device = _CPU
) -> None:
    """Refuse a wrong optimizer, option or rule before a model is loaded, by building it for one
    small matrix, and one for each rule.  With optim=external it also makes a step, on the run's
    device."""

    def small(**options: Any) -> dict[str, Any]:
        return {"params": [nn.Parameter(torch.zeros(2, 2, device=device))], **options}

    first = _make(config, [small()], seed=0)
    if type(config) is ExternalConfig:
        _try_step(config, first)
        _try_reading_back(config, first)
    for number, rule in enumerate(rules):
        options = groups.options_of(rule, config.lr)
        try:
            _make(config, [small(), small(**options)], seed=0)
        except UserError as error:
            also = groups.besides(rule, first.param_groups[0])
            raise UserError(f"method.rules[{number}] ({rule['pattern']}): {error}{also}") from error


def refuse_second_average(config: OptimizerConfig, method: MethodConfig) -> None:
    """Refuse method.ema beside an optimizer that averages the weights itself."""
    if not method.ema:
        return
    if isinstance(config, ExternalConfig):
        averages = switching.switches(_import(config), config.options)
    else:
        averages = switching.switches(optim.FAMILY[config.name])
    if averages:
        raise UserError(
            f"optim={config.name} averages the weights itself (Schedule-Free), and results have "
            "that average; leave ema out"
        )


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a checkpointed state, but keep the configured options instead of the saved ones.

    In the groups of another package's optimizer, the arguments of its class are options; the rest
    (Prodigy's d and k) is state, and comes from the checkpoint.

    Raises UserError if the state is not of this optimizer, these parameters and these options
    (`storage`, for example, affects its layout).
    """
    sizes = [
        [len(group["params"]) for group in each]
        for each in (optimizer.param_groups, state["param_groups"])
    ]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"resume: parameters are in groups of {sizes[0]} now, and of {sizes[1]} in the "
            "checkpoint; put method.rules and optim.weight_decay back, which make the groups"
        )
    try:
        merged = [
            _merged(optimizer, group, saved)
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        ]
        optimizer.load_state_dict(state | {"param_groups": merged})
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"resume: the optimizer's state does not fit: {error}") from error


def _merged(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], saved: dict[str, Any]
) -> dict[str, Any]:
    """A saved group, with the configured options."""
    if isinstance(optimizer, optim.FusedOptimizer):
        of_state = {"params", "param_names", *optimizer.shared}
        return saved | {key: value for key, value in group.items() if key not in of_state}
    chosen = {"initial_lr", *inspect.signature(type(optimizer)).parameters} - {"params"}
    return group | saved | {key: value for key, value in group.items() if key in chosen}


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Set every group's learning rate to its peak times `scale`; returns the first group's."""
    for group in optimizer.param_groups:
        lr = group["initial_lr"] * scale
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)  # torchao's compiled step reads this very tensor
        else:
            group["lr"] = lr
    return optimizer.param_groups[0]["initial_lr"] * scale


def found_rate(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """`optim/d` of an optimizer that finds its learning rate: d, which multiplies lr; else {}."""
    if "d" not in getattr(optimizer, "shared", ()):
        return {}
    return {"optim/d": float(optimizer.param_groups[0]["d"])}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of memory behind the optimizer's state, the family's or anyone's.

    Shared tensors (bitsandbytes' code books) count once; a tensor that holds others (torchao's
    codes and scales) counts as those.
    """
    states = optimizer.state.values()
    tensors = (x for state in states for value in state.values() for x in _plain_tensors(value))
    storages = ((x.device, x.untyped_storage()) for x in tensors)
    sizes = {(device, storage.data_ptr()): storage.nbytes() for device, storage in storages}
    return sum(sizes.values())


def _plain_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors with memory of their own within a value of an optimizer's state."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def _make(
    config: OptimizerConfig, chosen: list[dict[str, Any]], seed: int
) -> torch.optim.Optimizer:
    if isinstance(config, ExternalConfig):
        return _make_external(config, chosen)
    values = groups.with_tuples({k: v for k, v in asdict(config).items() if k != "name"})
    known = optim.options_of(config.name)
    for group in chosen:  # unknown keys would be kept silently
        for option in group.keys() - {"params", *known}:
            cls = optim.FAMILY[config.name].__name__
            raise UserError(f"optim={config.name}: {unknown_option(cls, option, known)}")
    try:
        with warnings.catch_warnings():
            for told in (optim.IdleOption, optim.SlowBackend):  # in the lines that `build` logs
                warnings.simplefilter("ignore", told)
            return optim.build(config.name, chosen, seed=seed, **values)
    except (TypeError, ValueError) as error:
        raise UserError(f"optim={config.name}: {error}") from error


def _make_external(config: ExternalConfig, chosen: list[dict[str, Any]]) -> torch.optim.Optimizer:
    cls, title = _import(config), _title(config)
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise UserError(f"{title} needs a closure, which the trainer does not provide")
    if issubclass(cls, optim.FusedOptimizer):
        name = next((n for n, c in optim.FAMILY.items() if c is cls), "NAME")
        raise UserError(f"{title} belongs to this family; use optim={name}")
    known = inspect.signature(cls).parameters
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in config.options:
        if option not in known and not accepts_any:
            reason = unknown(f"option of {config.class_path}", option, known)
            raise UserError(f"optim.options.{option}: {reason}")
    if "weight_decay" not in known:
        spared = {"weight_decay": 0.0}  # no decay, as without the option
        chosen = [{k: v for k, v in g.items() if (k, v) not in spared.items()} for g in chosen]
    for group in chosen:  # torch takes any key, and uses those it knows
        for option in group.keys() - {"params"}:
            if option not in known and not accepts_any:
                raise UserError(unknown(f"option of {config.class_path}", option, known))
    options = groups.with_tuples(config.options)
    make: Callable[..., torch.optim.Optimizer] = cls  # it takes more arguments than the base class
    try:
        made = make(chosen, lr=config.lr, **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items()) or "no options"
        raise UserError(f"{title} with {given}: {error}") from error
    if switching.switches(made):
        made.train()  # type: ignore[attr-defined]
    return made


def _try_step(config: ExternalConfig, optimizer: torch.optim.Optimizer) -> None:
    """Make a step with a zero gradient: many optimizers check their options no earlier."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    try:
        optimizer.step()
    except Exception as error:  # another package's code may raise anything
        raise UserError(f"{_title(config)} cannot make a step: {error}") from error


def _try_reading_back(config: ExternalConfig, optimizer: torch.optim.Optimizer) -> None:
    """Check that the state can be read back from a file: finding out at a resume, hours later,
    would be too late."""
    file = io.BytesIO()
    try:
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:  # training works, which may be enough for a short run
        message = "%s: no checkpoint of this run can be resumed: %s"
        log.warning(message, _title(config), checkpoint.unread(error))
    except Exception as error:  # as above
        raise UserError(f"{_title(config)}: its state cannot be saved: {error}") from error


def _title(config: ExternalConfig) -> str:
    """The user's choice, as it is written on the command line."""
    if isinstance(config, PeerConfig):
        return f"optim={config.name}"
    return f"optim.class_path={config.class_path}"


def _import(config: ExternalConfig) -> type[torch.optim.Optimizer]:
    title = _title(config)
    module_name, _, class_name = config.class_path.rpartition(".")
    remedy = "is its package installed in this environment?"
    if isinstance(config, PeerConfig):
        remedy = f"another version may have it: pip install --upgrade {config.package}"
        if importlib.util.find_spec(module_name.partition(".")[0]) is None:
            raise UserError(
                f"{title} needs {config.package}, which is not installed: "
                f"pip install {config.package}"
            )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"{title} cannot be imported ({error}); {remedy}") from error
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UserError(f"{title} is not a torch.optim.Optimizer")
    return cls
