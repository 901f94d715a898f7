import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bitplan.cli import EXIT_BAD_INPUT, main
from bitplan.errors import PlanError, RunError
from bitplan.options import PlanOptions
from bitplan.planner.export import export_plan
from bitplan.planner.plan import read_plan
from bitplan.planner.stage import make_plan
from bitplan.planner.targets import TARGETS
from bitplan.rundir import RunDir

FORMATS = ("int4-g32", "int4-token", "int8-token")
Make = Callable[..., Path]


@pytest.fixture
def planned(tables: Callable[..., Any], tmp_path: Path) -> Make:
    def make(*, formats: tuple[str, ...] = FORMATS, **options: Any) -> Path:
        run: Path = tables(2, formats=formats).write(tmp_path / "run")
        make_plan(run, PlanOptions(formats=formats, **options))
        return run

    return make


@pytest.mark.parametrize("name", TARGETS)
def test_the_plan_for_a_target_can_be_exported_to_it(planned: Make, name: str) -> None:
    run = planned(formats=TARGETS[name].formats, target=name)
    done = export_plan(run, name)
    assert {path.parent for path in done.files} == {run / "export" / name}
    assert all(path.read_text() for path in done.files)
    code = next(path for path in done.files if path.name.startswith("use."))
    assert read_plan(RunDir.open(run)).plan_id in code.read_text().splitlines()[0]
    assert sum(len(group.modules) for group in done.groups) == 14
    assert str(done.files[0]) in done.as_text()
    assert done.as_json()["target"] == name


def test_export_again_changes_nothing_and_output_names_the_place(
    planned: Make, tmp_path: Path
) -> None:
    run = planned()
    before = {path: path.read_bytes() for path in export_plan(run, "vllm").files}
    assert {path: path.read_bytes() for path in export_plan(run, "vllm").files} == before
    there = export_plan(run, "vllm", tmp_path / "there").files
    assert [path.read_bytes() for path in there] == list(before.values())
    assert {path.parent for path in there} == {tmp_path / "there"}


def test_a_refusal_names_linears_and_the_command_of_the_nearest_plan(planned: Make) -> None:
    run = planned()
    before = read_plan(RunDir.open(run)).assignment
    with pytest.raises(PlanError) as caught:
        export_plan(run, "torchao")
    assert not (run / "export").exists()
    text = str(caught.value)
    assert "int4-g32 weights with int4-token inputs" in text
    assert "and 9 more" in text or "and 8 more" in text or "and 7 more" in text
    command = text.partition("nearest plan it can: `")[2].partition("`")[0]
    assert command == f"bitplan plan {run} --formats int4-g32,int8-token --target torchao"
    # The command does what the message says.
    after = make_plan(run, PlanOptions(formats=("int4-g32", "int8-token"), target="torchao")).plan
    changed = [site for site, fmt in after.assignment.items() if fmt != before[site]]
    assert f"changes {len(changed)} of {len(before)} sites ({changed[0]}" in text
    assert export_plan(run, "torchao").files


def test_weights_only_targets_ask_for_inputs_left_alone(planned: Make) -> None:
    run = planned(weight_bits=4.5, pins=("lm_head=bf16",))
    with pytest.raises(PlanError) as caught:
        export_plan(run, "llama.cpp")
    assert (
        f"`bitplan plan {run} --weight-bits 4.5 --pin lm_head=bf16 --formats int4-g32,bf16 "
        "--target llama.cpp`" in str(caught.value)
    )


def test_a_budget_that_no_such_plan_meets_is_said(planned: Make) -> None:
    run = planned(input_bits=5.0)
    with pytest.raises(PlanError, match=r"nor is there .*--input-bits 5\.0"):
        export_plan(run, "torchao")


def test_nothing_to_export_is_one_line(tables: Callable[..., Any], tmp_path: Path) -> None:
    run = tables(1).write(tmp_path / "run")
    with pytest.raises(RunError, match="bitplan plan"):
        export_plan(run, "vllm")
    with pytest.raises(PlanError, match="the targets are"):
        export_plan(run, "onnx")


def test_conv1d_modules_are_not_passed_over_in_silence(planned: Make) -> None:
    run = planned()
    directory = RunDir.open(run)
    manifest = directory.manifest
    manifest["model"]["family"] = "gpt2"
    directory.write_json("run.json", manifest)
    with pytest.raises(PlanError, match=r"Conv1D modules of gpt2: plan for llama\.cpp"):
        export_plan(run, "vllm")
    with pytest.raises(PlanError, match="Conv1D modules of gpt2"):
        make_plan(run, PlanOptions(formats=FORMATS, target="vllm"))


def test_the_command_refuses_in_one_line_with_exit_code_2(planned: Make) -> None:
    run = planned()
    done = CliRunner().invoke(main, ["export", str(run), "--to", "vllm"])
    assert done.exit_code == 0
    assert "linears: int4-g32 weights, int4-token inputs" in done.stdout
    refused = CliRunner().invoke(main, ["export", str(run), "--to", "llama.cpp", "--json"])
    assert refused.exit_code == EXIT_BAD_INPUT
    assert refused.stdout == ""
    assert refused.stderr.startswith("error: llama.cpp (llama.cpp b11434) cannot run this plan: ")
    assert refused.stderr.count("\n") == 1


def test_layer_config_names_every_linear(planned: Make) -> None:
    run = planned(target="autoround", pins=("*.0.*=bf16",))
    export_plan(run, "autoround")
    config = json.loads((run / "export" / "autoround" / "layer_config.json").read_text())
    assert config["model.layers.0.mlp.up_proj"] == {"bits": 16, "act_bits": 16}
    assert config["model.layers.1.mlp.up_proj"]["bits"] == 4
    assert "model.embed_tokens" not in config


def test_the_nearest_command_spells_repeated_options_as_they_are_typed(planned: Make) -> None:
    asked = {"shares": ("fc2:input=int8-*>=0.25",), "quantizers": ("fc2=lac", "o:weight=lwc")}
    run = planned(**asked)
    with pytest.raises(PlanError) as caught:
        export_plan(run, "torchao")
    said = str(caught.value)
    assert "--share 'fc2:input=int8-*>=0.25'" in said
    assert "--quantizer fc2=lac --quantizer o:weight=lwc" in said
    command = shlex.split(said[said.index("`bitplan") + 1 :].partition("`")[0])
    assert CliRunner().invoke(main, command[1:]).exit_code == 0
    export_plan(run, "torchao")
