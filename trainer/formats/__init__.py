"""Checkpoints as others write and read them: diffusers folders, single files, LoRA files."""

from trainer.formats.lora import load_lora, save_lora
from trainer.formats.writing import save_folder, save_single_file

__all__ = ["load_lora", "save_folder", "save_lora", "save_single_file"]
