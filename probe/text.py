"""Text: files to token windows, the same ones wherever they are read.

A corpus is a list of spans of files, found without holding any of them in memory. Its three splits
never share text: from SPLIT_FILES files on whole files are dealt out, below that every file is cut
into contiguous parts. Files are ordered by the hash of their content, not by their place on disk,
and equal files count once, so that the same texts give the same tokens anywhere.

`tokenize` cuts its split into pieces at line ends, shuffles them by the seed, and joins as many as
are needed with the end-of-text token between them: a longer draw begins with the shorter one.
The default text is the source of the running Python's standard library without its tests: real,
always there, no download.
"""

import codecs
import hashlib
import itertools
import os
import random
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from bitplan.errors import DataError

Split = Literal["calibration", "train", "heldout"]

# Shares of the text, in the order in which files or parts of files are dealt out.
SHARES: dict[Split, float] = {"calibration": 0.1, "heldout": 0.1, "train": 0.8}
SPLIT_FILES = 20  # fewer files than this are cut, more are dealt out whole
PIECE_BYTES = 8192
# Reading on would take longer than profiling; a corpus is cut here and says so in its notes.
MAX_CORPUS_BYTES = 1 << 30
_BATCH_PIECES = 32
_BUFFER_BYTES = 1 << 20
_STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
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


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text by split, what it was made from, and a hash of its content.

    `notes` say what was left out, a line each.
    """

    source: str
    content_hash: str
    splits: dict[Split, tuple[Span, ...]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    path: Path
    size: int
    digest: str


def load_text(paths: tuple[str, ...] = ()) -> Corpus:
    """Return the corpus of text files and directories; of none, Python's standard library.

    Directories are searched whole; hidden files, and files in them that are not UTF-8 text, are
    left out and counted. Raises DataError where a path is missing, where a file that was named is
    empty or not text, and where nothing is left.
    """
    source = ", ".join(paths) if paths else "Python standard library"
    named = [Path(path).expanduser() for path in paths]
    found: dict[str, _File] = {}
    skipped = total = 0
    notes: list[str] = []
    for path, is_named in _candidates(named):
        file = _scan(path, is_named=is_named)
        if file is None:
            skipped += 1
            continue
        if file.size and file.digest not in found:
            total += file.size
            found[file.digest] = file
        if total > MAX_CORPUS_BYTES:
            notes.append(f"only the first {MAX_CORPUS_BYTES >> 30} GiB of text were read")
            break
    if not found:
        raise DataError(f"no text in {source}: give UTF-8 text files or directories of them")
    if skipped:
        notes.append(f"{skipped} files that are not UTF-8 text were left out")
    files = [found[digest] for digest in sorted(found)]
    return Corpus(
        source=source,
        content_hash=hashlib.sha256("".join(sorted(found)).encode()).hexdigest()[:32],
        splits=_split(files),
        notes=tuple(notes),
    )


def _candidates(named: Sequence[Path]) -> Iterator[tuple[Path, bool]]:
    """Yield files in a fixed order, and whether the user named them one by one."""
    if not named:
        root = Path(sysconfig.get_paths()["stdlib"])
        for path in _walk(root, skipped=_STDLIB_SKIPPED):
            if path.suffix == ".py":
                yield path, False
    for path in named:
        if path.is_dir():
            for inner in _walk(path):
                yield inner, False
        elif path.exists():
            yield path, True
        else:
            raise DataError(f"no text at {path}: there is no such file or directory")


def _walk(root: Path, *, skipped: Collection[str] = ()) -> Iterator[Path]:
    """Yield a directory's files, sorted, without hidden ones and the skipped directories."""
    for place, directories, files in os.walk(root):
        kept = (d for d in directories if not d.startswith(".") and d not in skipped)
        directories[:] = sorted(kept)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(place, name)


def _scan(path: Path, *, is_named: bool) -> _File | None:
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
    return _File(path, size, digest.hexdigest())


def _split(files: Sequence[_File]) -> dict[Split, tuple[Span, ...]]:
    """Deal files out to the splits, or cut each where there are few."""
    splits: dict[Split, list[Span]] = {split: [] for split in SHARES}
    edges = [0.0, *itertools.accumulate(SHARES.values())]
    if len(files) >= SPLIT_FILES:
        cuts = [round(edge * len(files)) for edge in edges]
        for split, (first, last) in zip(SHARES, itertools.pairwise(cuts), strict=True):
            splits[split] = [Span(file.path, 0, file.size) for file in files[first:last]]
    else:
        for file in files:
            cuts = [round(edge * file.size) for edge in edges]
            for split, span in zip(SHARES, _cut(file.path, cuts), strict=True):
                splits[split].append(span)
    return {split: tuple(spans) for split, spans in splits.items()}


def _cut(path: Path, cuts: Sequence[int]) -> list[Span]:
    """Return the spans between byte offsets, the inner ones moved to an end of a line."""
    with open(path, "rb") as file:
        inner = [_boundary(file, cut, cuts[-1]) for cut in cuts[1:-1]]
    places = [cuts[0], *inner, cuts[-1]]
    return [Span(path, start, max(start, end)) for start, end in itertools.pairwise(places)]


def _boundary(file: IO[bytes], offset: int, end: int) -> int:
    """Return the first end of a line from `offset` on, or of a character where lines are long."""
    file.seek(offset)
    window = file.read(min(PIECE_BYTES // 2, end - offset))
    newline = window.find(b"\n")
    if newline >= 0:
        return offset + newline + 1
    # Bytes 10xxxxxx continue a character.
    return offset + next((i for i, byte in enumerate(window) if byte & 0xC0 != 0x80), len(window))


def _pieces(span: Span) -> list[Span]:
    """Cut a span into pieces of about PIECE_BYTES."""
    return [
        piece
        for piece in _cut(span.path, [*range(span.start, span.end, PIECE_BYTES), span.end])
        if piece.end > piece.start
    ]


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    split: Split,
    *,
    tokens: int,
    seq_len: int,
    seed: int,
    batch_size: int = 1,
) -> Tensor:
    """Return at least `tokens` tokens of a split as full windows, [sequences, seq_len] int64.

    The seed chooses the text; reading stops when there is enough. Raises DataError where the split
    is too short, with what to do where it has not even `batch_size` sequences.
    """
    sequences = -(-tokens // seq_len)
    pieces = [piece for span in corpus.splits[split] for piece in _pieces(span)]
    random.Random(seed).shuffle(pieces)
    ids: list[int] = []
    for batch in _batches(pieces):
        ids.extend(itertools.chain.from_iterable(_encode(tokenizer, batch)))
        if len(ids) >= sequences * seq_len:
            return torch.tensor(ids[: sequences * seq_len]).view(sequences, seq_len)
    raise DataError(
        f"{sequences * seq_len:,} tokens were asked of the {split} part of {corpus.source}, which "
        f"has {len(ids):,}{_advice(len(ids), seq_len, batch_size)}"
    )


def _advice(found: int, seq_len: int, batch_size: int) -> str:
    """Say what to do about too few tokens: asking for fewer helps down to one batch."""
    if found >= batch_size * seq_len:
        return ": give more text with --data, or ask for fewer tokens"
    batch = f"one batch of {batch_size} sequences" if batch_size > 1 else "one sequence"
    smaller = "--batch-size or --seq-len" if batch_size > 1 else "--seq-len"
    return (
        f", less than {batch} of {seq_len} tokens: give more text with --data, or a smaller "
        f"{smaller}"
    )


def _batches(pieces: Sequence[Span]) -> Iterator[Sequence[Span]]:
    for first in range(0, len(pieces), _BATCH_PIECES):
        yield pieces[first : first + _BATCH_PIECES]


def _encode(tokenizer: Any, pieces: Sequence[Span]) -> Iterator[list[int]]:
    """Yield each piece's token ids, the end-of-text token last where the tokenizer has one."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = [piece.read() for piece in pieces]
    # verbose: a text longer than the model's window is no mistake here.
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        yield [*ids, end] if end is not None else ids
