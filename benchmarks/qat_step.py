"""What fake quantization costs a training step on a GPU: python benchmarks/qat_step.py

Trains a Llama of 97M parameters in bf16 autocast, W4A4 in groups of 128, every linear but the
head, and the same in bf16, in turn within one run: rounds go through all ways, a round's time over
that round's bf16 time is a ratio, and the median of the ratios is the result, with a 95 % bootstrap
interval over rounds. Goals, compiled: fused at most 1.04, with statistics of every site at every
step at most 1.06, faster than torchao.

    bf16      no quantization
    naive     the eager quantize-dequantize of core/quantize.py; compiled, what inductor makes of it
    fused     qat/fused.py, as every conversion trains on a GPU
    recorder  fused, with a Recorder of every site at every step
    torchao   its own QAT: 4-bit integers, symmetric, groups of 128 (left out where not installed)

And products of the forward pass on fp8 units beside those in bf16 (qat_step_fp8.py). The tables are
printed, and written to benchmarks/results/qat_step.json. Compiling takes longest: processes that
run one way each with --rounds 0, side by side, fill the caches beforehand.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from qat_step_fp8 import compare
from recorder_cost import Training, Way, table
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
SIZES = {"hidden": 1024, "intermediate": 2816, "layers": 5, "vocabulary": 32000} | {
    "batch": 48,
    "length": 1024,
}


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


MAKERS: dict[str, Callable[[Training, Format], Training]] = {
    "bf16": lambda training, fmt: training,
    "naive": naive,
    "fused": quantized,
    "recorder": quantized,
    "torchao": torchao,
}


def ways(options: argparse.Namespace, stack: ExitStack) -> Iterator[Way]:
    fmt = parse_format(FORMAT)
    for name in options.ways.split(","):
        try:
            training = MAKERS[name](Training(options), fmt)
        except ImportError as error:
            print(f"  left out: {error}")
            continue
        after: Callable[[], object] = int
        if name == "recorder":
            after = stack.enter_context(Recorder(training.model)).step
        yield Way(name, training, after, options.steps)


def measure(options: argparse.Namespace, is_compiled: bool) -> list[dict[str, Any]]:
    rows = []
    with ExitStack() as stack:
        found = list(ways(options, stack))
        for way in found:
            if is_compiled:
                way.training.run = torch.compile(way.training.model)
            for _ in range(3):
                way.step()
            print(f"  ready: {way.name}{', compiled' if is_compiled else ''}", flush=True)
        for _ in range(options.rounds):
            for way in found:
                way.seconds.append(way.take())
        for row, way in zip(table(found), found, strict=True) if options.rounds else ():
            ratios = [a / b for a, b in zip(way.seconds, found[0].seconds, strict=True)]
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
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="steps at a time")
    parser.add_argument("--ways", default=",".join(MAKERS))
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.device = "cuda"
    torch._dynamo.config.recompile_limit = 64  # one for each way
    rows = measure(options, True)
    if not options.rounds:
        return
    if options.eager:
        torch._dynamo.reset()
        rows += measure(options, False)
    print(f"{'':24} {'step':>13} {'over bf16':>10}")
    for row in rows:
        label = f"{row['way']}{', compiled' if row['is_compiled'] else ', eager'}"
        span = f"[{row['ratio_low']:.4f}, {row['ratio_high']:.4f}]"
        print(f"{label:24} {row['step_ms']:10.2f} ms {row['ratio']:10.4f} {span}")
    tokens, wide, inner = options.batch * options.length, options.hidden, options.intermediate
    shapes = [(wide, wide), (wide, 3 * wide), (wide, inner), (wide, 2 * inner), (inner, wide)]
    fp8 = [compare(tokens, *shape) for shape in shapes]
    for row in fp8:
        print("  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    result = {
        "device": torch.cuda.get_device_name(),
        "parameters": sum(p.numel() for p in Training(options).model.parameters()),
        "tokens_a_step": tokens,
        "format": FORMAT,
        "options": {k: v for k, v in vars(options).items() if k != "results"},
        "goal_ratios": GOALS,
        "ways": rows,
        "fp8_products": fp8,
        "versions": versions(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    write_json(options.results / "qat_step.json", result)


if __name__ == "__main__":
    main()
