"""Writing such that neither a crash nor a full disk leaves half a file."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL.Image import Image
from safetensors import SafetensorError

from trainer import memory
from trainer.errors import UserError

# What file systems say that cannot flush a folder.
_NEVER_FLUSHED = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Give a temporary folder to write in; when the block ends well, it becomes `final` at once.

    Everything is flushed to the disk before the rename, so a folder called `final` is complete or
    does not exist.  Raises UserError when the disk does not take it: nothing half-written stays,
    and an older `final` is as it was.
    """
    temporary, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    if old.exists() and not final.exists():
        old.rename(final)  # a process was killed between the two renames below
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap OSError
        if memory.ran_out(error):
            raise
        written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        shutil.rmtree(temporary, ignore_errors=True)  # before what is free is told
        if old.exists() and not final.exists():
            os.rename(old, final)
        # Of a folder that is copied, the first of what could not be, and why.
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
        raise UserError(
            f"could not save {final}: {reason} ({written / 1e6:.1f} MB written, "
            f"{_free_bytes(final.parent) / 1e6:.1f} MB free); earlier files are intact"
        ) from error
    finally:  # of whatever else ended it, a second Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """Give a temporary path to write to; when the block ends well, it becomes `final` at once.

    Raises UserError when the disk does not take it, within the block too; then nothing half-written
    stays, and an older `final` is as it was.
    """
    temporary = final.with_name(f".{final.stem}.tmp{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
        _flush(final.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        if memory.ran_out(error):
            raise
        free = _free_bytes(final.parent) / 1e6
        raise UserError(f"could not save {final}: {error} ({free:.1f} MB free)") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file: it has the old text or the new, never a part.  Raises OSError that
    names it."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_picture(path: Path, picture: Image) -> None:
    """Replace a PNG as `replace_text` does a text."""
    with _replacing(path) as temporary:
        picture.save(temporary, format="PNG")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two may write at once
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # which does not say where the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """fsync a file, or a folder's entries where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NEVER_FLUSHED):
            raise
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
