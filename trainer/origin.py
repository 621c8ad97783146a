"""Where a model's parts come from: a diffusers folder, one checkpoint file, or the hub.

Parts are read one at a time and in the dtype that they will have, because all of them at once, in
fp32, do not fit where the UNet alone does.
"""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from trainer.config import ModelConfig
from trainer.errors import UserError

log = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.bin", "*.json")  # of a part's folder


class Folder:
    """A pipeline in diffusers layout: model_index.json, and a folder for each part."""

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path, self.variant = path, variant
        index = path / "model_index.json"
        try:
            self.index: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model.path={path}: {index.name} cannot be read: {error}") from error
        if "unet" not in self.index:
            raise UserError(
                f"model.path={path} is a {self.index.get('_class_name')} without a UNet; a "
                "pipeline with a UNet2DConditionModel can be trained"
            )

    def __str__(self) -> str:
        return str(self.path)

    def has(self, part: str) -> bool:
        return self.index.get(part, (None, None))[1] is not None

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """The part with its weights.  Raises UserError where its folder is missing or damaged."""
        library, name = self.index[part]
        cls = getattr({"diffusers": diffusers, "transformers": transformers}[library], name)
        extra = {"dtype": dtype} if library == "transformers" else {"torch_dtype": dtype}
        try:
            return cls.from_pretrained(
                self.path / part, variant=self.variant, local_files_only=True, **extra
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"model.path={self.path}: {part} cannot be loaded: {error}") from error

    def config(self, part: str) -> dict[str, Any]:
        """The part's config.json, or the scheduler's."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        path = self.path / part / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"model.path={self.path}: {path} cannot be read: {error}") from error

    def tokenizer(self, part: str) -> Any:
        """`tokenizer` or `tokenizer_2`."""
        try:
            return transformers.CLIPTokenizer.from_pretrained(
                self.path / part, local_files_only=True
            )
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"model.path={self.path}: {part} cannot be loaded: {error}") from error

    def files(self, part: str) -> list[Path]:
        """The files whose bytes decide what the part computes."""
        return sorted(p for pattern in _WEIGHTS for p in (self.path / part).glob(pattern))

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the pipeline takes zeros, and not the encoded "", as the empty prompt."""
        return bool(self.index.get("force_zeros_for_empty_prompt", False))


Origin = Folder


def find(config: ModelConfig) -> Origin:
    """What `model.path` names.  Raises UserError where it names nothing that can be loaded."""
    path = Path(config.path).expanduser()
    if path.is_dir():
        return Folder(path, config.variant)
    return Folder(_from_hub(config), config.variant)


def _from_hub(config: ModelConfig) -> Path:
    """The folder of a hub repository's snapshot, downloaded unless it is there.

    Only what training reads: no ONNX or Flax files, and not the single files beside the folders.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    kind = f".{config.variant}" if config.variant else ""
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        wanted += [f"{part}/config.json", f"{part}/*{kind}.safetensors*", f"{part}/*{kind}.bin*"]
    wrong = [] if config.variant else ["*.fp16.*", "*.non_ema.*"]
    try:
        log.info("model: %s from the hub, or its cache", config.path)
        return Path(snapshot_download(config.path, allow_patterns=wanted, ignore_patterns=wrong))
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.path={config.path} is no folder and no file, and the hub does not give it "
            f"({reason}); name a diffusers folder, or a .safetensors file"
        ) from error
