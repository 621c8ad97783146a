"""`python -m trainer.sweep FOLDER ...`: rebuild the tables of a sweep, or of several."""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trainer.cli import command
from trainer.errors import UserError
from trainer.storage.run_folder import is_sweep
from trainer.sweep import files, page, planned
from trainer.sweep.folders import ended_runs
from trainer.sweep.runs import RunSummary

_HELP = """\
Compare finished runs: print the tables and remarks that end a sweep, without training.

  python -m trainer.sweep runs/sweep-20260101-120000
  python -m trainer.sweep runs/sweep-20260101-120000 --csv runs.csv --latex tables.tex
  python -m trainer.sweep runs/sweep-20260101-120000 runs/2026-01-02 --out compared

FOLDER is the folder of a sweep or a run, or any folder that contains some.  For a single sweep,
its sweep.md, curves.png and sweep.png are rewritten; otherwise they are written to --out.  Runs
with the same options count once: the newest finished one."""

_EPILOG = """\
Exit status: 0, the tables are printed and the files written; 2, a folder has no runs, a file exists
already, or the command is wrong."""

_FORMATS: dict[str, Callable[[Sequence[RunSummary]], str]] = {
    "csv": files.as_csv,
    "json": files.as_json,
    "latex": files.as_latex,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; an error prints one line and exits with status 2."""
    given = _parser().parse_args(arguments)
    texts = {kind: path for kind in _FORMATS if (path := getattr(given, kind))}
    try:
        runs = _ended(given.folders)
        missing = _missing(given.folders)
        own = _sweep_of(given.folders)
        out = given.out or own
        pages = [] if out is None or _is_same(out, own) else [out / name for name in page.FILES]
        _refuse_existing([*texts.values(), *pages])
        for kind, path in texts.items():
            _write_new(path, _FORMATS[kind](runs))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            page.write(out, runs, missing)
        print(page.printed(runs, missing))
        written = [*texts.values(), *([out / page.TABLE] if out else [])]
        print("".join(f"\n{path}" for path in written))
    except (UserError, OSError) as error:
        command.fail(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m trainer.sweep",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="folder that contains runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="write sweep.md, curves.png and sweep.png here; must not contain them yet",
    )
    for kind, what in (
        ("csv", "one row per run, with everything in its summary.json"),
        ("json", "the runs, statistics over seeds, and the remarks"),
        ("latex", "the tables, for a paper (booktabs)"),
    ):
        parser.add_argument(f"--{kind}", type=Path, metavar="FILE", help=f"new file: {what}")
    return parser


def _ended(folders: Sequence[Path]) -> list[RunSummary]:
    """The ended runs in all folders.  Raises UserError for a folder without any."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name the folder of a sweep or a run")
        if not ended_runs(folder):
            raise UserError(
                f"{folder} contains no finished run (no summary.json in it or below); name the "
                "folder of a sweep or a run"
            )
    return ended_runs(*folders)


def _missing(folders: Sequence[Path]) -> list[str]:
    """The planned runs of the sweeps in these folders that have not ended; if there are several
    sweeps, with the sweep's name."""
    plans = {path.resolve(): path for folder in folders for path in folder.rglob(planned.NAME)}
    missing = []
    for sweep in (path.parent for path in plans.values()):
        prefix = f"{sweep.name}: " if len(plans) > 1 else ""
        missing += [prefix + run for run in planned.missing(sweep, ended_runs(sweep))]
    return missing


def _sweep_of(folders: Sequence[Path]) -> Path | None:
    """The sweep's folder, if a single sweep is compared."""
    return folders[0] if len(folders) == 1 and is_sweep(folders[0]) else None


def _is_same(folder: Path, other: Path | None) -> bool:
    return other is not None and folder.resolve() == other.resolve()


def _refuse_existing(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"{path} already exists; name another")


def _write_new(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    command.end_with_the_reader()
    main()
