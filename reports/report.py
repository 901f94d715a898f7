"""The stage: run directories in, one HTML file out.

It reads without the run's lock (a report may be made while arms train) and records nothing in the
manifest: the same files always give the same report, byte for byte, and it takes seconds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitplan.errors import RunError
from bitplan.reports.load import Run, load_run
from bitplan.rundir import write_atomic

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """Where the report is, how large it is, and what it shows."""

    path: Path
    size_bytes: int
    runs: tuple[str, ...]
    missing: tuple[str, ...]
    """Commands whose results the report has no data of yet."""

    def as_text(self) -> str:
        """Return a line on what is not in it yet, and the path on the last line."""
        lines = [f"Not in the report yet: {'; '.join(self.missing)}"] if self.missing else []
        lines.append(f"Report of {', '.join(self.runs)} ({self.size_bytes / 1e6:.1f} MB):")
        return "\n".join([*lines, str(self.path)])

    def as_json(self) -> dict[str, Any]:
        """Return the same as a JSON value."""
        return {
            "report": str(self.path),
            "bytes": self.size_bytes,
            "runs": list(self.runs),
            "missing": list(self.missing),
        }


def write_report(runs: list[Path], output: Path | None = None) -> ReportResult:
    """Write one report of the runs, by default to report.html in the first of them.

    Raises RunError, and leaves a report that was there as it was, where a run is none, a file is
    damaged, or the place cannot be written.
    """
    if not runs:
        raise RunError("no run directory given: name one or more, as in `bitplan report RUN`")
    loaded = [load_run(Path(run)) for run in runs]
    path = Path(output) if output is not None else Path(runs[0]) / REPORT
    if path.is_dir():
        raise RunError(
            f"{path} is a directory: name a file for the report, such as {path / REPORT}"
        )
    # The chart libraries take a second to import: bad input is told before that.
    from bitplan.reports.page import render

    content = render(loaded).encode()
    write_atomic(path, lambda file: file.write(content))
    return ReportResult(
        path=path,
        size_bytes=len(content),
        runs=tuple(run.name for run in loaded),
        missing=tuple(command for run in loaded for command in _missing(run)),
    )


def _missing(run: Run) -> list[str]:
    """Return the commands that would add to a run's report."""
    wanted = {
        f"bitplan profile MODEL -o {run.path}": run.profile,
        f"bitplan plan {run.path}": run.plan,
        f"bitplan verify {run.path}": run.verdict,
    }
    return [command for command, made in wanted.items() if made is None]
