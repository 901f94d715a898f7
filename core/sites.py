"""Sites: the tensors of a model that can be quantized, and what each does in its block.

A *linear* is a matrix that multiplies tokens, described by name and shape alone, so that the same
code names the sites of a module tree and of bare safetensors. Its two operands are two sites,
`model.layers.3.mlp.down_proj:input` and `:weight`. Roles come from the table in families.py; what
no row names is told from its place and shape, and what stays unknown is `other`, never dropped.

Expert matrices kept as one 3-D parameter [expert, row, column] are one linear per expert: the index
stands before the parameter's name, `model.layers.0.mlp.experts.3.down_proj`, as in checkpoints
that keep them apart.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from bitplan.errors import PlanError
from bitplan.families import FAMILIES, GENERIC, Row
from bitplan.formats import Operand

ROLES = ("qkv", "o", "fc1", "fc2", "lm_head", "embed", "router", "other")
# Roles a plan quantizes unless told otherwise; the rest stay bf16 and outside the averages.
PLANNED_ROLES = ("qkv", "o", "fc1", "fc2")
OPERANDS: tuple[Operand, ...] = ("weight", "input")


@dataclass(frozen=True, order=True)
class Site:
    """One tensor that can be quantized: a linear's module name and an operand."""

    module: str
    operand: Operand

    def __str__(self) -> str:
        return f"{self.module}:{self.operand}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the site that `text` spells; raise PlanError for anything else."""
        module, _, operand = text.rpartition(":")
        if not module or operand not in OPERANDS:
            raise PlanError(f"{text!r} is no site: write MODULE:input or MODULE:weight")
        return cls(module, operand)


@dataclass(frozen=True)
class Linear:
    """A matrix of shape [out_features, in_features] that multiplies tokens.

    `role`, `block`, `expert` and `fused` are filled in by `describe`. Linears with the same `fused`
    name share their input and must share their formats (q/k/v; gate/up).
    """

    module: str
    in_features: int
    out_features: int
    role: str = "other"
    block: int | None = None
    expert: int | None = None
    fused: str | None = None

    def site(self, operand: Operand) -> Site:
        """Return the site of one of the two operands."""
        return Site(self.module, operand)


def site_columns(linear: Linear, operand: Operand) -> dict[str, str | int | None]:
    """Return the columns of tables.PROFILE that say which tensor a row is about, all but `step`."""
    return {
        "site": str(linear.site(operand)),
        "module": linear.module,
        "operand": operand,
        "role": linear.role,
        "block": linear.block,
        "expert": linear.expert,
        "fused": linear.fused,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
    }


_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)(?=\.|$)")


def describe(
    linears: Sequence[Linear], *, family: str | None = None, hidden_size: int | None = None
) -> list[Linear]:
    """Return the linears with role, block, expert and fused group filled in.

    `family` is the checkpoint's `model_type`; without one, or with one that has no row in the
    table, the generic rows and then the structure (place in the tree, shape) decide.
    """
    rows = (*FAMILIES.get(family or "", ()), *GENERIC)
    return [_describe_one(linear, rows, hidden_size) for linear in linears]


def _describe_one(linear: Linear, rows: Sequence[Row], hidden_size: int | None) -> Linear:
    block = _BLOCK.search(linear.module)
    expert = _EXPERT.search(linear.module)
    role = next(
        (row.role for row in rows if re.search(rf"(?:^|\.)(?:{row.pattern})$", linear.module)), None
    )
    if role is None:
        role = _role_by_structure(linear, in_block=block is not None, hidden_size=hidden_size)
    parent = linear.module.rpartition(".")[0]
    return replace(
        linear,
        role=role,
        block=int(block[1]) if block else None,
        expert=int(expert[1]) if expert else None,
        fused=f"{parent}:{role}" if role in ("qkv", "fc1") else None,
    )


def _role_by_structure(linear: Linear, *, in_block: bool, hidden_size: int | None) -> str:
    """Tell a role from the place in the tree and the shape, or `other`."""
    path = linear.module.lower()
    if not in_block:
        return "other"
    if re.search(r"attn|attention", path):
        leaf = path.rpartition(".")[2]
        if re.match(r"(q|k|v|query|key|value|qkv|wqkv|in_proj)\b|.*(qkv|query|key|value)", leaf):
            return "qkv"
        if re.match(r"(o|out|wo|output|proj|dense)(_proj)?\b", leaf):
            return "o"
        return "other"
    if re.search(r"mlp|ffn|feed_?forward|expert", path) and hidden_size is not None:
        if linear.in_features == hidden_size and linear.out_features > hidden_size:
            return "fc1"
        if linear.out_features == hidden_size and linear.in_features > hidden_size:
            return "fc2"
    return "other"
