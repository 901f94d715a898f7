import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from bitplan.errors import RunError
from bitplan.rundir import RunDir, content_hash, read_json, write_atomic, write_json
from bitplan.tables import ERRORS


def make_run(path: Path) -> RunDir:
    run = RunDir.create(path)
    with run.lock():
        run.finish("profile", {"a": 1}, [], model={"content_hash": "m"}, seed=3)
    return run


def test_create_open_and_refuse(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="bitplan profile"):
        RunDir.open(tmp_path / "none")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        RunDir.create(tmp_path / "mine")
    make_run(tmp_path / "run")
    assert RunDir.create(tmp_path / "run").manifest["model"] == {"content_hash": "m"}


def test_another_schema_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    text = json.dumps({**manifest, "schema": 99})
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(RunError, match="schema version 99"):
        RunDir.create(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_text() == text


def test_one_writer_at_a_time_across_processes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys; from bitplan.rundir import RunDir\n"
        "from bitplan.errors import RunError\n"
        "try:\n with RunDir.open(sys.argv[1]).lock(): print('got it')\n"
        "except RunError as e: print(e)\n"
    )

    def other() -> str:
        command = [sys.executable, "-c", code, str(run.path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with run.lock():
        assert "in use" in other()
    assert other() == "got it\n"


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    code = (
        "import sys,time; from bitplan.rundir import RunDir\n"
        "with RunDir.open(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=-1, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    with run.lock():
        pass


def test_a_stage_that_fails_at_once_leaves_no_trace(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "new")

    def fail() -> None:
        with run.lock():
            raise RunError("bad input")

    with pytest.raises(RunError, match="bad input"):
        fail()
    assert not (tmp_path / "new").exists()


def test_a_write_that_fails_keeps_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def fail(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A real failing write(): the kernel refuses bytes past the file size limit."""
    run = make_run(tmp_path / "run")
    frame = pl.DataFrame({"x": [float(i) ** 0.5 for i in range(100_000)]})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(RunError, match="cannot write"):
            run.write_table("profile.parquet", frame)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in run.path.iterdir()) == [".lock", "run.json"]


def test_tables_carry_provenance_and_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = ERRORS.frame([{"site": "a:input", "step": 0, "format": "bf16", "relative_error": 0.0}])
    path = run.write_table("errors.parquet", frame)
    first = path.read_bytes()
    note = json.loads(pl.read_parquet_metadata(path)["bitplan"])
    assert note["model"] == {"content_hash": "m"}
    assert note["seed"] == 3
    run.write_table("errors.parquet", frame)
    assert path.read_bytes() == first
    assert run.read_table("errors.parquet").equals(frame)


def test_frames_hold_no_non_finite_float() -> None:
    frame = ERRORS.frame(
        [{"site": "a:input", "relative_error": float("nan"), "sqnr_db": float("inf")}]
    )
    assert frame.columns == [column.name for column in ERRORS.columns]
    assert frame["relative_error"].null_count() == frame["sqnr_db"].null_count() == 1


def test_missing_files_name_the_command_that_makes_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(RunError, match="bitplan plan"):
        run.read_json("plan.json")
    with pytest.raises(RunError, match="bitplan profile"):
        run.read_table("profile.parquet")
    (run.path / "profile.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RunError, match="cannot be read"):
        run.read_table("profile.parquet")


def test_a_stage_is_done_for_its_options_while_its_files_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run.path / "x.json", {})
    run.finish("plan", {"b": 2, "a": 1}, ["x.json"])
    assert run.is_done("plan", {"a": 1, "b": 2})
    assert not run.is_done("plan", {"a": 1, "b": 3})
    (run.path / "x.json").unlink()
    assert not run.is_done("plan", {"a": 1, "b": 2})


def test_hashes_ignore_key_order_and_json_refuses_nan(tmp_path: Path) -> None:
    assert content_hash({"a": 1, "b": [2]}) == content_hash({"b": [2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "n.json", {"x": float("nan")})
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        read_json(tmp_path / "bad.json")


def test_files_of_a_commit_appear_together_or_not_at_all(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    frame = pl.DataFrame({"x": [1.0]})
    run.commit("plan", {"a": 1}, {"t.parquet": frame}, {"d.json": {"y": 2}})
    assert run.is_done("plan", {"a": 1})
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        run.commit("plan", {"a": 2}, {"t.parquet": frame * 2}, {"d.json": {"y": float("nan")}})
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_a_file_changed_since_its_stage_makes_the_stage_undone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.commit("plan", {"a": 1}, {"t.parquet": pl.DataFrame({"x": [1.0]})})
    run.write_table("t.parquet", pl.DataFrame({"x": [2.0]}))
    assert not run.is_done("plan", {"a": 1})
