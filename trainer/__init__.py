"""Fine-tunes SDXL, full or LoRA, with low-memory optimizers: `python -m trainer --help`.

Where things live, from the command line to the files of a run:

    commands         __main__ export doctor planner/ sweep/
    command line     cli explain resolvers errors
    configuration    config/ validate remarks remedies
    model            model origin formats/ conversion execution
    what is trained  method groups optimizers ema
    data             data/ text conditioning
    batches          batches micro_batches noise streams
    a run            run state intervals endings signals patience
    a step           losses gradients clipping curvature schedule guard
    saving           saving checkpoint resuming result disk
    its folder       run_folder claim record summary report
    watching it      metrics trackers curves charts/ evaluation sampling prompts pictures
                     watch probe measure clock memory console
"""

import logging
import os

# Silence messages on import that users cannot act on.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
