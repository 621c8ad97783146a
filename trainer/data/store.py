"""Latents, embeddings and masks, computed once and kept in memory or in a cache folder.

An entry's name is a hash of everything it depends on: for a latent, the picture's bytes, crop and
resize, VAE and dtype; for an embedding, the caption, text encoders and dtype; for a mask, also the
mask's bytes.  So no entry is ever stale (an edited picture or another resolution gives another
name), and nothing is encoded twice, in whichever run.  An entry is written to a temporary file and
renamed: a process killed while encoding loses at most one, and two processes may share a folder.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from trainer.config import DTYPES
from trainer.data.buckets import Size
from trainer.data.sample import Sample
from trainer.data.survey import ahead
from trainer.errors import UserError
from trainer.formats.weights import SAFETENSORS_DTYPES
from trainer.system import console, memory, signals
from trainer.system.retry import with_retries

log = logging.getLogger(__name__)

Thing = TypeVar("Thing")
Entry = dict[str, Tensor]
PictureEncoder = Callable[[Tensor], Tensor]  # (3, H, W) in [-1, 1] -> (4, h, w), scaled
TextEncoder = Callable[[list[Any]], list[Entry]]  # entries of prompt (tokens, dim), pooled (dim,)

# Increment when the meaning of an entry changes.  1: latents are the posterior's mode, scaled.
_VERSION = 1
CAPTIONS_AT_A_TIME = 16  # captions per encoder call


@dataclass(kw_only=True)
class Entries:
    """Entries of samples by their index, or of captions by their text."""

    keys: dict[Any, str]
    memory: dict[str, Entry] = field(default_factory=dict)
    folder: Path | None = None  # if set, every access reads the entry from here

    def __getitem__(self, name: Hashable) -> Entry:
        key = self.keys[name]
        if self.folder is None:
            return self.memory[key]
        path = _path(self.folder, key)
        try:
            entry = _load(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"the cache's {path} has become unreadable since the run began: {error}; resume or "
                "restart to recreate it"
            ) from error
        if not _is_finite(entry):
            with suppress(OSError):
                path.unlink()  # else the next run would find it again
            raise UserError(
                f"the cache's {path} was not finite and has been deleted; resume or restart to "
                "recreate it"
            )
        return entry


class Store:
    """Keeps entries in `data.cache`, or in memory if that is null."""

    def __init__(self, cache: str | None, dtype: str) -> None:
        self.folder = Path(cache).expanduser() if cache else None
        self.dtype = DTYPES[dtype]
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(self.folder, error) from error

    def latents(
        self,
        samples: list[Sample],
        fingerprint: str,
        make_encoder: Callable[[], PictureEncoder],
        stop: Sequence[int] = (),
    ) -> Entries:
        """An entry with `latent` (4, h, w) for each sample, by index.

        `make_encoder` is called only if an entry is missing; `fingerprint` identifies the VAE.
        Raises UserError for a latent that is not finite, and SystemExit once `stop` holds a signal.
        """
        keys = {i: self._latent_key(s, fingerprint) for i, s in enumerate(samples)}
        found = self._entries("latents", keys)
        by_key = {key: samples[i] for i, key in keys.items()}
        missing = self._missing(found, lambda key, entry: _is_latent(entry, by_key[key]))
        if missing:
            encode = make_encoder()
            with ahead(_read(Sample.read_pixels), [by_key[key] for key in missing]) as reads:
                for key, pixels in _progress(zip(missing, reads, strict=True), len(missing), stop):
                    entry = {"latent": encode(pixels)}
                    if not _is_finite(entry):
                        raise UserError(
                            f"the VAE's latent of {by_key[key].name} is not finite; check the "
                            "picture, or set model.vae_dtype=float32 or model.vae to another VAE "
                            "(SDXL's overflows in float16, its fp16-fix version does not)"
                        )
                    self._put(found, key, entry, len(missing))
        count = len(set(keys.values()))
        mirrored = sum(sample.mirrored for sample in by_key.values())
        what = f"pictures ({mirrored} of {count} are mirror images)" if mirrored else "pictures"
        self._report(what, count, len(missing))
        return found

    def masks(
        self, samples: list[Sample], latents: Entries, stop: Sequence[int] = ()
    ) -> Entries | None:
        """An entry with `mask` (1, h, w), at the latent's size, for each sample, by index; None if
        the loss is not masked.  `latents` is the result of that method; errors are as there."""
        if samples[0].config.mask == "none":
            return None
        scale = samples[0].bucket[0] // latents[0]["latent"].shape[1]
        sizes = [(s.bucket[0] // scale, s.bucket[1] // scale) for s in samples]
        keys = {i: self._mask_key(s, sizes[i]) for i, s in enumerate(samples)}
        found = self._entries("masks", keys)
        by_key = {key: i for i, key in keys.items()}
        missing = self._missing(found, lambda key, entry: _is_mask(entry, sizes[by_key[key]]))
        with ahead(_read(Sample.read_mask), [samples[by_key[key]] for key in missing]) as reads:
            things = zip(missing, reads, strict=True)
            for key, mask in _progress(things, len(missing), stop, "reading masks"):
                averaged = F.adaptive_avg_pool2d(mask, sizes[by_key[key]])
                self._put(found, key, {"mask": averaged}, len(missing))
        return found

    def texts(
        self,
        captions: Sequence[str | None],
        fingerprint: str,
        make_encoder: Callable[[], TextEncoder],
        stop: Sequence[int] = (),
    ) -> Entries:
        """An entry with `prompt` (tokens, dim), and `pooled` (dim,) if the model has it, for each
        caption; the caption None is no prompt.  As `latents`; `fingerprint` identifies the text
        encoders."""
        keys = {text: self._text_key(text, fingerprint) for text in captions}
        found = self._entries("texts", keys)
        by_key = {key: text for text, key in keys.items()}
        missing = self._missing(found, lambda key, entry: _is_text(entry))
        if missing:
            encode = make_encoder()
            chunks = [
                missing[i : i + CAPTIONS_AT_A_TIME]
                for i in range(0, len(missing), CAPTIONS_AT_A_TIME)
            ]
            for chunk in _progress(chunks, len(missing), stop, "encoding captions", len):
                for key, entry in zip(chunk, encode([by_key[key] for key in chunk]), strict=True):
                    if not _is_finite(entry):
                        raise UserError(
                            f"the text encoders' embedding of {by_key[key]!r} is not finite; run "
                            "them in float32, or check their weights"
                        )
                    self._put(found, key, entry, len(missing))
        self._report("captions", len(keys), len(missing))
        return found

    def missing_latents(self, samples: list[Sample], fingerprint: str) -> int:
        """How many pictures `latents` would encode."""
        by_key = {self._latent_key(s, fingerprint): s for s in samples}
        found = self._entries("latents", {key: key for key in by_key})
        return len(self._missing(found, lambda key, entry: _is_latent(entry, by_key[key])))

    def missing_texts(self, captions: Sequence[str | None], fingerprint: str) -> int:
        """How many captions `texts` would encode."""
        found = self._entries("texts", {t: self._text_key(t, fingerprint) for t in captions})
        return len(self._missing(found, lambda key, entry: _is_text(entry)))

    def _latent_key(self, sample: Sample, fingerprint: str) -> str:
        return _hash(*sample.pixels_key, fingerprint, str(self.dtype))

    def _mask_key(self, sample: Sample, size: Size) -> str:
        return _hash(*sample.mask_key, str(size), str(self.dtype))

    def _text_key(self, caption: str | None, fingerprint: str) -> str:
        return _hash(caption, fingerprint, str(self.dtype))

    def _entries(self, kind: str, keys: dict[Any, str]) -> Entries:
        return Entries(keys=keys, folder=self.folder / kind if self.folder else None)

    def _missing(self, found: Entries, is_good: Callable[[str, Entry], bool]) -> list[str]:
        """The keys without an intact entry, in order.

        Only headers and file lengths are checked: reading a cache of a hundred gigabytes would
        delay the start too much.  Values are checked when they are used.
        """
        keys = list(dict.fromkeys(found.keys.values()))
        folder = found.folder
        if folder is None or not folder.is_dir():
            return keys

        def state(key: str) -> str:
            path = _path(folder, key)
            if not path.is_file():
                return "absent"
            try:
                entry = _described(path)
            except (OSError, SafetensorError, KeyError):
                return "damaged"
            fits = all(tensor.dtype == self.dtype for tensor in entry.values())
            return "good" if fits and is_good(key, entry) else "damaged"

        with ahead(state, keys) as found_states:
            states = dict(zip(keys, found_states, strict=True))
        damaged = sum(s == "damaged" for s in states.values())
        if damaged:
            log.warning("cache: %d damaged entries in %s", damaged, folder)
        return [key for key in keys if states[key] != "good"]

    def _put(self, found: Entries, key: str, entry: Entry, total: int) -> None:
        """Store an entry, one of `total` that will be stored."""
        kept = {name: t.to("cpu", self.dtype, copy=True).contiguous() for name, t in entry.items()}
        if found.folder is None:
            if not found.memory:
                _check_room(kept, total)
            found.memory[key] = kept
            return
        path = _path(found.folder, key)
        temporary = path.with_name(f".{key}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(kept, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise self._unwritable(path, error) from error

    def _unwritable(self, path: Path, error: Exception) -> UserError:
        return UserError(
            f"data.cache={self.folder}: {path} cannot be written: {error}; free some space there, "
            "name another folder, or set data.cache=null"
        )

    def _report(self, what: str, count: int, encoded: int) -> None:
        where = f"; {count - encoded} found in {self.folder}" if self.folder else ""
        log.info("data: %d %s encoded%s", encoded, what, where)


def _check_room(entry: Entry, total: int) -> None:
    """Raise UserError if `total` such entries would not fit in memory."""
    needed, free = total * sum(t.nbytes for t in entry.values()), memory.free_host_bytes()
    if needed > free:
        raise UserError(
            f"{total} encoded {'captions' if 'prompt' in entry else 'pictures'} need "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; store them in a "
            "folder: data.cache=... (data.cache_dtype=bfloat16 needs half)"
        )


def _load(path: Path) -> Entry:
    """Read an entry.  Not memory-mapped: truncating a mapped file would kill the process."""
    return load(with_retries(path.read_bytes))


def _described(path: Path) -> Entry:
    """An entry's tensors on the meta device.  Raises SafetensorError if the file's length
    contradicts its header."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return {
            name: torch.empty(s.get_shape(), dtype=SAFETENSORS_DTYPES[s.get_dtype()], device="meta")
            for name, s in slices.items()
        }


def _path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.safetensors"


def _hash(*parts: str | None) -> str:
    return hashlib.sha256(repr((_VERSION, *parts)).encode()).hexdigest()


def _is_finite(entry: Entry) -> bool:
    return all(tensor.isfinite().all() for tensor in entry.values())


def _is_latent(entry: Entry, sample: Sample) -> bool:
    """Whether both sides are the bucket's, divided by the same integer (the VAE's scale)."""
    if entry.keys() != {"latent"} or entry["latent"].ndim != 3:
        return False
    sides = zip(sample.bucket, entry["latent"].shape[1:], strict=True)
    scales = {whole / part if part else 0.0 for whole, part in sides}
    return len(scales) == 1 and all(scale >= 1 and scale.is_integer() for scale in scales)


def _is_mask(entry: Entry, size: Size) -> bool:
    return entry.keys() == {"mask"} and entry["mask"].shape == (1, *size)


def _is_text(entry: Entry) -> bool:
    dims = {name: tensor.ndim for name, tensor in entry.items()}
    return dims in ({"prompt": 2}, {"prompt": 2, "pooled": 1})


def _read(of: Callable[[Sample], Tensor]) -> Callable[[Sample], Tensor]:
    """`of`, with its exceptions turned into a UserError that names the picture."""

    def read(sample: Sample) -> Tensor:
        try:
            return of(sample)
        except UserError:
            raise
        except Exception as error:  # decoders raise many types
            raise UserError(
                f"{sample.name} has become unreadable since the run began: {error}"
            ) from error

    return read


def _progress(
    things: Iterable[Thing],
    total: int,
    stop: Sequence[int],
    what: str = "encoding pictures",
    entries_of: Callable[[Thing], int] = lambda thing: 1,
) -> Iterator[Thing]:
    """Yield the things and report progress out of `total` entries.  Ends the process once `stop`
    holds a signal; entries encoded so far stay in the cache, if there is one."""
    with console.Aside(what, total, "entries") as aside:
        for thing in things:
            signals.end_if(stop, what)
            yield thing
            aside.advance(entries_of(thing))
