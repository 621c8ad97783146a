"""A torch checkpoint (.ckpt) without running anything in it: its tensors, one at a time.

Such a file is a zip of a pickle and of each tensor's bytes.  A pickle can call whatever it names,
and those of training programs name classes of packages that are not installed (Lightning's
callbacks, say).  Here every name but the few that tensors are made of stands for a class that
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
    """What the pickle of a zip holds, with a `Lazy` for each tensor and nothing of other classes.

    Raises UserError where it is no such zip, and whatever a damaged one makes pickle and zipfile
    raise.  The zip stays open for as long as there are tensors of it.
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
    """Stands for an object of any class: it accepts what a pickle does to one."""

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
        """What a pickle may name.  Each answer is a new object, which it cannot spoil for others,
        or one that cannot be changed."""
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
        """A storage: its type, and which of the zip's files it is."""
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
        place = (torch.Size(shape), tuple(stride), int(offset))
        read = partial(_tensor, self._archive, name, dtype, *place)
        return Lazy(shape=tuple(place[0]), dtype=dtype, read=read)


def _tensor(
    archive: zipfile.ZipFile,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
) -> Tensor:
    """A tensor of a zip's file.  Raises UserError where that is damaged or changed."""
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
