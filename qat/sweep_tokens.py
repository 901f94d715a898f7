"""The text of a sweep, tokenized once: two files of token ids that all its trainings map.

    train.npy     every token of the training split, in one fixed order
    heldout.npy   [sequences, seq_len], what final losses are measured on
    tokens.json   what they were made from, and hashes of both

A seed orders windows of the whole training split, and a training takes as many as its D needs: a
longer one begins with the shorter one's, and neither changes when cells are added to the grid. What
follows a trunk is the order of the arm's own seed without the windows that the trunk has read, so
that trunk and arm together are within one epoch, and arms of a seed after several points of the
trunk read nearly the same text.
"""

from array import array
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitplan import progress
from bitplan.errors import DataError
from bitplan.probe.text import Corpus, load_text, stream_tokens, tokenize
from bitplan.rundir import content_hash, file_hash, read_json, write_atomic, write_json

TRAIN_FILE = "train.npy"
HELDOUT_FILE = "heldout.npy"
FACTS_FILE = "tokens.json"


@dataclass(frozen=True)
class Read:
    """Windows that a trunk has read: the first ones in the order of a seed."""

    sequences: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokenized text on disk, and what identifies it."""

    path: str
    """The directory."""
    source: str
    text: str
    """Hash of the text."""
    tokenizer: str
    """Hash of the tokenizer."""
    vocabulary: int
    eval_tokens: int
    seq_len: int
    train_tokens: int
    train: str
    """Hash of train.npy."""
    heldout: str
    """Hash of heldout.npy."""

    def heldout_ids(self) -> Tensor:
        """Return the held-out windows, [sequences, seq_len] int64."""
        return torch.from_numpy(np.load(Path(self.path) / HELDOUT_FILE).astype(np.int64))

    def train_ids(self, sequences: int, seed: int, after: Read | None = None) -> Tensor:
        """Return the first windows in the order of a seed, [sequences, seq_len] int64.

        after: leave out what a trunk has read. Where there are fewer windows they come again, in
        another order each time.
        """
        windows = _mapped(self.path, self.seq_len)
        epoch, read = divmod(0 if after is None else after.sequences, len(windows))
        own = _order(len(windows), seed, epoch)
        if after is not None:
            own = own[~np.isin(own, _order(len(windows), after.seed, epoch)[:read])]
        order = [own]
        while sum(map(len, order)) < sequences:
            order.append(_order(len(windows), seed, epoch + len(order)))
        chosen = np.concatenate(order)[:sequences]
        return torch.from_numpy(windows[chosen].astype(np.int64))

    def order_hash(self, sequences: int, seed: int, after: Read | None = None) -> str:
        """Return what identifies `train_ids` without reading them."""
        left_out = [] if after is None else [asdict(after)]
        return content_hash([self.train, self.seq_len, sequences, seed, *left_out])


def _order(windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(windows)


@lru_cache(maxsize=1)
def _mapped(path: str, seq_len: int) -> npt.NDArray[Any]:
    flat: npt.NDArray[Any] = np.load(Path(path) / TRAIN_FILE, mmap_mode="r")
    return flat[: len(flat) // seq_len * seq_len].reshape(-1, seq_len)


def tokenize_once(
    place: Path,
    data: tuple[str, ...],
    tokenizer: Any,
    *,
    eval_tokens: int,
    seq_len: int,
) -> Tokens:
    """Return the text's tokens, from `place` where they are there already, else written there.

    Raises DataError where there is no text or too little for eval_tokens.
    """
    corpus = load_text(data)
    asked: dict[str, Any] = {
        "source": corpus.source,
        "text": corpus.content_hash,
        "tokenizer": hash_tokenizer(tokenizer),
        "vocabulary": len(tokenizer),
        "eval_tokens": eval_tokens,
        "seq_len": seq_len,
    }
    path = place.resolve()
    if (path / FACTS_FILE).is_file():
        found = read_json(path / FACTS_FILE)
        if all(found.get(key) == value for key, value in asked.items() if key != "source"):
            return Tokens(**found, path=str(path))
    heldout = tokenize(corpus, tokenizer, "heldout", tokens=eval_tokens, seq_len=seq_len, seed=0)
    train = _read(corpus, tokenizer)
    _save(path / HELDOUT_FILE, heldout.numpy().astype(train.dtype))
    _save(path / TRAIN_FILE, train)
    tokens = Tokens(
        path=str(path),
        **asked,
        train_tokens=len(train),
        train=file_hash(path / TRAIN_FILE)[:16],
        heldout=file_hash(path / HELDOUT_FILE)[:16],
    )
    write_json(path / FACTS_FILE, {k: v for k, v in asdict(tokens).items() if k != "path"})
    return tokens


def read_tokens(place: Path, *, eval_tokens: int, seq_len: int) -> Tokens:
    """Return tokens that an earlier sweep wrote; raise DataError where they are others."""
    found = read_json(place / FACTS_FILE)
    asked = {"eval_tokens": eval_tokens, "seq_len": seq_len}
    if {key: found.get(key) for key in asked} != asked:
        raise DataError(
            f"{place} was made for eval_tokens {found.get('eval_tokens')} and seq_len "
            f"{found.get('seq_len')}, and the grid has {eval_tokens} and {seq_len}"
        )
    return Tokens(**found, path=str(place.resolve()))


def hash_tokenizer(tokenizer: Any) -> str:
    """Return what identifies a tokenizer: its vocabulary, and how it cuts where it says so."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cuts = type(tokenizer).__name__ if backend is None else backend.to_str()
    return content_hash([sorted(tokenizer.get_vocab().items()), cuts, tokenizer.eos_token_id])


def _read(corpus: Corpus, tokenizer: Any) -> npt.NDArray[Any]:
    """Return all tokens of the training split, in as few bytes as the vocabulary takes."""
    ids = array("H" if len(tokenizer) <= 1 << 16 else "I")
    for more in progress.track(stream_tokens(corpus, tokenizer, "train", seed=0), "tokenizing"):
        ids.extend(more)
    if not ids:
        raise DataError(f"no text to train on in {corpus.source}: give more with data")
    return np.frombuffer(ids, dtype=np.dtype(ids.typecode))


def _save(path: Path, values: npt.NDArray[Any]) -> None:
    write_atomic(path, lambda file: np.save(file, values))
