"""Checkpoints as others write and read them: diffusers folders, single files, LoRA files.

Nothing is imported here: some modules need diffusers, which takes seconds to import, and the
command line needs others.
"""
