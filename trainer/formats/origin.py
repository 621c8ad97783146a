"""Where a model's parts come from: a diffusers folder, one checkpoint file, or the hub.

Parts are read one at a time and in their final dtype, because all of them at once, in fp32, may not
fit where the UNet alone does.
"""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from trainer.errors import UserError
from trainer.formats import architectures, fingerprints, hub, kinds
from trainer.formats.folder import find_weights, variant_option
from trainer.formats.single_file import SingleFile, vae_alone
from trainer.formats.weights import Weights, digest, of_file

log = logging.getLogger(__name__)

Kind = Literal["sdxl", "sd15", "other"]


class Origin(ABC):
    """The source of a model's parts, named as in a pipeline: unet, vae, text_encoder, ..."""

    path: Path
    option: str = "model.path"  # that named it

    def __str__(self) -> str:
        return str(self.path)

    @property
    def zeros_for_empty(self) -> bool:
        """Whether the pipeline uses zeros instead of the encoded "" for the empty prompt."""
        return bool(self.index.get("force_zeros_for_empty_prompt", False))

    def has(self, part: str) -> bool:
        """Whether the pipeline has this part (unet, vae, text_encoder, tokenizer, ...)."""
        entry = self.index.get(part)
        return isinstance(entry, list) and entry[-1] is not None

    @property
    @abstractmethod
    def index(self) -> dict[str, Any]:
        """model_index.json, or its equivalent."""

    @abstractmethod
    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration, or the scheduler's."""

    @abstractmethod
    def weights(self, part: str) -> Weights:
        """The part's tensors by their names in a diffusers folder, to be read one at a time."""

    @abstractmethod
    def folder(self, part: str) -> Path:
        """Where the part's files are (or would be); for a single file, the tokenizers only."""

    @abstractmethod
    def unused(self) -> Weights:
        """A single file's tensors that are not weights, by their names there: CLIP's position_ids
        and logit_scale, which are never used."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """`sdxl`: two text encoders, of any size; `sd15`: one, of Stable Diffusion 1."""

    @abstractmethod
    def _files(self, part: str) -> list[Path]:
        """The files with the part's weights."""

    def load(
        self, part: str, dtype: torch.dtype, compress: Callable[[nn.Module], None] | None = None
    ) -> nn.Module:
        """The part with its weights, on the CPU, in eval mode.  compress: as for
        `architectures.filled`.

        Raises UserError if its files are damaged or its weights do not match its configuration.
        """
        where = f"{self.option}={self.path}"
        return architectures.filled(
            part, self.config(part), self.weights(part), dtype, where, compress
        )

    def tokenizer(self, part: str) -> Any:
        """`tokenizer` or `tokenizer_2`."""
        folder = self.folder(part)
        try:
            return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.option}={self.path}: {part} cannot be loaded: {error}"
            ) from error

    def fingerprint(self, part: str, cache: Path | None = None) -> str:
        """sha256 of what the part's outputs depend on: weights and configuration, or a tokenizer's
        files.  `cache`: a folder that remembers it as long as the files do not change."""
        if part.startswith("tokenizer"):
            return _hash_of_files(self.folder(part))
        config = _computing(self.config(part))
        return fingerprints.remembered(
            {"part": part, "config": config},
            self._files(part),
            cache,
            lambda: _fingerprint(config, self.weights(part)),
        )

    def sketch(self, part: str) -> str:
        """Like `fingerprint`, but only from the weights' types, shapes and first and last values,
        to distinguish models without reading them (except a .ckpt, one tensor at a time)."""
        if part.startswith("tokenizer"):
            return _hash_of_files(self.folder(part))
        return _fingerprint(_computing(self.config(part)), self.weights(part), ends_only=True)


class Folder(Origin):
    """A pipeline in diffusers layout: model_index.json, and a folder for each part."""

    def __init__(self, path: Path, variant: str | None = None, option: str = "model.path") -> None:
        """Raises UserError unless it is a pipeline whose UNet can be trained."""
        self.path, self.variant, self.option = path, variant, option
        if not self.has("unet"):
            raise UserError(
                f"{option}={path} is a {self.index.get('_class_name')} without a UNet; only "
                "pipelines with a UNet2DConditionModel can be trained"
            )
        for part, cls in architectures.CLASSES.items():
            if self.has(part) and self.index[part][1] != cls.__name__:
                raise UserError(
                    f"{option}={path}: its {part} is a {self.index[part][1]}; it must be a "
                    f"{cls.__name__} (Stable Diffusion 1.x, 2.x and XL have one)"
                )
        if not self.has("text_encoder"):
            raise UserError(
                f"{option}={path} has no first text encoder (the SDXL refiner, or a model that is "
                "conditioned on something else); use the base model"
            )
        kinds.check_channels(self.config("unet").get("in_channels", 4), path)

    @cached_property
    def index(self) -> dict[str, Any]:
        return self._json(self.path / "model_index.json")

    @property
    def kind(self) -> Kind:
        if self.has("text_encoder_2"):
            return "sdxl" if self.config("unet").get("addition_embed_type") else "other"
        if not self.has("text_encoder"):
            return "other"
        # Stable Diffusion 2's encoder is OpenCLIP's, which uses gelu.
        acts = self.config("text_encoder").get("hidden_act", "quick_gelu")
        return "sd15" if acts == "quick_gelu" else "other"

    def config(self, part: str) -> dict[str, Any]:
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return self._json(self.folder(part) / name)

    def weights(self, part: str) -> Weights:
        return find_weights(self.folder(part), part, self.variant, self.option)[0]

    def unused(self) -> Weights:
        """Nothing: only single files have such tensors."""
        return {}

    def folder(self, part: str) -> Path:
        return self.path / part

    def _files(self, part: str) -> list[Path]:
        return find_weights(self.folder(part), part, self.variant, self.option)[1]

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.option}={self.path}: {path.relative_to(self.path)} cannot be read: {error}"
            ) from error
        if not isinstance(found, dict):
            raise UserError(
                f"{self.option}={self.path}: {path.relative_to(self.path)} is not a JSON object"
            )
        return found


class Architecture(Folder):
    """A published architecture, whose configuration ships with the trainer, without weights."""

    def folder(self, part: str) -> Path:
        is_tokenizer = part.startswith("tokenizer")
        return architectures.tokenizer_folder(part) if is_tokenizer else super().folder(part)


class Vae(Folder):
    """A VAE's own folder: config.json and its weights, such as that of sdxl-vae-fp16-fix."""

    option = "model.vae"

    def __init__(self, path: Path) -> None:
        """Raises UserError if it is another kind of model."""
        self.path, self.variant = path, None
        if (found := self.config("vae").get("_class_name")) != self.index["vae"][1]:
            raise UserError(f"{self.option}={path} is a {found}; it must be an AutoencoderKL")

    @cached_property
    def index(self) -> dict[str, Any]:
        return {"vae": ["diffusers", "AutoencoderKL"]}

    def folder(self, part: str) -> Path:
        return self.path


class VaeFile(Vae):
    """A VAE's file, such as sdxl_vae.safetensors, which does not contain its configuration."""

    def __init__(self, path: Path, model: Origin) -> None:
        """Its configuration is that of `model`, as other programs assume, or of its folder if it
        has diffusers' file name.  Raises UserError if it is damaged or holds no VAE."""
        self._settings = model.config("vae")
        if path.name.startswith("diffusion_pytorch_model.") and _is_vae(path.parent):
            self._settings = Vae(path.parent).config("vae")
        super().__init__(path)
        where = f"{self.option}={path}"
        self._weights = vae_alone(of_file(path)[0], self._settings, where)

    def config(self, part: str) -> dict[str, Any]:
        return {"_class_name": "AutoencoderKL"} | self._settings

    def weights(self, part: str) -> Weights:
        return self._weights

    def _files(self, part: str) -> list[Path]:
        return [self.path]


class File(Origin):
    """One .safetensors or .ckpt file with all parts."""

    def __init__(self, path: Path, option: str = "model.path") -> None:
        """Raises UserError if it is damaged, or not an SDXL or SD 1.x checkpoint."""
        self.path, self.option = path, option
        self.file = SingleFile(path)

    @property
    def kind(self) -> Kind:
        return "sdxl" if self.file.kind == "sdxl" else "sd15"

    @cached_property
    def index(self) -> dict[str, Any]:
        index = self.file.config("index")
        return index | {"scheduler": ["diffusers", self.config("scheduler")["_class_name"]]}

    def config(self, part: str) -> dict[str, Any]:
        return self.file.config(part)

    def weights(self, part: str) -> Weights:
        return self.file.weights(part)

    def unused(self) -> Weights:
        return self.file.unused()

    def folder(self, part: str) -> Path:
        return architectures.tokenizer_folder(part)

    def _files(self, part: str) -> list[Path]:
        return [self.path]


def at(
    name: str,
    variant: str | None = None,
    option: str = "model.path",
    with_weights: bool = True,
) -> Origin:
    """The origin that a name refers to: a folder, a file, or a hub repository, whose weights are
    downloaded only `with_weights`.  option: where the name was given, for errors.

    Raises UserError if it names nothing that can be loaded.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if variant:
            key = variant_option(option)
            log.warning("%s=%s has no effect: %s is a single file", key, variant, path)
        return File(path, option)
    folder = path if path.is_dir() else hub.pipeline(name, variant, option, with_weights)
    ships = folder in map(architectures.folder, architectures.PUBLISHED)
    return (Architecture if ships else Folder)(folder, variant, option)


def vae(name: str, model: Origin, with_weights: bool = True) -> Origin:
    """The origin of another VAE for `model`, as named by `model.vae`: a VAE's folder, file or hub
    repository, or a model that has it.

    Raises UserError if there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        is_model = kinds.has_unet(of_file(path)[0])
        return File(path, "model.vae") if is_model else VaeFile(path, model)
    folder = path if path.is_dir() else hub.vae(name, with_weights)
    for found in (folder / "vae", folder):
        if _is_vae(found):
            return Vae(found)
    raise UserError(f"model.vae={name} is not a VAE folder: neither it nor vae/ has a config.json")


def _is_vae(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _computing(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the keys that do not affect results."""
    silent = architectures.COMPUTES_NOTHING
    return {key: value for key, value in config.items() if key not in silent}


def _fingerprint(config: dict[str, Any], weights: Weights, ends_only: bool = False) -> str:
    settings = json.dumps(config, sort_keys=True)
    known = f"{settings} {digest(weights, weights, ends_only)}"
    return hashlib.sha256(known.encode()).hexdigest()


def _hash_of_files(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        sha.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return sha.hexdigest()
