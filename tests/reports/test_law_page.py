"""The crossover's chart: every point of the table, one file that fetches nothing."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import vl_convert
from click.testing import CliRunner

from bitplan.cli import main
from bitplan.forecast import crossover
from bitplan.law import PAPER, Law, LawSet
from bitplan.reports.charts import to_spec
from bitplan.reports.law_page import crossover_chart, crossover_rows, write_crossover


def test_every_cell_of_the_table_is_a_point() -> None:
    found = crossover([1e8, 1e9], [32, 128])
    rows = crossover_rows(found)
    assert rows.height == 2 * 2 * 2
    for row in rows.iter_rows(named=True):
        fc2 = row["inputs"].startswith("FC2")
        group = float(row["group_size"].removeprefix("G "))
        assert row["tokens"] == pytest.approx(
            PAPER.crossover_tokens(row["params"], group, fc2_at_8=fc2)
        )
        inside = not PAPER.outside_grid(
            params=row["params"], tokens=row["tokens"], group_size=group
        )
        assert (row["extrapolates"] == "no") == inside


def test_the_chart_draws() -> None:
    spec = to_spec(crossover_chart(crossover_rows(crossover())))
    colored = json.dumps(spec | {"width": 500}).replace("theme:", "#")
    colored = re.sub(r'"#[a-z]+\d?"', '"#123456"', colored)
    svg = vl_convert.vegalite_to_svg(colored, vl_version="v6.1")
    assert svg.count("<path") > 40


def test_the_command_writes_one_file(tmp_path: Path) -> None:
    path = tmp_path / "crossover.html"
    result = CliRunner().invoke(main, ["law", "crossover", "--chart", str(path)])
    assert result.exit_code == 0, result.output
    html = path.read_text()
    assert 'data-chart="crossover"' in html
    assert "<table" in html
    assert not re.search(r"(src|href)=.https?:", html)


def test_a_law_without_a_crossover_says_never(tmp_path: Path) -> None:
    flat = Law(k=0.1, gamma_n=0.2, gamma_d=0.1, gamma_g=0.5)
    late = replace(flat, gamma_d=0.2)
    rows = {"w16a4": flat, "w4a16": late, "w16a4+fc2": replace(late, k=0.2)}
    laws = LawSet("a file", PAPER.baseline, rows, PAPER.grid)
    found = crossover([1e8], [32], laws)
    assert found.rows[0]["fc2_inputs_at_8"] is None
    assert found.rows[0]["all_inputs_at_4"] == pytest.approx(1.0)
    assert found.as_text().count("never") == 1
    assert crossover_rows(found)["tokens"].null_count() == 1
    write_crossover(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").is_file()
