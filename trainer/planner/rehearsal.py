"""A rehearsal of a run's memory use, with tensors that have shapes but no data.

The model's own modules run, forward and backward, on torch's meta device, and a ledger counts the
bytes of live tensors.  So gradient checkpointing, adapters, autocast and trained text encoders are
accounted for in any UNet, and no formula for activations has to be maintained.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.config import DTYPES, Config
from trainer.data.buckets import Size
from trainer.data.store import CAPTIONS_AT_A_TIME
from trainer.models import execution, quantization, text
from trainer.models.model import Model
from trainer.objective import batches
from trainer.planner.ledger import Ledger
from trainer.sampling import drawer, prompts
from trainer.system import console
from trainer.training import gradients, method, optimizers


@dataclass(kw_only=True)
class Training:
    """Bytes on the training device, at the peak."""

    weights: int
    optimizer_state: int | None  # None if it is not known (an optimizer of another package)
    optimizer_scratch: int  # in its steps; most of it stays allocated
    averages: int
    gradients: int
    activations: int

    @property
    def peak(self) -> int:
        return self.kept + self.gradients + self.activations

    @property
    def kept(self) -> int:
        """What stays allocated between steps."""
        optimizer = (self.optimizer_state or 0) + self.optimizer_scratch
        return self.weights + optimizer + self.averages


@dataclass(kw_only=True)
class Rehearsal:
    """The peaks of a run's phases, in bytes of tensors on the training device."""

    num_parameters: int  # loaded for training
    num_trained: int  # of these
    unet_bytes: int  # of its weights
    training: Training
    captions_bytes: int  # while they are encoded; 0 if training steps do that
    pictures_bytes: int  # while they are encoded
    # While pictures are drawn, in addition to what training keeps; 0 if none are.
    denoising_bytes: int
    decoding_bytes: int  # the same for the VAE's part, when the UNet can be moved to the host
    tiled_bytes: int  # the same if it decodes in tiles


def rehearse(config: Config, model: Model, device_type: str) -> Rehearsal:
    """Simulate the phases of a run on a device of this type ("cpu" or "cuda").

    `model` needs no weights.  Raises UserError if the run would refuse the method, its rules or
    the optimizer.
    """
    optimizers.refuse_second_average(config.optim, config.method)
    with console.muted(logging.INFO):  # the run itself logs the same, once
        attached = method.attached_on_meta(config.method, model)
        parts = nn.ModuleDict(attached.trained_parts)
        num_parameters = quantization.num_weights(parts)
        optimizer = optimizers.planned(
            config.optim, parts, config.seed, config.method.rules, device_type
        )
        trained = [p for p in parts.parameters() if p.requires_grad]
        vae = model.empty("vae", model.config.vae_dtype)
        encoder = None if attached.text_encoder else model.empty_text_encoders()
        with _without_data(config, device_type) as device:
            _give_storage(parts, device)
            execution.prepare(_eager(config), attached.trained_parts, device)
            peak = _step(config, attached, device_type)
            denoising = _denoised(config, attached)
            _give_storage(vae, device)
            return Rehearsal(
                num_parameters=num_parameters,
                num_trained=sum(p.numel() for p in trained),
                unet_bytes=quantization.num_bytes(attached.unet),
                training=Training(
                    weights=peak["weights"],
                    optimizer_state=optimizer.state,
                    optimizer_scratch=optimizer.scratch,
                    averages=_bytes_of_averages(config, trained),
                    gradients=peak["gradients"],
                    activations=peak["activations"],
                ),
                captions_bytes=_encoded_captions(encoder, device) if encoder else 0,
                pictures_bytes=_encoded_picture(config, vae),
                denoising_bytes=denoising,
                decoding_bytes=_decoded(config, attached, vae) if denoising else 0,
                tiled_bytes=_decoded(config, attached, vae, in_tiles=True) if denoising else 0,
            )


def _step(config: Config, model: Model, device_type: str) -> dict[str, int]:
    """A step without the optimizer: bytes of weights, gradients and activations at the peak."""
    parts = nn.ModuleDict(model.trained_parts)
    trained = [p for p in parts.parameters() if p.requires_grad]
    side = config.data.largest_resolution  # a square: no bucket has a larger area
    latents = _latents(model, config.data.batch_size, (side, side))
    with Ledger("activations") as ledger, _consuming(config, trained, device_type, ledger):
        ledger.enter(_tensors(parts), "weights")
        for _ in range(min(config.runtime.accumulation, 2)):  # a third is like the second
            batch = _batch(config, model, latents)
            F.mse_loss(batches.predict(model.unet, batch), latents).backward()
    return ledger.peak


@contextmanager
def _consuming(
    config: Config, trained: Sequence[Tensor], device_type: str, ledger: Ledger
) -> Iterator[None]:
    """Enter gradients into the ledger as they arrive; a fused backward frees each full bucket."""
    frees = config.runtime.frees_gradients
    full = gradients.bucket_bytes(trained, device_type)
    waiting: list[Tensor] = []

    def arrived(parameter: Tensor) -> None:
        assert parameter.grad is not None
        ledger.enter([parameter.grad], "gradients")
        waiting.append(parameter)
        if frees and sum(p.grad.nbytes for p in waiting if p.grad is not None) >= full:
            free()

    def free() -> None:
        for parameter in waiting:
            parameter.grad = None
        waiting.clear()

    handles = [p.register_post_accumulate_grad_hook(arrived) for p in trained]
    try:
        yield
    finally:
        free()
        for handle in handles:
            handle.remove()


def _encoded_captions(encoder: text.Encoder, device: torch.device) -> int:
    """The peak of encoding captions before the first step, including the text encoders."""
    parts = nn.ModuleDict(encoder.encoders)
    _give_storage(parts, device)
    with Ledger("activations") as ledger, torch.no_grad():
        ledger.enter(_tensors(parts), "weights")
        encoder([""] * CAPTIONS_AT_A_TIME)
    return ledger.peak.total()


def _encoded_picture(config: Config, vae: AutoencoderKL) -> int:
    """The peak of encoding pictures one at a time, including the VAE."""
    side = config.data.largest_resolution
    with Ledger("activations") as ledger, torch.no_grad():
        ledger.enter(_tensors(vae), "weights")
        vae.encode(torch.empty(1, 3, side, side, dtype=vae.dtype)).latent_dist.mode()
    return ledger.peak.total()


def _denoised(config: Config, model: Model) -> int:
    """The peak of the UNet's part of drawing pictures, without the weights."""
    drawn = _drawn(config)
    if not drawn:
        return 0
    largest = max(drawn, key=lambda prompt: prompt.width * prompt.height)
    guided = any(prompt.is_guided for prompt in drawn)
    rows = min(len(drawn), config.data.batch_size) * (2 if guided else 1)
    with Ledger("activations") as ledger, torch.no_grad():
        ledger.enter(_tensors(nn.ModuleDict(model.trained_parts)), "weights")
        latents = _latents(model, rows, largest.size)
        batches.predict(model.unet, _batch(config, model, latents))
    return ledger.peak["activations"]


def _decoded(config: Config, model: Model, vae: AutoencoderKL, in_tiles: bool = False) -> int:
    """The peak of the VAE's part of drawing, one picture at a time, including the VAE.

    Tiles are decoded one after another, and their pixels kept: four times a picture's, as each
    overlaps the next by a quarter and the whole is put together from them.
    """
    size = max((prompt.size for prompt in _drawn(config)), key=math.prod)
    pixels = 0
    if in_tiles:
        pixels = 4 * 3 * math.prod(size) * vae.dtype.itemsize
        size = min(size[0], drawer.TILE), min(size[1], drawer.TILE)
    with Ledger("activations") as ledger, torch.no_grad():
        ledger.enter(_tensors(vae), "weights")
        vae.decode(_latents(model, 1, size).to(vae.dtype))
    return ledger.peak.total() + pixels


def _drawn(config: Config) -> list[prompts.Prompt]:
    """The prompts to draw.  For captions, whose pictures are not known yet, they are square: no
    bucket has a larger area."""
    side = config.data.largest_resolution
    places = range(config.log.sample_count)
    return prompts.of_config(config.log, side) or [
        prompts.of_caption("", place, prompts.usual(config.log), (side, side)) for place in places
    ]


def _latents(model: Model, rows: int, size: Size) -> Tensor:
    """(rows, 4, h, w)."""
    height, width = (side // model.pixels_per_latent for side in size)
    return torch.empty(rows, model.unet.config.in_channels, height, width)


def _batch(config: Config, model: Model, latents: Tensor) -> batches.Batch:
    """A batch with these latents; text encoders that are trained encode its captions here."""
    settings, rows, pooled = model.unet.config, len(latents), None
    if settings.addition_embed_type == "text_time":
        sizes = 6 * settings.addition_time_embed_dim
        pooled = torch.empty(rows, settings.projection_class_embeddings_input_dim - sizes)
    prompt = torch.empty(rows, _tokens(config), settings.cross_attention_dim)
    if model.text_encoder:
        encoded = model.text_encoder([""] * rows)
        prompt, pooled = encoded.prompt, encoded.pooled
    return batches.Batch(
        latents=latents,
        noisy=latents,
        target=latents,
        timesteps=torch.zeros(rows, dtype=torch.int64),
        time=torch.zeros(rows, dtype=torch.int64),
        prompt=prompt,
        pooled=pooled,
        time_ids=torch.empty(rows, 6) if pooled is not None else None,
    )


def _tokens(config: Config) -> int:
    """The length of a prompt: chunks of 75 tokens, with one start and one end token."""
    return 75 * config.model.prompt_chunks + 2


def _bytes_of_averages(config: Config, trained: Sequence[Tensor]) -> int:
    ema = config.method.ema
    if ema is None or ema.device == "cpu":
        return 0
    return sum(p.numel() for p in trained) * DTYPES[ema.dtype].itemsize


@contextmanager
def _without_data(config: Config, device_type: str) -> Iterator[torch.device]:
    """Make tensors that have shapes but no data; yields their device.

    Autocast only knows devices that compute: with it they are fake tensors of a CPU, and the
    rehearsal takes about twice as long.
    """
    if config.model.compute == "bfloat16":
        with FakeTensorMode(), _autocast_of(device_type):
            yield torch.device("cpu")
    else:
        with torch.device("meta") as device, _fused_attention():
            yield device


def _give_storage(module: nn.Module, device: torch.device) -> None:
    """Replace tensors on the meta device by ones on this device, if it is another."""
    if device.type == "meta":
        return
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                made = nn.Parameter(_like(parameter, device), requires_grad=parameter.requires_grad)
                owner._parameters[name] = made
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = _like(buffer, device)


def _like(x: Tensor, device: torch.device) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=device)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _eager(config: Config) -> Config:
    """The configuration without compilation, which needs no less memory."""
    return replace(config, runtime=replace(config.runtime, compile="none"))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Make attention keep what fused kernels keep, its result and a number per row.  (On the meta
    device torch would choose the kernel that keeps the whole matrix.)"""

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **others: Any,
    ) -> Tensor:
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask)[0]
        return result

    with _replaced(scaled_dot_product_attention=call):
        yield


@contextmanager
def _autocast_of(device_type: str) -> Iterator[None]:
    """Make autocast behave as on a GPU: there norms run in fp32 (PyTorch, "CUDA Ops that can
    autocast to float32") and keep more bytes, while fake tensors follow the CPU's, in bf16."""

    def in_fp32(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
            return original(*args, **kwargs)

        return call

    norms = ("group_norm", "layer_norm") if device_type == "cuda" else ()
    with _replaced(**{name: in_fp32(getattr(F, name)) for name in norms}):
        yield


@contextmanager
def _replaced(**functions: Callable[..., Tensor]) -> Iterator[None]:
    """Have other functions in torch.nn.functional."""
    originals = {name: getattr(F, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(F, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)
