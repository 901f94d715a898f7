"""Shares: `GLOB=FORMAT>=X` and `GLOB=FORMAT<=X`, how many of some sites a format may or must take.

The glob is a pin's (pins.py), so `fc2:input=int8-g128>=0.5` says that at least half of the FC2
inputs take int8-g128. FORMAT is a glob over the names of formats: `fc1:weight=int4-*<=0.25`. A
share counts sites, one each, those that pins fix among them; it speaks of one operand. Several
shares hold together.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitplan.errors import PlanError
from bitplan.planner.pins import Described, matching

_SHARE = re.compile(r"(.+?)=([^=<>]+)(>=|<=)(.+)")
EXAMPLE = "'fc2:input=int8-g128>=0.5'"


@dataclass(frozen=True)
class Share:
    """At most (`is_most`) or at least `value` of the sites that a glob matches take a format."""

    glob: str
    format_glob: str
    is_most: bool
    value: float

    def __str__(self) -> str:
        return f"{self.glob}={self.format_glob}{'<=' if self.is_most else '>='}{self.value:g}"

    @property
    def limit(self) -> float:
        """The largest share of sites that go against it: in the format, or (at least) not."""
        return self.value if self.is_most else 1 - self.value

    def takes(self, format_name: str) -> bool:
        """Whether a format is one that the share is about."""
        return fnmatchcase(format_name, self.format_glob)


def parse_share(text: str) -> Share:
    """Return the share that `text` spells; raise PlanError for anything else."""
    match = _SHARE.fullmatch(text.strip())
    if match is None:
        raise PlanError(
            f"--share {text!r}: write GLOB=FORMAT>=X or GLOB=FORMAT<=X, in quotes, e.g. {EXAMPLE}"
        )
    glob, format_glob, sign, number = (part.strip() for part in match.groups())
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise PlanError(f"--share {text!r}: {number!r} is no share from 0 to 1")
    return Share(glob, format_glob.lower(), sign == "<=", value)


def apply_share(
    share: Share, sites: Sequence[Described], counted: Sequence[bool], open_to: Sequence[set[str]]
) -> list[int]:
    """Return the indices of the sites that a share counts.

    `open_to`: the names of the formats that each site can take. Raises PlanError for a share that
    matches nothing, only sites outside the plan, both operands, or no format of these sites.
    """
    matched = matching(share.glob, sites, f"--share {str(share)!r}")
    inside = [i for i in matched if counted[i]]
    if not inside:
        raise PlanError(
            f"--share {str(share)!r} matches only sites outside the plan, such as "
            f"{sites[matched[0]].site}: include them with --pin, or name another role"
        )
    if len({sites[i].operand for i in inside}) > 1:
        raise PlanError(
            f"--share {str(share)!r} matches inputs and weights: end the glob in :input or :weight"
        )
    known = sorted(set().union(*(open_to[i] for i in inside)))
    if not any(map(share.takes, known)):
        raise PlanError(
            f"--share {str(share)!r}: no format of these sites is {share.format_glob}; they can "
            f"take {', '.join(known)}: add it with --formats"
        )
    return inside
