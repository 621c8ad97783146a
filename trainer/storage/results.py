"""Finding the results of a run, given its folder or that of an intermediate result."""

from pathlib import Path

from trainer.formats import diffusers_lora

LORA_NAME = f"{diffusers_lora.STEM}.safetensors"  # of a LoRA in diffusers' format


def found_in(folder: Path) -> Path | None:
    """The model (a diffusers folder), or else the LoRA's file (kohya's, or else diffusers'); None
    if there is neither."""
    if (folder / "model/model_index.json").is_file():
        return folder / "model"
    files = (folder / "lora").glob("*.safetensors")
    return min(files, key=lambda file: (file.name == LORA_NAME, file.name), default=None)
