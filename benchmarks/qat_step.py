"""What fake quantization costs a training step on a GPU: python benchmarks/qat_step.py

Trains a Llama of 110M parameters in bf16 autocast, W4A4 in groups of 128, every linear but the
head, and the same in bf16, in turn within one run: rounds go through all ways, a round's time over
that round's bf16 time is a ratio, and the median of the ratios is the result, with a 95 % bootstrap
interval over rounds. Goals, compiled: fused at most 1.04, with statistics of every site at every
step at most 1.06, faster than torchao.

    bf16      no quantization
    naive     the eager quantize-dequantize of core/quantize.py; compiled, what inductor makes of it
    fused     qat/fused.py, as every conversion trains on a GPU
    recorder  fused, with a Recorder of every site at every step; also with its int4 errors
    torchao   its own QAT: 4-bit integers, symmetric, groups of 128 (needs torchao)
    fp8       products of the forward pass on fp8 units (qat_step_fp8.py)

The table is printed, and written to benchmarks/results/qat_step.json.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from recorder_cost import SIZES, Training, Way, table
from torch import Tensor, nn

from bitplan.formats import Format, parse_format
from bitplan.probe import Recorder
from bitplan.probe.modules import find_linears
from bitplan.qat.convert import convert
from bitplan.qat.quantizers import InputQuantizer, WeightQuantizer, straight_through
from bitplan.quantize import quantize_dequantize
from bitplan.rundir import versions, write_json
from bitplan.sites import OPERANDS, PLANNED_ROLES

RESULTS = Path(__file__).parent / "results"
GOALS = {"fused": 1.04, "recorder": 1.06}
FORMAT = "int4-g128"
WAYS = ("bf16", "naive", "fused", "recorder", "recorder, int4-g128", "torchao", "fp8")
EAGER_WAYS = ("bf16", "naive", "fused", "torchao")


def quantized(training: Training, fmt: Format) -> Training:
    linears = [item.linear for item in find_linears(training.model)]
    planned = [linear for linear in linears if linear.role in PLANNED_ROLES]
    convert(training.model, {linear.site(side): fmt for linear in planned for side in OPERANDS})
    return training


class NaiveInput(InputQuantizer):
    def _rounded(self, x: Tensor) -> Tensor:
        return quantize_dequantize(x.detach(), self.format)


class NaiveWeight(WeightQuantizer):
    def __call__(self, weight: Tensor) -> Tensor:
        return straight_through(weight, quantize_dequantize(weight.detach(), self.format))


def naive(training: Training, fmt: Format) -> Training:
    for module in quantized(training, fmt).model.modules():
        if (found := getattr(module, "quantize_input", None)) is not None:
            found.__class__ = NaiveInput  # readers of one tensor go on sharing it
            module.quantize_weight = NaiveWeight(fmt)
    return training


class Flat(nn.Module):
    """torchao's rounding in groups, which takes matrices only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, x.shape[-1])).view(x.shape)


def torchao(training: Training, fmt: Format) -> Training:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    config = IntxFakeQuantizeConfig(torch.int4, group_size=fmt.group_size, is_symmetric=True)
    asked = QATConfig(activation_config=config, weight_config=config, step="prepare")
    quantize_(training.model.model, asked)  # the head is beside it
    for module in training.model.modules():
        if (found := getattr(module, "activation_fake_quantizer", None)) is not None:
            module.activation_fake_quantizer = Flat(found)
    return training


def fp8(training: Training, fmt: Format) -> Training:
    from qat_step_fp8 import Fp8Linear

    for module in training.model.model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Fp8Linear
    return training


MAKERS: dict[str, Callable[[Training, Format], Training]] = {
    "bf16": lambda training, fmt: training,
    "naive": naive,
    "fused": quantized,
    "recorder": quantized,
    "torchao": torchao,
    "fp8": fp8,
}


def ways(options: argparse.Namespace, names: list[str], stack: ExitStack) -> Iterator[Way]:
    fmt = parse_format(FORMAT)
    for name in names:
        kind, _, errors = name.partition(", ")
        training = MAKERS[kind](Training(options), fmt)
        after: Callable[[], object] = lambda: None  # noqa: E731
        if kind == "recorder":
            formats = (errors,) if errors else ()
            after = stack.enter_context(Recorder(training.model, formats=formats)).step
        yield Way(name, training, after, options.steps)


def measure(
    options: argparse.Namespace, names: list[str], is_compiled: bool
) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        found = list(ways(options, names, stack))
        ready = []
        for way in found:
            if is_compiled:
                way.training.run = torch.compile(way.training.model)
            try:
                for _ in range(3):
                    way.step()
            except Exception as error:  # of a peer or an experiment: said, and left out
                if way.name in ("bf16", "fused"):
                    raise
                print(f"  left out: {way.name}: {type(error).__name__}: {error}"[:600], flush=True)
                continue
            ready.append(way)
            print(f"  ready: {way.name}", flush=True)
        for _ in range(options.rounds):
            for way in ready:
                way.seconds.append(way.take())
        for row, way in zip(table(ready), ready, strict=True):
            ratios = [a / b for a, b in zip(way.seconds, ready[0].seconds, strict=True)]
            low, high = interval(ratios)
            rows.append({"is_compiled": is_compiled, **row, "ratio_low": low, "ratio_high": high})
    return rows


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return round(medians[50], 4), round(medians[-51], 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in SIZES["cuda"].items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps at a time")
    parser.add_argument("--ways", help="compiled ways, separated by semicolons; all by default")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device = "cuda"
    torch._dynamo.config.recompile_limit = 64  # one for each way
    compiled = options.ways.split(";") if options.ways else list(WAYS)
    eager = [name for name in EAGER_WAYS if name in compiled] if options.eager else []
    rows = []
    for names, is_compiled in ((eager, False), (compiled, True)):
        if names:
            rows += measure(options, names, is_compiled)
            torch._dynamo.reset()
    print(f"{'':32} {'step':>13} {'over bf16':>10}")
    for row in rows:
        label = f"{row['way']}{', compiled' if row['is_compiled'] else ''}"
        span = f"[{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
        print(f"{label:32} {row['step_ms']:10.2f} ms {row['ratio']:10.4f} {span}")
    result = {
        "device": torch.cuda.get_device_name(),
        "parameters": sum(p.numel() for p in Training(options).model.parameters()),
        "tokens_a_step": options.batch * options.length,
        "format": FORMAT,
        "options": {k: v for k, v in vars(options).items() if k != "results"},
        "goal_ratios": GOALS,
        "ways": rows,
        "versions": versions(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "qat_step.json", result)


if __name__ == "__main__":
    main()
