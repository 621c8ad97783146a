"""Read the tensors of a torch checkpoint (.ckpt), one at a time, without running code from it.

Such a file is a zip with a pickle and each tensor's bytes.  A pickle can call anything it names,
and those of training programs name classes of packages that may not be installed (Lightning's
callbacks, say).  Here every name, except the few that tensors need, resolves to a class that
accepts everything and does nothing.
https://docs.python.org/3/library/pickle.html#restricting-globals
"""

import pickle
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.errors import UserError, reason
from trainer.formats.lazy import Lazy

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


def read(path: Path) -> Any:
    """The content of the zip's pickle, with a `Lazy` for each tensor and placeholders for other
    objects.

    Raises UserError if it is not such a zip, and whatever pickle and zipfile raise for a damaged
    one.  The zip stays open while any of its tensors exists.
    """
    archive = zipfile.ZipFile(path)
    roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip file, but not a torch checkpoint")
    order = f"{roots[0]}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise UserError(f"{path} was written on a big-endian machine; it cannot be read")
    with archive.open(f"{roots[0]}data.pkl") as file:
        return _Unpickler(file, archive, roots[0]).load()


class _Nothing:
    """Placeholder for an object of any class: accepts everything that a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> "_Nothing":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _ignore(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(file, encoding="utf-8")
        self._archive, self._root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a name in the pickle, to a new or an immutable object, so that a pickle cannot
        change anything that others use."""
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(kind := getattr(torch, name, None), torch.dtype):
            return kind
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, stride, *_: self._lazy(
                storage, storage[0], offset, shape, stride
            )
        if module == "torch._utils" and name == "_rebuild_tensor_v3":
            return lambda storage, offset, shape, stride, _, __, dtype, *___: self._lazy(
                storage, dtype, offset, shape, stride
            )
        if module == "torch._utils" and name in (
            "_rebuild_parameter",
            "_rebuild_parameter_with_state",
        ):
            return lambda tensor, *_: tensor
        return type("Nothing", (_Nothing,), {})

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str]:
        """A storage: its type, and the name of its file in the zip."""
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{kind} is not a storage of tensors")
        return dtype, str(key)

    def _lazy(
        self,
        storage: tuple[torch.dtype, str],
        dtype: torch.dtype,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> Lazy:
        name = f"{self._root}data/{storage[1]}"
        layout = (torch.Size(shape), tuple(stride), int(offset))
        read = partial(_tensor, self._archive, name, dtype, *layout)
        return Lazy(shape=tuple(layout[0]), dtype=dtype, read=read)


def _tensor(
    archive: zipfile.ZipFile,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> Tensor:
    """A tensor from a file in the zip.  Raises UserError if that was damaged or changed."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    try:
        content = bytearray(archive.read(name))
        return torch.frombuffer(content, dtype=dtype).as_strided(shape, stride, offset)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive.filename}: {name} cannot be read ({reason(error)}); the file is damaged, "
            "or was changed while it was in use"
        ) from error
