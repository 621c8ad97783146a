"""Encoding captions for the UNet: with one CLIP text encoder (Stable Diffusion 1.5) or two (SDXL).

SDXL was trained on both encoders' hidden states before the last layer, concatenated, and on the
second encoder's pooled projection (Podell et al. 2023, arXiv 2307.01952, section 2.1); Stable
Diffusion 1.5 on the last states, normalised.  A caption longer than the 77 tokens that CLIP reads
is truncated, or encoded in chunks of 75 tokens, each with its own start and end token; the chunks'
states are concatenated with one start and one end, and the pooled projection is the first chunk's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.errors import UserError
from trainer.formats.origin import Origin
from trainer.models.execution import on_device

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


@dataclass(kw_only=True)
class Text:
    """Encoded captions, B rows."""

    prompt: Tensor  # (B, tokens, dim)
    pooled: Tensor | None  # (B, dim); None if the UNet does not use it


class Encoder:
    """The text encoders of a model with their tokenizers: captions -> Text."""

    def __init__(self, config: ModelConfig, origin: Origin, encoders: dict[str, nn.Module]) -> None:
        """`encoders` are the model's, by the names of TEXT_ENCODERS."""
        self.encoders = encoders
        self._tokenizers = {part: tokenizer(origin, part) for part in encoders}
        self._chunks = config.prompt_chunks
        self._is_pair = len(encoders) > 1
        self._skip = int(self._is_pair) if config.clip_skip is None else config.clip_skip
        self._zeros_for_empty = origin.zeros_for_empty
        for part, encoder in encoders.items():
            layers = len(_tower(encoder).encoder.layers)
            if self._skip >= layers:
                raise UserError(
                    f"model.clip_skip={self._skip}: the {part.replace('_', ' ')} has {layers} "
                    f"layers; skip at most {layers - 1}"
                )

    def __call__(self, captions: Sequence[str | None]) -> Text:
        """Encode; None is the empty prompt as in the model's pipeline: zeros, or ""."""
        read = [self._encode(part, [c or "" for c in captions]) for part in self.encoders]
        prompt = torch.cat([states for states, _ in read], dim=-1)
        pooled = read[-1][1] if self._is_pair else None
        if self._zeros_for_empty:
            keep = on_device(torch.tensor([c is not None for c in captions]), prompt.device)
            prompt = prompt * keep.view(-1, 1, 1)
            pooled = pooled if pooled is None else pooled * keep.view(-1, 1)
        return Text(prompt=prompt, pooled=pooled)

    def freeze_unused(self) -> None:
        """Freeze layers whose output is unused: those after the one that `clip_skip` selects,
        except in SDXL's second encoder, whose pooled output needs them all."""
        for part, encoder in self.encoders.items():
            if self._is_pair and part != TEXT_ENCODERS[0]:
                continue
            tower = _tower(encoder)
            if self._is_pair:
                tower.final_layer_norm.requires_grad_(False)
            for layer in tower.encoder.layers[len(tower.encoder.layers) - self._skip :]:
                layer.requires_grad_(False)

    def _encode(self, part: str, captions: list[str]) -> tuple[Tensor, Tensor | None]:
        """One encoder's states (B, tokens, dim), and its pooled projection (B, dim)."""
        encoder, ids = self.encoders[part], self._tokens(part, captions)
        count, chunks, _ = ids.shape
        device = next(encoder.parameters()).device
        output = encoder(on_device(ids.flatten(0, 1), device), output_hidden_states=True)
        states = output.hidden_states[-1 - self._skip]
        if not self._is_pair:
            states = _tower(encoder).final_layer_norm(states)
        states = states.unflatten(0, (count, chunks))
        words = states[:, :, 1:-1].flatten(1, 2)
        joined = torch.cat([states[:, 0, :1], words, states[:, -1, -1:]], dim=1)
        pooled = getattr(output, "text_embeds", None)
        return joined, pooled if pooled is None else pooled.unflatten(0, (count, chunks))[:, 0]

    def _tokens(self, part: str, captions: list[str]) -> Tensor:
        """-> (B, chunks, 77) token ids, each chunk between a start and an end token."""
        tokenizer = self._tokenizers[part]
        length, begin, end = (
            tokenizer.model_max_length,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
        )
        rows = []
        for caption in captions:
            words = token_ids(tokenizer, caption)
            for chunk in range(self._chunks):
                part_of = words[chunk * (length - 2) : (chunk + 1) * (length - 2)]
                padding = [tokenizer.pad_token_id] * (length - 2 - len(part_of))
                rows.append([begin, *part_of, end, *padding])
        return torch.tensor(rows).view(len(captions), self._chunks, length)


def tokenizer_part(encoder: str) -> str:
    """The name of a text encoder's tokenizer: text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")


def tokenizer(origin: Origin, part: str) -> Any:
    """The tokenizer of a text encoder."""
    return origin.tokenizer(tokenizer_part(part))


def token_ids(tokenizer: Any, caption: str) -> list[int]:
    """The tokens of a caption, without start and end tokens."""
    return tokenizer(caption, add_special_tokens=False, verbose=False).input_ids


def room(config: ModelConfig, tokenizer: Any) -> int:
    """How many tokens of a caption are read; the rest is truncated."""
    return config.prompt_chunks * (tokenizer.model_max_length - 2)


def _tower(encoder: nn.Module) -> Any:
    """The transformer of a CLIP text model, nested one level less in transformers 5 than in 4."""
    return getattr(encoder, "text_model", encoder)
