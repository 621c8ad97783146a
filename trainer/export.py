"""`python -m trainer.export SOURCE TARGET`: a model or a LoRA in the format that others read.

A model becomes a diffusers folder or a single file, a LoRA kohya's or diffusers' file; what was
written is read back before it gets its name.
"""

import argparse
import logging
import sys
from pathlib import Path

from trainer.errors import UserError

_EPILOG = """\
SOURCE is one of
  a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub repository (owner/name)
  a LoRA file of kohya's kind or diffusers'
  a run's folder (its model/ or lora/, or else its last checkpoint), or one of its checkpoints

Examples:
  python -m trainer.export sd_xl_base_1.0.safetensors sdxl-base
  python -m trainer.export runs/2026-01-01/12-00-00-cats cats.safetensors --dtype float16
  python -m trainer.export cats-diffusers.safetensors cats.safetensors --format kohya
Exit status: 0, the target is written and reads back equal; 1, an error of the program; 2, the
command, the source or the target is wrong, and nothing is written; 130, stopped by Ctrl-C.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    from trainer import conversion  # now that the command is good: diffusers takes seconds

    try:
        conversion.convert(
            options.source,
            Path(options.target),
            form=options.format,
            dtype=options.dtype,
            base=options.base,
            variant=options.variant,
        )
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description="Write a model or a LoRA in the form that another program reads.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="what to convert; see below")
    parser.add_argument("target", metavar="TARGET", help="what to write; it must not exist")
    parser.add_argument(
        "--format",
        choices=["diffusers", "single_file", "kohya"],
        help="as in method.export; of a model: diffusers (a folder) or single_file (by default "
        "what TARGET ends in decides: .safetensors is a file); of a LoRA: kohya or diffusers (by "
        "default the one that SOURCE is not; of a run, kohya)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float16", "bfloat16", "float32"],
        help="of the weights; a VAE keeps its own (all do, by default)",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="what a LoRA file is of: sdxl, sd15, or a model (by default what the file or its run "
        "says); of a checkpoint, where the model that its run began with is now",
    )
    parser.add_argument(
        "--variant",
        help="of a diffusers folder's files, such as fp16 (of a checkpoint, by default its run's)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
