"""Formats shared with other programs: diffusers folders, single files, LoRA files.

Nothing is imported here: some modules need diffusers, which takes seconds to import, and the
command line needs only modules that do not.
"""
