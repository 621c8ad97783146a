"""Fine-tunes SDXL, full or LoRA, with low-memory optimizers: `python -m trainer --help`.

Where things live; a folder imports only from those below it:

    __main__   compose the configuration, check it, run it
    doctor     check the pictures
    draw/      draw the same prompts with several models and LoRAs
    kohya/     translate commands of kohya's scripts
    sweep/     run several, and compare them
    run        one run: assemble, then one loop
    export/    convert models and LoRAs between formats
    phases/    the phases of the loop, and the state they share: evaluate, save, end
    planner/   how much memory a run will need
    checks/    what is wrong with a configuration, or looks wrong
    cli/       from arguments to a configuration
    reporting/ what a run tells: metrics, curves, trackers, its summary
    training/  how it learns: which weights, by which gradients, clip, optimizer and rate
    storage/   a run's folder: checkpoints, results, who may write there
    sampling/  pictures that the model draws
    objective/ what the UNet learns: inputs, noise, targets, losses
    models/    where the model's parts come from, and how they run
    data/      pictures and captions, their caches, batches of them
    formats/   files shared with other programs: diffusers, single files, kohya's LoRAs
    charts/    charts as PNG
    system/    the machine: memory, disks, the terminal, signals, several processes
    config/    the schema: a dataclass for each choice of each group in conf/
    streams    random streams, one for each kind of draw
    errors     errors that the user can fix
    wording    parts of messages: counts with their nouns, lists of names
"""

import logging
import os
import signal
import sys

from trainer.system import signals

# "-m" is what Python has there while it looks for the module of `python -m`.
if sys.argv[:1] == ["-m"] and any(x.split(".")[0] == "trainer" for x in sys.orig_argv):
    # Commands import for seconds, and have nothing to finish then.
    signal.signal(signal.SIGINT, signals.leave_at_once)

# Silence messages on import that users cannot act on.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
