"""The whole report: what is in it, what is not, and what hostile names make of it."""

import json
import re
from pathlib import Path

import pytest

from bitplan.errors import RunError
from bitplan.reports.load import load_run
from bitplan.reports.report import write_report

from .conftest import MakeRun, Synthetic, edit_json
from .test_markup import Reader

HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
SCRIPTS = 3  # palettes, Vega, ours; and one data script a chart


def page_without_bundle(html: str) -> str:
    """Return the page with the large scripts cut out: what is ours to get right."""
    return re.sub(r"<script>.*?</script>", "<script></script>", html, flags=re.DOTALL)


def charts_of(html: str) -> dict[str, dict[str, object]]:
    found = re.findall(
        r'<script type="application/json" data-chart="([^"]+)">(.*?)</script>', html, re.DOTALL
    )
    return {name: json.loads(spec) for name, spec in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete run, with its report."""
    path = Synthetic().write(tmp_path_factory.mktemp("whole") / "run", seeds=2, steps=12)
    write_report([path])
    return path


def test_a_whole_run_shows_every_section(whole: Path) -> None:
    path = whole
    html = (path / "report.html").read_text()
    result = write_report([path])
    assert result.as_text().splitlines()[-1] == str(path / "report.html")
    assert result.as_json()["bytes"] == len(html.encode())
    assert result.missing == ()
    shown = charts_of(html)
    assert set(shown) == {
        "r1-outliers-input",
        "r1-outliers-weight",
        "r1-where-tokens",
        "r1-where-channels",
        "r1-errors-input",
        "r1-errors-weight",
        "r1-sensitivity-scatter",
        "r1-plan-input",
        "r1-plan-weight",
        "r1-frontier-0",
        "r1-training-delta",
        "r1-training-loss",
        "r1-training-stats-bf16",
        "r1-training-stats-w4a4",
        "r1-training-stats-planned",
        "r1-measured-arms",
        "r1-measured-ratio",
        "r1-measured-attribution",
    }
    read = Reader(page_without_bundle(html))
    ids = [value for key, value in read.attributes if key == "id"]
    assert len(ids) == len(set(ids))
    assert set(shown) <= set(ids)
    assert [v for k, v in read.attributes if k == "href" and v and v[1:] not in ids] == []
    assert read.tags.count("h1") == 1
    assert "converge: R goes from 5.34" in read.text
    assert "bitplan plan run --input-bits 5.5 --pin '*.0.*=int8-g128'" in read.text
    assert "feedfacefeedface" in read.text
    assert 'class="missing"' not in html


def test_the_forecast_of_a_plan_is_told_in_its_section(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=4)
    before = write_report([path]).path.read_text()
    law = {"params": 3e8, "tokens": 5e10, "delta_weights": 0.02, "delta_inputs": 0.04, "R": 2.0}
    rest = {"R_fc2_at_8": 1.1, "extrapolates": [], "next_bit": "inputs", "source": "a law"}
    edit_json(path / "plan.json", advice=law | rest)
    after = write_report([path]).path.read_text()
    said = "For 300 million parameters and 50 billion training tokens"
    (section,) = re.findall(r'<section id="r1-plan">.*?</section>', after, re.DOTALL)
    assert said in section
    assert said not in before


def test_a_plan_that_was_measured_whole_says_what_it_costs(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=4)
    assert "loss of the plan" not in write_report([path]).path.read_text()
    whole = {"delta_loss": 0.0234, "stderr": 0.001, "kl": 0.02, "kl_stderr": 0.001, "tokens": 64}
    edit_json(path / "plan.json", measured=whole | {"agrees": True})
    assert "<dt>loss of the plan</dt><dd>0.0234" in write_report([path]).path.read_text()


def test_the_file_is_closed_to_the_network(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    assert policy is not None
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe-eval" not in policy[1]
    assert "connect-src" not in policy[1]
    ours = page_without_bundle(html)
    assert "http:" not in ours
    assert "https:" not in ours
    read = Reader(ours)
    assert [value for key, value in read.attributes if key in ("src", "srcset", "data")] == []
    assert all(value and value[0] == "#" for key, value in read.attributes if key == "href")
    assert not {"link", "iframe", "img", "object", "embed", "form", "base"} & set(read.tags)
    assert "ast: true" in html


def test_hostile_names_are_inert(make_run: MakeRun) -> None:
    path = make_run(
        blocks=2,
        seeds=1,
        steps=4,
        prefix=f"{HOSTILE}.layers",
        token=HOSTILE,
        source=f"/models/{HOSTILE}",
        weights_note=HOSTILE,
        notes={"notes": [HOSTILE]},
    )
    edit_json(path / "run.json", data={"name": HOSTILE, HOSTILE: [HOSTILE]})
    write_report([path])
    html = (path / "report.html").read_text()
    shown = charts_of(html)
    read = Reader(html)
    assert "img" not in read.tags
    assert read.tags.count("script") == SCRIPTS + len(shown)
    assert not [key for key, _ in read.attributes if key.startswith("on")]
    assert f"{HOSTILE}.layers.0.mlp.down_proj:input" in read.text
    # In charts the name is data: whole, and read back from JSON.
    assert "<img src=x" in str(shown["r1-outliers-input"])


@pytest.mark.parametrize(
    ("stages", "charts", "missing"),
    [
        ((), 0, ["bitplan profile MODEL", "bitplan plan", "bitplan verify"]),
        (("profile",), 7, ["bitplan plan", "bitplan verify"]),
        (("profile", "plan"), 10, ["bitplan verify"]),
    ],
)
def test_a_partial_run_names_the_next_commands(
    make_run: MakeRun, stages: tuple[str, ...], charts: int, missing: list[str]
) -> None:
    path = make_run(stages=stages)
    if not stages:
        path.mkdir(exist_ok=True)
        (path / "run.json").write_text(json.dumps({"schema": 1, "stages": {}}))
    result = write_report([path])
    html = (path / "report.html").read_text()
    assert len(charts_of(html)) == charts
    assert len(result.missing) == len(missing)
    for command, wanted in zip(result.missing, missing, strict=True):
        assert command.startswith(wanted)
    lines = re.findall(r'<p class="missing">(.*?)</p>', html)
    assert lines
    assert all("<code>bitplan " in line for line in lines)
    assert result.as_text().splitlines()[-1].endswith("report.html")


def test_weights_only_profiles_and_missing_sensitivity(make_run: MakeRun, tmp_path: Path) -> None:
    made = Synthetic(blocks=2)
    made.profile = [row for row in made.profile if row["operand"] == "weight"]
    made.errors = [row for row in made.errors if row["site"].endswith(":weight")]
    path = made.write(tmp_path / "weights", stages=("profile",))
    manifest = json.loads((path / "run.json").read_text())
    for name in ("sensitivity.parquet", "outliers.parquet"):
        (path / name).unlink()
        manifest["stages"]["profile"]["files"].remove(name)
    (path / "run.json").write_text(json.dumps(manifest))
    write_report([path])
    html = (path / "report.html").read_text()
    assert set(charts_of(html)) == {"r1-outliers-weight", "r1-errors-weight"}
    assert "Only weights were profiled so far." in html
    assert "No inputs in this profile" in html


def test_the_note_on_rounded_weights_stands_at_every_weight_error(make_run: MakeRun) -> None:
    note = "weights were already rounded to 4 bits (GGUF Q4_1)"
    path = make_run(seeds=1, steps=4, weights_note=note)
    write_report([path])
    html = (path / "report.html").read_text()
    figures = re.findall(r"<figure>(.*?)</figure>", html, re.DOTALL)
    noted = {m[1] for f in figures if note[1:] in f and (m := re.search(r'id="([^"]+)"', f))}
    assert noted == {"r1-errors-weight", "r1-sensitivity-scatter", "r1-measured-arms"}


def test_several_runs_share_one_report(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("first", seeds=1, steps=4)
    second = make_run("second", stages=("profile",), source="/models/other")
    result = write_report([first, second], tmp_path / "out" / "both.html")
    assert result.path == tmp_path / "out" / "both.html"
    html = result.path.read_text()
    read = Reader(page_without_bundle(html))
    assert read.tags.count("article") == 2
    assert "2 runs compared" in read.text
    assert "not verified yet" in read.text
    assert {name.partition("-")[0] for name in charts_of(html)} == {"r1", "r2"}
    assert html.count("<script>") == 2  # Vega once, and the page's own
    ids = [value for key, value in read.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_same_files_give_the_same_report(whole: Path, tmp_path: Path) -> None:
    again = write_report([whole], tmp_path / "again.html").path.read_bytes()
    assert again == (whole / "report.html").read_bytes()


def test_a_demo_sized_report_is_small(make_run: MakeRun) -> None:
    path = make_run(blocks=12, seeds=3, steps=300)
    assert write_report([path]).size_bytes < 1_500_000


def test_many_experts_still_make_a_report_that_opens(make_run: MakeRun) -> None:
    path = make_run(stages=("profile", "plan"), blocks=4, experts=128)
    result = write_report([path])
    html = (path / "report.html").read_text()
    assert result.size_bytes < 2_000_000
    assert "points are drawn." in html
    assert "more in plan.json" in html


def test_trainings_under_way_are_shown_before_there_is_a_verdict(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=4)
    manifest = json.loads((path / "run.json").read_text())
    del manifest["stages"]["verify"]
    (path / "run.json").write_text(json.dumps(manifest))
    (path / "verdict.json").unlink()
    write_report([path])
    html = (path / "report.html").read_text()
    assert {"r1-training-delta", "r1-training-loss"} <= charts_of(html).keys()
    assert "training has not verified it yet" in html
    assert "No verdict yet: <code>bitplan verify run</code>" in html


def test_bad_input_leaves_the_old_report(make_run: MakeRun) -> None:
    path = make_run(stages=("profile",))
    write_report([path])
    old = (path / "report.html").read_bytes()
    (path / "errors.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"errors\.parquet cannot be read"):
        write_report([path])
    assert (path / "report.html").read_bytes() == old


def test_no_run_and_a_directory_for_output_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run directory given"):
        write_report([])
    path = make_run(stages=("profile",))
    with pytest.raises(RunError, match="is a directory"):
        write_report([path], tmp_path)


def test_an_undetermined_verdict_without_bounds_is_told(make_run: MakeRun) -> None:
    nothing = {"estimate": None, "low": None, "high": None}
    path = make_run(
        seeds=1,
        steps=4,
        notes={
            "verdict": "undetermined",
            "R": {"before": nothing, "after": {"estimate": 7.5, "low": None, "high": None}},
            "needed": {"seeds": 9, "heldout_tokens": 65536},
        },
    )
    write_report([path])
    html = (path / "report.html").read_text()
    text = Reader(page_without_bundle(html)).text
    assert "the weights' error cannot be told from zero, so R has no bounds." in text
    assert "--seeds 9 --eval-tokens 65536" in text
    assert "r1-measured-ratio" in charts_of(html)


def test_what_was_made_from_older_files_is_marked(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=4, notes={"plan_id": "of another plan"})
    manifest = json.loads((path / "run.json").read_text())
    manifest["stages"]["plan"]["options"]["inputs"] = {"profile.parquet": "old"}
    manifest["stages"]["profile"]["hashes"] = {"profile.parquet": "new"}
    edit_json(path / "run.json", **manifest)
    write_report([path])
    text = Reader(page_without_bundle((path / "report.html").read_text())).text
    assert "The plan was made from an older profile: run `bitplan plan run`." in text
    assert "of another plan than the one shown: run `bitplan verify run`." in text


def test_what_is_up_to_date_is_not_marked(make_run: MakeRun) -> None:
    path = make_run(seeds=1, steps=4, notes={"plan_id": "0123456789abcdef"})
    assert load_run(path).stale == ()
