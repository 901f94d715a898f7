"""Which law forecasts a training: the one that is asked for, or the shipped one nearest to it.

The paper's law ships as code (law.py), each other as a file of laws/, written by `bitplan law fit`;
its name is the file's. A training of N parameters and D tokens lies within the ranges that a law
was fitted on, or outside by a distance:

    distance^2 = sum over N and D of log(value / nearest end of the range)^2

What is not known yet counts 0, so a law may be chosen by N alone. The smallest distance wins; of
equal ones, as where a training lies within the ranges of two, the paper's, then by name. Laws that
lack a precision that is needed are passed over. The choice says why in LawSet.why.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bitplan.errors import FitError
from bitplan.law import PAPER, Grid, LawSet, read_laws

FOLDER = Path(__file__).parent / "laws"
PAPER_NAME = "paper"
WORDS = {"params": "N", "tokens": "D", "flops": "6 N D"}


def shipped(folder: Path = FOLDER) -> dict[str, LawSet]:
    """Return the laws that come with the package by name, the paper's first."""
    files = {path.stem: read_laws(path) for path in sorted(folder.glob("*.json"))}
    return {PAPER_NAME: PAPER, **files}


def find_law(
    asked: str | None,
    *,
    needs: Collection[str] = (),
    laws: Mapping[str, LawSet] | None = None,
    **values: float | Sequence[float],
) -> LawSet:
    """Return the law of a name or a file or, where none is asked for, that nearest to `values`.

    needs: precisions that a law must have to be chosen. values: what is known of params, tokens and
    flops (6 N D), one or several of each. Raises FitError for neither a shipped law nor a file.
    """
    laws = shipped() if laws is None else laws
    if asked is not None:
        if asked in laws:
            return replace(laws[asked], why=f"the {asked} law was asked for")
        if not Path(asked).is_file():
            raise FitError(
                f"--law {asked} is neither a file nor one of the laws that ship: {', '.join(laws)}"
            )
        return read_laws(Path(asked))
    able = {name: law for name, law in laws.items() if set(needs) <= law.laws.keys()}
    if not able or len(laws) == 1:
        return laws[PAPER_NAME]
    distances = {name: _distance(law.grid, values) for name, law in able.items()}
    name = min(distances, key=lambda name: distances[name])
    passed = laws.keys() - able.keys()
    lacks = f"; {', '.join(sorted(passed))} lacks a precision" if passed else ""
    return replace(able[name], why=f"{_why(name, distances, values)}{lacks}")


def _distance(grid: Grid, values: Mapping[str, float | Sequence[float]]) -> float:
    ends = {
        "params": grid.params,
        "tokens": grid.tokens,
        "flops": tuple(6 * n * d for n, d in zip(grid.params, grid.tokens, strict=True)),
    }
    squares = 0.0
    for name, given in values.items():
        low, high = ends[name]
        several = given if isinstance(given, Sequence) else (given,)
        # What no training has is refused by those who take the values.
        outside = [max(math.log(low / v), math.log(v / high), 0) for v in several if v > 0]
        squares += max(outside, default=0.0) ** 2
    return math.sqrt(squares)


def _why(name: str, distances: Mapping[str, float], values: Mapping[str, object]) -> str:
    known = " and ".join(WORDS[value] for value in values)
    equal = [other for other, d in distances.items() if d == distances[name]]
    lie = "lies" if len(values) == 1 else "lie"
    where = f"{known} {lie} {'within' if distances[name] == 0 else 'outside, nearest to'}"
    if len(equal) > 1:
        return f"{where} what the laws {', '.join(equal)} were fitted on alike: the first of them"
    return f"{where} what the {name} law was fitted on"
