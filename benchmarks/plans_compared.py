"""Plans against each other after training: bitplan's choice, the paper's rule, and `--converge`.

    python benchmarks/plans_compared.py RUN
    python benchmarks/plans_compared.py run-smollm2 --tokens 524288 --seeds 3 --batch-size 16 \\
        --seq-len 512 --eval-tokens 131072 --to benchmarks/results/plans_smollm2.json

RUN is a run directory that `bitplan demo` or `profile` made; it is copied, not changed. For each
row of PLANS the copy is planned and verified: arms that do not depend on the plan are trained once.
`--converge` plans from what the rows above it have trained, so its second row knows one more plan.
What is not given is verify's default. Beside the losses: the kurtosis of the linears' inputs before
and after training, the median over sites and seeds by role.
"""

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from training import asked

from bitplan.options import PlanOptions, VerifyOptions
from bitplan.planner.stage import make_plan
from bitplan.qat.record import RECORD_FILE, STATS_FILE, arm_dir
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir, versions, write_json
from bitplan.tables import PROFILE

ARMS = ("bf16", "w4a4", "planned")
RESULT = Path(__file__).parent / "results" / "plans_compared.json"
PLANS = {
    "bitplan, at the input bits of fc2": PlanOptions(),
    "the paper's rule: every FC2 input": PlanOptions(rule="fc2"),
    "bitplan plan --converge": PlanOptions(converge=True),
    "bitplan plan --converge, again": PlanOptions(converge=True),
}


def row(run: Path, options: PlanOptions, training: VerifyOptions) -> dict[str, Any]:
    """Plan and verify, and return what was predicted and measured."""
    plan = make_plan(run, options).plan.as_json()
    verdict = verify_plan(run, training).as_json()
    deltas = ("w4a4", "planned", "planned-weights", "planned-inputs")
    return {
        "input_bits": plan["predicted"]["input_bits"],
        "weight_bits": plan["predicted"]["weight_bits"],
        "predicted_delta_loss_nats": plan["predicted"]["delta_loss"],
        "predicted_R": plan["predicted"]["R"],
        "predicted_R_trained": plan["predicted"]["R_trained"],
        "delta_nats": {arm: verdict["delta"][arm] for arm in deltas},
        "R": verdict["R"],
        "verdict": verdict["verdict"],
        "seeds": verdict["seeds"],
        "tokens": verdict["tokens"],
    }


def kurtosis_by_role(run: RunDir, seeds: range) -> dict[str, dict[str, float]]:
    """Return the median kurtosis of inputs: of the checkpoint, and of arms after their last step.

    The arm `planned` is that of the last plan.
    """
    tables = {"checkpoint": [run.read_table(PROFILE.file)]}
    tables |= {
        arm: [run.read_table(f"{arm_dir(arm, k)}/{STATS_FILE}") for k in seeds] for arm in ARMS
    }
    return {name: dict(_by_role(pl.concat(frames)).iter_rows()) for name, frames in tables.items()}


def _by_role(stats: pl.DataFrame) -> pl.DataFrame:
    rows = stats.filter(pl.col("operand") == "input", pl.col("step") == pl.col("step").max())
    return rows.group_by("role").agg(pl.col("kurtosis").median()).sort("role")


def main() -> None:
    """Compare, write and print."""
    source, result, given = asked(__doc__, RESULT)
    training = VerifyOptions(**given)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(source, Path(folder) / "run"))
        rows = {name: row(run, options, training) for name, options in PLANS.items()}
        directory = RunDir.open(run)
        seeds = range(training.seed, training.seed + training.seeds)
        kurtosis = kurtosis_by_role(directory, seeds)
        record = directory.read_json(f"{arm_dir('bf16', training.seed)}/{RECORD_FILE}")
    for name, found in rows.items():
        planned, after = found["delta_nats"]["planned"], found["R"]["after"]
        bounds = f"{after['estimate']:.2f} [{after['low']:.2f}, {after['high']:.2f}]"
        print(f"{name:36}{found['input_bits']:8.3f}{planned['estimate']:9.4f}  R {bounds}")
    model = directory.manifest["model"]
    keys = ("content_hash", "num_non_embedding_parameters", "weights_note")
    about = {
        "training": asdict(training),
        "hardware": record["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    facts = {key: model[key] for key in keys}
    write_json(result, {"model": facts, "plans": rows, "input_kurtosis": kurtosis, **about})


if __name__ == "__main__":
    main()
