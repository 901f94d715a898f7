"""The page: the verdict, the numbers behind it, the sections, and where all of it is from.

One file, nothing fetched: styles, data and the Vega bundle are inside, and a content security
policy forbids everything else. The template's text is ours; whatever comes from a run passes
through markup.py.
"""

import re
import string
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata, resources
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from bitplan.reports import (
    arm_sections,
    arm_summary,
    outlier_sections,
    sections,
    summary,
    theme,
    words,
)
from bitplan.reports.commands import reproduce
from bitplan.reports.load import Run
from bitplan.reports.markup import Markup, el, join, json_for_script, table
from bitplan.reports.numbers import (
    NATS_DIGITS,
    RATIO_DIGITS,
    bounds,
    count,
    estimate,
    interval,
    number,
)

SECTIONS: tuple[tuple[str, str, Callable[[Run, str], Markup]], ...] = (
    ("outliers", "Outliers", sections.outliers),
    ("where", "Where", outlier_sections.where),
    ("errors", "Errors", sections.errors),
    ("sensitivity", "Sensitivity", sections.sensitivity),
    ("plan", "Plan", sections.plan),
    ("frontier", "Frontier", sections.frontier),
    ("training", "Training", arm_sections.training),
    ("measured", "Measured", arm_sections.deltas),
)


def render(runs: list[Run]) -> str:
    """Return the whole report of one or several runs as HTML."""
    single = len(runs) == 1
    parts = [_run(run, f"r{i + 1}", heading="h1" if single else "h2") for i, run in enumerate(runs)]
    if not single:
        parts.insert(0, _comparison(runs))
    links = (
        [el("a", label, href=f"#r1-{name}") for name, label, _ in SECTIONS]
        + [el("a", "Provenance", href="#r1-provenance")]
        if single
        else [el("a", run.name, href=f"#r{i + 1}") for i, run in enumerate(runs)]
    )
    names = ", ".join(run.model_name for run in runs)
    return page(f"bitplan: {names}", links, parts)


def page(title: str, links: list[Markup], parts: list[Markup]) -> str:
    """Return a whole HTML file: a bar with links, the parts, and what draws their figures."""
    mark = el("b", el("i"), el("i"), "bitplan")
    button = el("button", "Dark", type="button", id="theme", hidden=True)
    bar = el("header", el("div", mark, el("nav", links, aria_label="Sections"), button))
    noscript = el("noscript", el("p", "Charts need JavaScript; their tables do not."))
    footer = el("footer", el("p", f"Made by bitplan {_version()}. Nothing here is fetched."))
    return string.Template(_resource("page.html")).substitute(
        title=join(title),
        style=_style(),
        body=join(
            Markup(bar.replace("<header>", '<header class="bar">', 1)),
            el("main", noscript, parts),
            footer,
        ),
        themes=json_for_script({"light": theme.LIGHT, "dark": theme.DARK}),
        bundle=_bundle(),
        script=_resource("page.js"),
    )


def _version() -> str:
    return metadata.version("bitplan")


def _resource(name: str) -> str:
    return resources.files("bitplan.reports").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """Return the style sheet with the palettes as custom properties."""

    def properties(palette: Mapping[str, str]) -> str:
        return "\n".join(f"  --{name}: {color};" for name, color in palette.items())

    sheet = string.Template(_resource("page.css"))
    return sheet.substitute(light=properties(theme.LIGHT), dark=properties(theme.DARK))


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script of about 900 kB, made without network."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=version)
    assert "</script" not in script.lower(), "the bundle would end its own script element"
    return script


def _run(run: Run, name: str, *, heading: str) -> Markup:
    sites = summary.plan_sites(run.plan) if run.plan is not None else None
    predicted = (run.plan or {}).get("predicted") or {}
    roles = summary.role_kurtosis(run, "input") if run.profile is not None else None
    tolerance = arm_sections.tolerance_of(run.verdict or {})
    word = str((run.verdict or {}).get("verdict") or "")
    hero = el(
        "div",
        el("p", _eyebrow(run), class_="eyebrow"),
        el("span", word, class_=f"mark {word}") if word else None,
        el(heading, _quiet_brackets(words.headline(run.verdict, sites, predicted, roles))),
        [el("p", line, class_="note", role="note") for line in run.stale],
        [el("p", line, class_="gloss") for line in words.gloss(run.verdict, tolerance)],
        _numbers(run, predicted),
        class_="hero",
    )
    drawn = [section(run, f"{name}-{key}") for key, _label, section in SECTIONS]
    return el("article", hero, drawn, _provenance(run, f"{name}-provenance"), id=name, class_="run")


def _quiet_brackets(sentence: str) -> list[str]:
    """Return a sentence whose bracketed intervals are set apart from what they qualify."""
    parts = re.split(r"(\([^()]*\))", sentence)
    return [el("span", part, class_="quiet") if part.startswith("(") else part for part in parts]


def _eyebrow(run: Run) -> str:
    parts = [run.model_name, run.model.get("architecture") or run.model.get("family"), run.name]
    return " \u00b7 ".join(str(part) for part in dict.fromkeys(parts) if part)


def _numbers(run: Run, predicted: Mapping[str, Any]) -> Markup:
    """Return the row of key numbers; what is not known yet is not there."""
    model, measured = run.model, (run.verdict or {}).get("delta") or {}
    cells: list[tuple[str, str, str | None]] = [("model", run.model_name, None)]
    if (parameters := model.get("num_non_embedding_parameters")) is not None:
        total = model.get("num_parameters")
        small = "without embeddings"
        if total is not None:
            small += f"; {count(total)} in all"
        cells.append(("parameters", count(parameters), small))
    if predicted.get("weight_bits") is not None or predicted.get("input_bits") is not None:
        bits = f"{_bits(predicted.get('weight_bits'))} \u00b7 {_bits(predicted.get('input_bits'))}"
        cells.append(("bits of weights \u00b7 inputs", bits, "on average, scales counted"))
    if predicted.get("delta_loss") is not None:
        cells.append(
            ("predicted loss", number(predicted["delta_loss"]), "nats per token, if sites add up")
        )
    if whole := (run.plan or {}).get("measured"):
        small = "nats per token, the plan whole, not trained"
        cells.append(("loss of the plan", number(whole["delta_loss"]), small))
    for arm, label in (("w4a4", "measured, all 4 bits"), ("planned", "measured, planned")):
        value = measured.get(arm) or {}
        if value.get("estimate") is not None:
            cells.append((label, estimate(value, NATS_DIGITS), bounds(value, NATS_DIGITS)))
    return el(
        "dl",
        [
            el("div", el("dt", label), el("dd", value, el("small", small) if small else None))
            for label, value, small in cells
        ],
        class_="numbers",
    )


def _bits(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}".rstrip("0").rstrip(".")


def _comparison(runs: list[Run]) -> Markup:
    header = ["run", "model", "weight bits", "input bits", "predicted loss", "delta w4a4"]
    header += ["delta planned", "R after", "verdict"]
    rows = []
    for i, run in enumerate(runs):
        predicted = (run.plan or {}).get("predicted") or {}
        verdict = run.verdict or {}
        measured = verdict.get("delta") or {}
        rows.append(
            [
                el("a", run.name, href=f"#r{i + 1}"),
                run.model_name,
                _known(predicted.get("weight_bits"), _bits),
                _known(predicted.get("input_bits"), _bits),
                _known(predicted.get("delta_loss"), number),
                _known(measured.get("w4a4"), _nats),
                _known(measured.get("planned"), _nats),
                _known((verdict.get("R") or {}).get("after"), _ratio),
                verdict.get("verdict") or "not verified yet",
            ]
        )
    title = el("h1", f"{words.plural(len(runs), 'run')} compared")
    return el("div", title, el("div", table(header, rows), class_="compare"), class_="hero")


def _nats(value: Mapping[str, Any]) -> str:
    return interval(value, NATS_DIGITS)


def _ratio(value: Mapping[str, Any]) -> str:
    return interval(value, RATIO_DIGITS)


def _known(value: Any, spell: Callable[[Any], str]) -> str:
    return "" if value is None else spell(value)


def _provenance(run: Run, name: str) -> Markup:
    """Return the last section: what this was made from and how to make it again."""
    manifest = run.manifest
    facts: dict[str, str] = {}
    for key in ("model", "data", "seed", "hardware", "versions"):
        facts |= _flat(key, manifest.get(key))
    for key in ("plan_id", "made_by", "budget", "optimality_gap", "device"):
        facts |= _flat(f"plan: {key}", (run.plan or {}).get(key))
    facts |= _trainings(run)
    for stage, entry in (manifest.get("stages") or {}).items():
        facts |= _flat(f"{stage} device", (entry.get("options") or {}).get("device"))
        facts[f"{stage} finished"] = str(entry.get("finished", ""))
    listed = [part for key, value in facts.items() for part in (el("dt", key), el("dd", value))]
    commands = "\n".join(reproduce(manifest, run.name))
    return el(
        "section",
        el("h2", "Provenance"),
        el("p", "The files, versions and options behind every number here.", class_="lead"),
        el("pre", el("code", commands), class_="commands", aria_label="Commands to reproduce"),
        el("dl", listed, class_="facts"),
        id=name,
    )


def _flat(key: str, value: Any) -> dict[str, str]:
    """Spell a JSON value as lines `key: part`; nested objects are one level deep, then inline."""
    if value is None or value == {} or value == []:
        return {}
    if not isinstance(value, dict):
        return {key.replace("_", " "): _inline(value)}
    if key == "versions":
        return {key: _inline(value)}
    return {
        f"{key}: {part}".replace("num_", "").replace("_", " "): _inline(item)
        for part, item in value.items()
        if item is not None and item != {} and item != []
    }


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_inline(item)}" for key, item in value.items())
    if isinstance(value, list):
        shown = ", ".join(_inline(item) for item in value[:8])
        return f"{shown} (+{len(value) - 8})" if len(value) > 8 else shown
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _trainings(run: Run) -> dict[str, str]:
    """Say how many trainings there are, of which seeds, and on what they ran."""
    if not run.arms:
        return {}
    facts = {
        "trainings": f"{len(run.arms)} ({len({arm.name for arm in run.arms})} arms)",
        "training seeds": ", ".join(str(seed) for seed in sorted({arm.seed for arm in run.arms})),
    }
    for key in ("hardware", "device"):
        found = {_inline(arm.record[key]) for arm in run.arms if arm.record.get(key)}
        if found:
            facts[f"training {key}"] = ", ".join(sorted(found))
    losses = arm_summary.losses(run.arms)
    if not losses.is_empty():
        most = losses.select(pl.col("tokens").max()).item()
        facts["training tokens an arm"] = f"{most:,}"
    return facts
