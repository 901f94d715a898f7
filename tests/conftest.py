"""What all tests share: one thread a process, a cache of their own, the same text everywhere."""

import atexit
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest

# Threads that wait for each other cost more than they bring here. Before torch is first imported,
# and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# What an earlier version kept must not stand in for what this one does.
os.environ["BITPLAN_CACHE"] = tempfile.mkdtemp(prefix="bitplan-tests-")
atexit.register(shutil.rmtree, os.environ["BITPLAN_CACHE"], ignore_errors=True)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of made-up words that follow each other in part, so that there is something to learn.

    The default text is the running Python's standard library, which differs from version to
    version: what a test compares by measuring must not.
    """
    rng = random.Random(0)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 7))) for _ in range(200)]
    follow = {word: rng.choices(words, k=4) for word in words}
    word, lines = words[0], []
    for _ in range(4000):
        line = []
        for _ in range(12):
            word = rng.choice(follow[word] if rng.random() < 0.9 else words)
            line.append(word)
        lines.append(" ".join(line))
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("\n".join(lines) + "\n")
    return path
