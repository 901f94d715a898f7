"""Pins: `GLOB=FORMAT`, formats that the user fixes.

A glob (case-sensitive, as in a shell) is compared with four spellings of each site, and fixes it
where one matches: the site itself, its module, its role, and `role:operand`. So `lm_head=bf16`,
`fc2:input=int8-g128`, `*.layers.0.*=int8-g128` all do what they say. Of two pins that match a
site, the later one holds; one of which nothing is left contradicts the later ones and is refused.
"""

import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from bitplan.errors import PlanError
from bitplan.formats import Format, Operand, parse_format


class Described(Protocol):
    """What a pin needs to know of a site."""

    @property
    def site(self) -> str: ...  # noqa: D102
    @property
    def module(self) -> str: ...  # noqa: D102
    @property
    def operand(self) -> Operand: ...  # noqa: D102
    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def fused(self) -> str | None: ...  # noqa: D102


@dataclass(frozen=True)
class Pin:
    """A glob and the format of the sites it matches."""

    glob: str
    format: Format

    def __str__(self) -> str:
        return f"{self.glob}={self.format}"


def parse_pin(text: str) -> Pin:
    """Return the pin that `text` spells; raise PlanError or FormatError for anything else."""
    glob, equals, name = text.rpartition("=")
    if not equals or not glob:
        raise PlanError(f"--pin {text!r}: write GLOB=FORMAT, e.g. 'lm_head=bf16'")
    return Pin(glob, parse_format(name))


def apply_pins(sites: Sequence[Described], pins: Sequence[str]) -> dict[str, Pin]:
    """Return the pin of each pinned site.

    Raises PlanError for a pin that matches nothing (with near misses), whose format does not
    apply to a site it matches, that later pins leave nothing of, or that leaves linears which must
    share a format apart.
    """
    pinned: dict[str, Pin] = {}
    parsed = [parse_pin(text) for text in pins]
    reach = [[sites[i] for i in matching(p.glob, sites, f"--pin {str(p)!r}")] for p in parsed]
    for pin, matched in zip(parsed, reach, strict=True):
        for site in matched:
            if not pin.format.applies_to(site.operand):
                raise PlanError(
                    f"--pin {str(pin)!r}: {pin.format} does not apply to {site.site}; "
                    f"end the glob in the other operand, or take another format"
                )
            pinned[site.site] = pin
    for pin, matched in zip(parsed, reach, strict=True):
        holds = {pinned[site.site] for site in matched}
        if all(other.format != pin.format for other in holds):
            raise PlanError(
                f"--pin {str(pin)!r} has no effect: {', '.join(sorted(map(str, holds)))} after it "
                "fixes all its sites; drop one, or put the narrower glob last"
            )
    _check_fused(sites, pinned)
    return pinned


def matching(glob: str, sites: Sequence[Described], option: str) -> list[int]:
    """Return the indices of the sites that a glob matches; raise PlanError where there is none."""
    found = [i for i, s in enumerate(sites) if any(fnmatchcase(n, glob) for n in _names(s))]
    if not found:
        raise PlanError(f"{option} matches no site{_near(glob, sites)}")
    return found


def _names(site: Described) -> tuple[str, ...]:
    return site.site, site.module, site.role, f"{site.role}:{site.operand}"


def _near(glob: str, sites: Sequence[Described]) -> str:
    known = dict.fromkeys(name for site in sites for name in _names(site))
    if near := difflib.get_close_matches(glob, known, n=3, cutoff=0.5):
        return f": did you mean {' or '.join(near)}?"
    roles = ", ".join(dict.fromkeys(site.role for site in sites))
    return f": the roles are {roles}, a site looks like {sites[0].site}"


def _check_fused(sites: Sequence[Described], pinned: Mapping[str, Pin]) -> None:
    groups: dict[tuple[str, str], list[Described]] = defaultdict(list)
    for site in sites:
        if site.fused is not None:
            groups[site.fused, site.operand].append(site)
    for group in groups.values():
        formats = {pinned[s.site].format if s.site in pinned else None for s in group}
        if len(formats) > 1:
            culprit = next(pinned[s.site] for s in group if s.site in pinned)
            raise PlanError(
                f"--pin {str(culprit)!r} splits {', '.join(s.site for s in group)}: "
                "they run as one kernel on one input and must share a format; pin all of them"
            )
