"""Synthetic runs: the tables of a small Llama that was never there, sensitivities planted."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from bitplan.formats import parse_format
from bitplan.rundir import RunDir
from bitplan.sites import Linear, describe
from bitplan.tables import ERRORS, PROFILE, SENSITIVITY

FORMATS = ("int4-g128", "int8-g128")
LLAMA = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 160),
    "mlp.up_proj": (64, 160),
    "mlp.down_proj": (160, 64),
}


class Tables:
    """Profile, errors and sensitivity of a synthetic model, and a run directory of them."""

    def __init__(
        self,
        linears: Sequence[Linear],
        *,
        formats: Sequence[str] = FORMATS,
        seed: int = 0,
        inputs: bool = True,
        tokens: dict[str, int] | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        sites = [
            (linear, operand)
            for linear in linears
            for operand in ("weight", "input")
            if operand == "weight" or (inputs and linear.role != "embed")
        ]
        profile, errors, sensitivity = [], [], []
        for linear, operand in sites:
            site = f"{linear.module}:{operand}"
            count = (tokens or {}).get(linear.module, 1000)
            profile.append(
                {
                    "site": site,
                    "module": linear.module,
                    "operand": operand,
                    "role": linear.role,
                    "block": linear.block,
                    "expert": linear.expert,
                    "fused": linear.fused,
                    "step": 0,
                    "in_features": linear.in_features,
                    "out_features": linear.out_features,
                    "tokens": count if operand == "input" else None,
                    "kurtosis": float(10 ** rng.uniform(0.5, 2.5)),
                }
            )
            harm = 10 ** rng.normal(-3, 1)
            for name in formats:
                fmt = parse_format(name)
                if not fmt.applies_to(operand):
                    continue
                size = 4.0 ** (4 - fmt.bits) * 10 ** rng.normal(0, 0.1)
                errors.append(
                    {"site": site, "step": 0, "format": name, "relative_error": 0.01 * size}
                )
                sensitivity.append(
                    {
                        "site": site,
                        "format": name,
                        "method": "gradient",
                        "delta_loss": harm * size,
                        "stderr": 0.1 * harm * size,
                    }
                )
        self.profile = PROFILE.frame(profile)
        self.errors = ERRORS.frame(errors)
        self.sensitivity: pl.DataFrame | None = SENSITIVITY.frame(sensitivity)

    def write(self, path: Path) -> Path:
        """Write the tables as a finished profile stage; return the run's path."""
        run = RunDir.create(path)
        frames = {"profile.parquet": self.profile, "errors.parquet": self.errors}
        if self.sensitivity is not None:
            frames["sensitivity.parquet"] = self.sensitivity
        with run.lock():
            for name, frame in frames.items():
                run.write_table(name, frame)
            run.finish(
                "profile", {}, list(frames), model={"source": "synthetic", "content_hash": "0" * 16}
            )
        return path


def llama(blocks: int = 3, *, extra: bool = True, keep: Sequence[str] = ()) -> list[Linear]:
    """Return the linears of a small Llama, with embedding and lm_head if `extra`."""
    linears = [
        Linear(f"model.layers.{block}.{name}", *shape)
        for block in range(blocks)
        for name, shape in LLAMA.items()
        if not keep or name.rpartition(".")[2] in keep
    ]
    if extra:
        linears.insert(0, Linear("model.embed_tokens", 64, 500))
        linears.append(Linear("lm_head", 64, 500))
    return describe(linears, family="llama", hidden_size=64)


@pytest.fixture(scope="session")
def tables() -> Callable[..., Tables]:
    """Return a maker of synthetic tables: of a Llama of `blocks`, or of given `linears`."""

    def make(blocks: int = 3, *, linears: Sequence[Linear] | None = None, **options: Any) -> Tables:
        extra, keep = options.pop("extra", True), options.pop("keep", ())
        return Tables(linears or llama(blocks, extra=extra, keep=keep), **options)

    return make
