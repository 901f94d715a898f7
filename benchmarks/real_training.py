"""Write docs/real-training.md from the recorded comparisons: python benchmarks/real_training.py

Everything in the page follows from benchmarks/results: arms_compared.json, what cost what in each
training, and plans_compared*.json, plans one after another on the embedded checkpoint. A cell
without an interval was not trained; a number of seeds below three is said beside it.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bitplan.qat.verdict import TOLERANCE, Interval, decide
from bitplan.rundir import write_atomic

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "real-training.md"
SIZES = (32, 128, 256)
STARTS = {
    "smollm2": "SmolLM2-135M from its checkpoint",
    "checkpoint": "the embedded checkpoint",
    "short": "the embedded checkpoint, 20,480 tokens",
    "scratch": "the embedded checkpoint's architecture from scratch",
}
TEXTS = {
    "smollm2": "the standard library of Python 3.12.3",
    "checkpoint": "the standard library of Python 3.12.3",
    "short": "the standard library of Python 3.11.7",
    "scratch": "40 MB of the embedded checkpoint's corpus (benchmarks/study/text.py --mb 40)",
}
TRAININGS = {
    "smollm2": "RUN --tokens 524288 --seeds 3 --batch-size 16 --seq-len 512 --eval-tokens 131072",
    "checkpoint": "RUN --tokens 2097152 --seeds 5 --batch-size 16 --eval-tokens 262144",
    "short": "RUN --seeds 3",
    "scratch": "RUN --tokens 8388608 --seeds 5 --batch-size 32 --eval-tokens 262144 "
    "--from-scratch core/embedded --data TEXT",
}
COMMIT = "1570f36"
"""Of the trainings; those of the date that the results tell."""
ARMS = {
    "w4a16": "weights at 4 bits",
    "w16a4": "inputs at 4 bits",
    "w4a4": "both at 4 bits",
    "w4a4-hadamard": "both at 4 bits, FC2 rotated (Hadamard)",
    "w4a4-fc2-input-8": "both, FC2's inputs at 8 (the paper's rule)",
}
PLANNED = {"short": "`plan --converge`, the second one"}
"""What the plan is that was trained last, where it is not the default one."""
AT_SAME_BITS = "bitplan's plan at the input bits of the paper's rule"
ROLES = {"qkv": "QKV", "o": "O", "fc1": "FC1", "fc2": "FC2"}
OTHERS = ("qkv", "o", "fc1")
Value = dict[str, Any]
Lines = Iterator[str]


def spelled(value: Value | None, digits: int = 3) -> str:
    """Return an estimate with its interval, and the seeds where they are few."""
    if value is None or value["estimate"] is None:
        return "-"
    few = (
        "" if value.get("seeds", 3) >= 3 else f" ({value['seeds']} seed{'s'[: value['seeds'] - 1]})"
    )
    if value["low"] is None:
        return f"{value['estimate']:.{digits}f}{few}"
    bounds = f"[{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value['estimate']:.{digits}f} {bounds}{few}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Lines:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def by_size(arms: dict[str, Value], start: str) -> dict[int, Value]:
    return {size: arms[f"{start}-g{size}"] for size in SIZES if f"{start}-g{size}" in arms}


def head_of(first: str, sizes: dict[int, Value]) -> list[str]:
    return [first, *(f"G = {size}" for size in sizes)]


def of_start(start: str, sizes: dict[int, Value]) -> Lines:
    """Say what was trained from one start, and what it cost."""
    name, planned = STARTS[start], PLANNED.get(start, AT_SAME_BITS)
    some = next(iter(sizes.values()))
    recipe = some["recipe"]
    tokens = recipe["steps"] * recipe["batch_size"] * recipe["seq_len"]
    yield f"## {name[0].upper()}{name[1:]}"
    yield ""
    yield (
        f"{tokens:,} tokens an arm: {recipe['steps']} steps of {recipe['batch_size']} x "
        f"{recipe['seq_len']}, peak rate {recipe['lr']:g}, {some['hardware']}. Held-out loss of "
        f"bf16 {some['loss_bf16']:.3f} nats per token. Delta, nats per token, and R:"
    )
    yield ""
    rows = [
        [f"{words} (`{arm}`)", *(spelled(found["delta_nats"].get(arm)) for found in sizes.values())]
        for arm, words in (*ARMS.items(), ("planned", planned))
    ]
    for when, words in (("before", "R, all inputs at 4 bits"), ("after", f"R, {planned}")):
        rows.append([words, *(spelled(found["R"].get(when), 2) for found in sizes.values())])
    yield from table(head_of("arm", sizes), rows)
    if not some["given_back_nats"]:
        return
    yield "What 8 bits at one role give back of the delta of both at 4 bits:"
    yield ""
    yield from table(
        head_of("role", sizes),
        [
            [f"{words} {operand}s", *(spelled(back(one, role, operand)) for one in sizes.values())]
            for role, words in ROLES.items()
            for operand in ("input", "weight")
        ],
    )


def back(found: Value, role: str, operand: str = "input") -> Value | None:
    value: Value | None = found["given_back_nats"].get(f"w4a4-{role}-{operand}-8")
    return value


def kurtosis(arms: dict[str, Value]) -> Lines:
    yield "## Kurtosis of inputs by role"
    yield ""
    yield (
        "The median over sites and seeds, after half of a training's steps and at its end; 3 is a "
        "normal distribution."
    )
    yield ""
    rows = []
    for start, words in STARTS.items():
        for size, found in by_size(arms, start).items():
            for arm in ("bf16", "w4a4"):
                of = found["input_kurtosis"].get(arm)
                if of is None or (arm == "bf16" and size != SIZES[0]):
                    continue
                at = [f"{of['first'][r]:.3g} to {of['last'][r]:.3g}" for r in ROLES]
                label = arm if arm == "bf16" else f"{arm}, G = {size}"
                rows.append([words, label, *at])
    yield from table(["start", "arm", *ROLES.values()], rows)


def plans(found: dict[int, Value]) -> Lines:
    yield "## Plans one after another"
    yield ""
    training = next(iter(found.values()))
    yield (
        "The embedded checkpoint with `verify`'s defaults (20,480 tokens an arm, "
        f"{training['hardware']}; benchmarks/plans_compared.py). `--converge` plans from what was "
        "trained before it, so the second one knows one plan more."
    )
    yield ""
    rows = [
        [
            name,
            f"{size}",
            f"{row['input_bits']:.2f}",
            spelled(row["delta_nats"]["planned"]),
            spelled(row["R"]["before"], 2),
            spelled(row["R"]["after"], 2),
            row["verdict"],
        ]
        for size, value in found.items()
        for name, row in value["plans"].items()
    ]
    yield from table(
        ["plan", "G", "input bits", "delta", "R, all at 4 bits", "R, the plan", "verdict"], rows
    )


def findings(arms: dict[str, Value], found: dict[int, Value]) -> Lines:
    """State for each of the paper's findings what these trainings say."""
    yield "## The paper's findings here"
    yield ""
    rows = []
    for start, words in STARTS.items():
        sizes = by_size(arms, start)
        ratios = [value["R"]["before"] for value in sizes.values()]
        rows.append(
            [
                "inputs cost more than weights (R above 1)",
                words,
                answer([above(value, 1) for value in ratios]),
                ", ".join(spelled(value, 2) for value in ratios),
            ]
        )
        deltas = [value["delta_nats"]["w4a4"] for value in sizes.values()]
        pairs = itertools.pairwise(deltas)
        rows.append(
            [
                "delta of both at 4 bits grows with G",
                words,
                answer([apart(big, small) for small, big in pairs]),
                ", ".join(f"{value['estimate']:.3f}" for value in deltas),
            ]
        )
        if not all(back(value, "fc2") for value in sizes.values()):
            continue
        rows.append(
            [
                "FC2's inputs are the bottleneck: 8 bits give back most there",
                words,
                answer([bottleneck(value) for value in sizes.values()]),
                "most at " + ", ".join(ROLES[largest(value)] for value in sizes.values()),
            ]
        )
        shares = [share(value) for value in sizes.values()]
        rows.append(
            [
                "FC2's inputs at 8 bits take off more of delta at a larger G",
                words,
                answer([b > a for a, b in itertools.pairwise(shares)]),
                ", ".join(f"{value:.0%}" for value in shares) + " (the paper: 21, 34, 43 %)",
            ]
        )
        falls = [[kurtosis_kept(value, role) for role in ROLES] for value in sizes.values()]
        of_others = "; ".join(", ".join(f"{f:.2f}" for f in row[:3]) for row in falls)
        rows.append(
            [
                "training at 4 bits lowers the kurtosis of QKV, O and FC1 inputs",
                words,
                answer([all(f < 1 for f in row[:3]) for row in falls]),
                f"w4a4 over bf16: {of_others}",
            ]
        )
        rows.append(
            [
                "and that of FC2's less so",
                words,
                answer([row[3] > max(row[:3]) for row in falls]),
                ", ".join(f"{row[3]:.2f}" for row in falls),
            ]
        )
    for name in ("the paper's rule: every FC2 input", "bitplan plan --converge, again"):
        values = [value["plans"][name]["R"]["after"] for value in found.values()]
        rows.append(
            [
                f"R within {TOLERANCE[0]} to {TOLERANCE[1]} under {name}",
                "the embedded checkpoint, 20,480 tokens",
                answer([within(value) for value in values]),
                ", ".join(spelled(value, 2) for value in values),
            ]
        )
    yield (
        "By G, 32 to 256. **yes** or **no** where the intervals say so at every G; numbers without "
        "an interval are compared as they are."
    )
    yield ""
    yield from table(["finding", "start", "holds", "numbers"], rows)


def answer(each: Sequence[bool | None]) -> str:
    """Return yes or no where all agree, and what there is where they do not."""
    words = {True: "yes", False: "no", None: "undetermined"}
    if len({*each}) > 1:
        return ", ".join(words[one] for one in each)
    return words[None] if each[0] is None else f"**{words[each[0]]}**"


def above(value: Value, bound: float) -> bool | None:
    if value["low"] is None:
        return None
    return True if value["low"] > bound else False if value["high"] < bound else None


def within(value: Value) -> bool | None:
    word = decide(Interval(value["estimate"], value["low"], value["high"]))
    return None if word == "undetermined" else word == "converged"


def apart(big: Value, small: Value) -> bool | None:
    if big["low"] > small["high"]:
        return True
    return False if big["high"] < small["low"] else None


def largest(found: Value) -> str:
    def estimate(role: str) -> float:
        value = back(found, role)
        return -1.0 if value is None else float(value["estimate"])

    return max(ROLES, key=estimate)


def bottleneck(found: Value) -> bool | None:
    most, fc2 = back(found, largest(found)), back(found, "fc2")
    assert most is not None
    assert fc2 is not None
    if largest(found) != "fc2":
        return False if most["low"] > fc2["high"] else None
    others = [value for role in OTHERS if (value := back(found, role))]
    return True if all(fc2["low"] > value["high"] for value in others) else None


def share(found: Value) -> float:
    value = back(found, "fc2")
    assert value is not None
    return float(value["estimate"] / found["delta_nats"]["w4a4"]["estimate"])


def kurtosis_kept(found: Value, role: str) -> float:
    of = found["input_kurtosis"]
    return float(of["w4a4"]["last"][role] / of["bf16"]["last"][role])


def page(arms: dict[str, Value], found: dict[int, Value]) -> Lines:
    yield "<!-- Generated by benchmarks/real_training.py from benchmarks/results; edit those. -->"
    yield ""
    yield "# Real training at three group sizes"
    yield ""
    yield (
        "What 4 bits cost after training, where the cost comes from, and whether the paper's "
        "findings (arXiv 2505.14302: models of 74M to 595M parameters, from scratch, on 10B to "
        "100B tokens) hold for two checkpoints and a small model from scratch. All arms of a seed "
        "share their batches; intervals are 95 %, over seeds and held-out text, from one seed over "
        "the text alone. SmolLM2's weights were already rounded to 4 bits (GGUF Q4_1)."
    )
    yield ""
    yield from findings(arms, found)
    for start in STARTS:
        yield from of_start(start, by_size(arms, start))
    yield from plans(found)
    yield from kurtosis(arms)
    yield from repeat()


def repeat() -> Lines:
    """Say how each start was trained."""
    yield "## To repeat it"
    yield ""
    yield (
        f"2026-11-25, commit {COMMIT}. RUN is what `bitplan profile MODEL -o RUN --formats "
        "int4-g32,int8-g32,int4-g128,int8-g128,int4-g256,int8-g256` makes. For each G: "
        "`python benchmarks/plans_compared.py ... --group-size G --work DIR --attribute --arms "
        "bf16,w4a16,w16a4,w4a4,planned,planned-weights,planned-inputs,w4a4-hadamard` with"
    )
    yield ""
    yield from table(
        ["start", "...", "text"],
        [[words, f"`{TRAININGS[start]}`", TEXTS[start]] for start, words in STARTS.items()],
    )
    yield (
        "then `python benchmarks/arms_compared.py NAME-gG=DIR ...` over all of them, and `python "
        "benchmarks/real_training.py`. On GPUs `--gpus 2 --workers 1` (SmolLM2) or 2. What was "
        "trained on GPUs ran out of time, seed by seed: so seeds, and rows, are missing."
    )
    yield ""


def read(results: Path) -> tuple[dict[str, Value], dict[int, Value]]:
    """Return the arms by start and group size, and the plans by group size."""
    arms = json.loads((results / "arms_compared.json").read_text())
    places = {size: results / f"plans_compared_g{size}.json" for size in SIZES}
    return arms, {size: json.loads(place.read_text()) for size, place in places.items()}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=PAGE)
    asked = parser.parse_args()
    text = "\n".join(page(*read(RESULTS))).rstrip("\n") + "\n"
    write_atomic(asked.output, lambda file: file.write(text.encode()))
    print(asked.output)


if __name__ == "__main__":
    main()
