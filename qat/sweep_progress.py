"""How far a sweep is, and how long the rest takes, from the tokens per second of what is done.

Drawing weights, compiling and reading text take time as well: how much, the seconds of all workers
until now tell against those that training took, where what is under way counts as half done.
"""

import time
from collections import defaultdict
from collections.abc import Sequence

import polars as pl

from bitplan import progress
from bitplan.qat.rates import duration, expected_rate
from bitplan.qat.sweep_trunk import Point
from bitplan.qat.sweep_work import Task, failure


class Progress:
    """The trainings that are left, forecast from those that are done."""

    def __init__(self, tasks: Sequence[Task | Point], at_once: int, measured: pl.DataFrame) -> None:
        """Begin with the rates of earlier trainings, tables.SWEEP."""
        self.left = {task.key: task for task in tasks}
        self.total = self._counts()
        self.at_once = at_once
        self.failed = 0
        self.start = time.monotonic()
        self.trained_s = 0.0
        self.rates: dict[int, list[float]] = defaultdict(list)
        for params, rate in measured.select("params", "tokens_per_second").iter_rows():
            self.rates[params].append(rate)

    @property
    def seconds_left(self) -> float | None:
        """The time that the rest takes, None where nothing is measured."""
        if not self.rates:
            return None
        seconds = [
            task.num_tokens / expected_rate(self.rates, task.params) for task in self.left.values()
        ]
        longest = max(seconds, default=0.0)
        whole = max(sum(seconds) / self.at_once, longest)
        total = sum(self.total)
        if (done := total - len(self.left)) == 0 or not self.trained_s:
            return whole
        spent = (time.monotonic() - self.start) * min(self.at_once, total)
        under_way = min(self.at_once, len(self.left))
        return whole * max(1.0, spent / (self.trained_s * (1 + under_way / 2 / done)))

    def done(self, task: Task | Point) -> None:
        """Take a training off, and say on stderr how far along the sweep is."""
        del self.left[task.key]
        if (outcome := task.outcome()) is None:
            self.failed += 1
            text = f"{task.name} failed: {failure(task)}"
        else:
            loss, seconds = outcome
            self.trained_s += seconds
            self.rates[task.params].append(task.num_tokens / seconds)
            text = f"{task.name} {loss:.4f} in {seconds:.0f} s"
        rest = self.seconds_left
        left = "" if rest is None or not self.left else f", about {duration(rest)} left"
        progress.say(
            f"{self._share_done()}, {duration(time.monotonic() - self.start)}{left}; {text}"
        )

    def _counts(self) -> tuple[int, int]:
        """Return how many trainings of cells, and of trunks up to a point, are left."""
        points = sum(isinstance(task, Point) for task in self.left.values())
        return len(self.left) - points, points

    def _share_done(self) -> str:
        (cells, points), left = self.total, self._counts()
        of_trunks = f", {points - left[1]} of {points} points of trunks" if points else ""
        return f"{cells - left[0]} of {cells} trainings{of_trunks}"
