from itertools import count

import pytest

from bitplan import progress


def test_lines_tell_what_is_done_and_how_long_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = count(0, 6)  # seconds, six more at every look
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    assert list(progress.track("abcdef", "letters")) == list("abcdef")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "letters: 1 of 6, 12 s, about 60 s left",
        "letters: 3 of 6, 24 s, about 24 s left",
        "letters: 5 of 6, 36 s, about 7 s left",
    ]
    list(progress.track(iter("abc"), "letters"))
    assert capsys.readouterr().err.splitlines() == ["letters: 1 of ?, 12 s"]
