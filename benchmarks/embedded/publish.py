"""Publishes a finished run: weights, what was recorded about them, and the model card.

The card is filled from record.json (train.py) and kurtosis.json (measure.py) and never edited by
hand, so that its numbers are those of the weights beside it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from corpus import replacing
from measure import ROLES

HERE = Path(__file__).parent
RESULT = HERE / "result"
CHECKPOINT = HERE.parent.parent / "core" / "embedded"
# What the recipe is meant for; a run below it says so in its card.
INTENDED_TOKENS = 400_000_000
COMMAND = (
    "python benchmarks/embedded/corpus.py --data DIR\n"
    f"python benchmarks/embedded/train.py --data DIR --out OUT --tokens {INTENDED_TOKENS} "
    "--batch 64 --micro-batch 64 --compile\n"
    "python benchmarks/embedded/measure.py --checkpoint OUT/final --data DIR "
    "--out OUT/kurtosis.json\n"
    "python benchmarks/embedded/publish.py --run OUT"
)

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# bitplan's embedded checkpoint

A Llama of {parameters_m:.2f}M parameters ({body_m:.2f}M without embeddings) trained from scratch \
on source code and technical documentation. It exists so that bitplan's demo and tests have a \
trained model without a download. **It is for demo and tests only**: too small to be of use for \
anything else, and no evidence about larger models.

| | |
|---|---|
| architecture | LlamaForCausalLM: {num_hidden_layers} blocks, hidden {hidden_size}, MLP \
{intermediate_size}, {num_attention_heads} query and {num_key_value_heads} key/value heads of \
{head_dim}, tied embeddings, {max_position_embeddings} positions |
| tokenizer | byte-level BPE, {vocab_size} tokens, trained on the same text; `<\\|endoftext\\|>` \
begins every document |
| weights | bf16 |
| trained on | {tokens:,} tokens ({epochs:.2f} epochs of {train_tokens:,}), {steps:,} steps of \
{batch_sequences} x {sequence_tokens} tokens |
| hardware | {hardware}, {minutes:.0f} minutes |
| held-out loss | **{held_out_loss_nats_per_token:.3f} nats/token** over {held_out_tokens:,} \
tokens of documents that were not trained on (uniform guessing: {uniform_loss:.2f}) |
| software | torch {torch}, transformers {transformers} |
| date | {date} |

{outstanding}\
## Kurtosis of linear inputs

Pearson kurtosis (normal distribution: 3) of the input of every linear, pooled over tokens and \
channels, float64, on {kurtosis_tokens:,} held-out tokens.

{kurtosis}

## Data

{bytes_m:.0f} MB of text in {documents:,} documents, {python_share:.0%} of it Python, from the \
packages below; sha256 of the text `{sha256}`. The Python standard library is not among them, and \
files that largely repeat it were dropped, because bitplan's demo trains and evaluates on it. So \
were files whose head names a copyleft license.

{sources}

## License

The weights are licensed under Apache-2.0. The texts carry the licenses listed above.

## Reproduction

{command}
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kurtosis_table(kurtosis: dict[str, Any]) -> str:
    cells = {(row["block"], row["role"]): row["kurtosis"] for row in kurtosis["inputs"]}
    blocks = sorted({block for block, _ in cells})
    return table(
        ["block", *ROLES],
        [[str(block), *(f"{cells[block, role]:.1f}" for role in ROLES)] for block in blocks],
    )


def source_table(sources: list[dict[str, Any]]) -> str:
    by_license = defaultdict(list)
    for source in sources:
        by_license[source["license"]].append(source)
    return table(
        ["license", "MB", "packages"],
        [
            [
                name,
                f"{sum(source['bytes'] for source in group) / 1e6:.1f}",
                ", ".join(f"{source['name']} {source['version']}" for source in group),
            ]
            for name, group in sorted(by_license.items())
        ],
    )


def outstanding(record: dict[str, Any]) -> str:
    if record["tokens"] >= INTENDED_TOKENS:
        return ""
    return (
        f"This run is short: the recipe is meant for at least {INTENDED_TOKENS:,} tokens. That run "
        "needs a GPU and is still outstanding; its command is below.\n\n"
    )


def card(record: dict[str, Any], kurtosis: dict[str, Any]) -> str:
    model, data, recipe = record["model"], record["data"], record["recipe"]
    python_bytes = sum(source["bytes"] for source in data["sources"] if source["kind"] == "pypi")
    return CARD.format(
        **model,
        **{key: recipe[key] for key in ("batch_sequences", "sequence_tokens")},
        **{key: record[key] for key in ("tokens", "steps", "hardware", "torch", "transformers")},
        **{key: record[key] for key in ("date", "held_out_loss_nats_per_token", "held_out_tokens")},
        **{key: data[key] for key in ("documents", "sha256", "train_tokens")},
        uniform_loss=record["uniform_loss_nats_per_token"],
        parameters_m=record["parameters"] / 1e6,
        body_m=(record["parameters"] - model["vocab_size"] * model["hidden_size"]) / 1e6,
        epochs=record["tokens"] / data["train_tokens"],
        minutes=record["seconds"] / 60,
        bytes_m=data["bytes"] / 1e6,
        python_share=python_bytes / data["bytes"],
        outstanding=outstanding(record),
        kurtosis_tokens=kurtosis["tokens"],
        kurtosis=kurtosis_table(kurtosis),
        sources=source_table(data["sources"]),
        command="\n".join("    " + line for line in COMMAND.splitlines()),
    )


def copy(source: Path, target: Path) -> None:
    with replacing(target) as file:
        file.write(source.read_bytes())


def main() -> None:
    parser = argparse.ArgumentParser(description="Publishes a finished run with its model card.")
    parser.add_argument("--run", type=Path, required=True, help="train.py's --out")
    parser.add_argument("--to", type=Path, default=CHECKPOINT, help="the checkpoint's directory")
    parser.add_argument("--result", type=Path, default=RESULT, help="the record's directory")
    arguments = parser.parse_args()
    for path in (arguments.run / "final").iterdir():
        copy(path, arguments.to / path.name)
    for name in ("record.json", "kurtosis.json", "metrics.parquet"):
        copy(arguments.run / name, arguments.result / name)
    record = json.loads((arguments.result / "record.json").read_text())
    kurtosis = json.loads((arguments.result / "kurtosis.json").read_text())
    with replacing(arguments.to / "README.md") as file:
        file.write(card(record, kurtosis).encode())


if __name__ == "__main__":
    main()
