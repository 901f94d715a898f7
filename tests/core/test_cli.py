import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bitplan.cli import EXIT_BAD_INPUT, main

COMMANDS = (
    "profile",
    "plan",
    "verify",
    "report",
    "export",
    "demo",
    "law predict",
    "law crossover",
    "law budget",
    "law design",
    "law fit",
    "sweep",
)
# The options others rely on; a new one is a decision, so it is written here too.
OPTIONS = {
    "profile": "-o --output --compare --data --tokens --seq-len --formats --weights-only --stream "
    "--no-sensitivity --interventions --device --seed --trust-remote-code --json",
    "plan": "--input-bits --weight-bits --bit-ops --bytes --time --rule --converge --pin --share "
    "--formats --per-role --quantizer --measure --tokens --params --law --explain --diff "
    "--target --json",
    "verify": "--steps --tokens --seeds --until-settled --confidence --batch-size --accumulate "
    "--seq-len --eval-tokens --lr --schedule --average-tail --compiled --data --from-scratch "
    "--arms --attribute --gpus --workers --device --seed --trust-remote-code --json",
    "report": "-o --output --json",
    "export": "--to -o --output --json",
    "demo": "-o --output",
    "law predict": "--params --tokens --group-size --precision --law --json",
    "law crossover": "--params --group-size --chart --law --json",
    "law budget": "--flops --gpu-hours --gpu --utilization --bytes --weight-bits --params --tokens "
    "--group-size --law --json",
    "law design": "--precision --exponent --steps --params --tokens --group-size --gpu "
    "--utilization --schedule --branched --force --json",
    "sweep": "-o --output --device --gpus --workers --ray --dry-run --json",
    "law fit": "-o --output --schedule --branched --force --json",
}


def find(name: str) -> click.Command:
    command: click.Command = main
    for part in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[part]
    return command


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_are_these(command: str) -> None:
    found = {flag for param in find(command).params for flag in param.opts if flag[0] == "-"}
    assert found == set(OPTIONS[command].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert f"Example: bitplan {command}" in result.output


@pytest.mark.parametrize("command", ["plan", "verify", "report"])
def test_no_run_directory_is_one_line_and_exit_2(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [command, str(tmp_path / "none")])
    assert result.exit_code == EXIT_BAD_INPUT
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "bitplan profile" in result.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model"], "-o RUN is missing"),
        (["-o", "run"], "MODEL is missing"),
        (["--compare", "a", "b", "model", "-o", "run"], "--compare goes without MODEL, --output"),
        (["--compare", "a", "b", "--tokens", "9"], "--compare goes without --tokens"),
        (["--compare", "a"], "requires 2 arguments"),
    ],
)
def test_wrong_use_of_profile_is_exit_2(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(main, ["profile", *arguments])
    assert result.exit_code == EXIT_BAD_INPUT
    assert result.stdout == ""
    assert says in result.stderr


def test_comparing_nothing_is_one_line_and_does_not_load_torch(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["profile", "--compare", str(tmp_path), str(tmp_path)])
    assert result.exit_code == EXIT_BAD_INPUT
    assert result.stderr.startswith(f"error: {tmp_path} has neither profile.parquet nor")
    assert result.stderr.count("\n") == 1
    code = "import sys; import bitplan.probe.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_and_version_as_a_process_do_not_load_torch() -> None:
    code = (
        "import sys; from bitplan.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'polars' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m bitplan --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert result.stderr == ""
    assert "Usage" in result.stdout
