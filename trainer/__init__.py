"""Fine-tunes SDXL, full or LoRA, with low-memory optimizers: `python -m trainer --help`."""
