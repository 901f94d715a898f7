"""What predicts the damage of quantizing one tensor: estimates against exhaustive measurement.

    python benchmarks/sensitivity_agreement.py [MODEL] [--tokens N] [--every K] [--format F]
        [--device D]

Every input (with all its fused readers) and every weight of the blocks is quantized by itself, and
the change of loss and the KL divergence are measured on the calibration tokens. Against these stand
the estimates: kurtosis and the relative quantization error (SQNR in another unit) from a forward
pass, the gradient's estimates from backward passes, and the last layer's relative error, which
itself costs the exhaustive measurement. Spearman's rank correlation tells whether the order is
right, the median ratio of estimate to measurement whether the size is: over the tensors whose
measured value is above two standard errors.

Estimates from as many other tokens show what is left of the agreement where the noise of the sample
is not shared, and what the planner makes of them: `prediction` is planner/predict.py's,
`gradient_delta_loss` what it would be without. `rmse_stderrs` is the root mean square of the
differences from the measured loss, each over the standard error of both.

Times are CPU seconds of this process, or on a GPU seconds of the clock. A pair is a (tensor,
format): an input counts once, however many linears read it. Exhaustive is the measured time of a
pair at one format, where up to eight pairs share an unquantized pass, times all pairs of all blocks
at as many formats; its floor is a plain forward pass with its loss for each pair. The estimate is
its whole profile of inputs: forward pass with statistics of the inputs and their errors in every
format, and all backward passes. With --every K only each K-th block is measured, and the
estimate timed with the first set alone.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from scipy.stats import spearmanr

from bitplan.formats import Format, parse_format, parse_formats
from bitplan.options import ProfileOptions
from bitplan.planner.predict import predict
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.inputs import Inputs, measure_inputs
from bitplan.probe.interventions import Intervention, measure_interventions
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.sensitivity import summed_loss
from bitplan.probe.tensor_stats import TensorStats
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import hardware, versions, write_json
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site
from bitplan.tables import SENSITIVITY

RESULT = Path(__file__).parent / "results" / "sensitivity_agreement.json"
EMBEDDED = Path(__file__).parents[1] / "core" / "embedded"
TARGETS = ("loss", "kl")
ESTIMATES = {
    "kurtosis": "forward",
    "relative_error": "forward",
    "gradient_delta_loss": "backwards",
    "gradient_kl": "backwards",
    "gradient_delta_loss_other_tokens": "backwards",
    "gradient_kl_other_tokens": "backwards",
    "prediction_other_tokens": "backwards",
    "last_layer_error": "exhaustive",
}
# The estimates that are meant in nats, and what they estimate.
IN_NATS = {
    "gradient_delta_loss": "loss",
    "gradient_kl": "kl",
    "gradient_delta_loss_other_tokens": "loss",
    "gradient_kl_other_tokens": "kl",
    "prediction_other_tokens": "loss",
}
# Sets of formats that the estimate is timed with: the profile's default, and one of each kind.
TIMED = (
    ("int4-g128", "int8-g128"),
    ("int4-g32", "int4-g64", "int4-g128", "int8-g128", "mxfp4", "nvfp4"),
)


class Clock:
    """Seconds since it was made: of the CPU, or of the clock where a GPU works."""

    def __init__(self) -> None:
        self._start = self._now()

    def seconds(self) -> float:
        return self._now() - self._start

    def _now(self) -> float:
        if not torch.cuda.is_initialized():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def units(items: Sequence[LinearModule], every: int) -> dict[tuple[str, str], list[LinearModule]]:
    """Return the tensors to measure: (name, operand) to the linears that hold or read it."""
    found: dict[tuple[str, str], list[LinearModule]] = {}
    for item in items:
        one = item.linear
        if one.role not in PLANNED_ROLES or (one.block or 0) % every:
            continue
        found.setdefault((one.fused or one.module, "input"), []).append(item)
        found.setdefault((one.module, "weight"), []).append(item)
    return found


def forward_estimates(
    items: Sequence[LinearModule], inputs: Inputs, fmt: Format
) -> dict[Site, Any]:
    """Return kurtosis and relative error by site."""
    found = {}
    for item in items:
        weight = item.weight().detach()
        stats = TensorStats(weight.shape[1], operand="weight", formats=[fmt], device=weight.device)
        stats.update(weight)
        seen = {"weight": stats, "input": inputs.stats.get(item.linear.module)}
        for operand in OPERANDS:
            if (stat := seen[operand]) is not None:
                summary = stat.summary()
                error = {r["format"]: r["relative_error"] for r in summary.error_rows()}[fmt.name]
                kurtosis = summary.row()["kurtosis"]
                found[item.linear.site(operand)] = {"kurtosis": kurtosis, "relative_error": error}
    return found


def rows_of(
    checkpoint: Checkpoint, ids: torch.Tensor, other_ids: torch.Tensor, fmt: Format, every: int
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Return a row per tensor with every estimate and both targets, and the times."""
    model, items = checkpoint.model, find_linears(checkpoint.model)
    chosen = units(items, every)
    speed, found = [], []
    for names in TIMED if every == 1 else TIMED[:1]:
        formats = parse_formats((fmt.name, *names))
        clock = Clock()
        found.append(measure_inputs(model, items, ids, formats, has_loss=True, sensitivity=True))
        speed.append({"formats": [f.name for f in formats], "estimate_s": clock.seconds()})
    inputs = found[0]
    other = measure_inputs(model, items, other_ids, (fmt,), has_loss=True, sensitivity=True)
    here, there = (
        {row["site"]: row for row in one.sensitivity or () if row["format"] == fmt.name}
        for one in (inputs, other)
    )
    predicted = predictions(other.sensitivity or (), fmt)
    clock = Clock()
    with torch.no_grad():
        for one in ids.split(4):
            one = one.to(model.device)
            summed_loss(model(input_ids=one, use_cache=False).logits, one)
    floor = clock.seconds()
    asked = [
        Intervention(f"{name}:{operand}", {i.linear.site(operand): fmt for i in readers})
        for (name, operand), readers in chosen.items()
    ]
    clock = Clock()
    effects = [e for wave in measure_interventions(model, items, ids, asked) for e in wave]
    per_pair = clock.seconds() / len(asked)
    for row in speed:
        row["pairs"] = len(units(items, 1)) * len(row["formats"])
        row["exhaustive_over_estimate"] = row["pairs"] * per_pair / row["estimate_s"]
        row["floor_over_estimate"] = row["pairs"] * floor / row["estimate_s"]
    forward = forward_estimates(items, inputs, fmt)
    rows = []
    for effect in effects:
        sites = [str(site) for site in effect.intervention.formats]
        first = next(iter(effect.intervention.formats))
        rows.append(
            {
                "tensor": effect.intervention.name,
                "operand": first.operand,
                **forward[first],
                "gradient_delta_loss": sum(here[site]["delta_loss"] for site in sites),
                "gradient_kl": sum(here[site]["kl"] for site in sites),
                "gradient_delta_loss_other_tokens": sum(there[s]["delta_loss"] for s in sites),
                "gradient_kl_other_tokens": sum(there[site]["kl"] for site in sites),
                "stderr_other_tokens": sum(there[site]["stderr"] or 0.0 for site in sites),
                "prediction_other_tokens": sum(predicted[site] for site in sites),
                "last_layer_error": effect.last_layer_error,
                "loss": effect.delta_loss,
                "loss_stderr": effect.stderr,
                "kl": effect.kl,
                "kl_stderr": effect.kl_stderr,
            }
        )
    times = {"forward_pass_s": floor, "exhaustive_s_per_pair": per_pair, "estimates": speed}
    return pl.DataFrame(rows), times


def predictions(rows: Sequence[dict[str, Any]], fmt: Format) -> dict[str, float]:
    """Return the planner's predicted change of loss by site, of the linears it plans."""
    planned = [row for row in rows if ".layers." in row["site"]]
    sites = [row["site"] for row in planned]
    is_input = np.array([site.endswith(":input") for site in sites])
    found = predict(SENSITIVITY.frame(planned), sites, is_input, (fmt,))
    return dict(zip(sites, found.loss[:, 0].tolist(), strict=True))


def agreement(rows: pl.DataFrame) -> dict[str, Any]:
    """Return how far each estimate agrees with each target."""
    estimates = {}
    for name in ESTIMATES:
        found = {
            f"spearman_{t}": round(float(spearmanr(rows[name], rows[t])[0]), 3) for t in TARGETS
        }
        if (target := IN_NATS.get(name)) is not None:
            clear = rows.filter(pl.col(target) > 2 * pl.col(f"{target}_stderr"))
            ratio = (clear[name] / clear[target]).median()
            found["median_ratio"] = None if ratio is None else round(float(ratio), 3)
            found["ratio_over_tensors"] = len(clear)
        if name.endswith("_other_tokens") and target == "loss":
            noise = (rows["loss_stderr"] ** 2 + rows["stderr_other_tokens"] ** 2).sqrt()
            squares = ((rows[name] - rows["loss"]) / noise) ** 2
            found["rmse_stderrs"] = round(float(squares.mean()) ** 0.5, 2)  # type: ignore[arg-type]
        estimates[name] = found
    return {
        "tensors": len(rows),
        "measured_loss_below_zero": len(rows.filter(pl.col("loss") < 0)),
        "measured_loss_within_two_stderr_of_zero": len(
            rows.filter(pl.col("loss").abs() < 2 * pl.col("loss_stderr"))
        ),
        "spearman_loss_kl": round(float(spearmanr(rows["loss"], rows["kl"])[0]), 3),
        "estimates": estimates,
        "largest_kurtosis": list(_ranked(rows, "kurtosis")),
        "largest_loss": list(_ranked(rows, "loss")),
    }


def _ranked(rows: pl.DataFrame, by: str, count: int = 5) -> Iterator[dict[str, Any]]:
    """Yield the tensors with the most of something, with their ranks by kurtosis and by damage."""
    ranks = [
        pl.col(name).rank("ordinal", descending=True).alias(f"rank_by_{name}")
        for name in ("kurtosis", "loss", "kl")
    ]
    for row in rows.with_columns(ranks).sort(by, descending=True).head(count).to_dicts():
        yield {
            "tensor": row["tensor"],
            "kurtosis": round(row["kurtosis"], 1),
            "loss": float(f"{row['loss']:.3g}"),
            "kl": float(f"{row['kl']:.3g}"),
            **{name: row[name] for name in row if name.startswith("rank_by_")},
        }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['tensors']} tensors, loss and KL agree at {found['spearman_loss_kl']}")
    print(
        f"{'estimate':34}{'cost':>12}{'with loss':>12}{'with KL':>12}{'median ratio':>14}"
        f"{'rmse/stderr':>13}"
    )
    for estimate, row in found["estimates"].items():
        ratio = row.get("median_ratio")
        print(
            f"{estimate:34}{ESTIMATES[estimate]:>12}{row['spearman_loss']:>12}"
            f"{row['spearman_kl']:>12}{'' if ratio is None else ratio:>14}"
            f"{row.get('rmse_stderrs', ''):>13}"
        )


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--tokens", type=int, default=ProfileOptions.tokens)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--format", default="int4-g128")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="each K-th block alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", action="append", default=[], metavar="PATH")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    fmt = parse_format(asked.format)
    checkpoint = load_checkpoint(asked.model, device=asked.device)
    corpus = load_text(tuple(asked.data))
    ids = tokenize(
        corpus,
        checkpoint.tokenizer,
        "calibration",
        tokens=2 * asked.tokens,
        seq_len=asked.seq_len,
        seed=0,
    )
    ids, other_ids = ids.chunk(2)
    rows, times = rows_of(checkpoint, ids, other_ids, fmt, asked.every)
    found = {f"{operand}s": agreement(rows.filter(operand=operand)) for operand in OPERANDS}
    found["inputs and weights"] = agreement(rows)
    for name, one in found.items():
        show(f"{name} at {fmt}", one)
    for row in times["estimates"]:
        print(
            f"\n{len(row['formats'])} formats, {row['pairs']} pairs: exhaustive over estimate "
            f"{row['exhaustive_over_estimate']:.1f}, its floor {row['floor_over_estimate']:.1f}"
        )
    result = {
        "model": Path(asked.model).name,
        "content_hash": checkpoint.content_hash,
        "weights_note": checkpoint.weights_note,
        "text": {"source": corpus.source, "content_hash": corpus.content_hash},
        "tokens": ids.numel(),
        "seq_len": ids.shape[1],
        "every_block": asked.every,
        "format": fmt.name,
        "agreement": found,
        "seconds": times,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_initialized() else hardware(),
        "versions": versions(),
    }
    write_json(asked.output, result)


if __name__ == "__main__":
    main()
