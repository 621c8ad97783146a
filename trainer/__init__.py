"""Fine-tunes SDXL, full or LoRA, with low-memory optimizers: `python -m trainer --help`."""

import logging
import os

# What libraries say of themselves when they are imported is nothing a user can act on.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
