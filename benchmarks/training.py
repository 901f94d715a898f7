"""What benchmarks that train arms share: a command line, a run and verify's options; kurtosis."""

import argparse
from pathlib import Path
from typing import Any

import polars as pl

MEASURED = ("bf16", "w4a4", "planned")
"""Arms whose inputs are told of."""
COUNTS = ("tokens", "seeds", "batch_size", "seq_len", "eval_tokens", "gpus", "workers")


def asked(
    description: str, result: Path, **more: dict[str, Any]
) -> tuple[Path, Path, dict[str, Any]]:
    """Parse the command line; return the run, the file to write and the options that were given.

    more: further options of a benchmark's own, by name, as argparse takes them.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=result)
    options: dict[str, dict[str, Any]] = {
        **{name: {"type": int} for name in COUNTS},
        "lr": {"type": float},
        "device": {},
        "data": {"action": "append"},
        "from_scratch": {},
        "arms": {"type": lambda names: tuple(names.split(","))},
        "attribute": {"action": "store_true", "default": None},
        **more,
    }
    for name, settings in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)
    given = {k: v for k, v in vars(parser.parse_args()).items() if v is not None}
    given |= {"data": tuple(given["data"])} if "data" in given else {}
    return given.pop("run"), given.pop("to"), given


def kurtosis_by_role(stats: pl.DataFrame, step: Any) -> dict[str, float]:
    """Return the median kurtosis of the inputs of tables.PROFILE at a step, by role."""
    rows = stats.filter(pl.col("operand") == "input", pl.col("step") == step)
    return dict(rows.group_by("role").agg(pl.col("kurtosis").median()).sort("role").iter_rows())
