"""`python -m trainer.doctor`: check a data set before a run.

It takes the trainer's own options, reads every caption and picture, and trains nothing.
"""

import argparse
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trainer.checks import remarks
from trainer.checks.validate import to_dataclasses
from trainer.cli import command, compose
from trainer.config import Config
from trainer.data import Store, dataset, findings, sources
from trainer.data.survey import survey
from trainer.errors import UserError
from trainer.reporting import report
from trainer.sampling import pictures
from trainer.storage.claim import config_in
from trainer.training import schedule
from trainer.wording import counted, plural, some

if TYPE_CHECKING:
    from trainer.models.model import Model

_HELP = """\
Check every picture and caption of a data set and list the problems, without training.

  python -m trainer.doctor experiment=sdxl_lora data.path=/pictures
  python -m trainer.doctor experiment=sdxl_lora data.path=/pictures data.cache=/cache \\
      model.path=/models/sd_xl_base_1.0.safetensors

It takes the options of `python -m trainer`; without a cache it needs no model.  Exit status:
0, no problems; 1, there are problems, all of them listed; 2, the data cannot be read, or an option
is wrong."""

_SHEET = 64  # most pictures on a sheet


def main() -> None:
    """The command line; exits with 0, 1 or 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m trainer.doctor", description=_HELP, formatter_class=formatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for the trainer; `python -m trainer --help data` explains them",
    )
    parser.add_argument(
        "--images-per-second",
        type=command.positive,
        help="training speed, to estimate an epoch's length",
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="draw pictures as a run would see them"
    )
    parser.add_argument(
        "--names", type=int, default=10, help="how many names to list per problem (default 10)"
    )
    given = parser.parse_intermixed_args()
    if given.names < 0:
        parser.error(f"--names={given.names} is negative")
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        overrides = compose.resumed(given.overrides)
        config = _config(overrides)
        if given.sheet:
            _check_sheet(given.sheet, config)
        for remark in remarks.of_data(config, overrides):
            print(remark)
        problems = examine(config, given.images_per_second, given.names, given.sheet)
    except (UserError, OSError) as error:
        command.fail(str(error))
    sys.exit(1 if problems else 0)


def _config(overrides: list[str]) -> Config:
    """Without a cache, the published model is enough if none is given: its tokenizers count tokens.
    With one, the model's weights are needed for the entries' names."""
    _, composed, _ = compose.with_published_model(overrides)
    if composed.data and composed.data.cache is not None:
        composed = compose.composed(overrides)
    return to_dataclasses(composed)


def _check_sheet(path: Path, config: Config) -> None:
    """Refuse an unknown suffix, an existing file, and a place inside the data."""
    if path.suffix.lower() not in (".png", ".jpg", ".webp"):
        raise UserError(f"--sheet {path}: name it .png, .jpg or .webp")
    if os.path.lexists(path):
        raise UserError(f"--sheet {path} already exists; name another file")
    for source in sources.of_config(config.data):
        if path.resolve().is_relative_to(Path(source.path).expanduser().resolve()):
            raise UserError(
                f"--sheet {path} is inside data.path={source.path}, where it would be taken for a "
                "training picture; name a file elsewhere"
            )


def examine(
    config: Config,
    images_per_second: float | None = None,
    shown: int = 10,
    sheet: Path | None = None,
) -> int:
    """Print a report on the data; returns how many kinds of problems it has.

    `sheet`: file in which to draw pictures as a run would see them.

    Raises UserError for data that cannot be read at all.
    """
    surveyed = survey(config.data)
    if not surveyed.count:
        raise findings.nothing_found(surveyed, config.data)
    if not surveyed.usable and not surveyed.undecodable:
        why = dict.fromkeys(surveyed.uncaptioned, "no caption") | surveyed.unreadable
        name = next(reversed(why))
        raise UserError(f"no picture of {surveyed.count} can be used; {name}: {why[name]}")
    made = dataset.build(surveyed.usable, config.data)
    print(f"{plural(surveyed.count, 'picture')}, {len(surveyed.usable)} of them usable")
    for line in findings.of_sources(surveyed, config.data):
        print(line)
    for what, names in surveyed.remarks.items():
        print(f"{counted(len(names), what)}: {some(names)}")
    from trainer.models.model import Model  # imported after the checks: it takes seconds

    # Names of cache entries depend on the weights; counting tokens does not need them.
    model = Model(config.model, torch.device("cpu"), with_weights=config.data.cache is not None)
    problems = findings.problems(surveyed, config.data) | _caption_problems(model, made)
    problems |= findings.of_batches(made.plan, made.samples)
    for what, names in problems.items():
        print(f"PROBLEM: {counted(len(names), what)}")
        for name in names[:shown]:
            print(f"    {name}")
        if len(names) > shown:
            print(f"    ... and {len(names) - shown} more (--names)")
    if made.samples:
        print(made.table())
        print(_cache_line(model, made))
        print(_epoch_line(config, made, images_per_second))
        print(_run_line(config, made))
        if sheet:
            print(_draw(made, sheet))
    print(f"{plural(len(problems), 'kind')} of problem" if problems else "no problems")
    return len(problems)


def _caption_problems(model: "Model", made: dataset.Dataset) -> dict[str, list[str]]:
    """Captions longer than the model's text encoders read, each with the first picture that has
    it."""
    from trainer.objective import encoding

    cut, room = encoding.cut_captions(model, made.all_captions())
    of = {text: s.name for s in reversed(made.samples) for text in (s.caption, *s.captions)}
    long = [f"{of[caption]}: {count} tokens: {caption[:60]}" for caption, count in cut.items()]
    what = f"captions are truncated at {room} tokens (model.prompt_chunks allows more)"
    return {what: long} if long else {}


def _draw(made: dataset.Dataset, path: Path) -> str:
    """Draw pictures from all parts of the data, cropped and scaled as a run would see them, with
    their captions; -> a line about it.  The crops of a picture are side by side."""
    views = {**made.views, **{row: [row] for row in made.held_out}}
    every_crop = [made.samples[row] for _, rows in sorted(views.items()) for row in rows]
    samples = [sample for sample in every_crop if not sample.mirrored]
    every = -(-len(samples) // _SHEET)
    chosen = samples[::every]
    drawn = [pictures.of_pixels(sample.read_pixels()) for sample in chosen]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures.grid({"as seen": drawn}, [sample.caption for sample in chosen]).save(path)
    which = "" if every == 1 else f", one in {every}"
    return f"{path}: {plural(len(drawn), 'picture')} as a run would see them{which}"


def _cache_line(model: "Model", made: dataset.Dataset) -> str:
    captions, samples, config = [None, *made.all_captions()], made.samples, made.config
    if config.cache is None:
        count = len({s.pixels_key for s in samples})
        others = len({s.pixels_key for s in samples if not s.is_central})
        of_them = f" ({others} of them other crops or mirror images)" if others else ""
        return (
            f"no cache (data.cache=null): every run encodes {plural(count, 'picture')}{of_them} "
            f"and {plural(len(captions), 'caption')}"
        )
    from trainer.objective import encoding

    store = Store(config.cache, config.cache_dtype)
    of_text = encoding.text_fingerprint(model, config.cache)
    of_pictures = encoding.picture_fingerprint(model, config.cache)
    latents, total = store.missing_latents(samples, of_pictures), len(samples)
    texts = store.missing_texts(captions, of_text)
    return (
        f"to be encoded (the others are cached in {config.cache}): {latents} of {total} "
        f"pictures, {texts} of {len(captions)} captions (including the empty prompt)"
    )


def _epoch_line(config: Config, made: dataset.Dataset, images_per_second: float | None) -> str:
    plan, source = made.plan, "as given"
    if images_per_second is None:
        images_per_second, source = _measured_speed(config)
    batches = float(plan.batches_per_epoch)
    many = plural(f"{round(batches, 3):g}", "batch", "es")
    epoch = f"an epoch: {plural(plan.pictures_per_epoch, 'picture')}, {many}"
    if not images_per_second:
        return f"{epoch}; its duration is unknown (--images-per-second)"
    minutes, seconds = divmod(round(plan.pictures_per_epoch / images_per_second), 60)
    return f"{epoch}, {minutes} min {seconds} s at {images_per_second:g} images/s ({source})"


def _run_line(config: Config, made: dataset.Dataset) -> str:
    steps_per_epoch = float(made.plan.batches_per_epoch) / config.runtime.micro_batches
    steps = schedule.settled(config.schedule, steps_per_epoch).steps
    epochs = steps / steps_per_epoch
    many = f"{epochs:,.0f}" if epochs >= 100 else f"{epochs:.3g}"
    return f"a run with these options: {plural(steps, 'step')}, {plural(many, 'epoch')}"


def _measured_speed(config: Config) -> tuple[float | None, str]:
    """Images per second of the newest run under ./runs with this model, method and resolution, and
    the file that says so."""
    summaries = sorted(Path("runs").glob("**/summary.json"), key=lambda p: -p.stat().st_mtime)
    for path in summaries:
        try:
            speed = report.read_summary(path.parent)["images_per_second"]
            if _traits(config_in(path.parent)) == _traits(asdict(config)):
                return float(speed), str(path)
        except (ValueError, KeyError, TypeError):
            continue  # a run that failed, or one of another version
    return None, ""


def _traits(config: dict[str, Any]) -> tuple[Any, ...]:
    """The options that decide most of the speed."""
    data = config["data"]
    named = (config["model"]["path"], config["method"]["name"])
    return (*named, data["resolution"], data["resolutions"], data["batch_size"])


if __name__ == "__main__":
    command.end_with_the_reader()
    main()
