"""What `bitplan profile` says when it is done: a table by role, notes, files, the next command."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from bitplan.findings import (
    massive_channels,
    routing,
    say_massive,
    say_routing,
    say_super_weights,
    super_weights,
)
from bitplan.sites import OPERANDS, ROLES
from bitplan.tables import OUTLIERS


@dataclass(frozen=True, kw_only=True)
class ProfileResult:
    """A finished profile: its tables, as they were written, and what the user should know."""

    run: Path
    up_to_date: bool
    profile: pl.DataFrame
    errors: pl.DataFrame
    sensitivity: pl.DataFrame | None
    outliers: pl.DataFrame | None
    formats: tuple[str, ...]
    files: tuple[str, ...]
    notes: tuple[str, ...]

    def by_role(self) -> pl.DataFrame:
        """Return a row per (role, operand): sites, kurtosis, worst block, error, delta_loss.

        Errors are medians over sites and delta_loss is summed, both of the first format.
        """
        first = pl.col("format") == self.formats[0]
        errors = self.errors.filter(first).select("site", "relative_error")
        joined = self.profile.join(errors, on="site", how="left")
        if self.sensitivity is not None:
            changes = self._changes().select("site", "delta_loss")
            joined = joined.join(changes, on="site", how="left")
        else:
            joined = joined.with_columns(delta_loss=pl.lit(None, pl.Float64))
        kurtosis, change = pl.col("kurtosis"), pl.col("delta_loss")
        found = joined.group_by("role", "operand").agg(
            sites=pl.len(),
            kurtosis_median=kurtosis.median(),
            kurtosis_max=kurtosis.max(),
            worst_block=pl.col("block").sort_by(kurtosis.fill_null(-1.0)).last(),
            relative_error=pl.col("relative_error").median(),
            delta_loss=pl.when(change.count() > 0).then(change.sum()),
        )
        return found.sort(
            pl.col("role").cast(pl.Enum(ROLES)), pl.col("operand").cast(pl.Enum(OPERANDS))
        )

    def _changes(self) -> pl.DataFrame:
        """Return a row per site in the first format, measured where it is and else estimated."""
        assert self.sensitivity is not None
        rows = self.sensitivity.filter(format=self.formats[0]).drop_nulls("delta_loss")
        best = rows.sort("method", descending=True, maintain_order=True)  # intervention, gradient
        return best.unique("site", keep="first", maintain_order=True)

    def as_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "run": str(self.run),
            "up_to_date": self.up_to_date,
            "format": self.formats[0],
            "roles": self.by_role().to_dicts(),
            "massive_channels": self._massive().to_dicts(),
            "super_weights": self._super_weights().to_dicts(),
            "routing": routing(self.profile).to_dicts(),
            "notes": list(self.notes),
            "files": [str(self.run / name) for name in self.files],
            "next": self._next(),
        }

    def as_text(self) -> str:
        """Return a table by role and operand, the notes, what was written and what to run next."""
        heads: tuple[str, ...] = (
            "role", "operand", "sites", "kurtosis median", "max", "in block",
            f"{self.formats[0]} error", "delta loss",
        )  # fmt: skip
        rows: list[tuple[str, ...]] = [
            (
                row["role"],
                row["operand"],
                str(row["sites"]),
                _number(row["kurtosis_median"], ".1f"),
                _number(row["kurtosis_max"], ",.1f"),
                _number(row["worst_block"], "d"),
                _number(row["relative_error"], ".2%"),
                _number(row["delta_loss"], "+.4f"),
            )
            for row in self.by_role().to_dicts()
        ]
        if self.sensitivity is None:
            heads, rows = heads[:-1], [row[:-1] for row in rows]
        wrote = "up to date:" if self.up_to_date else "wrote"
        lines = [
            *_table(heads, rows),
            *self._legend(),
            *self._findings(),
            *(f"note: {note}" for note in self.notes),
            f"{wrote} {', '.join(str(self.run / name) for name in self.files)}",
            f"next: {self._next()}",
        ]
        return "\n".join(lines)

    def _legend(self) -> Iterator[str]:
        yield f"error: median over sites of squared {self.formats[0]} error over squared norm"
        if self.sensitivity is not None:
            yield "delta loss: nats per token, estimated by backward passes, summed over sites"
            changes = self._changes()
            if measured := len(changes.filter(method="intervention")):
                yield f"of {len(changes)} sites, {measured} were measured by intervention instead"

    def _massive(self) -> pl.DataFrame:
        return massive_channels(self.outliers if self.outliers is not None else OUTLIERS.frame([]))

    def _super_weights(self) -> pl.DataFrame:
        return super_weights(self.outliers if self.outliers is not None else OUTLIERS.frame([]))

    def _findings(self) -> Iterator[str]:
        yield from (f"massive activations: {line}" for line in say_massive(self._massive()))
        yield from (
            f"super-weight candidates: {line}" for line in say_super_weights(self._super_weights())
        )
        if not (experts := routing(self.profile)).is_empty():
            yield f"experts: {say_routing(experts)}"

    def _next(self) -> str:
        return f"bitplan plan {self.run}"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: two columns of words, then numbers to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = (
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()
