"""What an interrupted profile has finished: tables by part and hidden states, in its run directory.

`RUN/.partial` holds one file for each thing that is done, written whole or not at all, under a key
that stands for the question: files of another question are removed when it is opened. Hidden
states are float32 [sequences, tokens, hidden], read back a batch at a time.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from bitplan.errors import BitplanError, CheckpointError, RunError
from bitplan.rundir import PARTIAL, write_atomic, write_json

_KEY = "key.json"


class Partial:
    """The finished parts of one profile."""

    def __init__(self, run: Path, key: str) -> None:
        self._path = run / PARTIAL
        marker = self._path / _KEY
        if not marker.is_file() or json.loads(marker.read_text()) != key:
            remove_partial(run)
            write_json(marker, key)
        for left in self._path.glob(".*.tmp"):
            left.unlink()

    def __contains__(self, name: str) -> bool:
        return (self._path / f"{name}.json").is_file()

    def is_empty(self) -> bool:
        """Whether no part is finished."""
        return all(path.name == _KEY for path in self._path.glob("*.json"))

    def save(self, name: str, value: dict[str, Any]) -> None:
        """Keep the tables of a part; it is finished then."""
        content = json.dumps(value).encode()
        write_atomic(self._path / f"{name}.json", lambda file: file.write(content))

    def load(self, name: str) -> dict[str, Any]:
        """Return the tables of a finished part."""
        found = json.loads((self._path / f"{name}.json").read_text())
        assert isinstance(found, dict)
        return found

    def save_states(self, name: str, batches: Iterable[Tensor]) -> None:
        """Keep hidden states, given batch by batch as [sequences, tokens, hidden]."""

        def write(file: IO[bytes]) -> None:
            for batch in batches:
                assert batch.dtype is torch.float32
                file.write(batch.detach().cpu().contiguous().numpy().data)

        write_atomic(self._states(name), write)

    def load_states(self, name: str, first: int, shape: Sequence[int]) -> Tensor:
        """Return the hidden states [sequences, tokens, hidden] from sequence `first` on."""
        count = math.prod(shape)
        start = 4 * first * math.prod(shape[1:])
        values = np.fromfile(self._states(name), np.float32, count, offset=start)
        return torch.from_numpy(values).view(*shape)

    def drop_states(self, *names: str) -> None:
        """Forget hidden states that nothing needs any more."""
        for name in names:
            self._states(name).unlink(missing_ok=True)

    def require(self, needed_bytes: int) -> None:
        """Raise RunError where the disk has less room than this."""
        free = shutil.disk_usage(self._path).free
        held = sum(path.stat().st_size for path in self._path.iterdir())
        if needed_bytes > free + held:
            raise RunError(
                f"hidden states between blocks take {needed_bytes / 1e9:.1f} GB in "
                f"{self._path.parent}, {free / 1e9:.1f} GB are free there: profile fewer --tokens, "
                "or pass --no-sensitivity, which keeps those of two blocks alone"
            )

    def _states(self, name: str) -> Path:
        return self._path / f"{name}.f32"


@contextlib.contextmanager
def opened_partial(run: Path, key: str) -> Iterator[Partial]:
    """Open what a profile has finished; bad input leaves nothing of it, an interruption all.

    A full disk leaves it too: the parts that were finished need not be profiled again.
    """
    partial = Partial(run, key)
    try:
        yield partial
    except BitplanError as error:
        if isinstance(error, CheckpointError) or partial.is_empty():
            remove_partial(run)
        raise


def remove_partial(run: Path) -> None:
    """Remove what an interrupted profile left in a run directory."""
    shutil.rmtree(run / PARTIAL, ignore_errors=True)
