"""Every arm against bf16 over the seeds that are finished: of whole comparisons, and cut-off ones.

    python benchmarks/arms_compared.py NAME=RUN... [--to benchmarks/results/arms_compared.json]

RUN is a run directory in which `verify` trained (plans_compared.py --work), NAME what to call it.
An arm is held against bf16, and against w4a4 where it spares one role, by the seeds that both have;
from a single seed the interval counts the noise of the held-out text alone. `planned` is left out
where its seeds are of different plans. Trainings are told apart by what they trained on: nothing is
pooled over directories. Beside the losses: the median kurtosis of inputs by role at the first and
the last record.
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from training import MEASURED, kurtosis_by_role

from bitplan.qat.arms import BASELINE, RATIOS, UNIFORM
from bitplan.qat.record import RECORD_FILE, STATS_FILE, arm_dir, heldout_losses
from bitplan.qat.verdict import Floats, delta, ratio
from bitplan.rundir import RunDir, write_json

RESULT = Path(__file__).parent / "results" / "arms_compared.json"
Records = dict[str, dict[int, dict[str, Any]]]


def finished(run: RunDir) -> Records:
    """Return the records of a run's finished trainings, by arm and seed."""
    found: Records = {}
    for path in sorted(run.path.glob(f"arms/*/seed-*/{RECORD_FILE}")):
        record = run.read_json(str(path.relative_to(run.path)))
        found.setdefault(record["arm"], {})[record["seed"]] = record
    one_plan = {
        arm: len({json.dumps(r["config"]["formats"], sort_keys=True) for r in seeds.values()}) == 1
        for arm, seeds in found.items()
    }
    found = {arm: seeds for arm, seeds in found.items() if one_plan[arm]}
    if "planned" in found and _of_weights(found["planned"]) == _of_weights(found["w4a16"]):
        found["planned-weights"] = found["w4a16"]  # one training, copied when a verify ends
    return found


def _of_weights(seeds: dict[int, dict[str, Any]]) -> dict[str, str]:
    formats = next(iter(seeds.values()))["config"]["formats"]
    return {site: fmt for site, fmt in formats.items() if site.endswith(":weight")}


def compare(run: RunDir) -> dict[str, Any]:
    """Return the deltas, what 8 bits at one role give back, R, and the kurtosis by role."""
    records = finished(run)

    def apart(base: str, *arms: str) -> list[Floats]:
        """Return the losses of each arm less those of the base, [seed, sequence]."""
        seeds = sorted(set.intersection(*({*records.get(arm, {})} for arm in (base, *arms))))
        if not seeds:
            return []
        losses = [
            np.stack([heldout_losses(run, records[arm][seed]["arm"], seed) for seed in seeds])
            for arm in (base, *arms)
        ]
        return [one - losses[0] for one in losses[1:]]

    def interval(arm: str, base: str, sign: int = 1) -> dict[str, Any]:
        (paired,) = apart(base, arm)
        return {**asdict(delta(sign * paired)), "seeds": len(paired)}

    spared = [arm for arm in records if arm.startswith(f"{UNIFORM}-") and arm.endswith("-8")]
    any_record = next(iter(records[BASELINE].values()))
    config = any_record["config"]
    ratios = {name: apart(BASELINE, *arms) for name, arms in RATIOS.items()}
    return {
        "recipe": {k: config["recipe"][k] for k in ("steps", "batch_size", "seq_len", "lr")},
        "hardware": any_record["hardware"],
        "loss_bf16": float(np.mean([heldout_losses(run, BASELINE, s) for s in records[BASELINE]])),
        "delta_nats": {arm: interval(arm, BASELINE) for arm in records if arm != BASELINE},
        "given_back_nats": {arm: interval(arm, UNIFORM, -1) for arm in spared},
        "R": {
            name: {**asdict(ratio(paired[0], paired[1])), "seeds": len(paired[0])}
            for name, paired in ratios.items()
            if paired
        },
        "formats": {
            arm: dict(Counter(next(iter(seeds.values()))["config"]["formats"].values()))
            for arm, seeds in records.items()
        },
        "input_kurtosis": {
            arm: kurtosis(run, arm, records[arm]) for arm in MEASURED if arm in records
        },
        "seconds": sum(r["seconds"] for seeds in records.values() for r in seeds.values()),
    }


def kurtosis(run: RunDir, arm: str, seeds: dict[int, Any]) -> dict[str, dict[str, float]]:
    """Return the median over sites and seeds by role, at the first and the last record."""
    frames = [run.read_table(f"{arm_dir(arm, seed)}/{STATS_FILE}") for seed in seeds]
    stats = pl.concat(frames)
    steps = {"first": stats["step"].min(), "last": stats["step"].max()}
    return {at: kurtosis_by_role(stats, step) for at, step in steps.items()}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--to", type=Path, default=RESULT)
    asked = parser.parse_args()
    found = {}
    for named in asked.runs:
        name, _, run = named.partition("=")
        found[name] = compare(RunDir.open(Path(run)))
        print(name, found[name]["recipe"], found[name]["hardware"])
        for kind in ("delta_nats", "given_back_nats", "R"):
            for arm, value in found[name][kind].items():
                low, high = (f"{value[k]:.4f}" if value[k] else "-" for k in ("low", "high"))
                line = f"  {kind:16}{arm:24}{value['estimate']:9.4f} [{low}, {high}]"
                print(f"{line} {value['seeds']} seeds")
    write_json(asked.to, found)


if __name__ == "__main__":
    main()
