"""What predicts the damage of quantizing one tensor: estimates against exhaustive measurement.

    python benchmarks/sensitivity_agreement.py [MODEL] [--tokens N] [--every K] [--formats A,B]

Every input (with all its fused readers) and every weight of the blocks is quantized by itself, and
the change of loss and the KL divergence are measured on the calibration tokens. Against these stand
the estimates: kurtosis and the relative quantization error (SQNR in another unit) from a forward
pass, the gradient's estimates from backward passes, and the last layer's relative error, which
itself costs the exhaustive measurement. Spearman's rank correlation tells whether the order is
right, the median ratio of estimate to measurement whether the size is: over the tensors whose
measured value is above two standard errors. Estimates from as many other tokens show what is left
of the agreement where the noise of the sample is not shared.

Times are CPU seconds of this process; those of the backward passes and of the exhaustive
measurement are for all formats asked. With --every K only each K-th block is measured, and the time
of all blocks is inferred.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import torch
from scipy.stats import spearmanr

from bitplan.formats import Format, parse_formats
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.inputs import Inputs, measure_inputs
from bitplan.probe.interventions import Intervention, measure_interventions
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.tensor_stats import TensorStats
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import hardware, versions, write_json
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site

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
    "last_layer_error": "exhaustive",
}
# The estimates that are meant in nats, and what they estimate.
IN_NATS = {
    "gradient_delta_loss": "loss",
    "gradient_kl": "kl",
    "gradient_delta_loss_other_tokens": "loss",
    "gradient_kl_other_tokens": "kl",
}


class Clock:
    """CPU seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self._start


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
    checkpoint: Checkpoint,
    ids: torch.Tensor,
    other_ids: torch.Tensor,
    formats: Sequence[Format],
    every: int,
) -> tuple[pl.DataFrame, dict[str, float]]:
    """Return a row per tensor and format with every estimate and both targets, and the times."""
    model, items = checkpoint.model, find_linears(checkpoint.model)
    chosen = units(items, every)
    times = {}
    clock = Clock()
    measure_inputs(model, items, ids, formats, has_loss=True, sensitivity=False)
    times["forward_s"] = clock.seconds()
    clock = Clock()
    inputs = measure_inputs(model, items, ids, formats, has_loss=True, sensitivity=True)
    times["forward_and_backward_s"] = clock.seconds()
    other = measure_inputs(model, items, other_ids, formats, has_loss=True, sensitivity=True)
    gradient, elsewhere = (
        {(row["site"], row["format"]): row for row in found.sensitivity or ()}
        for found in (inputs, other)
    )
    asked = [
        Intervention(f"{name}:{operand}", {i.linear.site(operand): fmt for i in readers})
        for fmt in formats
        for (name, operand), readers in chosen.items()
    ]
    clock = Clock()
    effects = [e for wave in measure_interventions(model, items, ids, asked) for e in wave]
    times["exhaustive_s"] = clock.seconds() * len(units(items, 1)) / len(chosen)
    by_format = {fmt: forward_estimates(items, inputs, fmt) for fmt in formats}
    rows = []
    for effect in effects:
        sites = effect.intervention.formats
        (first, fmt), *_ = sites.items()
        here, there = (
            [estimates[str(site), fmt.name] for site in sites]
            for estimates in (gradient, elsewhere)
        )
        rows.append(
            {
                "tensor": effect.intervention.name,
                "operand": first.operand,
                "format": fmt.name,
                **by_format[fmt][first],
                "gradient_delta_loss": sum(row["delta_loss"] for row in here),
                "gradient_kl": sum(row["kl"] for row in here),
                "gradient_delta_loss_other_tokens": sum(row["delta_loss"] for row in there),
                "gradient_kl_other_tokens": sum(row["kl"] for row in there),
                "last_layer_error": effect.last_layer_error,
                "loss": effect.delta_loss,
                "loss_stderr": effect.stderr,
                "kl": effect.kl,
                "kl_stderr": effect.kl_stderr,
            }
        )
    return pl.DataFrame(rows), times


def agreement(rows: pl.DataFrame) -> dict[str, Any]:
    """Return how far each estimate agrees with each target, of one operand and format."""
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
    print(f"{'estimate':34}{'cost':>12}{'with loss':>12}{'with KL':>12}{'median ratio':>14}")
    for estimate, row in found["estimates"].items():
        ratio = row.get("median_ratio")
        print(
            f"{estimate:34}{ESTIMATES[estimate]:>12}{row['spearman_loss']:>12}"
            f"{row['spearman_kl']:>12}{'' if ratio is None else ratio:>14}"
        )


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--formats", default="int4-g128")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="each K-th block alone")
    parser.add_argument("--data", action="append", default=[], metavar="PATH")
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    formats = parse_formats(asked.formats.split(","))
    checkpoint = load_checkpoint(asked.model, device="cpu")
    ids = tokenize(
        load_text(tuple(asked.data)),
        checkpoint.tokenizer,
        "calibration",
        tokens=2 * asked.tokens,
        seq_len=asked.seq_len,
        seed=0,
    )
    ids, other_ids = ids.chunk(2)
    rows, times = rows_of(checkpoint, ids, other_ids, formats, asked.every)
    found = {
        f"{operand}s at {fmt.name}": agreement(rows.filter(operand=operand, format=fmt.name))
        for fmt in formats
        for operand in OPERANDS
    }
    for name, one in found.items():
        show(name, one)
    speedup = times["exhaustive_s"] / times["forward_and_backward_s"]
    print(f"\nCPU seconds: {times}; exhaustive over estimate: {speedup:.1f}")
    result = {
        "model": Path(asked.model).name,
        "content_hash": checkpoint.content_hash,
        "weights_note": checkpoint.weights_note,
        "tokens": ids.numel(),
        "seq_len": ids.shape[1],
        "every_block": asked.every,
        "agreement": found,
        "cpu_seconds": {name: round(value, 1) for name, value in times.items()},
        "exhaustive_inferred_from_share": round(1 / asked.every, 3),
        "exhaustive_over_estimate": round(speedup, 1),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(asked.output, result)


if __name__ == "__main__":
    main()
