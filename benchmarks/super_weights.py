"""Are the super-weight candidates of a profile what they are taken for? The loss without them.

    python benchmarks/super_weights.py RUN [--tokens N]

RUN is a profiled run directory whose model is still where it was. Each candidate is set to zero
alone, then those of each linear together; the control is the largest weight of the same linear in
another row. Losses are in nats per token on calibration text.
Writes benchmarks/results/super_weights.json.
"""

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan.errors import BitplanError
from bitplan.findings import super_weights
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.modules import find_linears
from bitplan.probe.sensitivity import summed_loss
from bitplan.probe.text import load_text, tokenize
from bitplan.rundir import RunDir, hardware, versions
from bitplan.tables import OUTLIERS

RESULT = Path(__file__).parent / "results" / "super_weights.json"

Place = tuple[int, int]


@contextlib.contextmanager
def without(weight: Tensor, places: Sequence[Place]) -> Iterator[None]:
    """Set some weights of a matrix to zero for the block."""
    rows, columns = (list(numbers) for numbers in zip(*places, strict=True))
    kept = weight[rows, columns].clone()
    weight[rows, columns] = 0
    try:
        yield
    finally:
        weight[rows, columns] = kept


def control(weight: Tensor, rows: set[int]) -> Place:
    """Return the place of the largest weight outside some rows."""
    others = weight.abs()
    others[list(rows)] = 0
    row, column = divmod(int(others.argmax()), weight.shape[1])
    return row, column


@torch.no_grad()
def measure(run: RunDir, tokens: int) -> dict[str, Any]:
    """Return the loss with all weights, and without each candidate and each group."""
    options = run.manifest["stages"]["profile"]["options"]
    checkpoint = load_checkpoint(options["model"], device=options["device"])
    corpus = load_text(tuple(options["data"]))
    seq_len, seed = options["seq_len"], options["seed"]
    ids = tokenize(
        corpus, checkpoint.tokenizer, "calibration", tokens=tokens, seq_len=seq_len, seed=seed
    )
    model: Any = checkpoint.model
    ids = ids.to(next(model.parameters()).device)

    def loss() -> float:
        total = sum(summed_loss(model(row[None], use_cache=False).logits, row[None]) for row in ids)
        return float(total) / (ids.numel() - len(ids))

    weights = {item.linear.module: item.weight().detach() for item in find_linears(model)}
    whole = loss()
    rows = []
    found = super_weights(run.read_table(OUTLIERS.file))
    for (module,), group in found.group_by("module", maintain_order=True):
        weight = weights[str(module)]
        places = list(zip(group["row"], group["column"], strict=True))
        tried = {f"[{i}, {j}]": [(i, j)] for i, j in places}
        if len(places) > 1:
            tried["all of these"] = places
        other = control(weight, {i for i, _ in places})
        tried[f"control [{other[0]}, {other[1]}]"] = [other]
        for name, dropped in tried.items():
            with without(weight, dropped):
                left = loss()
            values = [float(weight[place]) for place in dropped]
            rows.append({"module": module, "dropped": name, "weights": values, "loss": left})
            print(f"{module} {name}: {whole:.4f} -> {left:.4f}", file=sys.stderr)
    return {"loss": whole, "tokens": ids.numel(), "model": run.manifest["model"], "without": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="profiled run directory")
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    try:
        found = measure(RunDir.open(given.run), given.tokens)
    except BitplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The name alone: the file travels, the place does not.
    found["model"]["source"] = Path(found["model"]["source"]).name
    found |= {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": dict(versions()),
    }
    print(f"{'linear':36}{'set to zero':24}{'loss':>9}{'change':>10}")
    print(f"{'':36}{'nothing':24}{found['loss']:9.4f}")
    for row in found["without"]:
        change = row["loss"] - found["loss"]
        print(f"{row['module']:36}{row['dropped']:24}{row['loss']:9.4f}{change:+10.4f}")
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
