"""What a newcomer waits for: `bitplan --help`, and `bitplan demo` from nothing, as whole processes.

    python benchmarks/demo_cost.py

Goals on two CPU cores: help under 0.3 s (median of 9 after a warm-up), demo under 6 minutes and
3 GB.
Writes benchmarks/results/demo_cost.json, with the verdict the demo came to.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bitplan.rundir import hardware, versions, write_json

RESULT = Path(__file__).parent / "results" / "demo_cost.json"
HELP_RUNS = 9
GOALS = {"help_s": 0.3, "demo_s": 360.0, "demo_peak_rss_gb": 3.0}


def seconds(*words: str) -> float:
    """Run `bitplan` with these words to its end and return the wall time."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "bitplan", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure, write and print."""
    help_s = [seconds("--help") for _ in range(HELP_RUNS + 1)][1:]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "demo"
        demo_s = seconds("demo", "-o", str(run))
        # The largest of the children so far, in KiB on Linux: the demo, since help is small.
        peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        again_s = seconds("demo", "-o", str(run))
        manifest = json.loads((run / "run.json").read_text())
        verdict = json.loads((run / "verdict.json").read_text())
        report_bytes = (run / "report.html").stat().st_size
    result = {
        "help_s": statistics.median(help_s),
        "demo_s": demo_s,
        "demo_again_s": again_s,
        "demo_peak_rss_gb": peak_bytes / 1e9,
        "goals": GOALS,
        "report_bytes": report_bytes,
        "stages_finished": {name: s["finished"] for name, s in manifest["stages"].items()},
        "model_hash": manifest["model"]["content_hash"],
        "verdict": {key: verdict[key] for key in ("verdict", "sentence", "R", "delta", "plan_id")},
        "hardware": hardware(),
        "load_average_1min_at_end": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "versions": dict(versions()),
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
