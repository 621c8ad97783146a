"""Checkpoints as others write and read them: diffusers folders, single files, LoRA files."""

from trainer.formats.writing import save_folder, save_single_file

__all__ = ["save_folder", "save_single_file"]
