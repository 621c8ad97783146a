"""`python -m trainer.planner`: how much memory a run needs, and whether it is available."""

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch

from trainer import planner
from trainer.checks.validate import to_dataclasses
from trainer.cli import command, compose
from trainer.config import Config, key_of, keys_of, remedies
from trainer.errors import UserError
from trainer.models import execution
from trainer.models.model import Model
from trainer.objective.noise_schedule import training_schedule
from trainer.objective.trained_scheduler import scheduler_config
from trainer.planner import largest_batch
from trainer.planner.page import page, verdict
from trainer.reporting.report import format_bytes

_HELP = """\
Print how much memory a run needs, phase by phase, and whether it fits, without training.

  python -m trainer.planner experiment=sdxl
  python -m trainer.planner experiment=sdxl_lora data.batch_size=4 --card 12
  python -m trainer.planner experiment=sdxl_lora --card 12 --largest-batch
  python -m trainer.planner -m experiment=sdxl optim=adamw8bit,adafactor8bit --card 24

It takes the options of `python -m trainer` and executes a step of the model on tensors without
data (shapes only), so it needs neither weights nor pictures nor a GPU: without model.path it
assumes the published architecture, without data.path pictures of data.resolution.  If the run does
not fit, it tries memory-saving options, the least costly first, until it does.  --largest-batch
also finds how large data.batch_size may be, which takes some more such steps.  -m prints one line
for each run of a sweep.  Exit status: 0, it fits; 1, it (or a run of the sweep) does not; 2, an
option is wrong."""

_LARGEST_CARD = 1024  # GB; larger numbers are a GPU's name


def main() -> None:
    """The command line; exits with 0, 1 or 2."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m trainer.planner", description=_HELP, formatter_class=formatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="as for the trainer; `python -m trainer --help data` explains them",
    )
    parser.add_argument(
        "--card",
        type=_gigabytes,
        metavar="GB",
        help="plan for a GPU of this nominal memory size (24, 24GB), instead of this machine",
    )
    parser.add_argument(
        "--largest-batch",
        action="store_true",
        help="also find the largest data.batch_size that fits",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, in bytes")
    parser.add_argument("-m", "--multirun", action="store_true", help="plan the runs of a sweep")
    given = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        overrides = compose.resumed(given.overrides)
        if given.multirun or any(o.startswith("sweep=") for o in overrides):
            fits = _print_sweep(compose.runs_of(overrides), given)
        else:
            fits = _print_run(overrides, given)
    except (UserError, OSError) as error:
        command.fail(str(error))
    sys.exit(0 if fits else 1)


def _gigabytes(text: str) -> float:
    """An argparse type: the size of a GPU's memory, with or without its unit."""
    size = command.positive(re.sub(r"(?i)(?<=\d)\s*g(i?b)?$", "", text))
    if size > _LARGEST_CARD:
        raise argparse.ArgumentTypeError(
            f"{text}: it is the size of the GPU's memory in GB, such as 16, not its model"
        )
    return size


def _print_run(overrides: list[str], given: argparse.Namespace) -> bool:
    """Print the plan of one run as a page or as JSON; -> whether it fits."""
    overrides, config = _completed(overrides)
    device, room = _device_and_room(config, given.card)
    with command.told_if_long("planning"):
        plan = _plan(config, device)
    if not given.json:
        print(page(plan, room), flush=True)
    largest = _largest_batch(plan, device, room) if given.largest_batch else None
    if given.json:
        print(json.dumps(_numbers(plan, room, largest)))
    else:
        if largest:
            print(largest)
        _print_remedies(plan, overrides, device, room)
    return plan.fits(room)


def _print_sweep(runs: list[list[str]], given: argparse.Namespace) -> bool:
    """Print one line per run, named by the options that not all runs share; -> whether all fit."""
    common, all_fit = set.intersection(*map(set, runs)), True
    for overrides in runs:
        own = [option for option in overrides if option not in common]
        _, config = _completed(overrides)
        device, room = _device_and_room(config, given.card)
        with command.told_if_long(f"planning {' '.join(own) or 'the run'}"):
            plan = _plan(config, device)
        largest = _largest_batch(plan, device, room) if given.largest_batch else None
        if given.json:
            print(json.dumps({"overrides": own} | _numbers(plan, room, largest)), flush=True)
        else:
            more = f"; {largest}" if largest else ""
            print(f"{' '.join(own) or 'default'}: {verdict(plan, room)}{more}", flush=True)
        all_fit &= plan.fits(room)
    return all_fit


def _device_and_room(config: Config, card: float | None) -> tuple[str, planner.Room]:
    """The type and the room of what is planned for: a card of so many GB, or the run's device."""
    if card is not None:
        return "cuda", planner.card(card)
    device = execution.device_of(config.runtime.device)
    return device.type, planner.room_of(device)


def _completed(overrides: list[str]) -> tuple[list[str], Config]:
    """The options and their configuration, with placeholders for paths of model and pictures if
    they are missing: a plan does not need them."""
    overrides, composed, choices = compose.with_published_model(overrides)
    is_chosen = choices.data != "emoji24" or any(o.startswith("data=") for o in overrides)
    if choices.model != "tiny" and not is_chosen:
        overrides = ["data=folder", *overrides]  # the default goes with tiny
        composed = compose.composed(overrides)
    if composed.data and not (composed.data.path or composed.data.sources):
        overrides = ["data.path=.", *overrides]
        composed.data.path = "."
    return overrides, to_dataclasses(composed)


def _plan(config: Config, device_type: str) -> planner.Plan:
    model = Model(config.model, torch.device("cpu"), with_weights=False)
    training_schedule(scheduler_config(config.noise, model.scheduler), config.noise)  # or refused
    return planner.make(config, model, device_type)


def _largest_batch(
    plan: planner.Plan, device_type: str, room: planner.Room
) -> largest_batch.LargestBatch:
    undrawn = replace(plan.config.log, sample_count=0, prompts=[], prompts_file=None)

    def planned(size: int) -> planner.Plan:
        data = replace(plan.config.data, batch_size=size)
        with command.told_if_long(f"planning data.batch_size={size}"):
            # Without drawing, which does not count.
            made = _plan(replace(plan.config, data=data, log=undrawn), device_type)
        return replace(made, process_bytes=plan.process_bytes)  # rehearsals add to it

    return largest_batch.find(plan, room, planned)


def _print_remedies(
    plan: planner.Plan, overrides: list[str], device_type: str, room: planner.Room
) -> None:
    """Print options that need less memory, each on top of those above it, until the run fits."""
    if plan.fits(room):
        return
    print("\noptions that need less, cumulative:")
    for remedy, better in _less(plan, overrides, device_type, room):
        fits = "  fits" if better.fits(room) else ""
        size = f"{format_bytes(better.needed_bytes):>9}{fits}"
        print(f"  {' '.join(remedy.overrides):<52}{size:<17}{remedy.what}", flush=True)
        plan = better
    if not plan.fits(room):
        print("even with all of these it does not fit")


def _less(
    plan: planner.Plan, overrides: list[str], device_type: str, room: planner.Room
) -> Iterator[tuple[remedies.Remedy, planner.Plan]]:
    """Remedies that help, each on top of those before it, with the resulting plan."""
    tried: set[remedies.Remedy] = set()
    while not plan.fits(room):
        remedy = next((r for r in remedies.of(plan.config) if r not in tried), None)
        if remedy is None:
            return
        tried.add(remedy)
        try:
            changed = _with(overrides, remedy.overrides)
            better = _plan(to_dataclasses(compose.composed(changed)), device_type)
        except UserError:  # the remedy excludes another option
            continue
        if better.needed_bytes < plan.needed_bytes:
            overrides, plan = changed, better
            tried.clear()  # what did not help before may now
            yield remedy, plan


def _with(overrides: Sequence[str], new: Sequence[str]) -> list[str]:
    """The options, with `new` replacing those of the same name."""
    return [*(o for o in overrides if key_of(o) not in keys_of(new)), *new]


def _numbers(
    plan: planner.Plan, room: planner.Room, largest: largest_batch.LargestBatch | None
) -> dict[str, object]:
    numbers: dict[str, object] = {
        "training": plan.training_bytes,
        "captions": plan.captions_bytes,
        "pictures": plan.pictures_bytes,
        "drawing": plan.drawing_bytes,
        "needed": plan.needed_bytes,
        "free": room.free_bytes,
        "where": room.where,
        "in_training": asdict(plan.rehearsal.training)
        | {"libraries": plan.libraries_bytes, "process": plan.process_bytes},
    }
    if largest:
        fitting = largest.fitting  # None: no size fits
        numbers["largest_batch"] = fitting and {
            "batch_size": fitting.config.data.batch_size,
            "needed": fitting.needed_bytes,
        }
    return numbers


if __name__ == "__main__":
    command.end_with_the_reader()
    main()
