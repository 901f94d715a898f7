"""The forecast of a sweep, against a clock that the test turns."""

from dataclasses import dataclass

import pytest

from bitplan.qat import sweep_progress
from bitplan.qat.sweep_progress import Progress
from bitplan.tables import SWEEP


@dataclass
class Training:
    """Takes so long, and trains for a part of it."""

    key: str
    seconds: float
    name: str = "cell"
    params: int = 1000
    num_tokens: int = 1000

    def outcome(self) -> tuple[float, float]:
        return 2.0, self.seconds


def test_the_forecast_knows_what_trainings_cost_beside_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Waves of four at once: each takes 30 s, of which 10 are training."""
    now = 0.0
    said: list[str] = []
    monkeypatch.setattr(sweep_progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sweep_progress.progress, "say", said.append)
    trainings = [Training(str(i), 10.0) for i in range(40)]
    found = Progress(trainings, 4, SWEEP.frame([]))  # type: ignore[arg-type]
    assert found.seconds_left is None
    for i, training in enumerate(trainings):
        now = 30.0 * (i // 4 + 1)
        found.done(training)  # type: ignore[arg-type]
        left = len(trainings) - i - 1
        if i == 0:
            # The other three of the wave are over, too, and not heard of yet.
            assert found.seconds_left == pytest.approx(30 * left / 4, rel=0.4)
        elif i % 4 == 3 and left:
            # Just begun, what is under way is taken for half done: too short, ever less so.
            assert 0.6 < found.seconds_left / (30 * left / 4) <= 1  # type: ignore[operator]
    assert found.seconds_left == 0
    assert said[0].startswith("1 of 40 trainings, 30 s, about ")
    assert said[-1] == "40 of 40 trainings, 5 min; cell 2.0000 in 10 s"
