"""What is written and when: results, samples, logs."""

import math
from pathlib import Path
from typing import Any

from trainer.kohya.reading import ScriptOptions
from trainer.kohya.translation import Translation, number

_DTYPES = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def results(given: ScriptOptions, made: Translation) -> None:
    """What is written, where, and how often."""
    every, keeps = _interval(given, "save", "save_every_n_steps", "save_every_n_epochs")
    if given.take_on("save_every_n_steps") and str(every).endswith("epoch"):
        made.note("save_every_n_steps: left out, as there is save_every_n_epochs")
    made.set("method.export_every", every or 0)
    if keeps:
        made.set("method.keep_exports", keeps)
    if given.take("save_state") and every:
        made.set("runtime.save_every", every)
    drawn, _ = _interval(given, "sample", "sample_every_n_steps", "sample_every_n_epochs")
    if str(given.options.get("sample_prompts")).endswith((".toml", ".json")):
        made.note("sample_prompts: write its prompts to a text file, one in a line")
    if given.take("sample_sampler") and drawn:
        made.note("sample_sampler: pictures are drawn with the model's own scheduler")
    if drawn:
        made.set("log.sample_every", drawn)
    if (dtype := given.take("save_precision")) is not None:
        made.set("method.export_dtype", _DTYPES.get(str(dtype), dtype))
    kind = given.take("save_model_as")
    if not made.is_lora:
        model = str(given.options.get("pretrained_model_name_or_path"))
        is_file = model.endswith((".safetensors", ".ckpt"))
        single = is_file if kind is None else not str(kind).startswith("diffusers")
        made.set("method.export", ["single_file" if single else "diffusers"])
    folder, name = given.take("output_dir"), given.options.get("output_name", "last")
    if folder is not None:
        made.set("hydra.run.dir", str(Path(str(folder)) / str(name)))
    _trackers(given, made)


def _interval(given: ScriptOptions, what: str, steps: str, epochs: str) -> tuple[Any, int]:
    """The interval as ours, and how many results are kept (0: all)."""
    in_epochs, in_steps = given.take_on(epochs), given.take_on(steps)
    kept_epochs, kept_steps = (
        number(name, given.take(name, 0))
        for name in (f"{what}_last_n_epochs", f"{what}_last_n_steps")
    )
    if in_epochs is not None:
        return f"{in_epochs}epoch", math.ceil(kept_epochs / number(epochs, in_epochs))
    if in_steps is not None:
        return in_steps, math.ceil(kept_steps / number(steps, in_steps))
    return None, 0


def _trackers(given: ScriptOptions, made: Translation) -> None:
    service, project = given.take("log_with"), given.take("log_tracker_name")
    if service in ("wandb", "all"):
        made.choose("log=wandb")
        made.set("log.wandb.mode", "online")
        if project is not None:
            made.set("log.wandb.project", project)
        if service == "all":
            made.set("log.tensorboard", True)
    elif service == "tensorboard" or given.options.get("logging_dir"):
        made.choose("log=tensorboard")
