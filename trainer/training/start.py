"""The adapters that a run starts from (`method.start_from`): reading them, and refusing those that
do not fit the run."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from trainer.errors import UserError
from trainer.formats import lora
from trainer.formats.adapter import commonest
from trainer.formats.adapters import Adapters, all_of, of_models
from trainer.models.model import Model

# The part of a module's name that says in which block it is.
_IN_A_BLOCK = re.compile(r".*\.(transformer_blocks|attentions|resnets|\w+samplers|layers)\.\d+\.")


def read(start_from: str, model: Model, layers: dict[str, list[str]]) -> tuple[Adapters, int]:
    """The adapters of a LoRA file that a run starts from, and how many of them are left out.

    layers: those of the trained parts whose output is used; adapters of others have no effect.
    """
    path = Path(start_from).expanduser()
    adapters = lora.read(path, model.trained_parts)
    if missing := sorted(adapters.keys() - layers.keys()):
        raise UserError(
            f"method.start_from={path} has adapters of the {missing[0]}, which method.train="
            f"{list(layers)} leaves out"
        )
    used = {
        part: {name: adapters[part][name] for name in layers[part] if name in adapters[part]}
        for part in adapters
    }
    count = len(all_of(used))
    if not count:
        raise UserError(f"method.start_from={path} has no adapter of a layer whose output is used")
    return used, len(all_of(adapters)) - count


def refuse_others(
    models: Mapping[str, nn.Module], adapters: Adapters, layers: Mapping[str, list[str]]
) -> None:
    """Raise UserError if modules, ranks, scales or DoRA of `adapters` differ from the models' PEFT
    modules.  The message names options of a run that they would fit, if there are any.

    layers: of each part, the modules that may have adapters.
    """
    in_run = of_models({part: models[part] for part in adapters})
    for part, by_path in adapters.items():
        for path in sorted(by_path.keys() | in_run[part].keys()):
            here, there = (
                "absent" if a is None else str(a)
                for a in (in_run[part].get(path), by_path.get(path))
            )
            if here != there:
                title = type(next(iter(by_path.values()))).method.title
                raise UserError(
                    f"the {title} does not fit the run: {part}.{path} is {there} in the file "
                    f"and {here} in the run{_hint(in_run, adapters, layers)}"
                )


def _hint(in_run: Adapters, adapters: Adapters, layers: Mapping[str, list[str]]) -> str:
    """What to do with adapters that do not fit the run; "" if no options describe them."""
    there, here = ({a.method.name for a in all_of(held)} for held in (adapters, in_run))
    if there.isdisjoint(here):
        return f"; it continues in a run with method={there.pop()}"
    options = _options_of(adapters, layers)
    return f"; it fits a run with {options}" if options else ""


def _options_of(adapters: Adapters, layers: Mapping[str, list[str]]) -> str | None:
    """The command-line options of a run with these adapters; None if no options describe them (they
    differ between blocks, say)."""
    every = all_of(adapters)
    kinds = {type(adapter) for adapter in every}
    own = kinds.pop().options(every) if len(kinds) == 1 else None
    if own is None:
        return None
    rank, alpha = commonest(every)
    key_of = {part: "targets" if part == "unet" else "text_targets" for part in adapters}
    lists: dict[str, dict[str, None]] = {"targets": {}, "text_targets": {}}
    scales: dict[str, tuple[int, float]] = {}  # by part and the end of a module's name
    for part, by_path in adapters.items():
        for path, adapter in by_path.items():
            end, scale = _IN_A_BLOCK.sub("", path), (adapter.rank, adapter.alpha)
            if scales.setdefault(f"{part}.*{end.replace('.', '[.]')}$", scale) != scale:
                return None
            lists[key_of[part]][end] = None
    for part, by_path in adapters.items():
        named = re.compile(rf"(^|\.)({'|'.join(lists[key_of[part]])})$")
        if by_path.keys() != {path for path in layers[part] if named.search(path)}:
            return None
    others = [
        f"{{pattern: '{where}', rank: {scale[0]}, alpha: {scale[1]:g}}}"
        for where, scale in scales.items()
        if scale != (rank, alpha)
    ]
    options = [
        f"method.rank={rank} method.alpha={alpha:g}",
        *([own] if own else []),
        f"'method.train=[{','.join(adapters)}]'",
        *(f"'method.{key}=[{','.join(ends)}]'" for key, ends in lists.items() if ends),
        *([f'"method.ranks=[{", ".join(others)}]"'] if others else []),
    ]
    return " ".join(options)
