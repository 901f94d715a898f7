"""Documents out of Parquet, Arrow, JSON Lines and the hub: the same ones as in text files."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import DataError
from bitplan.probe import documents
from bitplan.probe.text import SHARES, Corpus, load_text, tokenize

Texts = list[str]


def as_files(texts: Texts, place: Path) -> str:
    place.mkdir()
    for i, text in enumerate(texts):
        (place / f"{i}.txt").write_bytes(text.encode())
    return str(place)


def as_parquet(texts: Texts, place: Path, column: str = "text") -> str:
    """Two files, the second in small row groups; the documents in another order."""
    place.mkdir()
    frame = pl.DataFrame({column: texts[::-1]}).with_row_index("id")
    half = len(texts) // 2
    frame[:half].write_parquet(place / "a.parquet")
    frame[half:].write_parquet(place / "b.parquet", row_group_size=3)
    return str(place)


def as_lines(texts: Texts, place: Path) -> str:
    place.mkdir()
    rows = [json.dumps({"n": i, "text": text}) for i, text in enumerate(texts)]
    (place / "all.jsonl").write_text("\n".join(rows))
    return str(place)


def as_saved(texts: Texts, place: Path) -> str:
    """As `datasets` saves: Arrow's stream format in a folder per split, and JSON about it."""
    half = len(texts) // 2
    for split, part in (("train", texts[:half]), ("test", texts[half:])):
        (place / split).mkdir(parents=True)
        frame = pl.DataFrame({"text": part}, schema={"text": pl.String})
        frame.write_ipc_stream(place / split / "data-00000-of-00001.arrow")
        (place / split / "state.json").write_text("{}")
        (place / split / "dataset_info.json").write_text("{}")
    (place / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return str(place)


CONTAINERS = [as_parquet, as_lines, as_saved]
MANY = [f"document {i}\n" + "some words on a line, é\n" * (i * 37 % 900) for i in range(40)]


def spans_text(corpus: Corpus) -> dict[str, list[str]]:
    return {split: [span.read() for span in corpus.splits[split]] for split in SHARES}


@pytest.mark.parametrize("write", CONTAINERS)
@pytest.mark.parametrize("texts", [MANY, MANY[:5]], ids=["dealt out", "cut"])
def test_rows_are_the_documents_that_files_are(
    write: Callable[[Texts, Path], str], texts: Texts, tmp_path: Path, tokenizer: Any
) -> None:
    here = load_text((as_files(texts, tmp_path / "files"),))
    there = load_text((write(texts, tmp_path / "rows"),))
    assert there.content_hash == here.content_hash
    assert spans_text(there) == spans_text(here)
    assert there.notes == here.notes == ()
    asked = {"tokens": 6000, "seq_len": 30, "seed": 5}
    ids = [tokenize(corpus, tokenizer, "train", **asked) for corpus in (here, there)]
    assert torch.equal(*ids)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text(max_size=50), min_size=1, max_size=30), st.sampled_from(CONTAINERS))
def test_any_rows_are_kept_once_each(
    tmp_path_factory: pytest.TempPathFactory, texts: Texts, write: Callable[[Texts, Path], str]
) -> None:
    kept = {text for text in texts if text and "\0" not in text}
    place = tmp_path_factory.mktemp("rows") / "data"
    name = write(texts, place)
    if not kept:
        with pytest.raises(DataError, match="no text in"):
            load_text((name,))
        return
    found = documents.find_documents((name,))
    assert sorted(span.read() for span in found.spans.values()) == sorted(kept)
    left_out = sum(not text or "\0" in text for text in texts)
    expected = [f"{left_out} rows without text were left out"] if left_out else []
    assert found.notes == expected


def test_equal_documents_count_once_across_containers(tmp_path: Path) -> None:
    names = tuple(write(MANY, tmp_path / write.__name__) for write in (as_files, *CONTAINERS))
    assert load_text(names).content_hash == load_text(names[:1]).content_hash


def test_the_column_is_text_then_content_or_the_one_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "code.parquet"
    pl.DataFrame({"n": [1], "body": ["b"], "content": ["c"], "text": ["t"]}).write_parquet(path)

    def read(name: str) -> list[str]:
        found = documents.find_documents((name,))
        return [span.read() for span in found.spans.values()]

    assert read(str(path)) == read(str(tmp_path)) == ["t"]
    pl.read_parquet(path).drop("text").write_parquet(path)
    assert read(str(path)) == ["c"]
    assert read(f"{path}::body") == read(f"{tmp_path}::body") == ["b"]
    odd = path.rename(tmp_path / "odd::content")
    with pytest.raises(DataError, match="not UTF-8 text"):
        load_text((str(odd),))  # a path that is there is that path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "arrow"])
def test_a_file_without_a_text_column_names_those_there_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data.{suffix}"
    frame = pl.DataFrame({"text": [1, 2], "title": ["a", "b"], "body": ["c", "d"]})
    {"parquet": frame.write_parquet, "jsonl": frame.write_ndjson, "arrow": frame.write_ipc}[suffix](
        path
    )
    with pytest.raises(DataError, match=r"no text column text or content: .* title, body; name"):
        load_text((str(path),))
    with pytest.raises(DataError, match="no text column summary"):
        load_text((f"{path}::summary",))
    with pytest.raises(DataError, match="no text in"):
        load_text((str(tmp_path),))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.txt").write_text("words\n" * 99)
    assert load_text((str(tmp_path),)).notes == ("1 files without a text column were left out",)


@pytest.mark.parametrize("write", [as_parquet, as_saved])
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.9])
def test_a_truncated_table_is_refused(
    write: Callable[[Texts, Path], str], cut: float, tmp_path: Path
) -> None:
    name = write(MANY, tmp_path / "data")
    path = next(p for p in sorted(Path(name).rglob("*")) if p.suffix in (".parquet", ".arrow"))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(DataError, match=f"cannot read the rows of {path}"):
        load_text((name,))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n\n[1]\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "b"}\n')
    found = documents.find_documents((str(path),))
    assert [span.read() for span in found.spans.values()] == ["a", "b"]
    assert found.notes == ["3 rows without text were left out"]
    path.write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match="line 3 is no JSON"):
        load_text((str(path),))
    path.write_text('{"text": "a"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="line 2 is no JSON"):
        load_text((str(path),))


def test_reading_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_CORPUS_BYTES", 5000)
    found = documents.find_documents((as_lines([f"{i:0999}" for i in range(50)], tmp_path / "d"),))
    assert len(found.spans) == 6
    assert any("only the first" in note for note in found.notes)


def test_unpacked_rows_are_deleted_with_their_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    corpus = load_text((as_lines(MANY, tmp_path / "data"),))
    assert list(tmp_path.glob("bitplan-*/rows.txt"))
    del corpus
    gc.collect()
    assert not list(tmp_path.glob("bitplan-*"))


class Hub:
    """A hub of one data set, on disk: revision to the folder of its files."""

    def __init__(self, revisions: dict[str | None, Path]) -> None:
        self.revisions = revisions
        self.fetched: list[str] = []

    def list_repo_files(self, repo: str, *, repo_type: str, revision: str | None) -> list[str]:
        assert (repo, repo_type) == ("owner/name", "dataset")
        if revision not in self.revisions:
            raise FileNotFoundError(revision)
        root = self.revisions[revision]
        return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]

    def hf_hub_download(self, repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        self.fetched.append(file)
        return str(self.revisions[revision] / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    main, converted = tmp_path / "main", tmp_path / "converted"
    as_parquet(MANY, main)
    (main / "README.md").write_text("about it")
    converted.mkdir()
    for config in ("en", "fr"):
        as_parquet([f"{config} {text}" for text in MANY], converted / config)
    made = Hub({None: main, "v1": main, "refs/convert/parquet": converted})
    monkeypatch.setattr("huggingface_hub.list_repo_files", made.list_repo_files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.hf_hub_download)
    return made


def test_a_data_set_of_the_hub_is_its_tables(hub: Hub, tmp_path: Path) -> None:
    files = load_text((as_files(MANY, tmp_path / "files"),))
    corpus = load_text(("hf://datasets/owner/name",))
    assert corpus.content_hash == files.content_hash
    assert corpus.source == "hf://datasets/owner/name"
    assert load_text(("hf://datasets/owner/name@v1",)).content_hash == files.content_hash
    assert hub.fetched == ["a.parquet", "b.parquet"] * 2
    french = load_text(("hf://datasets/owner/name:fr",))
    assert all(s.read().startswith("fr ") for s in french.splits["calibration"])
    for table in hub.revisions[None].glob("*.parquet"):  # type: ignore[union-attr]
        table.unlink()
    hub.fetched.clear()
    both = load_text(("hf://datasets/owner/name::text",))
    assert hub.fetched == ["en/a.parquet", "en/b.parquet", "fr/a.parquet", "fr/b.parquet"]
    assert sum(len(spans) for spans in both.splits.values()) == 80


def test_no_more_of_a_data_set_is_fetched_than_is_read(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_CORPUS_BYTES", 5000)
    load_text(("hf://datasets/owner/name",))
    assert hub.fetched == ["a.parquet"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://models/owner/name", "names no data set: write hf://datasets/OWNER/NAME"),
        ("hf://datasets/owner/../name", "names no data set"),
        ("hf://datasets/owner/name:de", "no configuration de, there are en, fr"),
        ("hf://datasets/owner/name@v9", "could not be fetched from the hub .*check the name"),
        ("hf://datasets/owner/name::title", "no text in"),
    ],
)
def test_names_that_lead_nowhere(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_text((name,))
