"""Documents: what --data names, to spans of text files, each of equal ones once.

    PATH                              a text file, or a directory of any of these
    PATH.parquet, .arrow, .jsonl      a row is a document; PATH::COLUMN names the text column
    hf://datasets/OWNER/NAME          a data set of the hub (hub_data.py)

A document is its bytes, wherever they lie: the same texts as files, rows or lines are the same
documents, found by the hash of their content. Rows are unpacked, once a process, into one temporary
file ($TMPDIR), so that all that comes after reads spans of files; what is held in memory is where
each document is. Reading stops at MAX_CORPUS_BYTES.
"""

import codecs
import contextlib
import hashlib
import os
import shutil
import sysconfig
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitplan.errors import DataError
from bitplan.probe.hub_data import hub_files, is_hub_name
from bitplan.probe.rows import TEXT_COLUMNS, columns_of, has_rows, read_rows, text_column

# Reading on would take longer than profiling; a corpus is cut here and says so in its notes.
MAX_CORPUS_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` to `end` of a text file; both lie on ends of lines or characters."""

    path: Path
    start: int
    end: int

    def read(self) -> str:
        """Return the text of the span."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start).decode("utf-8")


class Unpacked:
    """A temporary file of texts that are no files; it is deleted with this object."""

    def __init__(self) -> None:
        place = tempfile.mkdtemp(prefix="bitplan-")
        weakref.finalize(self, shutil.rmtree, place, ignore_errors=True)
        self._path = Path(place, "rows.txt")
        self._size = 0
        # Unbuffered writes of one row each would cost more than reading them.
        self._file = open(self._path, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115

    def add(self, text: bytes) -> Span:
        """Append a text and return where it is; raises DataError where the disk is full."""
        with self._writing():
            self._file.write(text)
        self._size += len(text)
        return Span(self._path, self._size - len(text), self._size)

    def close(self) -> None:
        """Bring all that was added to the file."""
        with self._writing():
            self._file.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot unpack rows into {self._path.parent} ({error.strerror}): set TMPDIR to a "
                f"place with {MAX_CORPUS_BYTES >> 30} GiB"
            ) from error


@dataclass
class Documents:
    """The documents found, by the SHA-256 of their content, and what was left out."""

    spans: dict[bytes, Span] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unpacked: Unpacked | None = None
    _bytes: int = 0
    _files_left_out: int = 0
    _tables_left_out: int = 0
    _rows_left_out: int = 0

    @property
    def is_full(self) -> bool:
        """Whether MAX_CORPUS_BYTES are found."""
        return self._bytes > MAX_CORPUS_BYTES

    def take_text(self, path: Path, *, is_named: bool) -> None:
        """Take a text file as one document."""
        scanned = _scan(path, is_named=is_named)
        if scanned is None:
            self._files_left_out += 1
        elif scanned[1].end and scanned[0] not in self.spans:
            self.spans[scanned[0]] = scanned[1]
            self._bytes += scanned[1].end

    def take_rows(self, path: Path, asked: str | None, *, is_named: bool) -> None:
        """Take every row of a file as a document."""
        column = text_column(path, asked)
        if column is None:
            if is_named:
                raise _no_column(path, asked)
            self._tables_left_out += 1
            return
        if self.unpacked is None:
            self.unpacked = Unpacked()
        for text in read_rows(path, column):
            data = _encoded(text)
            if not data:
                self._rows_left_out += 1
                continue
            digest = hashlib.sha256(data).digest()
            if digest not in self.spans:
                self.spans[digest] = self.unpacked.add(data)
                self._bytes += len(data)
                if self.is_full:
                    return

    def note(self) -> None:
        """Write the notes."""
        if self.is_full:
            self.notes.append(f"only the first {MAX_CORPUS_BYTES >> 30} GiB of text were read")
        if self._files_left_out:
            self.notes.append(f"{self._files_left_out} files that are not UTF-8 text were left out")
        if self._tables_left_out:
            self.notes.append(f"{self._tables_left_out} files without a text column were left out")
        if self._rows_left_out:
            self.notes.append(f"{self._rows_left_out} rows without text were left out")


def find_documents(names: Sequence[str]) -> Documents:
    """Return the documents of paths and hub names; of none, Python's standard library's files.

    Directories are searched whole; hidden files, and files in them that are neither UTF-8 text nor
    rows of it, are left out and counted. Raises DataError where a path is missing, where a file
    that was named has no text, and where one that holds rows is damaged.
    """
    found = Documents()
    try:
        for path, column, is_named in _candidates(names):
            if has_rows(path):
                found.take_rows(path, column, is_named=is_named)
            else:
                found.take_text(path, is_named=is_named)
            if found.is_full:
                break
    finally:
        if found.unpacked is not None:
            found.unpacked.close()
    found.note()
    return found


def _candidates(names: Sequence[str]) -> Iterator[tuple[Path, str | None, bool]]:
    """Yield files in a fixed order, their text column if told, and whether they were named."""
    if not names:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _walk(root, skipped=_STDLIB_SKIPPED):
            if path.suffix == ".py":
                yield path, None, False
    for name in names:
        place, column = _parse(name)
        path = Path(place).expanduser()
        if is_hub_name(place):
            for inner in hub_files(place):
                yield inner, column, False
        elif path.is_dir():
            for inner in _walk(path):
                yield inner, column, False
        elif path.exists():
            yield path, column, True
        else:
            raise DataError(f"no text at {path}: there is no such file or directory")


def _parse(name: str) -> tuple[str, str | None]:
    """Return the place and the column that PATH::COLUMN names."""
    place, colons, column = name.rpartition("::")
    if not colons or Path(name).expanduser().exists():
        return name, None
    return place, column


def _walk(root: Path, *, skipped: Collection[str] = ()) -> Iterator[Path]:
    """Yield a directory's files, sorted, without hidden ones and the skipped directories."""
    for place, directories, files in os.walk(root):
        kept = (d for d in directories if not d.startswith(".") and d not in skipped)
        directories[:] = sorted(kept)
        # What `datasets` saves beside its tables tells of them and is no text.
        saved = any(name.endswith(".arrow") or name == "dataset_dict.json" for name in files)
        for name in sorted(files):
            if not (name.startswith(".") or (saved and not has_rows(Path(name)))):
                yield Path(place, name)


def _scan(path: Path, *, is_named: bool) -> tuple[bytes, Span] | None:
    """Hash a file and check that it is text, in pieces; None or DataError where it is not."""
    digest, decoder, size = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_BUFFER_BYTES):
                if b"\0" in chunk:
                    raise UnicodeError("it holds NUL bytes")
                decoder.decode(chunk)
                digest.update(chunk)
                size += len(chunk)
                if size > MAX_CORPUS_BYTES:
                    break
            else:
                decoder.decode(b"", final=True)
    except (OSError, UnicodeError) as error:
        if is_named:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise DataError(f"cannot use {path} as text: {reason}") from error
        return None
    if size == 0 and is_named:
        raise DataError(f"cannot use {path} as text: it is empty")
    return digest.digest(), Span(path, 0, size)


def _encoded(text: str | None) -> bytes:
    """Return a row as bytes; none for a row that is no text by the rules for files."""
    try:
        data = (text or "").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return b""
    return b"" if b"\0" in data else data


def _no_column(path: Path, asked: str | None) -> DataError:
    wanted = " or ".join(TEXT_COLUMNS) if asked is None else asked
    there = ", ".join(columns_of(path)[:8]) or "none"
    return DataError(
        f"{path} has no text column {wanted}: the columns that hold text are {there}; name one as "
        f"{path}::COLUMN"
    )
