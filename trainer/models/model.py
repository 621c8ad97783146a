"""The model that is fine-tuned: the UNet on its device, and the frozen parts when they are needed.

All parts together may not fit where the UNet alone does.  So each is loaded on demand: the text
encoders to encode captions and the VAE to encode pictures, both before the UNet is loaded, and the
VAE again to draw samples.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from torch import nn

from trainer.config import DTYPES, ModelConfig
from trainer.errors import UserError, reason
from trainer.formats import architectures, origin, schedulers
from trainer.models import quantization, text

log = logging.getLogger(__name__)


class Model:
    """The parts of a diffusion model.  `unet` is set by `load_unet`."""

    unet: UNet2DConditionModel

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        with_weights: bool = True,
        option: str = "model.path",
    ) -> None:
        """Find the model; no weights are read yet, and none downloaded without `with_weights`.
        Raises a UserError that names `option` if there is none."""
        self.config, self.device = config, device
        for library in (diffusers.utils.logging, transformers.utils.logging):
            library.set_verbosity_error()
            library.disable_progress_bar()
        self.origin = origin.at(config.path, config.variant, option, with_weights)
        self.vae_origin = self.origin
        if config.vae:
            self.vae_origin = origin.vae(config.vae, self.origin, with_weights)
        self.text_parts = [part for part in text.TEXT_ENCODERS if self.origin.has(part)]
        self.text_encoder: text.Encoder | None = None  # set if text encoders are trained
        self.scheduler = self.origin.config("scheduler")  # of the result; `noise=` may change it

    def sketch(self) -> str:
        """A hash that identifies this model, wherever it is stored."""
        parts = ["unet", *self.text_parts, *map(text.tokenizer_part, self.text_parts)]
        known = [
            *(self.origin.sketch(part) for part in parts),
            self.vae_origin.sketch("vae"),
            json.dumps(self.origin.config("scheduler"), sort_keys=True),
            str(self.origin.zeros_for_empty),
        ]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a picture's side an element of its latent stands for."""
        return 2 ** (len(self.vae_origin.config("vae")["block_out_channels"]) - 1)

    @property
    def resolution(self) -> int | None:
        """The picture side that the model was made for, by its configuration; None if unknown."""
        side = self.origin.config("unet").get("sample_size")
        levels = self.vae_origin.config("vae").get("block_out_channels")
        return side * 2 ** (len(levels) - 1) if isinstance(side, int) and levels else None

    @property
    def reads_time_ids(self) -> bool:
        """Whether the UNet is conditioned on a picture's sizes, as SDXL's is."""
        return self.origin.config("unet").get("addition_embed_type") == "text_time"

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        """What a method may train, by name: the UNet, and the text encoders that are kept."""
        encoders = self.text_encoder.encoders if self.text_encoder else {}
        return {"unet": self.unet, **encoders}

    def keep_text_encoders(self, trained: list[str]) -> None:
        """Keep the text encoders loaded if one of them is trained."""
        if self._keeps_text_encoders(trained):
            self.text_encoder = self.load_text_encoders()

    def _keeps_text_encoders(self, trained: list[str]) -> bool:
        """Whether one of them is trained.  Raises UserError for a part that the model lacks."""
        missing = sorted(set(trained) - {"unet", *self.text_parts})
        if missing:
            raise UserError(
                f"method.train={trained}: {self.origin} has no {missing[0]}; it has "
                f"{', '.join(['unet', *self.text_parts])}"
            )
        return bool(set(trained) & set(self.text_parts))

    def on_meta(self, trained: list[str]) -> "Model":
        """This model as it will be when these parts are trained, with the same dtypes but without
        values."""
        made = copy.copy(self)
        made.unet = self.empty("unet", self.config.dtype)
        if self.config.quantization != "none":
            made.unet.apply(partial(quantization.quantize, kind=self.config.quantization))
        keeps = self._keeps_text_encoders(trained)
        made.text_encoder = self.empty_text_encoders() if keeps else None
        return made

    def empty(self, part: str, dtype: str) -> nn.Module:
        """A part on the meta device."""
        source = self.vae_origin if part == "vae" else self.origin
        module = architectures.empty(part, source.config(part)).requires_grad_(False)
        return module.to(DTYPES[dtype]).eval()

    def empty_text_encoders(self) -> text.Encoder:
        """Like `load_text_encoders`, on the meta device."""
        parts = {part: self.empty(part, self.config.text_dtype) for part in self.text_parts}
        return text.Encoder(self.config, self.origin, parts)

    def load_unet(self) -> None:
        """Read the UNet, in the configured dtype or quantized, onto the device."""
        kind, compress = self.config.quantization, None
        if kind != "none":
            log.info("model: frozen weights of linear layers and convolutions become %s", kind)
            compress = partial(quantization.quantize, kind=kind, device=self.device)
        self.unet = self._load("unet", DTYPES[self.config.dtype], compress=compress)

    def sampling_schedule(self, is_trained: bool = True) -> SchedulerMixin:
        """The scheduler that the model's pipeline samples with: after training, or its own.

        Raises UserError for one that the pipeline cannot use.
        """
        config = self.scheduler if is_trained else self.origin.config("scheduler")
        config = schedulers.usable(config)
        name = config["_class_name"]
        try:
            made = getattr(diffusers, name).from_config(config)
            _ = made.scale_model_input  # which pipelines of Stable Diffusion call
        except Exception as error:  # of its values, or of a library that it needs: many kinds
            raise UserError(
                f"pictures cannot be drawn with the scheduler of {self.origin}, {name} "
                f"({reason(error)}); name another, such as EulerDiscreteScheduler, or for flow "
                f"matching {schedulers.EULER}, in its scheduler/scheduler_config.json"
            ) from error
        return made

    @property
    def predictions(self) -> tuple[str, str]:
        """What the UNet predicted originally, and what it is trained to predict."""
        both = (self.origin.config("scheduler"), self.scheduler)
        before, after = (schedulers.noise(config)["prediction_type"] for config in both)
        return before, after

    def load_text_encoders(self) -> text.Encoder:
        """The text encoders, on the device, in fp32 or as configured."""
        dtype = DTYPES[self.config.text_dtype]
        parts = {part: self._load(part, dtype) for part in self.text_parts}
        return text.Encoder(self.config, self.origin, parts)

    def load_vae(self) -> AutoencoderKL:
        """The VAE, on the device, as configured; freed when the caller drops it."""
        return self._load("vae", DTYPES[self.config.vae_dtype], self.vae_origin)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Apply no dropout within the block."""
        modules = nn.ModuleDict(self.trained_parts).modules()
        training = [module for module in modules if module.training]
        for part in self.trained_parts.values():
            part.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    @contextmanager
    def unet_aside(self) -> Iterator[None]:
        """Keep the UNet in host memory within the block."""
        self.unet.to("cpu")
        try:
            yield
        finally:
            self.unet.to(self.device)

    def _load(
        self,
        part: str,
        dtype: torch.dtype,
        source: origin.Origin | None = None,
        compress: Callable[[nn.Module], None] | None = None,
    ) -> nn.Module:
        source = source or self.origin
        log.info("model: loading the %s of %s", part.replace("_", " "), source)
        module = source.load(part, dtype, compress).to(self.device)
        return module.requires_grad_(False).eval()
