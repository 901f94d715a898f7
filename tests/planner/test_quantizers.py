"""Which quantizer a site trains under: the default, what a plan names, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitplan.errors import PlanError
from bitplan.formats import parse_format
from bitplan.options import PlanOptions
from bitplan.planner.export import export_plan
from bitplan.planner.plan import Plan
from bitplan.planner.quantizers import default_quantizer
from bitplan.planner.stage import make_plan


@pytest.mark.parametrize(
    ("name", "operand", "in_features", "expected"),
    [
        ("int4-g128", "input", 4096, "absmax"),
        ("int4-g256", "input", 4096, "lac"),
        ("int4-g256", "input", 192, "absmax"),
        ("int4-token", "input", 4096, "lac"),
        ("int4-token", "input", 128, "absmax"),
        ("int4-channel", "weight", 4096, "absmax"),
        ("fp8-e4m3", "input", 4096, "absmax"),
    ],
)
def test_coarse_inputs_train_their_clipping(
    name: str, operand: Any, in_features: int, expected: str
) -> None:
    assert default_quantizer(parse_format(name), operand, in_features) == expected


def test_a_plan_names_quantizers_by_glob(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(2).write(tmp_path / "run")
    asked = PlanOptions(quantizers=("fc2=lac", "*.0.*=lwc", "*.0.self_attn.*=lsq"))
    plan = make_plan(run, asked).plan
    fc2 = {s.site for s in plan.sites if s.role == "fc2" and s.operand == "input"}
    assert {site for site, name in plan.quantizers.items() if name == "lac"} == fc2
    first = {s.site for s in plan.sites if ".0." in s.site and s.operand == "weight"}
    assert {site for site, name in plan.quantizers.items() if name != "lac"} == first
    assert {n for s, n in plan.quantizers.items() if "self_attn" in s} == {"lsq"}
    assert Plan.from_json(plan.as_json()) == plan


def test_a_rotated_plan_says_so_and_is_not_exported(
    tables: Callable[..., Any], tmp_path: Path
) -> None:
    run = tables(2).write(tmp_path / "run")
    plan = make_plan(run, PlanOptions(quantizers=("fc2=hadamard",))).plan
    assert set(plan.quantizers) == {s.site for s in plan.sites if s.role == "fc2"}
    (note,) = [note for note in plan.notes if "rotated" in note]
    assert note.startswith("2 linears are rotated in training (hadamard)")
    with pytest.raises(PlanError, match="cannot run this plan: 4 sites are rotated"):
        export_plan(run, "torchao")
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fc2", "write GLOB=NAME"),
        ("fc2=best", "absmax, lwc, lac, lsq"),
        ("fc9=lac", "matches no site"),
        ("fc2:input=lwc", "matches no site"),
        ("*q_proj=lac", "which are one tensor"),
        ("*q_proj=hadamard", "which are one tensor"),
        ("fc2:input=hadamard", "a rotation is of both operands"),
        ("fc2:weight=hadamard", "a rotation is of both operands"),
    ],
)
def test_what_does_not_fit_is_refused(
    tables: Callable[..., Any], tmp_path: Path, text: str, said: str
) -> None:
    run = tables(2).write(tmp_path / "run")
    with pytest.raises(PlanError, match=said):
        make_plan(run, PlanOptions(quantizers=(text,)))
    assert not (run / "plan.json").exists()
