"""bitplan's plans against what one would choose otherwise, at equal cost.

    python benchmarks/alternatives.py profile ask --model MODEL --run RUN --to DIR
    PEERS/bin/python benchmarks/alternatives_peers.py DIR
    python benchmarks/alternatives.py choose measure train compare --model MODEL --run RUN --to DIR

Cost is bit operations: the sum over the planned linears of multiply-accumulates times weight bits
times input bits, here as a multiple of 4-bit weights and inputs. A budget is named by the average
input bits that it buys beside 4-bit weights; `fc2` is what the paper's rule spends. Every
alternative may spend that and no more, on int4-g128 and int8-g128:

    bitplan              inputs alone: `bitplan plan --bit-ops B --weight-bits W`, W as in uniform
    bitplan, measured    the same with --measure: refined by whole plans on calibration text
    bitplan, weights too `bitplan plan --bit-ops B`: it may buy 8-bit weights as well
    uniform              every site at 4 bits, the reference: it spends less than any budget
    fc2, first-last      rules.py as they are, at the budgets that they fit in; first-last raises
                         weights as well
    ends inward          inputs of whole blocks from both ends of the model, as many as fit
    kurtosis, sqnr       inputs of highest kurtosis or relative 4-bit error first, as many as fit
    random               inputs in random order, DRAWS times
    ModelOpt, AutoRound  their own searches over W4A4 and W8A8 (alternatives_peers.py)
    ..., inputs priced   ModelOpt's search over W4A8 as well, told what each scheme costs

Choices come from calibration text, what is measured from held-out text. `measure` quantizes the
whole model by each choice, without training: change of loss and KL from the unquantized model by
sequence. `train` continues training under each choice as `bitplan verify` does. Intervals are of
95 %, of differences paired by sequence, and by seed after training; the seeds' spread is pooled
over choices (randomized blocks), and the sequences' added in quadrature, as in qat/verdict.py.

Every stage adds to the tables in DIR what is missing there, so that any can be stopped and run
again; the same choice found twice is measured and trained once. --device may name several devices,
and one several times: each gets a process.
"""

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from alternatives_choose import BASELINE, DRAWS, HIGH, LOW, Sites, choose, limits
from alternatives_compare import as_text, compare
from alternatives_work import MEASURED, TRAINED, Call, Settings, add_rows, read, spread
from safetensors.torch import save_model

from bitplan.options import ProfileOptions
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.profile import profile_checkpoint
from bitplan.qat.recipe import Recipe
from bitplan.rundir import RunDir, versions, write_atomic, write_json

CHOICES = "choices.parquet"


def ask(settings: "Settings", place: Path) -> None:
    """Write the checkpoint and the question that alternatives_peers.py answers."""
    checkpoint = load_checkpoint(settings.model, device="cpu")
    sites = Sites.read(RunDir.open(settings.run))
    ids = settings.ids(checkpoint.tokenizer, "calibration", settings.peer_tokens)
    model: Any = checkpoint.model
    # transformers refuses to save what it read from GGUF, though it is plain float32 by now.
    folder = place / "checkpoint"
    checkpoint.tokenizer.save_pretrained(folder)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config | {"architectures": [type(model).__name__]})
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    fused = sites.inputs.group_by("unit", maintain_order=True).agg("module")
    request = {
        "budgets": limits(sites),
        "macs": sites.macs,
        "fused": [group for group in fused["module"].to_list() if len(group) > 1],
        "group_size": LOW.group_size,
        "ids": ids.tolist(),
        "texts": checkpoint.tokenizer.batch_decode(ids),
    }
    write_json(place / "request.json", request)


def measure_calls(choices: pl.DataFrame, done: pl.DataFrame) -> list[Call]:
    """Return what is left to measure, random draws last."""
    rows = choices.sort("draw", nulls_last=False, maintain_order=True)
    left = rows.unique("choice", maintain_order=True).join(done, on="choice", how="anti")
    return [("measure", row) for row in left.select("choice", "raised").rows()]


def train_calls(choices: pl.DataFrame, done: pl.DataFrame, settings: Settings) -> list[Call]:
    """Return what is left to train, seed by seed, so that what is whole can be compared."""
    asked = choices.filter(pl.col("draw").is_null() | (pl.col("draw") < settings.trained_draws))
    rows = asked.unique("choice", maintain_order=True).select("choice", "raised").rows()
    known = set(done.select("choice", "seed").unique().rows())
    return [
        ("train", (choice, raised, seed))
        for seed in range(settings.seeds)
        for choice, raised in [(BASELINE, None), *rows]
        if (choice, seed) not in known
    ]


def facts(settings: Settings, measured: pl.DataFrame, trained: pl.DataFrame) -> dict[str, Any]:
    """Return what the results depend on."""
    recipe, model = settings.recipe, RunDir.open(settings.run).manifest["model"]
    names = ("content_hash", "num_non_embedding_parameters", "weights_note")
    return {
        "model": {"name": Path(settings.model).name} | {name: model[name] for name in names},
        "cost": "sum of MACs x weight bits x input bits, over that of 4-bit weights and inputs",
        "formats": [LOW.name, HIGH.name],
        "measured": {
            "heldout_tokens": settings.measure_tokens,
            "choices": measured["choice"].n_unique(),
            "hardware": sorted(measured["hardware"].unique()),
        },
        "trained": {
            "recipe": asdict(recipe),
            "tokens": recipe.tokens,
            "heldout_tokens": settings.eval_tokens,
            "seeds": trained["seed"].n_unique(),
            "choices": trained["choice"].n_unique(),
            "hardware": sorted(trained["hardware"].unique()),
        },
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "versions": dict(versions()),
    }


def main() -> None:
    """Run the stages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = ("profile", "ask", "choose", "measure", "train", "compare")
    parser.add_argument("stages", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--model", required=True)
    parser.add_argument("--run", type=Path, required=True, help="run directory of the profile")
    parser.add_argument("--to", type=Path, required=True, help="directory of the tables")
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--device", action="append", default=[], help="again for more processes")
    parser.add_argument("--measure-tokens", type=int, default=4096)
    parser.add_argument("--peer-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trained-draws", type=int, default=DRAWS, help="random choices to train")
    parser.add_argument("--eval-tokens", type=int, default=24_576)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="start nothing after this")
    asked = parser.parse_args()
    deadline = time.time() + asked.limit_s
    devices = asked.device or ["cpu"]
    settings = Settings(
        model=asked.model,
        run=asked.run,
        data=tuple(asked.data),
        recipe=Recipe(
            steps=asked.steps, batch_size=asked.batch_size, seq_len=asked.seq_len, lr=asked.lr
        ),
        **{
            name: getattr(asked, name)
            for name in ("measure_tokens", "peer_tokens", "seeds", "trained_draws", "eval_tokens")
        },
    )
    asked.to.mkdir(parents=True, exist_ok=True)
    choices = asked.to / CHOICES
    measured, trained = asked.to / "measured.parquet", asked.to / "trained.parquet"
    peers = asked.to / "peers.json"
    if "profile" in asked.stages:
        options = ProfileOptions(model=asked.model, data=settings.data, device=devices[0])
        profile_checkpoint(asked.run, options)
    if "ask" in asked.stages:
        ask(settings, asked.to)
    if "choose" in asked.stages:
        answers = json.loads(peers.read_text()) if peers.exists() else {}
        choices.unlink(missing_ok=True)
        add_rows(choices, choose(asked.run, answers))

    def tables() -> tuple[pl.DataFrame, pl.DataFrame]:
        first = read(measured, MEASURED, settings.key("measure"))
        return first, read(trained, TRAINED, settings.key("train"))

    calls: list[Call] = []
    if "measure" in asked.stages:
        calls += measure_calls(pl.read_parquet(choices), tables()[0])
    if "train" in asked.stages:
        calls += train_calls(pl.read_parquet(choices), tables()[1], settings)
    for method, frame in spread(settings, calls, devices, deadline) if calls else ():
        add_rows({"measure": measured, "train": trained}[method], frame)
    if "compare" in asked.stages:
        found = compare(pl.read_parquet(choices), *tables())
        text = as_text(found)
        print(text)
        write_atomic(asked.to / "compared.txt", lambda file: file.write(f"{text}\n".encode()))
        about = facts(settings, *tables())
        write_json(asked.to / "compared.json", {**about, "budgets": found})


if __name__ == "__main__":
    main()
