"""`python -m trainer.draw SOURCE ... --out grid.png`: draw the same prompts with several models and
LoRAs, from the same noise."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.draw.request import Request
from trainer.errors import UserError

_HELP = """\
Draw the same prompts from the same noise with several models and LoRAs, and put the pictures into
one grid: a row for each model, a column for each prompt."""

_EPILOG = """\
SOURCE is one of
  a run's folder (its model or LoRA; with --all-results the intermediate ones, too), or one of
    its results/step-000500
  a LoRA's file in kohya's or diffusers' format, or a LoKr's or LoHa's
  a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub repository (owner/name)
A prompt may have kohya's options: "a cat --w 832 --h 1216 --n blurred --d 7 --l 5 --s 30" (width,
height, negative prompt, seed, guidance, steps).  The single pictures are written to a folder named
like the grid, after each row; what exists is never overwritten.

Examples:
  python -m trainer.draw runs/2026-01-01/12-00-00-cats --all-results --out cats.png
  python -m trainer.draw cats.safetensors --base sd_xl_base_1.0.safetensors --scale 0.5,0.75,1 \\
      --prompt "a sks cat on a roof" --prompt "a sks cat, oil painting --d 7" --out scales.png
  python -m trainer.draw sd_xl_base_1.0.safetensors runs/2026-01-01/13-00-00-dogs/model \\
      --prompts-file prompts.txt --out dogs.png
Exit status: 0, all is drawn; 1, an internal error; 2, the command or a source is wrong, or memory
ran out; 130, stopped by Ctrl-C.  What was drawn until then is kept."""


_AS_RUN = "(default: as the first run, or else {})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        request = Request(**vars(given))
        request.check()
        from trainer.draw.job import draw  # after these checks, as its imports take seconds

        draw(request)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.draw",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="what draws; see below")
    parser.add_argument(
        "--out", required=True, type=_path, metavar="FILE.png", help="the grid; it must not exist"
    )
    _add_prompts(parser)
    _add_models(parser)
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to draw")
    group.add_argument(
        "--prompt",
        action="append",
        dest="lines",
        default=[],
        metavar="TEXT",
        help="may be repeated; may have options, see below (default: what the first run drew)",
    )
    group.add_argument("--prompts-file", metavar="FILE", help="a text file with a prompt per line")
    group.add_argument(
        "--negative", metavar="TEXT", help=f"negative prompt {_AS_RUN.format('none')}"
    )
    group.add_argument(
        "--guidance", type=float, metavar="NUMBER", help=f"1 turns it off {_AS_RUN.format('5')}"
    )
    group.add_argument("--steps", type=int, metavar="N", help=f"of sampling {_AS_RUN.format('25')}")
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the first prompt's noise; others count on (default: 0)",
    )
    group.add_argument(
        "--resolution",
        type=int,
        metavar="PIXELS",
        help=f"of square pictures {_AS_RUN.format('that of the first model')}",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what draws")
    group.add_argument(
        "--all-results",
        action="store_true",
        help="of a run, also its intermediate results (method.export_every), in order",
    )
    group.add_argument(
        "--scale",
        type=_numbers,
        dest="scales",
        metavar="NUMBERS",
        help="strengths of LoRAs, a row for each: 0.5,1 or --scale=-1,1 (default: 1)",
    )
    group.add_argument(
        "--base",
        metavar="MODEL",
        help="the model of LoRAs (default: the one that their run started from)",
    )
    group.add_argument(
        "--no-base",
        action="store_false",
        dest="with_base",
        help="no row of the model that a LoRA belongs to, or that a run started from",
    )
    group.add_argument("--variant", help="variant of a diffusers folder's files, such as fp16")
    group.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of the UNet (default: as in the run, or else bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--quantization",
        choices=["none", "int8", "nf4"],
        help="of the UNet's weights, to save memory (default: as in the run, or else none)",
    )
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    group.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"pictures drawn at a time {_AS_RUN.format('1')}",
    )


def _path(text: str) -> Path:
    """An argparse type: a path, in which no shell has replaced the ~ of --out=~/grid.png."""
    return Path(text).expanduser()


def _numbers(text: str) -> list[float]:
    """An argparse type: numbers separated by commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, as 0.5,1") from None


if __name__ == "__main__":
    raise SystemExit(main())
