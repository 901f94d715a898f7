"""Plans against each other after training: bitplan's choice, the paper's rule, and `--converge`.

    python benchmarks/plans_compared.py RUN
    python benchmarks/plans_compared.py run-smollm2 --tokens 524288 --seeds 3 --batch-size 16 \\
        --seq-len 512 --eval-tokens 131072 --to benchmarks/results/plans_smollm2.json

RUN is a run directory that `bitplan demo` or `profile` made; it is copied, not changed. For each
row of PLANS the copy is planned and verified: arms that do not depend on the plan are trained once.
What is not given is verify's default.
"""

import argparse
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bitplan.options import PlanOptions, VerifyOptions
from bitplan.planner.stage import make_plan
from bitplan.qat.record import RECORD_FILE, arm_dir
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir, versions, write_json

RESULT = Path(__file__).parent / "results" / "plans_compared.json"
PLANS = {
    "bitplan, at the input bits of fc2": PlanOptions(),
    "the paper's rule: every FC2 input": PlanOptions(rule="fc2"),
    "bitplan plan --converge": PlanOptions(converge=True),
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
        "delta_nats": {arm: verdict["delta"][arm] for arm in deltas},
        "R": verdict["R"],
        "verdict": verdict["verdict"],
        "seeds": verdict["seeds"],
        "tokens": verdict["tokens"],
    }


def main() -> None:
    """Compare, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=RESULT)
    for name in ("tokens", "seeds", "batch_size", "seq_len", "eval_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device")
    asked = vars(parser.parse_args())
    source, result = asked.pop("run"), asked.pop("to")
    training = VerifyOptions(**{name: value for name, value in asked.items() if value is not None})
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(source, Path(folder) / "run"))
        rows = {name: row(run, options, training) for name, options in PLANS.items()}
        directory = RunDir.open(run)
        record = directory.read_json(f"{arm_dir('bf16', training.seed)}/{RECORD_FILE}")
    for name, found in rows.items():
        planned, after = found["delta_nats"]["planned"], found["R"]["after"]
        print(f"{name:36}{found['input_bits']:8.3f}{planned['estimate']:9.4f}  R {after}")
    model = directory.manifest["model"]
    keys = ("content_hash", "num_non_embedding_parameters", "weights_note")
    about = {
        "training": asdict(training),
        "hardware": record["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    facts = {key: model[key] for key in keys}
    write_json(result, {"model": facts, "plans": rows, **about})


if __name__ == "__main__":
    main()
