"""`python -m trainer.kohya config.toml`: the command of this trainer for one of kohya's scripts."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from trainer.checks.validate import to_dataclasses
from trainer.cli import command, compose
from trainer.config import key_of
from trainer.errors import UserError
from trainer.kohya.command import translate
from trainer.kohya.reading import ScriptOptions, parse, read
from trainer.kohya.translation import Translation

_HELP = """\
Translate a training command of kohya's sd-scripts (SDXL or Stable Diffusion 1.5, full or LoRA) into
one of this trainer.  The command goes to stdout; what it cannot express goes to stderr."""

_EPILOG = """\
SOURCE is a .toml that the scripts read with --config_file (its dataset_config is read, too), or a
.sh or .bat with the command; or give the command itself after --:

  python -m trainer.kohya config_lora-20250101.toml
  python -m trainer.kohya train.sh > mine.sh
  python -m trainer.kohya -- sdxl_train_network.py --network_dim 32 --learning_rate 1e-4 ...

Nothing is run, and pictures and models need not exist.  Exit status: 0, or 2 if the command cannot
be read or trains something else."""

_SHOWN = ("hydra.run.dir", "optim.lr", "method.rank", "method.alpha")  # also where they are usual
_FILES = (
    *("model.path", "model.vae", "data.path", "data.sources", "method.start_from"),
    "log.prompts_file",
)
_OF_OTHERS = ("t5xxl", "clip_l", "qwen3", "token_string")  # Flux, SD3, textual inversion, ...
_OF_SD15 = ("train_network.py", "fine_tune.py", "train_db.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    own, theirs = (
        (words[: words.index("--")], words[words.index("--") + 1 :])
        if "--" in words
        else (words, [])
    )
    parser = argparse.ArgumentParser(
        "python -m trainer.kohya",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", type=Path)
    parser.add_argument(
        "--model", choices=("sdxl", "sd15"), help="which model, if no script's name says it"
    )
    chosen = parser.parse_args(own)
    if (chosen.source is None) == (not theirs):
        parser.error("give a file, or the words of a command after --")
    try:
        given = parse(theirs) if theirs else read(chosen.source)
        made = translate(given, chosen.model or _family(given))
        overrides = _needed(made)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(" \\\n    ".join(["python -m trainer", *map(shlex.quote, overrides)]))
    _tell(given, made, chosen.model)
    return 0


def _needed(made: Translation) -> list[str]:
    """The options without those that the chosen preset has anyway.  Raises UserError for a value
    that an option cannot have; files are not looked for, as they may be on another machine."""
    known = [o for o in made.overrides if key_of(o) not in _FILES]
    choices = [o for o in known if "." not in key_of(o)]
    usual, chosen = (
        compose.with_published_model([*options, "data.path=."])[1] for options in (choices, known)
    )
    to_dataclasses(chosen)

    def differs(key: str) -> bool:
        return OmegaConf.select(usual, key) != OmegaConf.select(chosen, key)

    return [
        o
        for o in made.overrides
        if o in choices or key_of(o) in (*_FILES, *_SHOWN) or differs(key_of(o))
    ]


def _family(given: ScriptOptions) -> str:
    """The model that a script trains.  Raises UserError for other scripts."""
    for option in _OF_OTHERS:
        if option in given.options:
            raise UserError(f"{option} is an option of scripts that are not translated")
    if "max_resolution" in given.options:
        raise UserError(
            "these are settings of kohya_ss' GUI (max_resolution); give the config_*.toml that it "
            "writes into the folder of its results, or the command that it prints"
        )
    if not given.script or given.script in ("sdxl_train.py", "sdxl_train_network.py"):
        return "sdxl"
    if given.script in _OF_SD15:
        return "sd15"
    raise UserError(
        f"{given.script} is not translated: only sdxl_train.py, sdxl_train_network.py, "
        f"{', '.join(_OF_SD15[:-1])} and {_OF_SD15[-1]} are"
    )


def _tell(given: ScriptOptions, made: Translation, model: str | None) -> None:
    if not given.script and model is None:
        made.notes.insert(0, "taken for SDXL; --model sd15 says otherwise")
    if made.notes:
        print("\nnot the same, or left out:", file=sys.stderr)
        for note in made.notes:
            print(f"  {note}", file=sys.stderr)


if __name__ == "__main__":
    command.end_with_the_reader()
    sys.exit(main())
