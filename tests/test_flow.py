"""The whole flow on the embedded checkpoint, as a user runs it, small."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bitplan.cli import EXIT_BAD_INPUT, EXIT_NO, main
from bitplan.demo import EMBEDDED

PROFILE = ["--tokens", "1024", "--seq-len", "128", "--device", "cpu"]
# The arms that R after the plan needs: one seed, two steps.
VERIFY = ["--arms", "bf16,planned-weights,planned-inputs", "--steps", "2", "--seeds", "1"]
VERIFY += ["--batch-size", "2", "--seq-len", "64", "--eval-tokens", "512", "--device", "cpu"]


def bitplan(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("flow") / "run"
    bitplan("profile", EMBEDDED, "-o", run, *PROFILE)
    bitplan("plan", run)
    return run


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def copy(run: Path, to: Path) -> Path:
    for name, data in contents(run).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(data)
    return to


def verdict(run: Path) -> Any:
    return json.loads((run / "verdict.json").read_text())


def test_a_killed_verify_ends_with_the_verdict_of_one_that_was_not(
    planned: Path, tmp_path: Path
) -> None:
    whole, killed = copy(planned, tmp_path / "whole"), copy(planned, tmp_path / "killed")
    command = [sys.executable, "-m", "bitplan", "verify", str(killed), *VERIFY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        end = time.monotonic() + 120
        while not list(killed.glob("arms/bf16/seed-0/record.json")) and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "verdict.json").exists()
    done = {p: p.read_bytes() for p in killed.glob("arms/*/seed-*/record.json")}
    assert done

    for run in (whole, killed):
        result = CliRunner().invoke(main, ["verify", str(run), *VERIFY])
        assert result.exit_code in (0, EXIT_NO), result.output
    assert {p: p.read_bytes() for p in done} == done, "a finished arm was trained again"
    assert verdict(killed)["delta"] == verdict(whole)["delta"]
    assert verdict(killed)["R"] == verdict(whole)["R"]

    text = bitplan("report", killed).output
    page = (killed / "report.html").read_text()
    assert str(killed / "report.html") in text.splitlines()[-1]
    assert verdict(killed)["plan_id"] in page
    assert bitplan("report", killed).output


def test_two_profiles_and_plans_are_the_same_bit_for_bit(planned: Path, tmp_path: Path) -> None:
    bitplan("profile", EMBEDDED, "-o", tmp_path / "again", *PROFILE)
    bitplan("plan", tmp_path / "again")
    first, again = contents(planned), contents(tmp_path / "again")
    names = ("profile.parquet", "errors.parquet", "sensitivity.parquet", "frontier.parquet")
    for name in (*names, "plan.json"):
        assert first[name] == again[name], name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "RUN", "--input-bits", "3"], "4.125"),
        (["plan", "RUN", "--pin", "nothing*=int8-g128"], "nothing"),
        (["plan", "RUN", "--formats", "int3"], "int3"),
        (["verify", "RUN", "--arms", "w9a9"], "w9a9"),
        (["verify", "RUN", "--data", "EMPTY"], "empty"),
        (["verify", "RUN", "--data", "BINARY"], "text"),
        (["profile", "MISSING", "-o", "RUN"], "MISSING"),
        (["profile", "TRUNCATED", "-o", "RUN"], "truncated"),
        (["report", "EMPTY"], "run directory"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    planned: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\0\xff\0")
    truncated = copy(EMBEDDED, tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes(b"\0" * 100)
    places = {"RUN": planned, "EMPTY": tmp_path / "empty.txt", "BINARY": tmp_path / "binary.txt"}
    places |= {"TRUNCATED": truncated, "MISSING": tmp_path / "MISSING"}
    before = contents(planned)
    result = bitplan(*(places.get(word, word) for word in words), code=EXIT_BAD_INPUT)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert contents(planned) == before


def test_a_full_disk_is_one_line_and_keeps_what_was_there(planned: Path, tmp_path: Path) -> None:
    """The kernel refuses bytes past a file's size limit, as it does when the disk is full."""
    run = copy(planned, tmp_path / "run")
    before = contents(run)
    command = [sys.executable, "-m", "bitplan", "plan", str(run), "--input-bits", "6"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stderr.startswith("error: cannot write")
    assert result.stderr.count("\n") == 1
    assert contents(run) == before


def test_the_embedded_checkpoint_is_what_the_docs_say() -> None:
    from bitplan.probe.checkpoint import load_checkpoint

    facts = load_checkpoint(str(EMBEDDED), device="cpu").facts()
    assert facts["family"] == "llama"
    assert 2e6 <= facts["num_non_embedding_parameters"] <= 4e6
    size = sum(path.stat().st_size for path in EMBEDDED.iterdir())
    assert size <= 16e6
