"""Finding the files of a run's result, given its folder or that of an intermediate result."""

from pathlib import Path

from trainer.config import file_name
from trainer.formats import diffusers_lora
from trainer.storage.claim import config_in
from trainer.storage.steps import completed

LORA_NAME = f"{diffusers_lora.STEM}.safetensors"  # of a LoRA in diffusers' format


def found_in(folder: Path) -> Path | None:
    """The model (a diffusers folder, or else a single file), or else the LoRA's file (kohya's, or
    else diffusers'); None if there is none of these."""
    if (folder / "model/model_index.json").is_file():
        return folder / "model"
    run = run_of(folder)
    name = name_of(run) if run == folder else f"{name_of(run)}-{folder.resolve().name}"
    single = folder / f"{file_name(name)}.safetensors"  # method.export=[single_file]
    if single.is_file():
        return single
    files = (folder / "lora").glob("*.safetensors")
    return min(files, key=lambda file: (file.name == LORA_NAME, file.name), default=None)


def run_of(folder: Path) -> Path:
    """The run whose results/step-000040 this is, or else the folder itself."""
    whole = folder.resolve()
    is_intermediate = whole.parent.name == "results" and whole in completed(whole.parent)
    return whole.parents[1] if is_intermediate else folder


def name_of(run: Path) -> str:
    """A run's name, or else its folder's."""
    return str(config_in(run).get("name") or run.resolve().name)
