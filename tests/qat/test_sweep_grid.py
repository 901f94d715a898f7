"""Grids: the cells they spell, and that anything else is refused in words."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.errors import BitplanError
from bitplan.formats import parse_format
from bitplan.qat.law_runs import classify
from bitplan.qat.sweep_grid import PRECISIONS, parse_grid
from bitplan.sites import OPERANDS, PLANNED_ROLES

GRID: dict[str, Any] = {
    "tokens": [1e6, 4_000_000],
    "group_sizes": [32, "row"],
    "precisions": ["bf16", "w4a4", "w4a16"],
    "seeds": 2,
    "eval_tokens": 1024,
    "data": ["text"],
    "repeat": False,
    "recipe": {"batch_size": 8, "seq_len": 64, "lr": 1e-3, "betas": [0.9, 0.95]},
    "models": [{"layers": 2, "hidden": 64, "ffn": 128, "heads": 2, "lr": 2e-3}],
    "parts": [
        {},
        {"seeds": [7], "recipe": {"schedule": "wsd"}},
        {"trunk_tokens": [1e5, 2e5], "trunk_seed": 1, "trunk_warmup_steps": 9, "tokens": [1e5]},
    ],
}
JUNK = st.sampled_from(
    [None, True, -1, 0, 2.5, float("nan"), float("inf"), "x", "", [], [[]], {}, [{}], {"x": 1}]
)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [at] if at else []
    for key, inner in items if isinstance(value, dict | list) else ():
        found += paths(inner, (*at, key)) if isinstance(inner, dict | list) else [(*at, key)]
    return found


def test_the_cells_are_all_combinations() -> None:
    found = parse_grid(GRID).cells
    branched = [cell for cell in found if cell.trunk is not None]
    assert len(branched) == 2 * 2 * (1 + 2 * 2)
    assert {(c.trunk.steps, c.trunk.warmup_steps, c.trunk.seed) for c in branched if c.trunk} == {
        (round(1e5 / 512), 9, 1),
        (round(2e5 / 512), 9, 1),
    }
    assert {cell.tokens for cell in branched} == {195 * 512 + 195 * 512, 391 * 512 + 195 * 512}
    cells = [cell for cell in found if cell.trunk is None]
    # Two D, three seeds in all, and bf16 beside two precisions at two group sizes.
    assert len(cells) == 2 * 3 * (1 + 2 * 2) == len(set(cells))
    assert {cell.recipe.lr for cell in cells} == {2e-3}  # the model's own
    assert {(cell.seed, cell.recipe.schedule) for cell in cells} == {
        (0, "cosine"),
        (1, "cosine"),
        (7, "wsd"),
    }
    assert {cell.arm for cell in cells} == {
        "bf16",
        "w4a4-g32",
        "w4a4-row",
        "w4a16-g32",
        "w4a16-row",
    }
    for cell in cells:  # whole steps, the nearest
        assert cell.tokens % (8 * 64) == 0
        assert min(abs(cell.tokens - d) for d in (1e6, 4e6)) <= 8 * 64 / 2


@given(st.sampled_from(paths(GRID)), JUNK)
def test_junk_anywhere_is_refused_in_words_or_means_something(at: Any, junk: Any) -> None:
    changed = copy.deepcopy(GRID)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = junk
    with contextlib.suppress(BitplanError):
        assert parse_grid(changed).cells


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("group", [32, "row"])
def test_a_precision_is_what_the_law_calls_it(name: str, group: int | str) -> None:
    sites = {f"{role}:{operand}": role for role in PLANNED_ROLES for operand in OPERANDS}
    formats = {}
    for role in PLANNED_ROLES:
        for operand in OPERANDS:
            fmt = PRECISIONS[name].format(role, operand, group)
            if fmt is not None:
                assert fmt.applies_to(operand)
                assert fmt == parse_format(str(fmt))
                formats[f"{role}:{operand}"] = fmt
    assert classify(formats, sites) == name.replace("-fc2-8", "+fc2")


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden"])
def test_a_name_stays_in_the_directory(name: str) -> None:
    model = {**GRID["models"][0], "name": name}
    with pytest.raises(BitplanError, match="a model's name"):
        parse_grid({**GRID, "models": [model]})


def test_paths_are_relative_to_the_grid(tmp_path: Path) -> None:
    found = parse_grid(GRID, tmp_path)
    assert found.data == (str((tmp_path / "text").resolve()),)
