"""The plan on a terminal: a map of formats by role and block, and totals beside the rules'.

Rows are role and operand, columns blocks; the cheapest format is a dot, so that what was raised
stands out. At most WIDTH characters wide for up to 80 blocks; more blocks wrap.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill
from typing import Any

import polars as pl

from bitplan.formats import Format
from bitplan.planner.plan import Plan, SiteChoice
from bitplan.sites import ROLES

WIDTH = 100
LABEL = 16
MIXED = "*"
LETTERS = "abcdeghijklmnopqrstuvwxyz"


def plan_text(plan: Plan, frontier: pl.DataFrame) -> str:
    """Return the text that `bitplan plan` prints, up to what was written."""
    sections = [
        _headline(plan),
        "\n".join(_map(plan)),
        "\n".join(_totals(plan, frontier)),
        "" if plan.advice is None else "\n".join(_advice(plan.advice)),
        "\n".join(fill(f"note: {note}", WIDTH, subsequent_indent="      ") for note in plan.notes),
    ]
    return "\n\n".join(section for section in sections if section)


def _headline(plan: Plan) -> str:
    budget = ", ".join(f"{name} <= {value:.6g}" for name, value in plan.budget.items())
    device = f" on {plan.device}" if plan.device else ""
    gap = "" if plan.optimality_gap is None else f"; optimality gap {plan.optimality_gap:.2g}"
    shares = "".join(f", share {share}" for share in plan.shares)
    limits = f" under {budget}{device}{shares}" if budget else ""
    return fill(f"plan {plan.plan_id}: {plan.made_by}{limits}{gap}", WIDTH, subsequent_indent="  ")


def _map(plan: Plan) -> Iterator[str]:
    """Yield the map: one line per (role, operand), one character per block."""
    cells: dict[tuple[str, str], dict[int, list[SiteChoice]]] = defaultdict(
        lambda: defaultdict(list)
    )
    outside: dict[str, list[SiteChoice]] = defaultdict(list)
    for choice in plan.sites:
        if choice.planned and choice.block is not None:
            cells[choice.role, choice.operand][choice.block].append(choice)
        else:
            outside[choice.role].append(choice)
    glyph = _glyphs(plan)
    blocks = sorted({block for row in cells.values() for block in row})
    step = WIDTH - LABEL - 14
    for start in range(0, len(blocks), step):
        shown = blocks[start : start + step]
        yield f"{'block':<{LABEL}}{_ruler(shown)}"
        for role, operand in sorted(cells, key=_row_order):
            row = cells[role, operand]
            text = "".join(_cell(row.get(b, []), glyph) for b in shown)
            raised = sum(glyph[c.format] != "." for b in shown for c in row.get(b, []))
            count = sum(len(row.get(b, [])) for b in shown)
            yield f"{role + ':' + operand:<{LABEL}}{text}  {raised} of {count}"
    used = Counter(c.format for row in cells.values() for cell in row.values() for c in cell)
    by_bits = sorted(used.items(), key=lambda item: _by_price(item[0]))
    legend = [f"{glyph[f]} {f} ({n} sites)" for f, n in by_bits]
    if any(_mixed(cell) for row in cells.values() for cell in row.values()):
        legend.append(f"{MIXED} several")
    yield from _wrap(" " * LABEL, legend)
    for role, choices in sorted(outside.items()):
        formats = ", ".join(
            f"{f} ({n} sites)" for f, n in Counter(c.format for c in choices).items()
        )
        where = "" if any(c.planned for c in choices) else ", outside the averages"
        yield f"{role:<{LABEL}}{formats}{where}"


def _ruler(blocks: Sequence[int]) -> str:
    """Return the number of every tenth block, above its column."""
    marks = [" "] * (len(blocks) + 3)
    for column, block in enumerate(blocks):
        if block % 10 == 0:
            marks[column : column + len(str(block))] = str(block)
    return "".join(marks).rstrip()


def _wrap(indent: str, parts: Sequence[str], gap: str = "   ") -> Iterator[str]:
    line = indent
    for part in parts:
        if line.strip() and len(line) + len(part) > WIDTH:
            yield line.rstrip()
            line = indent
        line += part + gap
    if line.strip():
        yield line.rstrip()


def _row_order(row: tuple[str, str]) -> tuple[int, str]:
    role, operand = row
    return ROLES.index(role) if role in ROLES else len(ROLES), operand


def _glyphs(plan: Plan) -> Mapping[Format, str]:
    """Return one character per format: a dot for the lowest, else its bits, else a letter."""
    used = sorted({c.format for c in plan.sites if c.planned}, key=_by_price)
    lowest = min((f.bits for f in used), default=0)
    letters = iter(LETTERS)
    glyphs: dict[Format, str] = {}
    for f in used:
        first = "." if f.bits == lowest else "F" if f.bits == 16 else str(f.bits)
        # A whole row is a token of an input and a channel of a weight: two names, one mark.
        twins = [glyphs[g] for g in glyphs if f.group_size is None and _row_of(g) == _row_of(f)]
        glyphs[f] = twins[0] if twins else next(letters) if first in glyphs.values() else first
    return glyphs


def _by_price(f: Format) -> tuple[int, int, str]:
    """Order formats by bits, then from the longest group to the shortest."""
    return f.bits, -(f.group_size or sys.maxsize), f.name


def _row_of(f: Format) -> tuple[str, int, bool]:
    return f.kind, f.bits, f.granularity in ("token", "channel")


def _mixed(cell: Sequence[SiteChoice]) -> bool:
    return len({c.format for c in cell}) > 1


def _cell(cell: Sequence[SiteChoice], glyph: Mapping[Format, str]) -> str:
    if not cell:
        return " "
    return MIXED if _mixed(cell) else glyph[cell[0].format]


def _totals(plan: Plan, frontier: pl.DataFrame) -> Iterator[str]:
    """Yield the plan's totals and below them the rules', cheapest first."""
    p = plan.predicted
    unit = "loss (nats)" if p.delta_loss is not None else "weighted error"
    yield f"{'predicted':<{LABEL}}{'input bits':>12}{'weight bits':>13}{unit:>16}"
    rows = frontier.filter(pl.col("label") != "optimal").sort("cost", maintain_order=True)
    mine = rows.filter(pl.col("label") == "plan")
    for row in pl.concat([mine, rows.filter(pl.col("label") != "plan")]).iter_rows(named=True):
        label = "this plan" if row["label"] == "plan" else row["label"]
        yield (
            f"{label:<{LABEL}}{_fixed(row['input_bits']):>12}{_fixed(row['weight_bits']):>13}"
            f"{row['objective']:>+16.5f}"
        )
    if p.delta_loss is not None:
        ratio = "undefined" if p.R is None else f"{p.R:.2f}"
        if p.R_trained is not None:
            ratio += f", after training {p.R_trained:.2f}"
        inputs = 0.0 if p.delta_loss_inputs is None else p.delta_loss_inputs
        yield (
            f"weights {p.delta_loss_weights:+.5f}, inputs {inputs:+.5f}: predicted R {ratio} "
            "(above 1: activation-limited)"
        )
    if (m := plan.measured) is not None:
        yield (
            f"measured on {m.tokens:,} tokens: loss {m.delta_loss:+.5f}{_plus_minus(m.stderr)} "
            f"(predicted {p.delta_loss or 0.0:+.5f}{_plus_minus(p.stderr)})"
        )
        kl = "" if p.kl is None else f" (predicted {p.kl:.5f})"
        yield f"{'':<{LABEL}}KL {m.kl:.5f}{_plus_minus(m.kl_stderr)}{kl}"
    extras = [f"{p.bytes / 1e6:.3f} MB of planned weights"]
    if p.bit_ops is not None:
        extras.append(f"{p.bit_ops:.4g} bit operations per token")
    if p.time_ms is not None:
        extras.append(
            f"{p.time_ms:.4g} ms for 4,096 tokens on {plan.device}, at its published rate"
        )
    yield from _wrap("", [f"{extra};" for extra in extras[:-1]] + extras[-1:], " ")


def _plus_minus(stderr: float | None) -> str:
    return "" if stderr is None else f" +- {stderr:.5f}"


def _advice(a: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the scaling law says, and where the next bit should go."""
    start = "from a trained model" if a.get("branched") else "from scratch"
    yield fill(
        f"law: {a['params']:.4g} parameters and {a['tokens']:.4g} tokens, 4 bits, QAT {start} "
        f"({a['source']}{_chosen(a)}):",
        WIDTH,
    )
    yield f"{'':<{LABEL}}{'weights':>9}{'inputs':>9}{'R':>8}{'R = 1 at':>12}"
    for label, key in (("all inputs at 4", ""), ("FC2 inputs at 8", "_fc2_at_8")):
        yield (
            f"{label:<{LABEL}}{a['delta_weights']:9.4f}{a['delta_inputs' + key]:9.4f}"
            f"{a['R' + key]:8.2f}{_tokens(a['crossover_tokens' + key])}"
        )
    yield fill(f"next bit: {a['next_bit']}{_why(a)}", WIDTH, subsequent_indent="  ")
    for text in a["extrapolates"]:
        yield fill(f"extrapolation: {text}", WIDTH, subsequent_indent="  ")


def _chosen(a: Mapping[str, Any]) -> str:
    return f"; {a['why']}" if a.get("why") else ""


def _tokens(value: float | None) -> str:
    return f"{'never':>12}" if value is None else f"{value:12.2g} tokens"


def _why(a: Mapping[str, Any]) -> str:
    inputs, weights = a["saves_per_input_bit"], a["saves_per_weight_bit"]
    if inputs is None or weights is None:
        return f" (the forecast R is {'above' if a['R'] > 1 else 'not above'} 1)"
    return (
        f"; after this plan the best step saves {inputs:.2g} nats per average input bit and "
        f"{weights:.2g} per average weight bit"
    )


def _fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
