"""What draws: models and LoRAs, found by their paths or as the results of runs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.export import loras
from trainer.formats import kinds
from trainer.formats.hub import why_missing
from trainer.formats.weights import of_file
from trainer.reporting import report
from trainer.storage import result_files
from trainer.storage.claim import config_in
from trainer.storage.steps import completed, step_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model, or a LoRA."""

    place: str  # a path, or a model's name on the hub
    name: str
    is_lora: bool = False
    run: Path | None = None  # whose result it is
    step: int | None = None  # of the run

    @property
    def title(self) -> str:
        return self.name if self.step is None else f"{self.name}\nstep {self.step}"

    @property
    def config(self) -> dict[str, Any]:
        """Of its run; {} without one."""
        return config_in(self.run) if self.run else {}


def found(given: Sequence[str], all_results: bool) -> list[Source]:
    """The sources with these names, and with all_results the intermediate results of runs, in the
    order of their steps.  Raises UserError for one that cannot be drawn with, or is given twice."""
    every = [source for name in given for source in _found(name, all_results)]
    places = [source.place for source in every]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise UserError(f"{twice} is given twice; once is enough")
    if all_results and not any(_intermediate(Path(name).expanduser()) for name in given):
        raise UserError(
            "--all-results: none is the folder of a run with intermediate results "
            "(method.export_every writes them); leave it out"
        )
    return _told_apart(every)


def _found(given: str, all_results: bool) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_file():
        return [_of_file(path)]
    if not path.is_dir():
        if wrong := why_missing("SOURCE", given):
            raise UserError(wrong)
        return [Source(place=given, name=given.rpartition("/")[2])]
    if (path / "model_index.json").is_file():
        return [Source(place=str(path), name=path.resolve().name)]
    if (path / result_files.LORA_NAME).is_file():
        return [_of_file(path / result_files.LORA_NAME)]
    if (path / "checkpoint.json").is_file():
        raise UserError(
            f"{path} is a checkpoint; write what it holds first: python -m trainer.export {path} "
            "TARGET"
        )
    folders = [*(_intermediate(path) if all_results else []), path]
    of_run = [source for folder in folders if (source := _of_folder(folder))]
    if not of_run:
        raise UserError(f"{path} {_why_nothing(path)}")
    return of_run


def _why_nothing(folder: Path) -> str:
    if _intermediate(folder):
        return "has no result yet; --all-results draws with its intermediate ones"
    if config_in(folder):
        return (
            "is a run without a result; python -m trainer.export writes one from its last "
            "checkpoint, if it has any"
        )
    return "is not a model, a LoRA, a run or its result: it has no model_index.json, and no lora/"


def _of_folder(folder: Path) -> Source | None:
    """The result in the folder of a run, or in one of its results/step-000040; None without one."""
    result = result_files.found_in(folder)
    if not result:
        return None
    run = result_files.run_of(folder)
    ended = report.result_step(report.read_summary(run))
    return replace(
        _of_file(result) if result.is_file() else Source(place=str(result), name=result.name),
        name=result_files.name_of(run),
        step=ended if run == folder else step_of(folder.resolve()),
        run=run if _names_model(run) else None,
    )


def _of_file(path: Path) -> Source:
    if not kinds.adapters_in(of_file(path)[0]):
        return Source(place=str(path), name=path.stem)
    run = loras.run_of(path)
    return Source(place=str(path), name=_lora_name(path, run), is_lora=True, run=run)


def _lora_name(path: Path, run: Path | None) -> str:
    """That of its run, or of its folder, where all files have the same."""
    if path.name != result_files.LORA_NAME:
        return path.stem
    return result_files.name_of(run) if run else path.absolute().parent.name


def _names_model(run: Path) -> bool:
    model = config_in(run).get("model")
    return isinstance(model, dict) and bool(model.get("path"))


def _intermediate(run: Path) -> list[Path]:
    """The folders of a run's intermediate results, oldest first."""
    return completed(run / "results")


def _told_apart(sources: Sequence[Source]) -> list[Source]:
    """The sources, with longer names where titles would be the same."""
    for longer in (_name_in_folder, lambda source: str(source.run or source.place), _place):
        sources = _renamed(sources, longer)
    return [*sources]


def _place(source: Source) -> str:
    return source.place


def _renamed(sources: Sequence[Source], longer: Callable[[Source], str]) -> list[Source]:
    titles = [source.title for source in sources]
    return [
        replace(source, name=longer(source)) if titles.count(source.title) > 1 else source
        for source in sources
    ]


def _name_in_folder(source: Source) -> str:
    """With its folder's name; of a run, that alone."""
    if source.run:
        return source.run.absolute().name
    return f"{Path(source.place).absolute().parent.name}/{source.name}"


def first_run(sources: Iterable[Source]) -> Source | None:
    """The first source that is a run's result, if any."""
    return next((source for source in sources if source.run), None)
