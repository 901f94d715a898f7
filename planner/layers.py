"""A plan as exports need it: linears with both formats, grouped by them, and names as patterns.

A target's file says something once for all linears that share it, so their names are written as
few regular expressions: one per module path, the block numbers as alternatives. Each matches the
names it was made from and no other when it has to match a whole name.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bitplan.formats import BF16, Format

_BLOCK = re.compile(r"(?:^|(?<=\.))\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear with the formats of its operands; an operand without a site is bf16."""

    module: str
    role: str
    fused: str | None
    expert: int | None
    in_features: int
    weight: Format = BF16
    input: Format = BF16

    @property
    def is_plain(self) -> bool:
        """Whether the plan leaves the linear alone."""
        return not (self.weight.is_quantized or self.input.is_quantized)


@dataclass(frozen=True, kw_only=True)
class Group:
    """The linears of one pair of formats; `storage` is the target's name for how it is kept."""

    weight: Format
    input: Format
    storage: str
    modules: tuple[str, ...]

    @property
    def name(self) -> str:
        """A name for the group: `int4-g32_int8-token`."""
        return f"{self.weight}_{self.input}"


def patterns(modules: Iterable[str]) -> list[str]:
    """Return regular expressions without anchors that together match exactly these names whole."""
    blocks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module in dict.fromkeys(modules):
        match = _BLOCK.search(module)
        head, tail = (module[: match.start()], module[match.end() :]) if match else (module, "")
        blocks[head, tail].append(match[0] if match else "")
    return [_pattern(head, numbers, tail) for (head, tail), numbers in blocks.items()]


def _pattern(head: str, numbers: Sequence[str], tail: str) -> str:
    middle = f"({'|'.join(numbers)})" if numbers != [""] else ""
    return f"{re.escape(head)}{middle}{re.escape(tail)}"
