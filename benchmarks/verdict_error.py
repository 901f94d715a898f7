"""How often the verdict's intervals miss and its words are wrong, on simulated losses.

    python benchmarks/verdict_error.py [--trials 1000] [--to FILE]

Paired differences of two arms, delta 0.05 and R times that: an effect of the seed, one of the
held-out sequence (in runs of neighbors from one text, `run` long, which share 0.4 of its variance)
and one of both together, all correlated at 0.6 between the arms. Three questions:
    coverage   how often the intervals of delta and R hold the truth, looked at once
    looks      the same for R where it stops at the first word from three seeds on: at the levels of
               Looks, and at the plain level (`peeking`), and how many seeds it took
    advice     how often an undetermined verdict of three seeds is settled by the seeds, or by the
               seeds and the text, that `needed` names
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitplan.qat.verdict import Floats, Looks, decide, delta, needed, ratio

RESULT = Path(__file__).parent / "results" / "verdict_error.json"
DELTA = 0.05
SHARED = 0.4
CORRELATION = 0.6


@dataclass(frozen=True)
class World:
    """Standard deviations of the effects, nats per token, and the length of runs of text."""

    seed: float
    text: float
    both: float
    run: int = 1


SEEDS_ONLY = World(0.004, 0.001, 0.0)
TEXT_MOSTLY = World(0.0001, 0.03, 0.0)
EQUAL = World(0.002, 0.02, 0.02)
WORLDS = (SEEDS_ONLY, TEXT_MOSTLY, EQUAL, World(0.002, 0.02, 0.02, 3), World(0.002, 0.02, 0.02, 10))


def draw(
    rng: np.random.Generator, world: World, r: float, *, seeds: int, sequences: int
) -> tuple[Floats, Floats]:
    """Return paired differences of the weights' and the inputs' arm, [seed, sequence] each."""
    mix = np.linalg.cholesky(np.array([[1.0, CORRELATION], [CORRELATION, 1.0]]))
    by_seed = mix @ rng.standard_normal((2, seeds)) * world.seed
    alone = mix @ rng.standard_normal((2, sequences))
    shared = mix @ rng.standard_normal((2, sequences // world.run + 1))
    runs = shared.repeat(world.run, axis=1)[:, :sequences]
    by_text = (np.sqrt(1 - SHARED) * alone + np.sqrt(SHARED) * runs) * world.text
    both = rng.standard_normal((2, seeds, sequences)) * world.both
    means = np.array([DELTA, DELTA * r])[:, None, None]
    weights, inputs = means + by_seed[:, :, None] + by_text[:, None, :] + both
    return weights, inputs


def holds(low: float | None, high: float | None, truth: float) -> bool:
    return low is None or high is None or low <= truth <= high


def coverage(rng: np.random.Generator, trials: int) -> Iterator[dict[str, Any]]:
    for seeds, sequences, world in itertools.product((3, 5), (96, 256), WORLDS):
        drawn = [draw(rng, world, 1.4, seeds=seeds, sequences=sequences) for _ in range(trials)]
        of_delta, of_r = [delta(w) for w, _ in drawn], [ratio(i, w) for w, i in drawn]
        yield {
            "seeds": seeds,
            "sequences": sequences,
            **asdict(world),
            "delta": float(np.mean([holds(i.low, i.high, DELTA) for i in of_delta])),
            "R": float(np.mean([holds(i.low, i.high, 1.4) for i in of_r])),
        }


def looks(rng: np.random.Generator, trials: int) -> Iterator[dict[str, Any]]:
    cases = itertools.product((5, 10), (0.8, 1.0, 1.25, 1.5), (SEEDS_ONLY, EQUAL))
    for most, r, world in cases:
        drawn = [draw(rng, world, r, seeds=most, sequences=96) for _ in range(trials)]
        for name, levels in (("bounded", Looks(most=most)), ("peeking", Looks())):
            ends = []
            for weights, inputs in drawn:
                for seeds in range(3, most + 1):
                    found = ratio(inputs[:seeds], weights[:seeds], levels)
                    if decide(found) != "undetermined":
                        break
                ends.append((seeds, decide(found), holds(found.low, found.high, r)))
            right = "converged" if 0.8 <= r <= 1.25 else "activation-limited"
            yield {
                "levels": name,
                "most": most,
                "R": r,
                **asdict(world),
                "missed": float(np.mean([not held for *_, held in ends])),
                "wrong_word": float(
                    np.mean([w not in (right, "undetermined") for _, w, _ in ends])
                ),
                "settled": float(np.mean([word != "undetermined" for _, word, _ in ends])),
                "seeds": float(np.mean([seeds for seeds, *_ in ends])),
            }


def advice(rng: np.random.Generator, trials: int) -> Iterator[dict[str, Any]]:
    """Follow the advice given after three seeds: what was drawn stays, the rest is drawn anew."""
    for r, world in itertools.product((1.1, 1.4), (SEEDS_ONLY, EQUAL, TEXT_MOSTLY)):
        asked, settled, text = [], [], 0
        for _ in range(trials // 5):
            weights, inputs = draw(rng, world, r, seeds=100, sequences=96 * 16)
            few = (inputs[:3, :96], weights[:3, :96])
            if decide(ratio(*few)) != "undetermined":
                continue
            found = needed(*few)
            if found is None or found.text > 16:
                settled.append(False)
                continue
            asked.append(found.seeds)
            text += found.text > 1
            cut = (slice(found.seeds), slice(96 * found.text))
            settled.append(decide(ratio(inputs[cut], weights[cut])) != "undetermined")
        yield {
            "R": r,
            **asdict(world),
            "undetermined": len(settled),
            "seeds": float(np.median(asked)) if asked else None,
            "asked_for_text": text,
            "settled": float(np.mean(settled)) if settled else None,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--to", type=Path, default=RESULT)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    found = {}
    for question in (coverage, looks, advice):
        found[question.__name__] = list(question(rng, options.trials))
        print(question.__name__)
        rows = found[question.__name__]
        print("  ".join(f"{key:>14}" for key in rows[0]))
        for row in rows:
            print(
                "  ".join(
                    f"{v:14.3g}" if isinstance(v, float) else f"{v!s:>14}" for v in row.values()
                )
            )
    options.to.write_text(json.dumps({"trials": options.trials, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
