"""Captions as token ids: CLIP's byte-pair vocabulary, and the small part of it that occurs."""

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from tiny.noto import Emoji, SourceError

NUM_MERGES = 49152 - 256 - 2


# --- the vocabulary -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Bpe:
    vocabulary: dict[str, int]  # token to id, 49,408 entries
    merges: list[tuple[str, str]]  # 48,894 pairs


def read_bpe(path: Path | None) -> Bpe:
    """CLIP's byte-pair vocabulary.

    Ids count 256 bytes, the same 256 at a word's end, one per merge, then the two special tokens.
    """
    path = path or _installed_bpe()
    if not path.is_file():
        raise SourceError(
            f"no BPE vocabulary at {path}: pip install --no-deps open_clip_torch, or pass --bpe"
        )
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # After a version line the file has 262,144 merges, of which CLIP uses the first 48,894.
    merges = [(left, right) for left, right in map(str.split, lines[1 : 1 + NUM_MERGES])]
    alphabet = _byte_alphabet()
    tokens = alphabet + [c + "</w>" for c in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return Bpe(vocabulary={token: index for index, token in enumerate(tokens)}, merges=merges)


def write_tokenizer(folder: Path, bpe: Bpe, *, pad: str) -> None:
    """A CLIPTokenizer folder in the classic files, a third of the size of tokenizer.json."""
    folder.mkdir(parents=True)
    vocabulary = json.dumps(bpe.vocabulary, ensure_ascii=False, separators=(",", ":"))
    merges = "\n".join(" ".join(pair) for pair in bpe.merges)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def _installed_bpe() -> Path:
    """Find open_clip's copy without importing open_clip, which needs torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise SourceError(
            "open_clip is not installed: pip install --no-deps open_clip_torch, or pass --bpe"
        )
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of their ids: printable first."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(others)]


# --- the captions ---------------------------------------------------------------------------------


class Captions:
    """Captions as token ids, over a vocabulary of only the words that occur.

    Of CLIP's 49,408 rows these captions use about 3,000; the rest would be ballast in every step.
    `used` (V,) are the real ids, ascending; a compact id is an index into it, and the end token
    stays the largest.
    """

    def __init__(self, tokenizer: CLIPTokenizer, emoji: list[Emoji]):
        self.tokenizer = tokenizer
        texts = [", ".join([e.label, *e.tags]) for e in emoji]
        padding = {tokenizer.convert_tokens_to_ids("!"), tokenizer.eos_token_id}
        self.used = torch.tensor(sorted(padding.union(*tokenizer(texts).input_ids)))
        self.compact = torch.zeros(len(tokenizer), dtype=torch.long)
        self.compact[self.used] = torch.arange(len(self.used))

    def ids(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """-> compact ids (B, 77) per encoder; padding is the end token in one, "!" in the other."""
        batch = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ends = (batch.input_ids == self.tokenizer.eos_token_id).cumsum(dim=1)
        padded_with_0 = batch.input_ids.masked_fill(ends > 1, 0)
        return self.compact[batch.input_ids], self.compact[padded_with_0]


def caption(emoji: Emoji, rng: np.random.Generator) -> str:
    """Mostly the label alone; else with two to four tags, so that single words gain meaning."""
    if rng.random() < 0.6 or len(emoji.tags) < 2:
        return emoji.label
    number = min(int(rng.integers(2, 5)), len(emoji.tags))
    return ", ".join([emoji.label, *rng.choice(emoji.tags, number, replace=False)])
