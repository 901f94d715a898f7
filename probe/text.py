"""Text: documents to token windows, the same ones wherever they are read.

A corpus is a list of spans of files, found (documents.py) without holding any of them in memory.
Its three splits never share text: from SPLIT_DOCUMENTS documents on whole ones are dealt out, below
that each is cut into contiguous parts. Documents are ordered by the hash of their content, not by
their place, and equal ones count once. So the same documents give the same hash, the same splits
and the same tokens as text files, Parquet, Arrow or JSON Lines, under whatever names and in
whatever order.

`tokenize` cuts its split into pieces at line ends, shuffles them by the seed, and joins as many as
are needed with the end-of-text token between them: a longer draw begins with the shorter one. What
was drawn once is kept (token_cache.py).
The default text is the source of the running Python's standard library without its tests: real,
always there, no download.
"""

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bitplan.errors import DataError
from bitplan.probe.documents import Span, Unpacked, find_documents
from bitplan.probe.token_cache import Drawn, Ids, draw_key, keep_drawn, read_drawn

Split = Literal["calibration", "train", "heldout"]

# Shares of the text, in the order in which documents or parts of documents are dealt out.
SHARES: dict[Split, float] = {"calibration": 0.1, "heldout": 0.1, "train": 0.8}
SPLIT_DOCUMENTS = 20  # fewer documents than this are cut, more are dealt out whole
PIECE_BYTES = 8192
_BATCH_PIECES = 32
_TOKEN_BYTES = 2  # few tokenizers spend more tokens on text than one for each two bytes
_VERSION = 1  # of what `tokenize` does with a text: with another, nothing kept is used


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Text by split, what it was made from, and a hash of its content.

    `notes` say what was left out, a line each.
    """

    source: str
    content_hash: str
    splits: dict[Split, tuple[Span, ...]]
    notes: tuple[str, ...] = ()
    unpacked: Unpacked | None = field(default=None, repr=False, compare=False)
    """Keeps the texts that are no files; they go with it."""


def load_text(names: tuple[str, ...] = ()) -> Corpus:
    """Return the corpus of what --data names; of nothing, Python's standard library.

    Documents are found as documents.py says. Raises DataError as that does, and where no document
    is left.
    """
    source = ", ".join(names) if names else "Python standard library"
    found = find_documents(names)
    if not found.spans:
        raise DataError(
            f"no text in {source}: give UTF-8 text, or Parquet or JSON Lines with a text column, "
            "in files or directories of them"
        )
    digests = sorted(found.spans)
    whole = hashlib.sha256()
    for digest in digests:
        whole.update(digest.hex().encode())
    return Corpus(
        source=source,
        content_hash=whole.hexdigest()[:32],
        splits=_split([found.spans[digest] for digest in digests]),
        notes=tuple(found.notes),
        unpacked=found.unpacked,
    )


def _split(documents: Sequence[Span]) -> dict[Split, tuple[Span, ...]]:
    """Deal documents out to the splits, or cut each where there are few."""
    splits: dict[Split, list[Span]] = {split: [] for split in SHARES}
    edges = [0.0, *itertools.accumulate(SHARES.values())]
    if len(documents) >= SPLIT_DOCUMENTS:
        cuts = [round(edge * len(documents)) for edge in edges]
        for split, (first, last) in zip(SHARES, itertools.pairwise(cuts), strict=True):
            splits[split] = list(documents[first:last])
    else:
        for whole in documents:
            size = whole.end - whole.start
            cuts = [whole.start + round(edge * size) for edge in edges]
            for split, span in zip(SHARES, _cut(whole.path, cuts), strict=True):
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
    if 0 < span.end - span.start <= PIECE_BYTES:
        return [span]
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
    apart: bool = False,
) -> Tensor:
    """Return at least `tokens` tokens of a split as full windows, [sequences, seq_len] int64.

    The seed chooses the text; reading stops when there is enough. `apart`: of a longer draw, every
    so-manieth window, so that as far as there is text no two come from one piece; what they say of
    a model is then nearly independent. Raises DataError where the split is too short, with what to
    do where it has not even `batch_size` sequences.
    """
    sequences = -(-tokens // seq_len)
    stride = -(-PIECE_BYTES // (_TOKEN_BYTES * seq_len)) if apart else 1
    ids = _draw(corpus, tokenizer, split, stride * sequences * seq_len, seed)
    if len(ids) >= sequences * seq_len:
        stride = min(stride, len(ids) // seq_len // sequences)
        windows = ids[: stride * sequences * seq_len].reshape(-1, seq_len)
        return torch.from_numpy(windows[::stride].astype(np.int64))
    raise DataError(
        f"{sequences * seq_len:,} tokens were asked of the {split} part of {corpus.source}, which "
        f"has {len(ids):,}{_advice(len(ids), seq_len, batch_size)}"
    )


def stream_tokens(
    corpus: Corpus, tokenizer: Any, split: Split, *, seed: int
) -> Iterator[list[int]]:
    """Yield the token ids of a split, batches of pieces in the order that the seed chooses."""
    for batch in _batches(corpus, split, seed):
        yield list(itertools.chain.from_iterable(_encode(tokenizer, batch)))


def _draw(corpus: Corpus, tokenizer: Any, split: Split, tokens: int, seed: int) -> Ids:
    """Return at least `tokens` token ids of a split in the order of a seed, or all it has."""
    facts = [_VERSION, PIECE_BYTES, corpus.content_hash, split, seed, _end_of_text(tokenizer)]
    key = draw_key(tokenizer, facts)
    kept = read_drawn(key)
    if len(kept.ids) >= tokens:
        return kept.ids
    parts, found, pieces = [kept.ids], len(kept.ids), kept.pieces
    for batch in _batches(corpus, split, seed, first=kept.pieces):
        more = itertools.chain.from_iterable(_encode(tokenizer, batch))
        parts.append(np.fromiter(more, dtype=np.int32))
        found, pieces = found + len(parts[-1]), pieces + len(batch)
        if found >= tokens:
            break
    drawn = Drawn(np.concatenate(parts), pieces)
    if pieces > kept.pieces:
        keep_drawn(key, drawn)
    return drawn.ids


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


def _batches(
    corpus: Corpus, split: Split, seed: int, *, first: int = 0
) -> Iterator[Sequence[Span]]:
    """Yield a split's pieces from number `first` on, in the order of a seed, some at once."""
    pieces = [piece for span in corpus.splits[split] for piece in _pieces(span)]
    random.Random(seed).shuffle(pieces)
    for start in range(first, len(pieces), _BATCH_PIECES):
        yield pieces[start : start + _BATCH_PIECES]


def _encode(tokenizer: Any, pieces: Sequence[Span]) -> Iterator[list[int]]:
    """Yield each piece's token ids, the end-of-text token last where the tokenizer has one."""
    end = _end_of_text(tokenizer)
    texts = [piece.read() for piece in pieces]
    # verbose: a text longer than the model's window is no mistake here.
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        yield [*ids, end] if end is not None else ids


def _end_of_text(tokenizer: Any) -> int | None:
    found: int | None = tokenizer.eos_token_id
    return found if found is not None else tokenizer.sep_token_id
