"""What averaging the tail does to the spread of delta over seeds, branched and from scratch.

    python benchmarks/noise.py [--from-scratch] [--seeds 5] [--steps 24] [--to FILE] [--work DIR]

Embedded checkpoint, every planned site at int4-g128; one training per arm and seed, judged on the
averages over each share of its last steps at once. For every arm and share: delta, its standard
deviation over seeds, the part of that which is left when the held-out text is as long as one likes
(the interaction of seeds and sequences taken out), and how far delta is from that of the last
weights. `bf16` is the standard deviation of the losses themselves: seeds that share no baseline.
DIR keeps each training's losses, so that a stopped benchmark goes on.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bitplan.demo import EMBEDDED
from bitplan.formats import parse_format
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.loading import fresh_model
from bitplan.probe.modules import find_linears
from bitplan.probe.text import load_text, tokenize
from bitplan.qat.average import TailAverage
from bitplan.qat.convert import convert
from bitplan.qat.recipe import Recipe, make_optimizer, sequence_losses, share_of_peak
from bitplan.qat.verdict import Floats
from bitplan.sites import PLANNED_ROLES

RESULT = Path(__file__).parent / "results" / "noise.json"
SHARES = (0.0, 0.1, 0.2, 0.4)
ARMS = {"bf16": (), "w4a16": ("weight",), "w16a4": ("input",)}
LOW = parse_format("int4-g128")
HELDOUT_TOKENS = 12_288


def train(
    model: nn.Module, operands: tuple[str, ...], recipe: Recipe, ids: torch.Tensor, heldout: Any
) -> Floats:
    """Return the held-out losses on the average over each share of the steps, [share, sequence]."""
    model = copy.deepcopy(model)
    model.config.use_cache = False  # type: ignore[union-attr]  # of any transformers model
    linears = [item.linear for item in find_linears(model) if item.linear.role in PLANNED_ROLES]
    convert(model, {linear.site(operand): LOW for linear in linears for operand in operands})
    optimizer = make_optimizer(model, recipe)
    averages = [TailAverage(model, steps=recipe.steps, share=share) for share in SHARES]
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share_of_peak(step, recipe)
        model.train()
        batch = ids[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        sequence_losses(model, batch).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        for average in averages:
            average.add(step)
    model.eval()
    losses = []
    with torch.no_grad():
        for average in averages:  # the first is of no step: the last weights
            average.apply()
            losses.append(torch.cat([sequence_losses(model, b) for b in heldout.split(16)]))
    return torch.stack(losses).double().numpy()


def scattered(values: Floats) -> tuple[float, float]:
    """Return the standard deviation over seeds of [seed, sequence], and that with endless text."""
    seeds, sequences = values.shape
    spread = values.mean(1).var(ddof=1)
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    both = (rest**2).sum() / ((seeds - 1) * (sequences - 1))
    return float(spread**0.5), float(max(0.0, spread - both / sequences) ** 0.5)


def measure(checkpoint: Checkpoint, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    rate = 1.5e-3 if options.from_scratch else 1e-4
    recipe = Recipe(steps=options.steps, batch_size=options.batch_size, seq_len=256, lr=rate)
    corpus, tokens = load_text(), recipe.tokens
    draw = {"seq_len": recipe.seq_len}
    tokenizer = checkpoint.tokenizer
    heldout = tokenize(
        corpus, tokenizer, "heldout", tokens=HELDOUT_TOKENS, seed=0, apart=True, **draw
    )
    losses: dict[str, list[Floats]] = {arm: [] for arm in ARMS}
    for seed in range(options.seeds):
        ids = tokenize(corpus, tokenizer, "train", tokens=tokens, seed=seed, **draw)
        start = checkpoint.model
        if options.from_scratch:
            torch.manual_seed(seed)
            start = fresh_model(start.config)
        for arm, operands in ARMS.items():
            kept = options.work / f"{name}-{options.steps}-{arm}-{seed}.npy"
            if not kept.is_file():
                np.save(kept, train(start, operands, recipe, ids, heldout))
            losses[arm].append(np.load(kept))
    found = {arm: np.stack(of_arm, axis=1) for arm, of_arm in losses.items()}
    rows = []
    for arm, values in found.items():
        compared = values - found["bf16"] if arm != "bf16" else values
        for share, each in zip(SHARES, compared, strict=True):
            std, endless = scattered(each)
            shift = (each - compared[0]).mean(1)
            rows.append(
                {
                    "arm": arm,
                    "tail": share,
                    "mean": float(each.mean()),
                    "seed_std": std,
                    "seed_std_endless_text": endless,
                    "shift": float(shift.mean()),
                    "shift_stderr": float(shift.std(ddof=1) / len(shift) ** 0.5),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--to", type=Path, default=RESULT)
    parser.add_argument("--work", type=Path, default=Path("noise-work"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name = "from_scratch" if options.from_scratch else "branched"
    rows = measure(load_checkpoint(str(EMBEDDED), device="cpu"), name, options)
    print("  ".join(f"{key:>14.14}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{v:14.5f}" if isinstance(v, float) else f"{v:>14}" for v in row.values()))
    known = json.loads(options.to.read_text()) if options.to.is_file() else {}
    settings = {key: getattr(options, key) for key in ("seeds", "steps", "batch_size")}
    known[name] = {**settings, "seq_len": 256, "heldout_tokens": HELDOUT_TOKENS, "rows": rows}
    options.to.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
