"""Rows: the texts in files that hold many documents, Parquet, Arrow and JSON Lines, one at a time.

A row of the text column is a document. The column is the one that was asked for, else `text`, else
`content`; other columns are not read. Memory holds a few row groups of Parquet, one line of JSON
Lines, and one file of Arrow's stream format, which is how `datasets` saves to disk: shards of 500
MB unless told otherwise. No code of a data set runs: these are tables and nothing else.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import polars as pl

from bitplan.errors import DataError

TEXT_COLUMNS = ("text", "content")
_LINES = (".jsonl", ".ndjson")
_TABLES = (".parquet", ".arrow")
_BATCH_ROWS = 1024
# Polars panics, which is no Exception, on some damaged files.
_DAMAGE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


def has_rows(path: Path) -> bool:
    """Whether a file holds rows, by its suffix."""
    return path.suffix.lower() in (*_LINES, *_TABLES)


def text_column(path: Path, asked: str | None) -> str | None:
    """Return the column of a file whose rows are documents; None where it has no such column.

    Raises DataError where the file cannot be read.
    """
    kinds = _first_row(path) if path.suffix.lower() in _LINES else _schema(path)
    wanted = (asked,) if asked is not None else TEXT_COLUMNS
    return next((name for name in wanted if kinds.get(name)), None)


def columns_of(path: Path) -> list[str]:
    """Return the columns of a file that hold text."""
    kinds = _first_row(path) if path.suffix.lower() in _LINES else _schema(path)
    return [name for name, is_text in kinds.items() if is_text]


def read_rows(path: Path, column: str) -> Iterator[str | None]:
    """Yield the texts of a column in order; None for a row that has none.

    Raises DataError where the file is damaged.
    """
    if path.suffix.lower() in _LINES:
        yield from _read_lines(path, column)
        return
    try:
        for batch in _batches(path, column):
            yield from batch[column]
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _batches(path: Path, column: str) -> Iterator[pl.DataFrame]:
    if _is_stream(path):
        yield from pl.read_ipc_stream(path, columns=[column]).iter_slices(_BATCH_ROWS)
    else:
        yield from _scan(path).select(column).collect_batches(chunk_size=_BATCH_ROWS, lazy=True)


def _scan(path: Path) -> pl.LazyFrame:
    if path.suffix.lower() == ".parquet":
        return pl.scan_parquet(path, glob=False, hive_partitioning=False)
    return pl.scan_ipc(path, glob=False, hive_partitioning=False)


def _is_stream(path: Path) -> bool:
    """Whether a file is Arrow's stream format and not its file format."""
    if path.suffix.lower() != ".arrow":
        return False
    with open(path, "rb") as file:
        return file.read(6) != b"ARROW1"


def _schema(path: Path) -> dict[str, bool]:
    """Return whether each column of a table is text."""
    try:
        if _is_stream(path):
            schema = pl.read_ipc_stream(path, n_rows=0).schema
        else:
            schema = _scan(path).collect_schema()
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return {name: dtype == pl.String for name, dtype in schema.items()}


def _first_row(path: Path) -> dict[str, bool]:
    """Return whether each entry of the first line is text; of no JSON object, nothing."""
    with _opened(path) as file:
        try:
            row = json.loads(next((line for line in file if line.strip()), b""))
        except (ValueError, RecursionError):
            return {}
    return {name: isinstance(value, str) for name, value in row.items()} if _is_row(row) else {}


def _read_lines(path: Path, column: str) -> Iterator[str | None]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _damaged(path, f"line {number} is no JSON ({error})") from error
            value = row.get(column) if _is_row(row) else None
            yield value if isinstance(value, str) else None


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _damaged(path, error.strerror) from error


def _damaged(path: Path, reason: object) -> DataError:
    first = str(reason).strip().splitlines()[:1]
    return DataError(f"cannot read the rows of {path}: {first[0] if first else 'it is damaged'}")
