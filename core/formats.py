"""Number formats: the value type `Format` and its one spelling.

A format is a number type plus the set of elements that share one scale:

    int4-g128     4-bit integers, one 16-bit scale per 128 elements along the input dimension
    int8-token    one scale per token (inputs)           scale shape [tokens, 1]
    int8-channel  one scale per output channel (weights) scale shape [out_features, 1]
    int8-tensor   one scale for the whole tensor
    fp8-e4m3      8-bit floats, one scale per token or output channel
    nvfp4         E2M1 floats, one E4M3 scale per 16 elements, one fp32 scale per tensor
    mxfp4         E2M1 floats, one power-of-two (E8M0) scale per 32 elements
    bf16          not quantized

Groups run along the input (reduction) dimension of both operands. A row whose length is not a
multiple of the group ends in a shorter group, which has a scale of its own. Bits are counted with
their scales (`effective_bits`): int4-g128 is 4 + 16/128 = 4.125. In a list of formats int4-g*
stands for groups of 32, 64, 128, 256 and whole rows (int4-token for inputs, int4-channel for
weights).
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from bitplan.errors import FormatError

Kind = Literal["int", "fp8", "nvfp4", "mxfp4", "bf16"]
Granularity = Literal["group", "token", "channel", "row", "tensor", "none"]
Operand = Literal["input", "weight"]

SCALE_BITS = 16


@dataclass(frozen=True, order=True)
class Format:
    """A number format with its granularity; `str()` and `parse_format` are inverse.

    `group_size` is the number of elements along the input dimension that share a scale; None where
    a whole row (token, output channel) or tensor does.
    """

    name: str
    kind: Kind
    bits: int
    granularity: Granularity
    group_size: int | None = None
    scale_bits: int = SCALE_BITS

    def __str__(self) -> str:
        return self.name

    @property
    def is_quantized(self) -> bool:
        """Whether values change at all: False for bf16 only."""
        return self.kind != "bf16"

    def applies_to(self, operand: Operand) -> bool:
        """Whether the operand has the axis this format's scales run along."""
        return self.granularity not in ({"channel"} if operand == "input" else {"token"})

    def effective_bits(self, in_features: int) -> float:
        """Bits per element with scales counted, for rows of `in_features` elements."""
        match self.granularity:
            case "group":
                assert self.group_size is not None
                return self.bits + self.scale_bits * math.ceil(in_features / self.group_size) / (
                    in_features
                )
            case "token" | "channel" | "row":
                return self.bits + self.scale_bits / in_features
            case _:
                return float(self.bits)

    def short_group(self, in_features: int) -> int:
        """Return the elements of the shorter group that rows end in, 0 where groups divide them."""
        return 0 if self.group_size is None else in_features % self.group_size


BF16 = Format("bf16", "bf16", 16, "none", scale_bits=0)
_NAMED = {
    f.name: f
    for f in (
        BF16,
        Format("fp8-e4m3", "fp8", 8, "row"),
        Format("nvfp4", "nvfp4", 4, "group", 16, 8),
        Format("mxfp4", "mxfp4", 4, "group", 32, 8),
    )
}
_INTEGER = re.compile(r"int([2-8])-(?:g(\d+)|(token|channel|tensor))")

GROUP_CHOICES = ("g32", "g64", "g128", "g256", "token", "channel")
"""What `-g*` stands for in a list of formats."""
DEFAULT_LOW = "int4-g128"
DEFAULT_HIGH = "int8-g128"
SPELLINGS = "int4-g128, int8-token, int8-channel, int8-tensor, fp8-e4m3, nvfp4, mxfp4 or bf16"


@lru_cache
def parse_format(text: str) -> Format:
    """Return the format that `text` spells.

    Raises FormatError for anything else, with the spellings there are.
    """
    name = text.strip().lower()
    if name in _NAMED:
        return _NAMED[name]
    match = _INTEGER.fullmatch(name)
    if match is None:
        raise FormatError(f"unknown format {text!r}: write one like {SPELLINGS}")
    bits, group = int(match[1]), match[2]
    if group is None:
        granularity: Granularity = match[3]  # type: ignore[assignment]
        return Format(name, "int", bits, granularity)
    if int(group) < 1:
        raise FormatError(
            f"format {text!r} has groups of {group}: a group holds at least 1 element"
        )
    return Format(name, "int", bits, "group", int(group))


def parse_formats(names: Iterable[str]) -> tuple[Format, ...]:
    """Return the formats that `names` spell, in their order, each once; of none, FormatError.

    int4-g* stands for every group size in GROUP_CHOICES.
    """
    spelled = [one for name in names for one in _spell_groups(name)]
    formats = tuple(dict.fromkeys(parse_format(name) for name in spelled))
    if not formats:
        raise FormatError(f"no format was given: write a list such as {DEFAULT_LOW},{DEFAULT_HIGH}")
    return formats


def short_groups_note(sites: Iterable[tuple[Format, int]]) -> list[str]:
    """Return a note on the sites, (format, in_features), whose groups do not divide their rows."""
    short = Counter((fmt.group_size, row) for fmt, row in sites if fmt.short_group(row))
    if not short:
        return []
    which = ", ".join(f"groups of {size} in rows of {row:,}" for size, row in sorted(short))
    return [
        f"rows of {short.total()} sites end in a shorter group ({which}): it has a scale of its "
        "own, counted in the bits, and no export target runs it"
    ]


def _spell_groups(name: str) -> list[str]:
    stem, star, rest = name.strip().partition("-g*")
    return [f"{stem}-{group}" for group in GROUP_CHOICES] if star and not rest else [name]
