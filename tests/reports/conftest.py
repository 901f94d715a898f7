"""A synthetic run directory, complete and realistic: FC2 inputs with outliers, noisy trainings."""

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bitplan import tables
from bitplan.rundir import RunDir

ROLE_OF = {
    "self_attn.q_proj": "qkv",
    "self_attn.k_proj": "qkv",
    "self_attn.v_proj": "qkv",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "fc1",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
FORMATS = ("int4-g128", "int8-g128")
ARMS = {
    "bf16": 0.0,
    "w4a16": 0.0058,
    "w16a4": 0.0310,
    "w4a4": 0.0362,
    "planned": 0.0131,
    "planned-inputs": 0.0070,
    "planned-weights": 0.0058,
}
# The last is the plan that was chosen.
RULES = (
    ("uniform", 4.125, 0.041),
    ("uniform-8", 8.125, 0.0028),
    ("fc2", 5.31, 0.0262),
    ("first-last", 5.45, 0.0305),
    ("kurtosis", 5.31, 0.0258),
    ("sqnr", 5.31, 0.0231),
    ("plan", 5.32, 0.0191),
)
STAGES = ("profile", "plan", "verify")

Row = dict[str, Any]


class Synthetic:
    """The tables of a made-up run, as rows, so that tests can count them by naive loops."""

    def __init__(
        self,
        *,
        blocks: int = 6,
        seed: int = 0,
        prefix: str = "model.layers",
        token: str = "\n\n",
        source: str = "/models/tiny-llama",
        weights_note: str | None = None,
        experts: int = 0,
    ) -> None:
        self.random = random.Random(seed)
        self.blocks, self.token, self.source, self.note = blocks, token, source, weights_note
        self.modules: list[tuple[str, str, int | None, int | None]] = []
        for block in range(blocks):
            for leaf, role in ROLE_OF.items():
                if experts and role in ("fc1", "fc2"):
                    stem, _, last = leaf.partition(".")
                    self.modules += [
                        (f"{prefix}.{block}.{stem}.experts.{e}.{last}", role, block, e)
                        for e in range(experts)
                    ]
                else:
                    self.modules.append((f"{prefix}.{block}.{leaf}", role, block, None))
        self.modules.append(("lm_head", "lm_head", None, None))
        self.profile = [row for m in self.modules for row in self._profile_rows(*m)]
        self.profile.append(self._weight_row("model.embed_tokens", "embed", None, None))
        self.outliers = self._outlier_rows(prefix)
        self.errors = [row for p in self.profile for row in self._error_rows(p)]
        self.sensitivity = [row for p in self.profile for row in self._sensitivity_rows(p)]
        self.plan_sites = {p["site"]: self._plan_entry(p) for p in self.profile}

    def _kurtosis(self, role: str, block: int | None) -> float:
        base = {"qkv": 6.0, "o": 11.0, "fc1": 7.0, "fc2": 190.0}.get(role, 5.0)
        spike = 4.0 if role == "fc2" and block == 1 else 1.0
        return base * spike * math.exp(self.random.gauss(0, 0.35))

    def _profile_rows(
        self, module: str, role: str, block: int | None, expert: int | None
    ) -> Iterator[Row]:
        yield self._weight_row(module, role, block, expert)
        kurtosis = self._kurtosis(role, block)
        yield self._row(module, "input", role, block, expert, kurtosis) | {
            "tokens": 16384,
            "kurtosis_without_first_token": kurtosis * 0.9,
            "kurtosis_without_top_tokens": min(kurtosis, 4 + kurtosis / 12),
            "top_channel_stability": 0.9,
            "top_channel_overlap": 0.5 if role in ("qkv", "fc1") and expert is None else None,
            "top_channels": [
                {"channel": 17, "absmax": 3.0 * kurtosis, "rms": 2.0, "stability": 1.0},
                {"channel": 40 + (block or 0), "absmax": 9.0, "rms": 1.0, "stability": 0.8},
            ],
            "top_tokens": [
                {"sequence": 0, "position": 7, "absmax": 3.0 * kurtosis, "text": self.token}
            ],
        }

    def _weight_row(self, module: str, role: str, block: int | None, expert: int | None) -> Row:
        alignment = {"gate_up_correlation": 0.2, "gate_up_correlation_max": 0.5 + (block or 0) / 20}
        return self._row(
            module, "weight", role, block, expert, 3.2 + abs(self.random.gauss(0, 0.8))
        ) | (alignment if role == "fc1" else {})

    def _outlier_rows(self, prefix: str) -> list[Row]:
        place = {"sequence": 0, "position": 0, "text": self.token, "channel": 17}
        massive = {"kind": "massive_activation", "tokens": 4, "first_tokens": 4, **place}
        rows: list[Row] = [
            massive
            | {"module": f"{prefix}.{b}", "block": b, "value": 900.0 - b, "value_over_median": 2e3}
            for b in range(1, self.blocks)
        ]
        return [
            *rows,
            {
                "kind": "super_weight",
                "module": f"{prefix}.1.mlp.down_proj",
                "block": 1,
                **place,
                "value": 880.0,
                "value_over_median": 3e3,
                "input_channel": 5,
                "input_value": 300.0,
                "input_over_median": 5e3,
                "weight": 2.2,
                "share": 0.75,
            },
        ]

    def _row(
        self,
        module: str,
        operand: str,
        role: str,
        block: int | None,
        expert: int | None,
        kurtosis: float,
    ) -> Row:
        return {
            "site": f"{module}:{operand}",
            "module": module,
            "operand": operand,
            "role": role,
            "block": block,
            "expert": expert,
            "step": 0,
            "in_features": 256,
            "out_features": 256,
            "count": 65536,
            "mean": 0.0,
            "std": 1.0,
            "kurtosis": kurtosis,
            "excess_kurtosis": kurtosis - 3,
            "absmax": 3.0 * kurtosis,
            "max_over_rms": 2.0 * math.sqrt(kurtosis),
            "outlier_share": 0.001,
            "top_channels": [{"channel": 17, "absmax": 3.0 * kurtosis, "rms": 2.0}],
        }

    def _error_rows(self, row: Row) -> Iterator[Row]:
        for i, name in enumerate(FORMATS):
            sqnr = 22.0 + 24.1 * i - 2.4 * math.log(row["kurtosis"]) + self.random.gauss(0, 0.4)
            yield {
                "site": row["site"],
                "step": 0,
                "format": name,
                "relative_error": 10 ** (-sqnr / 10),
                "sqnr_db": sqnr,
            }

    def _sensitivity_rows(self, row: Row) -> Iterator[Row]:
        if row["role"] in ("embed", "lm_head"):
            return
        scale = 4e-4 if row["operand"] == "input" else 1.5e-4
        last = 8.0 if row["block"] == self.blocks - 1 and row["role"] == "fc1" else 1.0
        loss = scale * last * row["kurtosis"] ** 0.25 * math.exp(self.random.gauss(0, 0.9))
        if self.random.random() < 0.12:
            loss = -0.1 * loss
        for i, name in enumerate(FORMATS):
            yield {
                "site": row["site"],
                "format": name,
                "method": "gradient",
                "delta_loss": loss / 300**i,
                "stderr": abs(loss) / 8,
                "kl": abs(loss),
            }

    def _plan_entry(self, row: Row) -> Row:
        planned = row["role"] not in ("embed", "lm_head")
        high = row["operand"] == "input" and (
            row["role"] == "fc2" or (row["role"] == "o" and row["block"] % 3 == 1)
        )
        name = FORMATS[high] if planned else "bf16"
        loss = 1e-6 if high else 4e-4
        return {
            "format": name,
            "role": row["role"],
            "block": row["block"],
            "planned": planned,
            "bits": 8.125 if high else 4.125,
            "delta_loss": loss if planned else None,
            "reason": f"{name} costs {loss:g} nats; the next best would cost 0.003 more"
            if planned
            else f"{row['role']} stays bf16",
        }

    def plan(self) -> Row:
        """Return plan.json."""
        return {
            "schema": 1,
            "plan_id": "0123456789abcdef",
            "made_by": "optimal",
            "budget": {"input_bits": 5.5},
            "device": None,
            "predicted": {
                "objective": 0.0191,
                "delta_loss": 0.0191,
                "R": 1.1,
                "weight_bits": 4.125,
                "input_bits": 5.32,
                "bytes": 1e6,
                "bit_ops": 2e9,
                "time_ms": None,
            },
            "optimality_gap": 0.0,
            "formats": list(FORMATS),
            "pins": [],
            "notes": [],
            "sites": self.plan_sites,
            "provenance": {},
        }

    def frontier(self) -> list[Row]:
        """Return the rows of frontier.parquet."""
        rows = [
            {
                "label": "optimal",
                "budget": "input_bits",
                "limit": bits,
                "cost": bits,
                "delta_loss": 0.041 * math.exp(-(bits - 4.125) / 1.5),
                "weight_bits": 4.125,
                "input_bits": bits,
                "plan_id": f"{i:016x}",
            }
            for i, bits in enumerate(4.125 + 4 * k / 24 for k in range(25))
        ]
        for name, bits, loss in RULES:
            same = {"label": name, "limit": None, "cost": bits, "input_bits": bits}
            rows.append(rows[0] | same | {"delta_loss": loss, "plan_id": name})
        rows[-1]["plan_id"] = self.plan()["plan_id"]
        return rows

    def verdict(self) -> Row:
        """Return verdict.json."""
        return {
            "schema": 1,
            "verdict": "converged",
            "sentence": "converged: under the plan the inputs' error is the weights'.",
            "confidence": 0.95,
            "missing": [],
            "needed": None,
            "heldout_tokens": 16384,
            "notes": [],
            "R": {
                "before": {"estimate": 5.34, "low": 4.9, "high": 5.87},
                "after": {"estimate": 1.05, "low": 0.93, "high": 1.19},
            },
            "delta": {
                arm: {"estimate": d, "low": d - 0.0008, "high": d + 0.0008, "seeds": 3}
                for arm, d in ARMS.items()
            },
            "attribution": {
                role: {
                    operand: {"estimate": d, "low": d - 0.0008, "high": d + 0.0008}
                    for operand, d in (("input", given_back), ("weight", given_back / 6))
                }
                for role, given_back in (("qkv", 0.006), ("fc1", 0.004), ("fc2", 0.014))
            },
            "tolerance": [0.8, 1.25],
            "noise": {"seed_std": 0.0003, "evaluation_stderr": 0.0002, "floor": 0.0009},
        }

    def metrics(self, arm: str, seed: int, steps: int) -> list[Row]:
        """Return the rows of one arm's metrics.parquet; the noise of a step is shared by arms."""
        shared = random.Random(1000 + seed)
        own = random.Random(f"{arm}{seed}")
        rows = []
        for step in range(1, steps + 1):
            progress = step / steps
            noise = shared.gauss(0, 0.06)
            gap = ARMS[arm] * (0.4 + 0.6 * math.exp(-4 * progress) + 0.6 * progress)
            loss = 1.9 - 0.15 * progress + noise + gap + own.gauss(0, 0.0012)
            rows.append(
                {
                    "step": step,
                    "tokens": step * 2048,
                    "loss": loss,
                    "lr": 3e-4 * (1 - progress),
                    "grad_norm": 1.0,
                    "seconds": 0.5 * step,
                }
            )
        return rows

    def stats(self, arm: str, steps: int) -> list[Row]:
        """Return the rows of one arm's stats.parquet: outliers shrink, FC2's least."""
        rows = []
        for step in range(0, steps + 1, max(1, steps // 8)):
            for row in self.profile:
                if row["operand"] == "input":
                    decay = 0.9 if row["role"] == "fc2" or arm == "bf16" else 0.6
                    kurtosis = 3 + (row["kurtosis"] - 3) * (1 - (1 - decay) * step / steps)
                    rows.append(row | {"step": step, "kurtosis": kurtosis})
        return rows

    def write(
        self,
        path: Path,
        *,
        stages: tuple[str, ...] = STAGES,
        seeds: int = 3,
        steps: int = 40,
        notes: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the run directory, up to the last of `stages`."""
        run = RunDir.create(path)
        with run.lock():
            if "profile" in stages:
                self._write_profile(run)
            if "plan" in stages:
                run.write_json("plan.json", self.plan())
                run.write_table("frontier.parquet", tables.FRONTIER.frame(self.frontier()))
                files = ["plan.json", "frontier.parquet"]
                run.finish("plan", {"input_bits": 5.5, "pins": ["*.0.*=int8-g128"]}, files)
            if "verify" in stages:
                self._write_arms(run, seeds, steps)
                run.write_json("verdict.json", self.verdict() | dict(notes or {}))
                run.finish("verify", {"seeds": seeds, "steps": steps}, ["verdict.json"])
        return path

    def _write_profile(self, run: RunDir) -> None:
        for table, rows in (
            (tables.PROFILE, self.profile),
            (tables.ERRORS, self.errors),
            (tables.SENSITIVITY, self.sensitivity),
            (tables.OUTLIERS, self.outliers),
        ):
            run.write_table(table.file, table.frame(rows))
        run.finish(
            "profile",
            {"model": self.source, "tokens": 16384, "formats": list(FORMATS)},
            ["profile.parquet", "errors.parquet", "sensitivity.parquet", "outliers.parquet"],
            model={
                "source": self.source,
                "content_hash": "feedfacefeedface",
                "family": "llama",
                "architecture": "LlamaForCausalLM",
                "num_parameters": 5_243_136,
                "num_non_embedding_parameters": 3_145_984,
                "weights_note": self.note,
            },
            data={"name": "Python standard library", "content_hash": "0ddba11", "documents": 512},
        )

    def _write_arms(self, run: RunDir, seeds: int, steps: int) -> None:
        for arm, delta in ARMS.items():
            for seed in range(seeds):
                place = f"arms/{arm}/seed-{seed}"
                metrics = self.metrics(arm, seed, steps)
                run.write_table(f"{place}/metrics.parquet", tables.METRICS.frame(metrics))
                stats = tables.PROFILE.frame(self.stats(arm, steps))
                run.write_table(f"{place}/stats.parquet", stats)
                record = {
                    "arm": arm,
                    "seed": seed,
                    "same_as": None,
                    "tokens": steps * 2048,
                    "loss": {"heldout": 1.8 + seed * 0.01 + delta + 0.0002 * (seed - 1)},
                    "seconds": 21.0,
                }
                run.write_json(f"{place}/record.json", record)


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Return a function that writes a synthetic run and returns its directory."""

    def make(name: str = "run", *, stages: tuple[str, ...] = STAGES, **options: Any) -> Path:
        writing = {key: options.pop(key) for key in ("seeds", "steps", "notes") if key in options}
        return Synthetic(**options).write(tmp_path / name, stages=stages, **writing)

    return make


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
