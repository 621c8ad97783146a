"""Writing files so that neither a crash nor a full disk leaves a partial one."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL.Image import Image
from safetensors import SafetensorError

from trainer.errors import UserError
from trainer.system import memory

# Errors of file systems that cannot flush a folder.
_NEVER_FLUSHED = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `final` if the block succeeds.

    Everything is flushed to the disk before the rename, so a folder called `final` is complete or
    does not exist.  Raises UserError if writing fails: nothing half-written remains, and an older
    `final` is unchanged.
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
        shutil.rmtree(temporary, ignore_errors=True)  # before free space is measured
        if old.exists() and not final.exists():
            os.rename(old, final)
        raise UserError(
            f"could not save {final}: {_reason(error)} ({written / 1e6:.1f} MB written, "
            f"{_free_bytes(final.parent) / 1e6:.1f} MB free); earlier files are intact"
        ) from error
    finally:  # for any other exception, a second Ctrl-C included
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(final: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `final` if the block succeeds.

    Raises UserError if writing fails, within the block too; then nothing half-written remains, and
    an older `final` is unchanged.
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
        raise UserError(f"could not save {final}: {_reason(error)} ({free:.1f} MB free)") from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file: it has the old text or the new, never a part.  Raises an OSError that
    names it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_picture(path: Path, picture: Image) -> None:
    """Replace a PNG, like `replace_text`."""
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `path` if the block succeeds, like
    `replace_text`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two may write at once
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # for a full disk, it does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """Why a file could not be written.  Of a full disk under its file, `torch.save` says only that
    a position is unexpected, and keeps the OSError as the context."""
    if isinstance(error, shutil.Error):  # (source, target, reason) of each file
        return str(error.args[0][0][2])
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return str(error.__context__)
    return str(error)


def _flush(path: Path) -> None:
    """fsync a file, or a folder's entries if the file system supports that."""
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
