"""What one plan costs in the libraries it is exported to, without training.

    make test-exports                       (once: it installs the libraries)
    python benchmarks/exports_compared.py

The embedded checkpoint is profiled, planned with formats that all of them have, and exported. Each
library makes a model of it by the `use.py` of its export, in its environment, and the loss of that
model on the same held-out tokens is compared with the loss under bitplan's own rounding: the ratio
of the two changes of loss is the result. They differ in how a value is rounded, not in the plan.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "exports_compared.json"
FORMATS = ("int4-g32", "int4-token", "int8-token")
TARGET = "modelopt"
ENVIRONMENTS = {
    "llm-compressor": "llmcompressor-0.14.0.1",
    "torchao-qat": "torchao-0.18.0",
    "modelopt": "nvidia-modelopt-0.47.0",
    "autoround": "auto-round-0.16.1",
}
TOKENS, SEQ_LEN, BATCH = 65_536, 256, 16


def quantized(target: str, place: Path, source: Path) -> Any:
    """Return the model that a target's export makes of a checkpoint."""
    spec = importlib.util.spec_from_file_location("use", place / "use.py")
    assert spec is not None
    assert spec.loader is not None
    use = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(use)
    if target == "llm-compressor":
        use.quantize(source, place / "out")
        return AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    if target == "autoround":
        return use.rounder(source, iters=0, disable_opt_rtn=True, device_map="cpu").quantize()[0]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if target == "torchao-qat":
        use.prepare(model)
        return model
    return use.quantize(model)


def loss_of(model: Any, ids: torch.Tensor) -> float:
    """Return the mean next-token loss in nats."""
    model.eval()
    with torch.no_grad():
        losses = [float(model(input_ids=x, labels=x).loss) for x in ids.split(BATCH)]
    return sum(losses) / len(losses)


def inside(target: str, place: Path, source: Path) -> None:
    """Print the loss under a library; runs in its environment."""
    ids = torch.from_numpy(np.load(place.parent / "ids.npy"))
    print(json.dumps({"loss": loss_of(quantized(target, place, source), ids)}))


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--inside", nargs=3)
    asked = parser.parse_args().inside
    if asked:
        inside(asked[0], Path(asked[1]), Path(asked[2]))
        return
    from bitplan.demo import EMBEDDED
    from bitplan.options import PlanOptions, ProfileOptions
    from bitplan.planner.export import export_plan
    from bitplan.planner.stage import make_plan
    from bitplan.probe.profile import profile_checkpoint
    from bitplan.probe.text import load_text, tokenize
    from bitplan.qat.convert import convert
    from bitplan.rundir import hardware, versions, write_json
    from bitplan.sites import Site

    source = Path(EMBEDDED)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        profile_checkpoint(run, ProfileOptions(model=str(source), formats=FORMATS, tokens=4096))
        plan = make_plan(run, PlanOptions(formats=FORMATS, target=TARGET)).plan
        ids = tokenize(
            load_text(),
            AutoTokenizer.from_pretrained(source),
            "heldout",
            tokens=TOKENS,
            seq_len=SEQ_LEN,
            seed=0,
        )
        np.save(Path(folder) / "ids.npy", ids.numpy())
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        exact = loss_of(model, ids)
        sites = {Site.parse(s): f for s, f in plan.assignment.items() if f.is_quantized}
        convert(model, sites)
        deltas = {"bitplan": loss_of(model, ids) - exact}
        for target, environment in ENVIRONMENTS.items():
            place = Path(folder) / target
            export_plan(run, target, place)
            python = ROOT / ".venv-exports" / environment / "bin" / "python"
            command = [str(python), __file__, "--inside", target, str(place), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True)
            deltas[target] = json.loads(done.stdout.splitlines()[-1])["loss"] - exact
    print(f"plan {plan.plan_id}: predicted {plan.predicted.delta_loss:+.4f} nats", file=sys.stderr)
    for name, delta in deltas.items():
        print(f"{name:16}{delta:+.4f} nats  {delta / deltas['bitplan']:.2f}")
    about = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "versions": versions()}
    predicted = plan.predicted.delta_loss
    facts = {"plan_id": plan.plan_id, "predicted_delta_loss_nats": predicted, "tokens": TOKENS}
    write_json(RESULT, {**facts, "delta_nats": deltas, "environments": ENVIRONMENTS, **about})


if __name__ == "__main__":
    main()
