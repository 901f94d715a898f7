"""The result of `bitplan sweep`: what the grid asks, what was there, what failed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitplan.qat.rates import duration


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a grid asks of one run directory."""

    name: str
    params: int
    tokens: int
    """Tokens that each cell trains on."""
    trunk_tokens: int
    """Tokens that it was trained on before, with others; 0 from scratch."""
    steps: int
    cells: int
    left: int
    """Cells that were not finished when the sweep began."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The trainings of a grid."""

    path: str
    runs: tuple[Run, ...]
    trunks: Mapping[str, int]
    """Points of trunks that were not there when the sweep began, to the tokens up to each."""
    dry_run: bool
    seconds_left: float | None
    """Forecast when the sweep began; None where nothing was measured."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Cell to why its training could not go on."""

    @property
    def cells(self) -> int:
        """Trainings of the grid."""
        return sum(run.cells for run in self.runs)

    @property
    def left(self) -> int:
        """Those that were not finished when the sweep began."""
        return sum(run.left for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {
            **asdict(self),
            "cells": self.cells,
            "left": self.left,
            "tokens": sum(run.cells * run.tokens for run in self.runs),
            "tokens_left": sum(run.left * run.tokens for run in self.runs),
        }

    def as_text(self) -> str:
        """Return a row per run directory, the sums, what failed, and what next."""
        width = max(len(run.name) for run in self.runs)
        head = f"{'run':{width}} {'N':>12} {'D':>15} {'steps':>8} {'cells':>6} {'to train':>9}"
        rows = [
            f"{run.name:{width}} {run.params:>12,} {run.trunk_tokens + run.tokens:>15,} "
            f"{run.steps:>8,} "
            f"{run.cells:>6} {run.left:>9}"
            for run in self.runs
        ]
        tokens = sum(run.left * run.tokens for run in self.runs)
        trunks = [f"{name}: {count:,} tokens to train" for name, count in self.trunks.items()]
        lines = [head, *rows, "", *trunks]
        if self.dry_run:
            flops = sum(6 * run.params * run.tokens * run.left for run in self.runs)
            time = "unknown before one is trained"
            if self.seconds_left is not None:
                time = f"about {duration(self.seconds_left)}"
            lines.append(
                f"{self.left} of {self.cells} trainings to do: {tokens:.3g} tokens, {flops:.2g} "
                f"FLOPs (6 N D); time {time}; nothing was trained"
            )
            return "\n".join(lines)
        done = self.left - len(self.failed)
        lines.append(
            f"{done} trainings done ({tokens:.3g} tokens asked), {self.cells - self.left} were "
            f"there already, {len(self.failed)} failed"
        )
        lines += [f"failed: {name}: {why}" for name, why in self.failed.items()]
        lines += [
            f"wrote {self.path}/sweep.parquet, ratios.parquet",
            f"next: bitplan law fit {self.path}",
        ]
        return "\n".join(lines)
