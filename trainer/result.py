"""What a run leaves for others: the trained model or adapter, in the formats that they read."""

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionXLPipeline
from peft import get_peft_model_state_dict

from trainer import disk
from trainer.config import LoraConfig
from trainer.model import Model


def export(config: Any, model: Model, folder: Path) -> Path:
    """Write the result in diffusers format: the whole pipeline to `folder/model`, or the adapter to
    `folder/lora`.

    The adapter's file carries rank and alpha, without which a reader would assume alpha = rank.
    """
    if not isinstance(config, LoraConfig):
        with disk.whole_folder(folder / "model") as temporary:
            shutil.copytree(model.origin.path, temporary, dirs_exist_ok=True)
            for part, module in model.trained_parts.items():
                shutil.rmtree(temporary / part)
                module.save_pretrained(temporary / part)
            if model.scheduler != model.origin.config("scheduler"):
                _write_scheduler(model, temporary)
        return folder / "model"
    adapter = model.unet.peft_config["default"]
    with disk.whole_folder(folder / "lora") as temporary:
        StableDiffusionXLPipeline.save_lora_weights(
            temporary,
            unet_lora_layers=get_peft_model_state_dict(model.unet),
            unet_lora_adapter_metadata=adapter.to_dict(),
        )
    return folder / "lora"


def _write_scheduler(model: Model, folder: Path) -> None:
    """Put the scheduler that the noise options ask for into a pipeline's folder."""
    model.sampling_schedule().save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", model.scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
