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
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.torch import save_model
from scipy import stats
from torch import Tensor

from bitplan.formats import DEFAULT_HIGH, DEFAULT_LOW, Format, parse_format
from bitplan.options import PlanOptions, ProfileOptions
from bitplan.planner.plan import Plan
from bitplan.planner.stage import make_plan
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.profile import profile_checkpoint
from bitplan.probe.text import Split, load_text, tokenize
from bitplan.progress import track
from bitplan.qat.convert import convert, restore
from bitplan.qat.measure import make_measured_plan
from bitplan.qat.recipe import Recipe
from bitplan.qat.record import HELDOUT_FILE, arm_dir
from bitplan.qat.train import Job, make_accelerator, train_arm
from bitplan.qat.verdict import CONFIDENCE, Floats
from bitplan.rundir import RunDir, content_hash, hardware, versions, write_atomic, write_json
from bitplan.sites import OPERANDS, PLANNED_ROLES, Site
from bitplan.tables import ERRORS, PROFILE

LOW, HIGH = parse_format(DEFAULT_LOW), parse_format(DEFAULT_HIGH)
INPUT_BITS = (4.4, 4.75, 5.75, 6.75)
DRAWS = 20
BASELINE = "bf16"
OURS = "bitplan"
# What bitplan is asked for, beside the bit operations.
PLANS: dict[str, Callable[[Plan], dict[str, Any]]] = {
    OURS: lambda uniform: {"weight_bits": uniform.predicted.weight_bits},
    "bitplan, measured": lambda uniform: {
        "weight_bits": uniform.predicted.weight_bits,
        "measure": PlanOptions.DEFAULT_MEASURE,
    },
    "bitplan, weights too": lambda uniform: {},
}
RAISED = {"W4A8": ("input",), "W8A8": ("input", "weight")}
RULES = ("uniform", "fc2", "first-last")
CHOICES = "choices.parquet"
# `key` identifies the model, the text and the recipe that a row's numbers depend on.
KEY = {"choice": pl.String, "key": pl.String, "hardware": pl.String}
MEASURED = {**KEY, "sequence": pl.Int64, "delta_loss": pl.Float64, "kl": pl.Float64}
TRAINED = {**KEY, "seed": pl.Int64, "sequence": pl.Int64, "loss": pl.Float64}
BATCH_TOKENS = 2048  # of a forward pass without training; logits are the largest tensors


# --- choosing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sites:
    """The planned sites of a run: `frame` holds a row each, `raised` means a site at 8 bits."""

    frame: pl.DataFrame

    @classmethod
    def read(cls, run: RunDir) -> "Sites":
        profile = run.read_table(PROFILE.file).filter(
            pl.col("step") == 0, pl.col("role").is_in(PLANNED_ROLES)
        )
        errors = run.read_table(ERRORS.file).filter(pl.col("step") == 0, format=LOW.name)
        own = pl.when(operand="input").then("fused")
        frame = profile.join(errors, on="site", maintain_order="left").select(
            "site", "module", "operand", "role", "block", "kurtosis", "relative_error",
            "in_features", unit=pl.coalesce(own, "module"),
            macs=pl.col("in_features") * pl.col("out_features"),
        )  # fmt: skip
        return cls(frame)

    @property
    def inputs(self) -> pl.DataFrame:
        return self.frame.filter(operand="input")

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates a token by module."""
        return dict(self.inputs.select("module", "macs").iter_rows())

    def cost(self, raised: Iterable[str]) -> float:
        """Return bit operations over those of uniform 4-bit."""
        times = HIGH.bits / LOW.bits
        sites = set(raised)

        def of(module: str) -> float:
            return float(times ** sum(f"{module}:{o}" in sites for o in OPERANDS))

        used = sum(macs * of(module) for module, macs in self.macs.items())
        return used / sum(self.macs.values())

    def bits(self, operand: str, raised: Iterable[str]) -> float:
        """Return an operand's average bits, scales counted, weighted by multiply-accumulates."""
        sites, mine = set(raised), self.frame.filter(operand=operand)
        rows = mine.select("site", "in_features", "macs").iter_rows()
        total = sum(
            macs * (HIGH if site in sites else LOW).effective_bits(width)
            for site, width, macs in rows
        )
        return float(total / mine["macs"].sum())

    def formats(self, raised: Iterable[str]) -> dict[Site, Format]:
        sites = set(raised)
        return {Site.parse(s): HIGH if s in sites else LOW for s in self.frame["site"]}

    def greedy(self, score: Mapping[str, float], limit: float) -> list[str]:
        """Raise inputs, with all their readers, by falling score, each that still fits."""
        raised: list[str] = []
        readers = self.inputs.group_by("unit", maintain_order=True).agg("site")
        for _, sites in sorted(readers.iter_rows(), key=lambda unit: -score[unit[0]]):
            if self.cost([*raised, *sites]) <= limit * (1 + 1e-9):
                raised += sites
        return raised

    def scores(self, expression: pl.Expr) -> dict[str, float]:
        """Return the largest value by unit of inputs."""
        return dict(self.inputs.group_by("unit", maintain_order=True).agg(expression).iter_rows())


def limits(sites: Sites) -> dict[str, float]:
    """Return each budget's bit operations over those of uniform 4-bit."""
    fc2 = [s for s, role in sites.inputs.select("site", "role").iter_rows() if role == "fc2"]
    base = sites.bits("input", [])
    buys = {f"{bits:.2f}": 1 + (bits - base) / LOW.bits for bits in INPUT_BITS}
    buys[f"fc2 ({sites.bits('input', fc2):.2f})"] = sites.cost(fc2)
    return dict(sorted(buys.items(), key=lambda item: item[1]))


def choose(run: Path, peers: Mapping[str, Any]) -> pl.DataFrame:
    """Return a row for every alternative and budget, with the sites it puts at 8 bits."""
    sites = Sites.read(RunDir.open(run))
    rows: list[dict[str, Any]] = []

    def add(name: str, budget: str, raised: Iterable[str], draw: int | None = None) -> None:
        chosen = sorted(raised)
        assert sites.cost(chosen) <= bought[budget] * (1 + 1e-9), (name, budget)
        rows.append(
            {
                "budget": budget,
                "limit": bought[budget],
                "name": name,
                "draw": draw,
                "choice": content_hash({str(s): str(f) for s, f in sites.formats(chosen).items()}),
                "cost": sites.cost(chosen),
                "input_bits": sites.bits("input", chosen),
                "weight_bits": sites.bits("weight", chosen),
                "raised": chosen,
            }
        )

    ends = sites.inputs["block"].max()
    ranked = {
        "ends inward": sites.scores(-pl.min_horizontal("block", ends - pl.col("block")).min()),
        "kurtosis": sites.scores(pl.col("kurtosis").max()),
        "sqnr": sites.scores(pl.col("relative_error").max()),
    }
    bought = limits(sites)
    with tempfile.TemporaryDirectory() as folder:
        own = Path(shutil.copytree(run, Path(folder) / "run"))

        def planned(**options: Any) -> tuple[Plan, list[str]]:
            asked = PlanOptions(**options)
            plan = (make_measured_plan if asked.measure else make_plan)(own, asked).plan
            return plan, [site for site, fmt in plan.assignment.items() if fmt == HIGH]

        uniform, _ = planned(rule="uniform")
        assert uniform.predicted.bit_ops is not None
        rules = {name: planned(rule=name)[1] for name in RULES}
        for budget, limit in bought.items():
            for name, more in PLANS.items():
                ops = uniform.predicted.bit_ops
                plan, raised = planned(bit_ops=limit * ops, **more(uniform))
                assert math.isclose(plan.predicted.bit_ops or 0.0, sites.cost(raised) * ops)
                add(name, budget, raised)
            for name, raised in rules.items():
                if sites.cost(raised) <= limit * (1 + 1e-9):
                    add(name, budget, raised)
    for budget, limit in bought.items():
        for name, score in ranked.items():
            add(name, budget, sites.greedy(score, limit))
        for name, answer in peers.items():
            schemes = answer["choices"][budget].items()
            add(name, budget, [f"{m}:{o}" for m, s in schemes for o in RAISED[s]])
        for draw in range(DRAWS):
            dice = random.Random(f"{budget} {draw}")
            units = dict.fromkeys(sites.inputs["unit"])
            add("random", budget, sites.greedy({u: dice.random() for u in units}, limit), draw)
    return pl.DataFrame(rows)


# --- asking the peers --------------------------------------------------------------------------


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


# --- measuring and training --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for on the command line."""

    model: str
    run: Path
    data: tuple[str, ...]
    measure_tokens: int
    peer_tokens: int
    seeds: int
    trained_draws: int
    eval_tokens: int
    recipe: Recipe

    def key(self, stage: str) -> str:
        """Identify what the rows of `measure` or `train` depend on beside the choice."""
        used: dict[str, dict[str, Any]] = {
            "measure": {"tokens": self.measure_tokens, "seq_len": self.recipe.seq_len},
            "train": {"tokens": self.eval_tokens}
            | {key: asdict(self.recipe)[key] for key in ("steps", "batch_size", "seq_len", "lr")},
        }
        text = load_text(self.data).content_hash
        return content_hash({"model": Path(self.model).name, "text": text, **used[stage]})

    def ids(self, tokenizer: Any, split: Split, tokens: int, seed: int = 0) -> Tensor:
        length = self.recipe.seq_len
        return tokenize(
            load_text(self.data), tokenizer, split, tokens=tokens, seq_len=length, seed=seed
        )

    def heldout(self, tokenizer: Any, tokens: int) -> Tensor:
        return self.ids(tokenizer, "heldout", tokens)


class Worker:
    """A process's model on its device, and the texts that it needs again and again."""

    def __init__(self, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.checkpoint = load_checkpoint(settings.model, device="cpu")
        self.sites = Sites.read(RunDir.open(settings.run))

    @cached_property
    def heldout(self) -> list[Tensor]:
        """Batches of held-out sequences for `measure`."""
        tokens = self.settings.measure_tokens
        ids = self.settings.heldout(self.checkpoint.tokenizer, tokens).to(self.device)
        return list(torch.split(ids, max(1, BATCH_TOKENS // ids.shape[1])))

    @cached_property
    @torch.no_grad()
    def base(self) -> list[Tensor]:
        """Log-probabilities of the unquantized model for each batch."""
        model = self.checkpoint.model.to(self.device).eval()
        return [model(input_ids=ids).logits.log_softmax(-1) for ids in self.heldout]

    @torch.no_grad()
    def measure(self, choice: str, raised: Sequence[str]) -> pl.DataFrame:
        """Return the change of loss and the KL of each held-out sequence, nats per token."""
        base = self.base
        model = self.checkpoint.model
        convert(model, self.sites.formats(raised))
        rows: list[Tensor] = []
        for ids, expected in zip(self.heldout, base, strict=True):
            difference = expected - model(input_ids=ids).logits.log_softmax(-1)
            kl = torch.linalg.vecdot(expected.exp(), difference)[:, :-1].double().mean(1)
            loss = difference[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].double().mean(1)
            rows.append(torch.stack([loss, kl], dim=1).cpu())
        restore(model)
        loss, kl = torch.cat(rows).T.numpy()
        columns = {"sequence": range(len(loss)), "delta_loss": loss, "kl": kl}
        return self._rows(pl.DataFrame(columns), "measure", choice).select(*MEASURED)

    @cached_property
    def accelerator(self) -> Any:
        return make_accelerator(self.device)

    def train(self, choice: str, raised: Sequence[str] | None, seed: int) -> pl.DataFrame:
        """Return the loss of each held-out sequence after training; `raised` is None for bf16."""
        settings, recipe = self.settings, self.settings.recipe
        self.__dict__.pop("base", None)  # makes room
        tokens = recipe.steps * recipe.batch_size * recipe.seq_len
        job = Job(
            arm=choice,
            seed=seed,
            formats={} if raised is None else self.sites.formats(raised),
            quantizers={},
            recipe=recipe,
            train=settings.ids(self.checkpoint.tokenizer, "train", tokens, seed),
            heldout=settings.heldout(self.checkpoint.tokenizer, settings.eval_tokens),
        )
        with tempfile.TemporaryDirectory() as folder:
            run = RunDir.create(folder)
            train_arm(run, self.checkpoint.model.cpu(), job, self.accelerator)
            losses = run.read_table(f"{arm_dir(choice, seed)}/{HELDOUT_FILE}")
        losses = losses.with_columns(seed=pl.lit(seed, pl.Int64))
        return self._rows(losses, "train", choice).select(*TRAINED)

    def _rows(self, frame: pl.DataFrame, stage: str, choice: str) -> pl.DataFrame:
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if cuda else hardware()
        return frame.with_columns(
            choice=pl.lit(choice), key=pl.lit(self.settings.key(stage)), hardware=pl.lit(name)
        )


_worker: Worker
_deadline: float
Call = tuple[str, tuple[Any, ...]]
"""A method of Worker and its arguments."""


def _start(settings: Settings, devices: Any, deadline: float) -> None:
    global _worker, _deadline
    _worker, _deadline = Worker(settings, devices.get()), deadline


def _call(method: str, arguments: tuple[Any, ...]) -> pl.DataFrame | None:
    if time.time() > _deadline:
        return None
    found: pl.DataFrame = getattr(_worker, method)(*arguments)
    return found


def spread(
    settings: Settings, calls: Sequence[Call], devices: Sequence[str], deadline: float
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield what a Worker's methods return, a process for each device.

    Nothing is started after the deadline, in seconds of time.time(); what runs then is finished.
    """
    context = get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    with ProcessPoolExecutor(
        len(devices), mp_context=context, initializer=_start, initargs=(settings, queue, deadline)
    ) as pool:
        method_of = {pool.submit(_call, *call): call[0] for call in calls}
        for future in track(as_completed(method_of), "choices", total=len(calls)):
            if (frame := future.result()) is not None:
                yield method_of[future], frame


def read(path: Path, schema: Mapping[str, Any], key: str) -> pl.DataFrame:
    """Return the rows of a key, none where there is no table yet."""
    table = pl.read_parquet(path) if path.exists() else pl.DataFrame(schema=dict(schema))
    return table.filter(key=key)


def add_rows(path: Path, frame: pl.DataFrame) -> None:
    """Add rows to a Parquet table."""
    table = pl.concat([pl.read_parquet(path), frame]) if path.exists() else frame
    write_atomic(path, lambda file: table.write_parquet(file, compression="zstd"))


# --- comparing ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate with a 95 % interval, nats per token."""

    estimate: float
    low: float
    high: float

    @classmethod
    def around(cls, estimate: float, *squared_half_widths: float) -> "Interval":
        half = math.sqrt(sum(squared_half_widths))
        return cls(estimate, estimate - half, estimate + half)


def t_squared(freedom: int) -> float:
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) ** 2


def over_sequences(values: Floats) -> float:
    """Return the squared half width of a mean over sequences [sequence]."""
    return t_squared(len(values) - 1) * float(values.var(ddof=1)) / len(values)


def seed_variance(losses: Mapping[str, Floats]) -> tuple[float, int]:
    """Return the residual variance of choices x seeds, and its degrees of freedom.

    What is left of the losses [seed, sequence] when each choice and each seed has its own mean.
    With one seed nothing is known of it, and the intervals are those of the held-out text alone.
    """
    means = np.array([each.mean(1) for each in losses.values()])
    left = means - means.mean(1, keepdims=True) - means.mean(0) + means.mean()
    freedom = (means.shape[0] - 1) * (means.shape[1] - 1)
    return (float((left**2).sum()) / freedom if freedom else 0.0), max(freedom, 1)


def compare(choices: pl.DataFrame, measured: pl.DataFrame, trained: pl.DataFrame) -> list[Any]:
    """Return, for every budget, a row per alternative and the names that bitplan loses to."""
    untrained = {
        key: {c: f.sort("sequence")[key].to_numpy() for (c,), f in measured.group_by("choice")}
        for key in ("delta_loss", "kl")
    }
    losses = whole(trained, choices.filter(pl.col("name").is_in(list(PLANS)))["choice"].unique())
    variance, freedom = seed_variance(losses) if losses else (0.0, 1)
    base = losses.get(BASELINE)

    def means(rows: pl.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a named row's arrays, the mean over draws, and the draws' ranges."""
        ids = rows["choice"].to_list()
        arrays, ranges = {}, {}
        for key, known in (*untrained.items(), ("trained", losses)):
            found = [known[i] for i in ids if i in known]
            if found and (key != "trained" or base is not None):
                less = base if key == "trained" else 0.0
                arrays[key] = np.mean(found, axis=0) - less
                each = [float((one - less).mean()) for one in found]
                ranges[key] = {"draws": len(each), "least": min(each), "most": max(each)}
        return arrays, ranges

    def interval(key: str, values: Floats, draws: int) -> dict[str, float]:
        """Return the interval of a mean; `values` are differences from another choice."""
        if not values.any():
            return asdict(Interval(0.0, 0.0, 0.0))  # the same choice
        if key != "trained":
            return asdict(Interval.around(float(values.mean()), over_sequences(values)))
        noise = variance * (1 / draws + 1) / len(values)
        return asdict(
            Interval.around(
                float(values.mean()), t_squared(freedom) * noise, over_sequences(values.mean(0))
            )
        )

    budgets = []
    for (budget, limit), of_budget in choices.group_by("budget", "limit", maintain_order=True):
        ours, _ = means(of_budget.filter(name=OURS))
        rows = []
        for (name,), mine in of_budget.group_by("name", maintain_order=True):
            arrays, ranges = means(mine)
            spent = mine.select(pl.col("cost", "input_bits", "weight_bits").mean())
            row: dict[str, Any] = {"name": name} | spent.row(0, named=True)
            for key, values in arrays.items():
                draws = ranges[key]["draws"]
                row[key] = interval(key, values, draws)
                if key in ours:
                    row[f"{key}_over_bitplan"] = interval(key, values - ours[key], draws)
                if len(mine) > 1:
                    row[f"{key}_range"] = ranges[key]
            rows.append(row)
        loses = {
            key: [r["name"] for r in rows if r.get(f"{key}_over_bitplan", {}).get("high", 0) < 0]
            for key in TITLES
            if key in ours
        }
        budgets.append({"budget": budget, "limit": limit, "loses_to": loses, "rows": rows})
    return budgets


def whole(trained: pl.DataFrame, ours: pl.Series) -> dict[str, Floats]:
    """Return the losses [seed, sequence] of the choices trained under every seed that counts.

    A seed counts when the baseline and all of bitplan's choices are trained under it.
    """
    wanted = {BASELINE, *ours}
    found = trained.filter(pl.col("choice").is_in(wanted)).group_by("seed")
    count = found.agg(pl.col("choice").n_unique())
    seeds = count.filter(pl.col("choice") == len(wanted))["seed"]
    rows = trained.filter(pl.col("seed").is_in(seeds.implode())).sort("seed", "sequence")
    return {
        choice: of_choice["loss"].to_numpy().reshape(len(seeds), -1)
        for (choice,), of_choice in rows.group_by("choice", maintain_order=True)
        if of_choice["seed"].n_unique() == len(seeds)
    }


TITLES = {
    "delta_loss": "change of loss, not trained",
    "kl": "KL from the unquantized model, not trained",
    "trained": "loss over bf16 after training",
}


def summary(found: Sequence[Any], key: str) -> list[str]:
    """Return a line per alternative with an estimate per budget, and how bitplan stands to it."""
    # The last budget has room for every name.
    names = [row["name"] for budget in reversed(found) for row in budget["rows"]]
    cells: dict[str, dict[str, str]] = {name: {} for name in names}
    for budget in found:
        for row in budget["rows"]:
            if key in row:
                over = row[f"{key}_over_bitplan"]
                mark = ">" if over["low"] > 0 else "<" if over["high"] < 0 else " "
                text = f"{row[key]['estimate']:.4f}{mark}"
                cells[row["name"]][budget["budget"]] = text
    budgets = [budget["budget"] for budget in found]
    head = f"{'input bits':26}" + "".join(f"{budget:>14}" for budget in budgets)
    lines = [
        f"{name:26}" + "".join(f"{of.get(budget, ''):>14}" for budget in budgets)
        for name, of in cells.items()
        if of
    ]
    return ["", f"{TITLES[key]}, nats per token", head, *lines] if lines else []


def as_text(found: Sequence[Any]) -> str:
    """Return a table per quantity, then one per budget with the intervals."""
    lines = ["> above bitplan's beyond the interval of the difference, < below it"]
    for key in TITLES:
        lines += summary(found, key)

    def cell(one: Mapping[str, float] | None) -> str:
        if one is None:
            return f"{'':20}"
        return f"{one['estimate']:>10.4f} +- {(one['high'] - one['low']) / 2:.4f}"

    for budget in found:
        title = f"{budget['budget']} input bits: {budget['limit']:.3f} times the bit operations"
        heads = ("loss", "KL", "loss trained", "less bitplan's")
        lines += [
            "",
            f"{title} of 4-bit",
            f"{'':26}{'spent':>7}" + "".join(f"{h:>20}" for h in heads),
        ]
        for row in budget["rows"]:
            cells = "".join(cell(row.get(key)) for key in (*TITLES, "trained_over_bitplan"))
            lines.append(f"{row['name']:26}{row['cost']:>7.3f}{cells}")
            ranges = [row.get(f"{key}_range") for key in TITLES]
            if any(ranges):
                ends = (f"{r['least']:.4f} to {r['most']:.4f}" if r else "" for r in ranges)
                lines.append(f"{'  range of its draws':33}{''.join(f'{end:>20}' for end in ends)}")
        for key, names in budget["loses_to"].items():
            lines.append(f"bitplan loses, {TITLES[key]}: {', '.join(names) or 'to none'}")
    return "\n".join(lines)


# --- the command -------------------------------------------------------------------------------


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
            "tokens": recipe.steps * recipe.batch_size * recipe.seq_len,
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
