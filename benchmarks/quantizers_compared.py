"""Quantizers against each other after training: what a trained scale buys, by operand and group.

    bitplan profile MODEL -o RUN --formats int4-g32,int4-g128,int4-token,int4-channel
    python benchmarks/quantizers_compared.py RUN --tokens 81920

Each row of ROWS quantizes one operand of the run's model uniformly and trains it from the
checkpoint; delta is against bf16 on the same text and seeds. RUN is copied, not changed.
"""

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training import asked

from bitplan.options import PlanOptions, VerifyOptions
from bitplan.planner.stage import make_plan
from bitplan.qat.record import RECORD_FILE, arm_dir
from bitplan.qat.verify import verify_plan
from bitplan.rundir import RunDir, versions, write_json

RESULT = Path(__file__).parent / "results" / "quantizers_compared.json"
ROWS = (
    ("input", "int4-g32", "absmax"),
    ("input", "int4-g32", "lac"),
    ("input", "int4-g128", "absmax"),
    ("input", "int4-g128", "lac"),
    ("input", "int4-token", "absmax"),
    ("input", "int4-token", "lac"),
    ("weight", "int4-g128", "absmax"),
    ("weight", "int4-g128", "lwc"),
    ("weight", "int4-g128", "lsq"),
    ("weight", "int4-channel", "absmax"),
    ("weight", "int4-channel", "lwc"),
    ("weight", "int4-channel", "lsq"),
)
ARM = {"input": "w16a4", "weight": "w4a16"}
OTHER = {"input": "int4-g128", "weight": "int4-g128"}


def row(run: Path, operand: str, name: str, quantizer: str, training: dict[str, Any]) -> Any:
    """Plan uniformly under a format, train the operand's arm, and return its delta."""
    formats = tuple(dict.fromkeys((name, OTHER[operand])))
    pins = tuple(f"{role}:{operand}={name}" for role in ("qkv", "o", "fc1", "fc2"))
    quantizers = tuple(f"{role}:{operand}={quantizer}" for role in ("qkv", "o", "fc1", "fc2"))
    make_plan(run, PlanOptions(rule="uniform", formats=formats, pins=pins, quantizers=quantizers))
    arms = ("bf16", f"planned-{operand}s")
    verdict = verify_plan(run, VerifyOptions(arms=arms, **training)).as_json()
    return verdict["delta"][f"planned-{operand}s"]


def main() -> None:
    """Compare, write and print."""
    source, result, training = asked(__doc__, RESULT)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(shutil.copytree(source, Path(folder) / "run"))
        for operand, name, quantizer in ROWS:
            delta = row(run, operand, name, quantizer, training)
            rows.append({"operand": operand, "format": name, "quantizer": quantizer, **delta})
            print(
                f"{operand:7} {name:13} {quantizer:7} {delta['estimate']:+.4f} "
                f"[{delta['low']:+.4f}, {delta['high']:+.4f}]",
                flush=True,
            )
        directory = RunDir.open(run)
        record = directory.read_json(f"{arm_dir('bf16', 0)}/{RECORD_FILE}")
    about = {
        "training": asdict(VerifyOptions(**training)),
        "model": directory.manifest["model"]["content_hash"],
        "hardware": record["hardware"],
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
    }
    write_json(result, {"rows": rows, **about})


if __name__ == "__main__":
    main()
