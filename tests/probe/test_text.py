import hashlib
import itertools
import shutil
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.errors import DataError
from bitplan.probe.text import PIECE_BYTES, SHARES, load_text, tokenize

EOS = 256


def text_of(corpus, split):
    return "".join(span.read() for span in corpus.splits[split])


def spans(corpus):
    return [span for split in SHARES for span in corpus.splits[split]]


def test_the_default_is_the_standard_library():
    corpus = load_text()
    names = {span.path.name for span in spans(corpus)}
    assert {"argparse.py", "ast.py"} <= names
    assert not any("site-packages" in str(span.path) for span in spans(corpus))
    sizes = {split: sum(s.end - s.start for s in corpus.splits[split]) for split in SHARES}
    assert sizes["train"] > 3e6
    assert min(sizes.values()) > 3e5
    assert corpus.source == "Python standard library"
    assert corpus.notes == ()


def test_many_files_are_dealt_out_whole_and_once(text_directory):
    corpus = load_text((str(text_directory),))
    dealt = {split: {span.path for span in corpus.splits[split]} for split in SHARES}
    assert {split: len(paths) for split, paths in dealt.items()} == {
        "calibration": 3,
        "heldout": 3,
        "train": 24,
    }
    assert len(set.union(*dealt.values())) == 30
    assert all(span.start == 0 and span.end == span.path.stat().st_size for span in spans(corpus))


def test_one_file_is_cut_into_contiguous_parts_at_line_ends(tmp_path):
    path = tmp_path / "novel.txt"
    path.write_text("".join(f"line number {n}\n" for n in range(5000)))
    corpus = load_text((str(path),))
    parts = [text_of(corpus, split) for split in SHARES]
    assert "".join(parts) == path.read_text()
    assert all(part.endswith("\n") for part in parts)
    shares = [len(part) / path.stat().st_size for part in parts]
    assert shares == pytest.approx([0.1, 0.1, 0.8], abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.text(st.sampled_from("aé☃😀\n"), min_size=1, max_size=20_000))
def test_parts_and_pieces_cover_any_text_once(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(text, encoding="utf-8", newline="")
    corpus = load_text((str(path),))
    # Cutting inside a character would raise; a lost or doubled one would differ.
    assert "".join(text_of(corpus, split) for split in SHARES) == text


def test_equal_files_count_once_wherever_they_are(text_directory, tmp_path):
    twice = tmp_path / "twice"
    shutil.copytree(text_directory, twice / "z")
    shutil.copytree(text_directory, twice / "a")
    once, doubled = load_text((str(text_directory),)), load_text((str(twice),))
    assert doubled.content_hash == once.content_hash
    for split in SHARES:
        assert text_of(doubled, split) == text_of(once, split)


def test_splits_never_share_text(text_directory):
    corpus = load_text((str(text_directory),))
    texts = [{s.read() for s in corpus.splits[split]} for split in SHARES]
    assert all(not a & b for a, b in itertools.combinations(texts, 2))


def test_the_content_hash_tells_texts_apart(text_directory, tmp_path):
    changed = shutil.copytree(text_directory, tmp_path / "changed")
    (changed / "00.txt").write_text("something else\n")
    assert load_text((str(changed),)).content_hash != load_text((str(text_directory),)).content_hash


def test_tokens_are_those_of_the_pieces_with_ends_between(tokenizer, tmp_path):
    path = tmp_path / "text"
    path.write_text("abc\n" * 20_000)
    corpus = load_text((str(path),))
    ids = tokenize(corpus, tokenizer, "train", tokens=30_000, seq_len=100, seed=0)
    assert ids.shape == (300, 100)
    assert ids.dtype == torch.int64
    pieces = tokenizer.decode(ids.flatten().tolist()).split("<end>")
    assert len(pieces) >= 3
    assert set("".join(pieces)) == {"a", "b", "c", "\n"}
    assert all(abs(len(piece) - PIECE_BYTES) < 10 for piece in pieces[:-1])


def test_the_seed_and_the_text_alone_decide(tokenizer, text_directory, tmp_path):
    here = load_text((str(text_directory),))
    there = load_text((str(shutil.copytree(text_directory, tmp_path / "moved")),))

    def draw(corpus, seed, tokens=2000):
        return tokenize(corpus, tokenizer, "train", tokens=tokens, seq_len=50, seed=seed)

    assert torch.equal(draw(here, 3), draw(there, 3))
    assert not torch.equal(draw(here, 3), draw(here, 4))
    assert torch.equal(draw(here, 3, tokens=4000)[:40], draw(here, 3))


def test_tokens_are_rounded_up_to_whole_windows(tokenizer, text_directory):
    corpus = load_text((str(text_directory),))
    assert tokenize(corpus, tokenizer, "heldout", tokens=101, seq_len=50, seed=0).shape == (3, 50)


def test_windows_apart_are_spread_over_a_longer_draw(tokenizer, tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("".join(f"line {n}\n" for n in range(300_000)))
    corpus = load_text((str(path),))
    draw = partial(tokenize, corpus, tokenizer, "heldout", seq_len=100, seed=0)
    # A piece gives at most so many windows, at two bytes a token.
    stride = -(-PIECE_BYTES // 200)
    far = draw(tokens=1000, apart=True)
    assert torch.equal(far, draw(tokens=1000 * stride)[::stride])
    # With less text than that, as far apart as it goes.
    held = draw(tokens=sum(span.end - span.start for span in corpus.splits["heldout"]))
    few = draw(tokens=100 * (len(held) // 3), apart=True)
    assert torch.equal(few, held[::3][: len(few)])
    assert torch.equal(held, draw(tokens=held.numel(), apart=True))


def test_too_little_text_says_how_much_there_is(tokenizer, text_directory):
    corpus = load_text((str(text_directory),))
    asked = sum(span.end - span.start for span in corpus.splits["calibration"]) * 2
    with pytest.raises(DataError, match=r"asked of the calibration part .* which has [\d,]+:"):
        tokenize(corpus, tokenizer, "calibration", tokens=asked, seq_len=50, seed=0)


def test_long_texts_make_no_noise(tokenizer, text_directory, capfd):
    tokenizer.model_max_length, before = 16, tokenizer.model_max_length
    try:
        corpus = load_text((str(text_directory),))
        tokenize(corpus, tokenizer, "train", tokens=1000, seq_len=50, seed=0)
    finally:
        tokenizer.model_max_length = before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"\0\1\2", "not UTF-8"),
        (b"caf\xe9 ", "not UTF-8"),
        (b"\xc3", "UTF-8"),
    ],
)
def test_files_that_are_no_text(tmp_path, content, reason):
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        load_text((str(path),))


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        load_text((str(tmp_path / "nowhere"),))
    with pytest.raises(DataError, match="no text in"):
        load_text((str(tmp_path),))


def test_a_directory_may_hold_other_things(text_directory, tmp_path):
    mixed = shutil.copytree(text_directory, tmp_path / "mixed")
    (mixed / "picture.png").write_bytes(b"\x89PNG\0\0")
    (mixed / ".hidden").write_text("not read")
    (mixed / "empty").touch()
    corpus = load_text((str(mixed),))
    assert corpus.content_hash == load_text((str(text_directory),)).content_hash
    assert corpus.notes == ("1 files that are not UTF-8 text were left out",)


def test_the_hash_is_of_the_files_digests(text_directory):
    digests = sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in text_directory.iterdir())
    expected = hashlib.sha256("".join(digests).encode()).hexdigest()[:32]
    assert load_text((str(text_directory),)).content_hash == expected
