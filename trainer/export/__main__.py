"""`python -m trainer.export SOURCE TARGET`: convert a model or a LoRA to another format.

A model becomes a diffusers folder or a single file, a LoRA a file in kohya's or diffusers' format;
with --merge, a LoRA and its base model become one model; with --extract, a fine-tuned model becomes
a LoRA of its base; with --rank, a LoRA becomes a smaller one.  The result is read back and compared
before it gets its name.
"""

import argparse
import logging
import sys
from pathlib import Path

from trainer.errors import UserError

_EPILOG = """\
SOURCE is one of
  a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub repository (owner/name)
  a LoRA's file in kohya's or diffusers' format, or a LoKr's or LoHa's
  a run's folder (its model or LoRA, or else its last checkpoint), or one of its checkpoints

Examples:
  python -m trainer.export sd_xl_base_1.0.safetensors sdxl-base
  python -m trainer.export runs/2026-01-01/12-00-00-cats cats.safetensors --dtype float16
  python -m trainer.export cats-diffusers.safetensors cats.safetensors --format kohya
  python -m trainer.export cats.safetensors merged --base sd_xl_base_1.0.safetensors --merge
  python -m trainer.export runs/2026-01-01/12-00-00-cats merged --merge
  python -m trainer.export runs/2026-01-01/12-00-00-cats cats.safetensors --extract
  python -m trainer.export cats.safetensors small.safetensors --rank 8
Exit status: 0, the target is written and verified; 1, an internal error; 2, the command, the source
or the target is wrong; 130, stopped by Ctrl-C; in both cases nothing is written.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        import torch  # imported after parsing, as is diffusers: they take seconds

        from trainer.export.conversion import convert
        from trainer.export.request import Request

        request = Request(
            source=options.source,
            target=Path(options.target),
            form=options.format,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            base=options.base,
            variant=options.variant,
            merge=options.merge,
            scale=options.scale,
            extract=options.extract,
            rank=options.rank,
        )
        convert(request)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description="Convert a model or a LoRA to another program's format.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert; see below")
    parser.add_argument("target", metavar="TARGET", help="what to write; it must not exist")
    parser.add_argument(
        "--format",
        choices=["diffusers", "single_file", "kohya"],
        help="as in method.export; for a model: diffusers (a folder) or single_file (default: by "
        "TARGET's suffix, .safetensors is a file); for a LoRA: kohya or diffusers (default: the "
        "other format than SOURCE's; for a run, or extracted, kohya; resized, the same)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="dtype to write (default: SOURCE's; a VAE always keeps its own)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model of a LoRA: sdxl, sd15, or a model (default: as recorded in the file or "
        "its run); with --extract, the model that SOURCE was fine-tuned from (default for a run: "
        "the one it started from); for a checkpoint, the new location of the model its run "
        "started from",
    )
    parser.add_argument(
        "--variant",
        help="variant of a diffusers folder's files, such as fp16 (default for a checkpoint: its "
        "run's)",
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="write the --base model (default for a run's LoRA or checkpoint: the one that the run "
        "started from) with the LoRA SOURCE merged into it, as a model",
    )
    parser.add_argument(
        "--scale",
        type=float,
        metavar="NUMBER",
        help="with --merge: how much of the LoRA's change is added (default: 1)",
    )
    parser.add_argument(
        "--extract",
        action="store_true",
        help="write the difference between the fine-tuned model SOURCE and its --base as a LoRA, "
        "the closest one of this --rank",
    )
    parser.add_argument(
        "--rank",
        type=int,
        metavar="NUMBER",
        help="the largest rank in the LoRA to write (default: 64 with --extract, else SOURCE's)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
