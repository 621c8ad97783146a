"""Hugging Face datasets on disk: .parquet files, and the .arrow files of `save_to_disk`.

Pictures are in the column `image`, or in the first that holds bytes; captions in
`data.caption_column`, or `captions`, `text` or `caption`; `weight` and `mask` are optional.
Pictures are read on demand.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from trainer.data.items import Item, Reading, item, read_file, shown
from trainer.errors import UserError

_one_reads = threading.Lock()  # one of the read-ahead threads reads a row group at a time


def items(path: Path, reading: Reading) -> Iterator[Item]:
    """One item for each row.  Raises UserError if pyarrow is missing, or the file is damaged, has
    no pictures, or lacks the requested caption column."""
    names, image = _columns(path)
    has = f"the columns {shown(', '.join(names))}"
    if image is None:
        raise UserError(f"{shown(path)} has {has}; it needs one with pictures")
    column = reading.caption_column
    if column is not None and column not in names:
        raise UserError(f"{shown(path)} has no data.caption_column={column}; it has {has}")
    if not {*names} & {*reading.caption_columns}:
        message = f"tables have no captions in {has} (data.caption_column names another)"
        reading.remarks[message].append(shown(path))
    columns = [name for name in (*reading.caption_columns, "weight") if name in names]
    with _named_errors(path):
        for number, (group, row, record) in enumerate(_records(path, columns)):
            position = (path, group, row)
            mask = partial(_read, *position, "mask") if "mask" in names else None
            with reading.going_on():
                read = partial(_read, *position, image)
                # files=(): the picture may be in a file that the table names
                yield item(f"{path}:{number}", read, record, mask, reading, files=())


def has_pictures(path: Path) -> bool:
    """Whether one of its columns holds pictures.  Raises UserError as `items` does."""
    return _columns(path)[1] is not None


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn errors in reading the table into a UserError that names it."""
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
    """All columns, and the one that holds pictures."""
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

    with_bytes = [name for name in schema.names if name != "mask" and holds_bytes(name)]
    return schema.names, "image" if "image" in with_bytes else next(iter(with_bytes), None)


def _records(path: Path, columns: list[str]) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(row group, row within it, caption and weight columns) of every row."""
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".arrow":
        for row, record in enumerate(_rows(_arrow(path), columns)):
            yield 0, row, record
        return
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            for row, record in enumerate(_rows(file.read_row_group(group, columns), columns)):
                yield group, row, record


def _rows(table: Any, columns: list[str]) -> list[dict[str, Any]]:
    return table.select(columns).to_pylist() if columns else [{}] * table.num_rows


def _read(path: Path, group: int, row: int, column: str) -> bytes:
    """The bytes in one cell, or in the file that it names, relative to the table's folder."""
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
    with _one_reads:  # the others wait, then find it in the cache
        return _read_group(path, group, column)


def free_rows() -> None:
    """Free the cached row groups, which may be gigabytes."""
    _read_group.cache_clear()


@lru_cache(maxsize=2)  # row groups are read whole, and rows are requested in order
def _read_group(path: Path, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, [column]).column(column)


@lru_cache(maxsize=16)
def _arrow(path: Path) -> Any:
    """A memory-mapped arrow file, in stream or random-access format."""
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(source).read_all()
