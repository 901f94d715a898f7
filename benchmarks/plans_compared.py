"""Plans against each other after training: bitplan's choice, the paper's rule, and `--converge`.

    python benchmarks/plans_compared.py RUN
    python benchmarks/plans_compared.py run-smollm2 --tokens 524288 --seeds 3 --batch-size 16 \\
        --seq-len 512 --eval-tokens 131072 --to benchmarks/results/plans_smollm2.json

RUN is a run directory that `bitplan demo` or `profile` made; it is copied, not changed, and with
--work DIR the copy stays, so that a killed comparison goes on. For each row of PLANS the copy is
planned and verified: arms that do not depend on the plan are trained once. --group-size G takes
the formats int4-gG and int8-gG, which the run has to be profiled with; --arms, --attribute,
--from-scratch, --data, --gpus and --workers are verify's.
`--converge` plans from what the rows above it have trained, so its second row knows one more plan.
What is not given is verify's default. Beside the losses: the kurtosis of the linears' inputs before
and after training, the median over sites and seeds by role.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
from training import MEASURED, asked, kurtosis_by_role

from bitplan.options import PlanOptions, VerifyOptions
from bitplan.planner.stage import make_plan
from bitplan.qat.arms import ARMS, BASELINE, EXTRA_ARMS
from bitplan.qat.record import RECORD_FILE, STATS_FILE, arm_dir
from bitplan.qat.verdict import Interval
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir, versions, write_json
from bitplan.tables import PROFILE

TOLD = ({*ARMS} | {*EXTRA_ARMS}) - {BASELINE}
MODEL_FACTS = ("content_hash", "num_non_embedding_parameters", "weights_note")
RESULT = Path(__file__).parent / "results" / "plans_compared.json"
PLANS = {
    "bitplan, at the input bits of fc2": PlanOptions(),
    "the paper's rule: every FC2 input": PlanOptions(rule="fc2"),
    "bitplan plan --converge": PlanOptions(converge=True),
    "bitplan plan --converge, again": PlanOptions(converge=True),
}


def row(
    run: Path, options: PlanOptions, training: VerifyOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plan and verify; return what was predicted and measured, and the attribution by role."""
    plan = make_plan(run, options).plan.as_json()
    verdict = verify_plan(run, training).as_json()
    measured = {
        "input_bits": plan["predicted"]["input_bits"],
        "weight_bits": plan["predicted"]["weight_bits"],
        "predicted_delta_loss_nats": plan["predicted"]["delta_loss"],
        "predicted_R": plan["predicted"]["R"],
        "predicted_R_trained": plan["predicted"]["R_trained"],
        "delta_nats": {k: v for k, v in verdict["delta"].items() if k in TOLD},
        "R": verdict["R"],
        "verdict": verdict["verdict"],
        "seeds": verdict["seeds"],
        "tokens": verdict["tokens"],
    }
    return measured, verdict["attribution"]


def kurtosis_of_arms(run: RunDir, seeds: range) -> dict[str, dict[str, float]]:
    """Return the median kurtosis of inputs: of the checkpoint, and of arms after their last step.

    The arm `planned` is that of the last plan.
    """
    tables = {"checkpoint": [run.read_table(PROFILE.file)]}
    tables |= {
        arm: [run.read_table(f"{arm_dir(arm, k)}/{STATS_FILE}") for k in seeds] for arm in MEASURED
    }
    stats = {name: pl.concat(frames) for name, frames in tables.items()}
    return {name: kurtosis_by_role(found, found["step"].max()) for name, found in stats.items()}


def copied(source: Path, work: Path) -> Path:
    """Return a copy of the run to plan and train in; what an earlier call left there stays."""
    return work if work.exists() else Path(shutil.copytree(source, work))


def compare(run: Path, plan: PlanOptions, training: VerifyOptions) -> Iterator[dict[str, Any]]:
    """Plan and verify a run row by row; yield what is known after each."""
    directory = RunDir.open(run)
    model = directory.manifest["model"]
    found: dict[str, Any] = {}
    attribution: dict[str, Any] = {}
    for name, options in PLANS.items():
        asked_for = replace(options, formats=plan.formats)
        found[name], attributed = row(run, asked_for, training)
        attribution = attribution or attributed
        seeds = range(training.seed, training.seed + training.seeds)
        record = directory.read_json(f"{arm_dir('bf16', training.seed)}/{RECORD_FILE}")
        yield {
            "model": {key: model[key] for key in MODEL_FACTS},
            "formats": list(plan.formats),
            "plans": found,
            "attribution": attribution,
            "input_kurtosis": kurtosis_of_arms(directory, seeds),
            "training": asdict(training),
            "hardware": record["hardware"],
            "date": time.strftime("%Y-%m-%d"),
            "versions": versions(),
        }


def main() -> None:
    """Compare, write and print."""
    source, result, given = asked(
        __doc__,
        RESULT,
        group_size={"type": int, "default": 128},
        work={"type": Path},
    )
    size, work = given.pop("group_size"), given.pop("work", None)
    plan = PlanOptions(formats=(f"int4-g{size}", f"int8-g{size}"))
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = copied(source, work or Path(folder) / "run")
        for found in compare(run, plan, VerifyOptions(**given)):
            write_json(result, found)
            name, last = list(found["plans"].items())[-1]
            delta = last["delta_nats"]["planned"]["estimate"]
            line = f"{last['input_bits']:8.3f}{delta:9.4f}  R {Interval(**last['R']['after'])}"
            print(f"{name:36}{line}", flush=True)


if __name__ == "__main__":
    main()
