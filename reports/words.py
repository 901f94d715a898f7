"""One plain sentence per picture, computed from the frames the picture is drawn from.

A sentence says what the data shows, also when it does not show what one hopes for: no outliers, a
kurtosis that does predict, a rule that beats the plan. Numbers are in the units of design.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from bitplan.formats import parse_format
from bitplan.reports import summary
from bitplan.reports.numbers import (
    NATS_DIGITS,
    RATIO_DIGITS,
    count,
    estimate,
    interval,
    number,
    percent,
    span,
)

ROLE_NAMES = {"qkv": "QKV", "o": "O", "fc1": "FC1", "fc2": "FC2"}
# A role stands out when its kurtosis is this many times the next one's.
STANDS_OUT = 2.0
# Rank correlation from which kurtosis may be trusted to order sites.
STRONG_RANK = 0.8


def role_name(role: str) -> str:
    """Return a role as it is spelled in a sentence."""
    return ROLE_NAMES.get(role, role)


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural where needed."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """Join parts as in a sentence: a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def outliers(roles: pl.DataFrame, peak: Mapping[str, Any] | None, operand: str) -> str:
    """Say which role's kurtosis stands out; `roles` from `summary.role_kurtosis`."""
    noun = f"{operand}s"
    if roles.is_empty():
        return f"No kurtosis of {noun} was recorded."
    top, rest = roles.row(0, named=True), roles[1:]
    if rest.is_empty():
        text = f"{role_name(top['role'])} {noun} have a median kurtosis of {number(top['median'])}"
    elif top["median"] >= STANDS_OUT * rest["median"][0]:
        others = span(rest["median"].to_list())
        text = (
            f"{role_name(top['role'])} {noun} carry the outliers: median kurtosis "
            f"{number(top['median'])}, against {others} for the other roles"
        )
    else:
        medians = span(roles["median"].to_list())
        text = f"No role stands out: the median kurtosis of {noun} is {medians}"
    if peak is not None and peak["kurtosis"] > 1.5 * top["median"]:
        where = f" in block {peak['block']}" if peak["block"] is not None else ""
        text += f"; the peak is {number(peak['kurtosis'])}, at {role_name(peak['role'])}{where}"
    if top["calm"] is not None and top["calm"] < top["median"] / STANDS_OUT:
        text += (
            f". A few tokens make it: without the first and the top 1 % of tokens "
            f"{role_name(top['role'])} is at {number(top['calm'])}"
        )
    return text + "."


def errors(frame: pl.DataFrame, operand: str) -> str:
    """Say which role loses most at the lowest format, and what the next format gains."""
    low = summary.lowest_format(frame["format"])
    if low is None:
        return f"No quantization error of {operand}s was recorded."
    rows = frame.filter(pl.col("format") == low).sort("median", "role")
    worst, best = rows.row(0, named=True), rows.row(-1, named=True)
    text = f"At {low}, {role_name(worst['role'])} {operand}s have the most error, "
    text += f"{number(worst['median'])} dB"
    if rows.height > 1:
        gap = best["median"] - worst["median"]
        text += f", {number(gap, 2)} dB worse than {role_name(best['role'])}"
    others = frame.filter(pl.col("role") == worst["role"], pl.col("format") != low)
    if not others.is_empty():
        other = others.sort("median", descending=True).row(0, named=True)
        gain = other["median"] - worst["median"]
        text += f"; {other['format']} gains {number(gain, 2)} dB there"
    return text + "."


def rank_correlation(points: pl.DataFrame) -> float | None:
    """Return Spearman's rank correlation of kurtosis with delta_loss; None where undefined."""
    if points.height < 3:
        return None
    ranks = points.select(pl.col("kurtosis").rank(), pl.col("delta_loss").rank())
    value = ranks.select(pl.corr("kurtosis", "delta_loss")).item()
    return None if value is None or value != value else float(value)


def sensitivity(points: pl.DataFrame) -> str:
    """Say how far kurtosis orders the inputs by what quantizing them costs, and where it errs."""
    points = points.filter(pl.col("operand") == "input")
    rho = rank_correlation(points)
    if rho is None:
        return "Too few inputs to compare kurtosis with sensitivity."
    verdict = (
        "kurtosis orders the inputs well here"
        if rho >= STRONG_RANK
        else "kurtosis is a weak guide to what an input costs"
    )
    by_kurtosis = points.sort("kurtosis", "site", descending=[True, False]).row(0, named=True)
    by_loss = points.sort("delta_loss", "site", descending=[True, False])
    costly = by_loss.row(0, named=True)
    text = f"Rank correlation {rho:.2f} over {plural(points.height, 'input')}: {verdict}"
    if costly["site"] == by_kurtosis["site"]:
        return f"{text}; the input with the highest kurtosis is also the one that costs most."
    rank = by_loss["site"].to_list().index(by_kurtosis["site"]) + 1
    return (
        f"{text}. The input with the highest kurtosis ({number(by_kurtosis['kurtosis'])}, "
        f"{_place(by_kurtosis)}) ranks {rank} of {points.height} by loss; the costliest, "
        f"{_place(costly)}, has a kurtosis of {number(costly['kurtosis'])}."
    )


def _place(row: Mapping[str, Any]) -> str:
    where = "" if row["block"] is None else f" in block {row['block']}"
    return f"{role_name(row['role'])}{where}"


def advice(plan: Mapping[str, Any]) -> str | None:
    """Say what the scaling law forecasts and where the next bit goes; None where not asked."""
    law = plan.get("advice")
    if not law:
        return None
    why = f"; {law['why']}" if law.get("why") else ""
    outside = "; N, D or G lie outside what it was fitted on" if law["extrapolates"] else ""
    return (
        f"For {count(law['params'])} parameters and {count(law['tokens'])} training tokens the "
        f"scaling law ({law['source']}{why}) forecasts "
        f"{law['delta_weights']:.{NATS_DIGITS}f} nats from 4-bit weights and "
        f"{law['delta_inputs']:.{NATS_DIGITS}f} from 4-bit inputs, R "
        f"{law['R']:.{RATIO_DIGITS}f}, and R {law['R_fc2_at_8']:.{RATIO_DIGITS}f} with FC2 inputs "
        f"at 8 bits{outside}: the next bit should go to the {law['next_bit']}."
    )


def plan(sites: pl.DataFrame) -> str:
    """Say how many sites of each operand are above the lowest bits, and of which roles."""
    sites = sites.filter("planned")
    raised = summary.raised_sites(sites)
    parts = []
    for operand in summary.base_formats(sites):
        mine = sites.filter(pl.col("operand") == operand)
        base = _lowest(mine)
        above = raised.filter(pl.col("operand") == operand)
        if above.is_empty():
            rest = f"all {mine.height:,} {operand}s stay"
            parts.append(f"{rest if mine.height > 1 else f'the {operand} stays'} at {base}")
            continue
        by_role = above.group_by("role").len().sort("len", "role", descending=[True, False])
        roles = listed([f"{n} {role_name(role)}" for role, n in by_role.iter_rows()])
        parts.append(
            f"{above.height:,} of {plural(mine.height, operand)} are above {base} ({roles})"
        )
    if not parts:
        return "The plan names no site."
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _lowest(sites: pl.DataFrame) -> str:
    """Name the format of the fewest bits, or the bits where several formats share them."""
    bits = min(sites["bits"].to_list())
    names = sites.filter(pl.col("bits") == bits)["format"].unique().to_list()
    return names[0] if len(names) == 1 else f"{bits} bits"


def frontier(points: pl.DataFrame, chosen: Mapping[str, float] | None, unit: str) -> str:
    """Compare the chosen plan with the best rule that costs no more."""
    if chosen is None:
        best = points.filter(pl.col("label") == summary.OPTIMAL)
        return f"{plural(best.height, 'best plan')} over {unit}."
    value = chosen["value"]
    text = f"At {number(chosen['cost'])} {unit} the plan is predicted to cost {number(value)}"
    text += " nats per token" if "nats" in points["measure"][0] else " in relative error"
    return f"{text}{_against_rules(points, chosen['cost'], value)}.{_below_the_line(points)}"


def _against_rules(points: pl.DataFrame, cost: float, value: float) -> str:
    affordable = summary.rules(points).filter(pl.col("cost") <= cost * (1 + 1e-6))
    if affordable.is_empty():
        return "; no rule is as cheap"
    rule = affordable.sort("value", "label").row(0, named=True)
    best = f"the best rule at no higher cost ({rule['label']})"
    if rule["value"] == value:
        return f", the same as {best}"
    if rule["value"] < value:
        return f", more than {best} at {number(rule['value'])}"
    less = f"{percent(1 - value / rule['value'])} less" if value > 0 else "less"
    return f", {less} than {best} at {number(rule['value'])}"


def _below_the_line(points: pl.DataFrame) -> str:
    """Name the rules that beat the best plans of their cost by spending more of something else."""
    best = points.filter(pl.col("label") == summary.OPTIMAL)
    elsewhere = [c for c in ("weight_bits", "input_bits") if not best[c].equals(best["cost"])]
    names = []
    for rule in summary.rules(points).sort("label").iter_rows(named=True):
        reachable: list[float] = best.filter(pl.col("cost") <= rule["cost"])["value"].to_list()
        spends_more = any(
            rule[column] > max(known) * (1 + 1e-6)
            for column in elsewhere
            if rule[column] is not None and (known := best[column].drop_nulls().to_list())
        )
        if reachable and rule["value"] < min(reachable) and spends_more:
            names.append(rule["label"])
    if not names:
        return ""
    rules = "Rules" if len(names) > 1 else "The rule"
    verb = "spend" if len(names) > 1 else "spends"
    return f" {rules} below the line ({', '.join(names)}) {verb} more of what it holds fixed."


def deltas_in_training(curves: pl.DataFrame) -> str:
    """Say where the planned and the all-4-bit arms end above bf16 in training loss."""
    ends = {
        row["arm"]: row
        for row in curves.sort("tokens").group_by("arm").last().iter_rows(named=True)
    }
    wanted = [arm for arm in ("w4a4", "planned") if arm in ends] or sorted(ends)[:2]
    if not wanted:
        return "No arm has a bf16 twin to compare with yet."
    parts = [f"{arm} {ends[arm]['mean']:+.4f}" for arm in wanted]
    seeds = min(ends[arm]["seeds"] for arm in wanted)
    return (
        f"At the end of training, in nats per token above bf16: {listed(parts)} "
        f"(mean of {plural(seeds, 'seed')}, smoothed)."
    )


def copies(same: Mapping[str, str]) -> str:
    """Say, after another sentence, which arms are one training because their formats are equal."""
    if not same:
        return ""
    pairs = listed([f"{arm} quantizes exactly as {other}" for arm, other in same.items()])
    return f" {pairs}: one training, drawn once."


def stats(frame: pl.DataFrame) -> str:
    """Say how each role's kurtosis moved in the most quantized of the arms shown."""
    arms = frame["arm"].unique().to_list()
    arm = next((name for name in ("w4a4", "planned", "bf16") if name in arms), sorted(arms)[0])
    rows = frame.filter(pl.col("arm") == arm).sort("step")
    first = dict(rows.group_by("role").agg(pl.col("kurtosis").first()).iter_rows())
    last = dict(rows.group_by("role").agg(pl.col("kurtosis").last()).iter_rows())
    if rows["step"].n_unique() < 2:
        return f"Statistics of one step of {arm} so far."
    roles = sorted(first, key=lambda role: (-first[role], role))
    moved = [f"{role_name(r)} {number(first[r], 2)} to {number(last[r], 2)}" for r in roles]
    return f"Median kurtosis of inputs in {arm}, first to last step: {listed(moved)}."


def delta(intervals: Mapping[str, Mapping[str, Any]], floor: float | None) -> str:
    """Say how much of the all-4-bit error the plan removes, and whether that may be chance.

    `floor` is the verdict's noise floor: differences between arms below it may be.
    """
    before, after = intervals.get("w4a4"), intervals.get("planned")
    if before is None or after is None:
        parts = [f"{arm} {estimate(value, NATS_DIGITS)}" for arm, value in intervals.items()]
        return f"Measured so far, in nats per token: {listed(parts)}." if parts else ""
    less = before["estimate"] - after["estimate"]
    change = (
        f"from {estimate(before, NATS_DIGITS)} to {estimate(after, NATS_DIGITS)} nats per token"
    )
    if floor is None or abs(less) < floor:
        known = "unknown" if floor is None else f"{floor:.{NATS_DIGITS}f}"
        return (
            f"Between 4 bits everywhere and the plan the error goes {change}; that may be chance "
            f"(noise floor {known})."
        )
    if less <= 0 or before["estimate"] <= 0:
        return f"The plan does not lower the error of 4 bits everywhere: {change}."
    share = percent(less / before["estimate"])
    return f"The plan removes {share} of the error of 4 bits everywhere: {change}."


def ratio(verdict: Mapping[str, Any], tolerance: Sequence[float]) -> str:
    """Say where R stands after the plan, relative to the band in which errors converge."""
    after = (verdict.get("R") or {}).get("after")
    band = f"{tolerance[0]:g} to {tolerance[1]:g}"
    if not after or after.get("estimate") is None:
        return "R after the plan could not be estimated."
    low, high = after.get("low"), after.get("high")
    if low is None or high is None:
        return f"R after the plan is {interval(after, RATIO_DIGITS)}: it may be anything."
    if tolerance[0] <= low and high <= tolerance[1]:
        where = f"lies inside {band}: inputs and weights cost about the same"
    elif low > tolerance[1]:
        where = f"lies above {band}: the inputs still cost more than the weights"
    elif high < tolerance[0]:
        where = f"lies below {band}: now the weights cost more than the inputs"
    else:
        where = f"reaches over an edge of {band}: more seeds or tokens are needed to tell"
    return f"After the plan the interval of R, {interval(after, RATIO_DIGITS)}, {where}."


def attribution(given_back: pl.DataFrame) -> str:
    """Say which operand of which role costs most, and where FC2's inputs, the usual suspect, stand.

    given_back: arm_summary.attribution, the largest first.
    """
    first = given_back.row(0, named=True)
    text = (
        f"8 bits at the {first['operand']}s of {role_name(first['role'])} alone give back the most "
        f"of the error of 4 bits everywhere, {interval(first, NATS_DIGITS)} nats per token"
    )
    place = given_back.with_row_index("place", offset=1).filter(role="fc2", operand="input")
    if place.is_empty() or place.item(0, "place") == 1:
        return text + "."
    row = place.row(0, named=True)
    return (
        f"{text}; the inputs of {role_name('fc2')} come as number {row['place']}, "
        f"{interval(row, NATS_DIGITS)}."
    )


def predicted_ratio(predicted: Mapping[str, Any]) -> str:
    """Say, after another sentence, which R the plan predicted; nothing where it predicted none."""
    before, trained = predicted.get("R"), predicted.get("R_trained")
    if before is None:
        return ""
    after = "" if trained is None else f", {trained:.{RATIO_DIGITS}f} after training"
    return f" The plan predicted {before:.{RATIO_DIGITS}f} for the untrained checkpoint{after}."


def headline(
    verdict: Mapping[str, Any] | None,
    sites: pl.DataFrame | None,
    predicted: Mapping[str, Any],
    roles: pl.DataFrame | None,
) -> str:
    """Return the report's first sentence: the verdict, else the prediction, else the finding."""
    if verdict is not None:
        return _verdict_sentence(verdict)
    if sites is not None and not sites.is_empty():
        return _prediction(sites.filter("planned"), predicted)
    if roles is not None and not roles.is_empty():
        return outliers(roles.with_columns(calm=pl.lit(None, pl.Float64)), None, "input")
    return "Only weights were profiled so far." if roles is not None else "Nothing measured yet."


def _prediction(sites: pl.DataFrame, predicted: Mapping[str, Any]) -> str:
    raised = summary.raised_sites(sites)
    bits = sorted({parse_format(name).bits for name in raised["format"]})
    to_bits = f" to {listed([str(b) for b in bits])} bits" if bits else ""
    text = f"The plan raises {raised.height:,} of {plural(sites.height, 'site')}{to_bits}"
    if predicted.get("delta_loss") is not None:
        text += f" and is predicted to cost {number(predicted['delta_loss'])} nats per token"
    return f"{text}; training has not verified it yet."


def _verdict_sentence(verdict: Mapping[str, Any]) -> str:
    if verdict.get("missing"):
        return f"Not decided yet: {listed(list(verdict['missing']))} still to be trained."
    ratios = verdict.get("R") or {}
    before, after = ratios.get("before") or {}, ratios.get("after") or {}
    move = ""
    if after.get("low") is None:
        move = ": the weights' error cannot be told from zero, so R has no bounds"
    elif after.get("estimate") is not None:
        move = f"; R is {interval(after, RATIO_DIGITS)}"
        if before.get("low") is not None:
            move = (
                f": R goes from {interval(before, RATIO_DIGITS)} to {interval(after, RATIO_DIGITS)}"
            )
    said = {
        "converged": "With this plan the errors of inputs and weights converge",
        "activation-limited": "Even with this plan the inputs cost more than the weights",
        "weight-limited": "With this plan the weights cost more than the inputs",
        "undetermined": "These trainings cannot tell whether the errors converge",
    }
    name = str(verdict.get("verdict"))
    return f"{said.get(name, f'Verdict: {name}')}{move}."


def gloss(verdict: Mapping[str, Any] | None, tolerance: Sequence[float]) -> list[str]:
    """Return the lines below the verdict: what R is, what would settle it, the verify's notes."""
    if verdict is None:
        return []
    confidence = verdict.get("confidence")
    lines = [
        "R is the loss that quantized inputs add over the loss that quantized weights add; from "
        f"{tolerance[0]:g} to {tolerance[1]:g} the two count as equal."
        + (f" Intervals are {percent(confidence)}." if confidence is not None else "")
    ]
    seeds, allowed = verdict.get("seeds"), verdict.get("seeds_allowed")
    if seeds is not None and allowed is not None and seeds < allowed:
        lines.append(f"Settled after {seeds} of at most {allowed} seeds.")
    noise = verdict.get("noise") or {}
    apart, moves = noise.get("bf16_seeds"), noise.get("seed_std")
    if apart is not None and moves is not None:
        lines.append(
            f"Two bf16 seeds differ by {apart:.4f} nats per token; the delta of an arm, paired by "
            f"seed, moves by {moves:.4f}."
        )
    needed = verdict.get("needed")
    if needed:
        lines.append(
            f"About {plural(needed['seeds'], 'seed')} on {needed['heldout_tokens']:,} held-out "
            f"tokens would settle it (--seeds {needed['seeds']} "
            f"--eval-tokens {needed['heldout_tokens']})."
        )
    elif verdict.get("verdict") == "undetermined" and not verdict.get("missing"):
        lines.append("No number of seeds on this text would settle it: train longer (--tokens).")
    return lines + [str(note) for note in verdict.get("notes") or ()]
