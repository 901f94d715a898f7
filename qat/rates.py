"""How long a training takes, from the tokens per second of others.

A training is forecast by the median rate of its model where one is measured. Another model's rate
stands in where none is: the nearest in size, slower in proportion where ours is the larger, no
faster where it is the smaller, as steps of small models take the same time whatever their size.
"""

from collections.abc import Mapping, Sequence
from statistics import median


def expected_rate(rates: Mapping[int, Sequence[float]], params: float) -> float:
    """Return the tokens per second to expect of a model of N parameters, from those measured."""
    near = min(rates, key=lambda n: max(n, params) / min(n, params))
    return median(rates[near]) * min(1.0, near / params)


def duration(seconds: float) -> str:
    """Return seconds in words of one unit or two."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
