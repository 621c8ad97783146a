"""Hugging Face datasets on the disk: .parquet files, and the .arrow files of `save_to_disk`.

The picture is in a column `image`, or in the first that holds bytes; captions are in
`data.caption_column`, or `captions`, `text` or `caption`; `weight` and `mask` may be there.
Pictures are read when they are needed.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from trainer.data.items import Item, Reading, item, read_file, shown
from trainer.errors import UserError

_one_reads = threading.Lock()  # of the threads that read ahead


def items(path: Path, reading: Reading) -> Iterator[Item]:
    """One item for each row.  Raises UserError where pyarrow is missing, or the file is damaged or
    has no pictures, or not the column of captions that was asked for."""
    names, image = _columns(path)
    has = f"the columns {shown(', '.join(names))}"
    if image is None:
        raise UserError(f"{shown(path)} has {has}; it needs one with pictures")
    column = reading.caption_column
    if column is not None and column not in names:
        raise UserError(f"{shown(path)} has no data.caption_column={column}; it has {has}")
    if not {*names} & {*reading.caption_columns}:
        said = f"tables have no captions in {has} (data.caption_column names another)"
        reading.remarks[said].append(shown(path))
    words = [name for name in (*reading.caption_columns, "weight") if name in names]
    with _named_errors(path):
        for number, (group, row, record) in enumerate(_records(path, words)):
            place = (path, group, row)
            mask = partial(_read, *place, "mask") if "mask" in names else None
            with reading.going_on():
                read = partial(_read, *place, image)  # from a file beside the table, perhaps
                yield item(f"{path}:{number}", read, record, mask, reading, files=())


def has_pictures(path: Path) -> bool:
    """Whether one of its columns holds pictures.  Raises UserError as `items` does."""
    return _columns(path)[1] is not None


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """What goes wrong with the table as a UserError that names it."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(
            f"{shown(path)} needs the package pyarrow to be read: pip install pyarrow"
        ) from None
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{shown(path)} cannot be read: {error}; recreate it, or remove it from the data "
            "(data.max_unreadable only covers pictures)"
        ) from error


def _columns(path: Path) -> tuple[list[str], str | None]:
    """All columns, and the one that pictures are in."""
    with _named_errors(path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        is_parquet = path.suffix.lower() == ".parquet"
        schema = pq.read_schema(path) if is_parquet else _arrow(path).schema

    def holds_bytes(name: str) -> bool:
        kind = schema.field(name).type
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [name for name in schema.names if name != "mask" and holds_bytes(name)]
    return schema.names, "image" if "image" in found else next(iter(found), None)


def _records(path: Path, words: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(row group, row in it, its small values) of every row."""
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".arrow":
        for row, record in enumerate(_rows(_arrow(path), words)):
            yield 0, row, record
        return
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row, record in enumerate(_rows(file.read_row_group(group, words), words)):
                yield group, row, record


def _rows(table: Any, words: list[str]) -> list[dict[str, Any]]:
    return table.select(words).to_pylist() if words else [{}] * table.num_rows


def _read(path: Path, group: int, row: int, column: str) -> bytes:
    """The bytes in one cell, or in the file beside the table that it names."""
    if path.suffix.lower() == ".arrow":
        cell = _arrow(path).column(column)[row].as_py()
    else:
        cell = _group(path, group, column)[row].as_py()
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return read_file(path.parent / cell["path"])
        cell = cell.get("bytes")
    if cell is None:
        raise OSError(f"the column {column} is empty here")
    return cell


def _group(path: Path, group: int, column: str) -> Any:
    with _one_reads:  # the others wait, and then find it
        return _read_group(path, group, column)


def free_rows() -> None:
    """Free the row groups that are kept for the next rows: gigabytes, perhaps."""
    _read_group.cache_clear()


@lru_cache(maxsize=2)  # row groups are read whole, and rows are asked for in their order
def _read_group(path: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, [column]).column(column)


@lru_cache(maxsize=16)
def _arrow(path: Path) -> Any:
    """An arrow file, stream or random access, mapped into memory."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
