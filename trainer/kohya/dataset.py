"""kohya's dataset configuration: where pictures are, and the options of how they are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.kohya.reading import ScriptOptions, toml

_OF_SOURCES = {"image_dir", "num_repeats", "class_tokens", "is_reg"}


def from_file(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any], list[str]]:
    """-> the sources as `data.sources` has them, the options that all of them share, and notes on
    those that differ.  Raises UserError if the file is not a dataset configuration."""
    tables = toml(file)
    subsets = [
        tables.get("general", {}) | _own(dataset, "subsets") | dict(subset)
        for dataset in tables.get("datasets", [])
        for subset in dataset.get("subsets", [])
    ]
    if not subsets:
        raise UserError(f"{file}: there is no [[datasets.subsets]] in it")
    missing = [subset for subset in subsets if "image_dir" not in subset]
    if missing:
        raise UserError(f"{file}: a [[datasets.subsets]] has no image_dir")
    options, notes = dict[str, Any](), list[str]()
    for name in dict.fromkeys(name for subset in subsets for name in subset):
        if name in _OF_SOURCES:
            continue
        values = [subset[name] for subset in subsets if name in subset]
        if len(values) < len(subsets) or any(value != values[0] for value in values):
            notes.append(f"{name}: differs between subsets; {values[0]} for all of them here")
        options["train_batch_size" if name == "batch_size" else name] = values[0]
    return [_source(subset) for subset in subsets], options, notes


def from_folders(given: ScriptOptions) -> list[dict[str, Any]]:
    """The folders of --train_data_dir and --reg_data_dir as sources."""
    folders = [(given.take("train_data_dir"), False), (given.take("reg_data_dir"), True)]
    return [{"path": path} | ({"prior": True} if prior else {}) for path, prior in folders if path]


def weighted(sources: Sequence[dict[str, Any]], weight: Any) -> list[dict[str, Any]]:
    """The sources, with this weight for regularisation pictures."""
    if weight is None:
        return [*sources]
    return [source | ({"weight": weight} if source.get("prior") else {}) for source in sources]


def _own(table: Mapping[str, Any], but: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != but}


def _source(subset: Mapping[str, Any]) -> dict[str, Any]:
    source: dict[str, Any] = {"path": subset["image_dir"]}
    if subset.get("num_repeats", 1) != 1:
        source["repeats"] = subset["num_repeats"]
    if subset.get("class_tokens"):
        source["caption"] = subset["class_tokens"]
    if subset.get("is_reg"):
        source["prior"] = True
    return source
