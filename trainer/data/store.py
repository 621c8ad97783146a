"""Latents, embeddings and masks, computed once and kept in memory or in a cache folder.

An entry's name is a hash of everything it depends on: for a latent, the picture's bytes, crop and
resize, VAE and dtype; for an embedding, the caption, text encoders and dtype; for a mask, also the
mask's bytes.  So no entry is ever stale (an edited picture or another resolution gives another
name), and nothing is encoded twice, in whichever run.  An entry is written to a temporary file and
renamed: a process killed while encoding loses at most one, and two processes may share a folder.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from trainer.config import DTYPES
from trainer.data.entries import (
    Entries,
    Entry,
    is_finite,
    is_latent,
    is_mask,
    is_text,
    path_of,
    read_header,
)
from trainer.data.sample import Sample
from trainer.errors import UserError
from trainer.system import console, disk, memory, signals
from trainer.system.threads import ahead
from trainer.wording import counted

log = logging.getLogger(__name__)

Thing = TypeVar("Thing")
PictureEncoder = Callable[[Tensor], Tensor]  # (3, H, W) in [-1, 1] -> (4, h, w), scaled
TextEncoder = Callable[[list[Any]], list[Entry]]  # entries of prompt (tokens, dim), pooled (dim,)

# Increment when the meaning of an entry changes.  1: latents are the posterior's mode, scaled.
_VERSION = 1
CAPTIONS_AT_A_TIME = 16  # captions per encoder call


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
        entries, missing = self._latents(samples, fingerprint)
        if missing:
            encode = make_encoder()
            with ahead(_read(Sample.read_pixels), missing.values()) as reads:
                pairs = zip(missing.items(), reads, strict=True)
                for (key, sample), pixels in self._progress(pairs, len(missing), stop):
                    entry = {"latent": encode(pixels)}
                    if not is_finite(entry):
                        raise UserError(
                            f"the VAE's latent of {sample.name} is not finite; check the picture, "
                            "or set model.vae_dtype=float32 or model.vae to another VAE (SDXL's "
                            "overflows in float16, its fp16-fix version does not)"
                        )
                    self._put(entries, key, entry, len(missing))
        count = len(set(entries.keys.values()))
        others = len({entries.keys[i] for i, s in enumerate(samples) if not s.is_central})
        of_them = f" (other crops and mirror images: {others} of {count})" if others else ""
        self._report(f"pictures{of_them}", count, len(missing))
        return entries

    def masks(
        self, samples: list[Sample], latents: Entries, stop: Sequence[int] = ()
    ) -> Entries | None:
        """An entry with `mask` (1, h, w), at the latent's size, for each sample, by index; None if
        the loss is not masked.  `latents` is the result of that method; errors are as there."""
        if samples[0].config.mask == "none":
            return None
        scale = samples[0].bucket[0] // latents[0]["latent"].shape[1]
        sizes = [(s.bucket[0] // scale, s.bucket[1] // scale) for s in samples]
        keys = {i: self._key(*s.mask_key, str(sizes[i])) for i, s in enumerate(samples)}
        entries, missing = self._looked_up("masks", keys, lambda i, entry: is_mask(entry, sizes[i]))
        with ahead(_read(Sample.read_mask), [samples[i] for i in missing.values()]) as reads:
            pairs = zip(missing.items(), reads, strict=True)
            for (key, i), mask in self._progress(pairs, len(missing), stop, "reading masks"):
                averaged = F.adaptive_avg_pool2d(mask, sizes[i])
                self._put(entries, key, {"mask": averaged}, len(missing))
        return entries

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
        entries, missing = self._texts(captions, fingerprint)
        if missing:
            encode, keys = make_encoder(), list(missing)
            chunks = [
                keys[i : i + CAPTIONS_AT_A_TIME] for i in range(0, len(keys), CAPTIONS_AT_A_TIME)
            ]
            for chunk in self._progress(chunks, len(keys), stop, "encoding captions", len):
                for key, entry in zip(chunk, encode([missing[key] for key in chunk]), strict=True):
                    if not is_finite(entry):
                        raise UserError(
                            f"the text encoders' embedding of {missing[key]!r} is not finite; run "
                            "them in float32, or check their weights"
                        )
                    self._put(entries, key, entry, len(keys))
        self._report("captions", len(entries.keys), len(missing))
        return entries

    def missing_latents(self, samples: list[Sample], fingerprint: str) -> int:
        """How many pictures `latents` would encode."""
        return len(self._latents(samples, fingerprint)[1])

    def missing_texts(self, captions: Sequence[str | None], fingerprint: str) -> int:
        """How many captions `texts` would encode."""
        return len(self._texts(captions, fingerprint)[1])

    def _latents(
        self, samples: list[Sample], fingerprint: str
    ) -> tuple[Entries, dict[str, Sample]]:
        keys = {i: self._key(*s.pixels_key, fingerprint) for i, s in enumerate(samples)}
        entries, missing = self._looked_up(
            "latents", keys, lambda i, entry: is_latent(entry, samples[i])
        )
        return entries, {key: samples[i] for key, i in missing.items()}

    def _texts(
        self, captions: Sequence[str | None], fingerprint: str
    ) -> tuple[Entries, dict[str, str | None]]:
        keys = {caption: self._key(caption, fingerprint) for caption in captions}
        return self._looked_up("texts", keys, lambda _, entry: is_text(entry))

    def _key(self, *parts: str | None) -> str:
        return hashlib.sha256(repr((_VERSION, *parts, str(self.dtype))).encode()).hexdigest()

    def _looked_up(
        self, kind: str, keys: dict[Any, str], fits: Callable[[Any, Entry], bool]
    ) -> tuple[Entries, dict[str, Any]]:
        """The entries with these keys, and {key: name} of those that are missing or damaged.

        Only headers and file lengths are checked: reading a cache of a hundred gigabytes would
        delay the start too much.  Values are checked when they are used.
        """
        folder, names = self.folder and self.folder / kind, {key: n for n, key in keys.items()}
        entries = Entries(keys=keys, folder=folder)
        if folder is None or not folder.is_dir():
            return entries, names

        def state(key: str) -> str:
            path = path_of(folder, key)
            if not path.is_file():
                return "absent"
            try:
                entry = read_header(path)
            except (OSError, SafetensorError, KeyError):
                return "damaged"
            right = all(tensor.dtype == self.dtype for tensor in entry.values())
            return "good" if right and fits(names[key], entry) else "damaged"

        with ahead(state, names) as checked:
            states = dict(zip(names, checked, strict=True))
        damaged = sum(s == "damaged" for s in states.values())
        if damaged:
            log.warning("cache: %d damaged entries in %s", damaged, folder)
        return entries, {key: name for key, name in names.items() if states[key] != "good"}

    def _put(self, entries: Entries, key: str, entry: Entry, total: int) -> None:
        """Store an entry, one of `total` that will be stored."""
        kept = {name: t.to("cpu", self.dtype, copy=True).contiguous() for name, t in entry.items()}
        if entries.folder is None:
            if not entries.memory:
                _check_room(kept, total)
            entries.memory[key] = kept
            return
        path = path_of(entries.folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.replacing(path) as temporary:
                save_file(kept, temporary)
        except (OSError, SafetensorError) as error:
            raise self._unwritable(path, error) from error

    def _progress(
        self,
        things: Iterable[Thing],
        total: int,
        stop: Sequence[int],
        what: str = "encoding pictures",
        entries_of: Callable[[Thing], int] = lambda thing: 1,
    ) -> Iterator[Thing]:
        """Yield the things and report progress out of `total` entries.  Ends the process once
        `stop` holds a signal; entries encoded so far stay in the cache, if there is one."""
        done = 0
        with console.Aside(what, total, "entries") as aside:
            for thing in things:
                kept = f"{done} of {total} are kept in {self.folder}"
                lost = "nothing is kept; data.cache=... would keep what is done"
                signals.end_if(stop, f"{what}: {kept if self.folder else lost}")
                yield thing
                done += entries_of(thing)
                aside.advance(entries_of(thing))

    def _unwritable(self, path: Path, error: Exception) -> UserError:
        return UserError(
            f"data.cache={self.folder}: {path} cannot be written: {error}; free some space there, "
            "name another folder, or set data.cache=null"
        )

    def _report(self, what: str, count: int, encoded: int) -> None:
        where = f"; {count - encoded} found in {self.folder}" if self.folder else ""
        log.info("data: %s encoded%s", counted(encoded, what), where)


def _check_room(entry: Entry, total: int) -> None:
    """Raise UserError if `total` such entries would not fit in memory."""
    needed, free = total * sum(t.nbytes for t in entry.values()), memory.free_host_bytes()
    if needed > free:
        raise UserError(
            f"{total} encoded {'captions' if 'prompt' in entry else 'pictures'} need "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; store them in a "
            "folder: data.cache=... (data.cache_dtype=bfloat16 needs half)"
        )


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
