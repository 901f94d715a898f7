"""What is kept of drawn tokens: the same ids, read or made, and never from a damaged file."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import DataError
from bitplan.probe import text, token_cache
from bitplan.probe.text import Corpus, load_text, tokenize
from bitplan.probe.token_cache import Drawn, keep_drawn, read_drawn

ASKED: dict[str, Any] = {"tokens": 3000, "seq_len": 50, "seed": 1}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def corpus(text_directory: Path) -> Corpus:
    return load_text((str(text_directory),))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many pieces each call of the tokenizer gets from here on."""
    seen: list[int] = []
    real = text._encode

    def noting(tokenizer: Any, pieces: Any) -> Any:
        seen.append(len(pieces))
        return real(tokenizer, pieces)

    monkeypatch.setattr(text, "_encode", noting)
    return seen


def test_a_text_is_tokenized_once(
    cache: Path, corpus: Corpus, tokenizer: Any, encoded: list[int], text_directory: Path
) -> None:
    first = tokenize(corpus, tokenizer, "train", **ASKED)
    calls = len(encoded)
    assert calls > 0
    assert torch.equal(tokenize(corpus, tokenizer, "train", **ASKED), first)
    again = load_text((str(shutil.copytree(text_directory, cache.parent / "moved")),))
    assert torch.equal(tokenize(again, tokenizer, "train", **ASKED), first)
    assert torch.equal(
        tokenize(corpus, tokenizer, "train", **ASKED | {"seq_len": 30}).flatten(), first.flatten()
    )
    assert len(encoded) == calls
    assert len(list(cache.iterdir())) == 1
    for other in ({"seed": 2}, {"split": "heldout", "tokens": 300}):
        tokenize(corpus, tokenizer, **({"split": "train"} | ASKED | other))
    assert len(list(cache.iterdir())) == 3
    tokenizer.eos_token, before = "a", tokenizer.eos_token
    try:
        assert not torch.equal(tokenize(corpus, tokenizer, "train", **ASKED), first)
    finally:
        tokenizer.eos_token = before


def test_a_longer_draw_goes_on_from_the_shorter_one(
    cache: Path, corpus: Corpus, tokenizer: Any, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_BATCH_PIECES", 2)
    short = tokenize(corpus, tokenizer, "train", **ASKED)
    done = sum(encoded)
    long = tokenize(corpus, tokenizer, "train", **ASKED | {"tokens": 12_000})
    pieces = sum(encoded)
    assert pieces > done
    assert torch.equal(long[: len(short)], short)
    shutil.rmtree(cache)
    encoded.clear()
    assert torch.equal(tokenize(corpus, tokenizer, "train", **ASKED | {"tokens": 12_000}), long)
    assert sum(encoded) == pieces


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5), st.integers(0, 2))
def test_any_draws_in_any_order_are_those_without_a_cache(
    tmp_path_factory: pytest.TempPathFactory,
    text_directory: Path,
    tokenizer: Any,
    counts: list[int],
    seed: int,
) -> None:
    corpus = load_text((str(text_directory),))
    asked: dict[str, Any] = {"seq_len": 10, "seed": seed}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITPLAN_CACHE", str(tmp_path_factory.mktemp("cache")))
        kept = [tokenize(corpus, tokenizer, "train", tokens=n, **asked) for n in counts]
        patch.setattr(text, "draw_key", lambda *_: None)
        for count, ids in zip(counts, kept, strict=True):
            assert torch.equal(tokenize(corpus, tokenizer, "train", tokens=count, **asked), ids)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 300),
        lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\1\2\3\4"),
        lambda path: path.write_bytes(token_cache.save({"ids": np.zeros(9000, np.int32)})),
        lambda path: path.write_bytes(
            token_cache.save(
                {"ids": np.zeros(9, np.float32)}, metadata={"sha256": "", "pieces": ""}
            )
        ),
    ],
    ids=["short", "empty", "noise", "changed", "bare", "floats"],
)
def test_a_damaged_entry_is_made_again(
    cache: Path,
    corpus: Corpus,
    tokenizer: Any,
    damage: Callable[[Path], Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = tokenize(corpus, tokenizer, "train", **ASKED)
    (entry,) = cache.iterdir()
    whole = read_drawn(entry.stem)
    damage(entry)
    assert torch.equal(tokenize(corpus, tokenizer, "train", **ASKED), first)
    assert "is damaged" in caplog.text
    assert read_drawn(entry.stem).pieces == whole.pieces
    assert np.array_equal(read_drawn(entry.stem).ids, whole.ids)


def test_too_little_text_is_told_again_from_the_cache(
    cache: Path, corpus: Corpus, tokenizer: Any, encoded: list[int]
) -> None:
    for _ in range(2):
        with pytest.raises(DataError, match="which has"):
            tokenize(corpus, tokenizer, "train", **ASKED | {"tokens": 10**7})
        calls = len(encoded)
    assert sum(encoded) == sum(encoded[:calls])


DRAW = """
import hashlib, sys
from transformers import AutoTokenizer
from bitplan.probe.text import load_text, tokenize
text, model = sys.argv[1:]
corpus, tokenizer = load_text((text,)), AutoTokenizer.from_pretrained(model)
for tokens in range(500, 15_000, 500):
    ids = tokenize(corpus, tokenizer, "train", tokens=tokens, seq_len=50, seed=1)
    print(hashlib.sha256(ids.numpy().tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_draw_at_once_draw_what_one_does(
    cache: Path, corpus: Corpus, tokenizer: Any, text_directory: Path, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", DRAW, str(text_directory), str(tmp_path / "model")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    shutil.rmtree(cache)
    expected = [
        hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        for tokens in range(500, 15_000, 500)
        for ids in [tokenize(corpus, tokenizer, "train", **ASKED | {"tokens": tokens})]
    ]
    assert printed == [expected] * 2
    assert not [path for path in cache.iterdir() if path.suffix != ".safetensors"]


def test_the_entries_used_longest_ago_go_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn(np.zeros(1000, np.int32), 1)
    for i in range(3):
        keep_drawn(str(i), drawn)
        os.utime(cache / f"{i}.safetensors", (i, i))
    size = (cache / "0.safetensors").stat().st_size
    assert len(read_drawn("0").ids) == 1000  # used just now
    monkeypatch.setattr(token_cache, "MAX_BYTES", 3 * size)
    keep_drawn("3", drawn)
    assert sorted(path.stem for path in cache.iterdir()) == ["0", "2", "3"]
    monkeypatch.setattr(token_cache, "MAX_BYTES", size // 2)
    keep_drawn("4", drawn)
    assert [path.stem for path in cache.iterdir()] == ["4"]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path,
    corpus: Corpus,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = tokenize(corpus, tokenizer, "train", **ASKED)
    (tmp_path / "file").touch()
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "file"))
    assert torch.equal(tokenize(corpus, tokenizer, "train", **ASKED), first)
    assert "tokens are not kept" in caplog.text


def test_tokenizers_that_run_code_of_their_own_are_not_kept(
    cache: Path, corpus: Corpus, tokenizer: Any
) -> None:
    class Custom(type(tokenizer)):  # type: ignore[misc]
        pass

    Custom.__module__ = "transformers_modules.custom"
    custom = Custom(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    tokenize(corpus, custom, "train", **ASKED)
    assert not cache.exists()
