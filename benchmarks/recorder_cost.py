"""What recording costs a training step: python benchmarks/recorder_cost.py [--device cuda]

Trains a Llama (on a GPU: 110M parameters in bf16 autocast, a batch that fills it; on a CPU: a tiny
one), plain and with each way of recording the inputs and weights of all linears, in turn within one
run: rounds go through all of them, a round's time over that round's plain time is a ratio, and the
median of the ratios is the result. Goal: recording every step below 1.05, every 20 below 1.005.

What a user has otherwise, each at every step:
    torch hooks         the four moments, |x| of rows and channels, with torch operations in hooks
    sums on the device  as torchtitan's tensor logging: sum, squares, fourth powers and largest |x|
    histograms          as wandb.watch, which has no inputs: of parameters and gradients, 64 bins by
                        torch.histc between their extremes, copied to the host
    nvdlfw-inspect      its six statistics, if it is installed

The first two record inputs and weights. With --compile the model is compiled, and compared with the
compiled plain step; hooks of the others would break its graph at every linear and are left out. The
table is printed, and written with its options to benchmarks/results/recorder_cost_DEVICE.json
(.._compiled.json).
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.probe import Recorder
from bitplan.rundir import versions, write_json

RESULTS = Path(__file__).parent / "results"
GOALS = {1: 1.05, 20: 1.005}
EVERY = 20
SIZES: dict[str, dict[str, int]] = {
    "cpu": {"hidden": 64, "intermediate": 192, "layers": 4, "vocabulary": 512, "batch": 4}
    | {"length": 128},
    "cuda": {"hidden": 768, "intermediate": 2048, "layers": 12, "vocabulary": 32000, "batch": 48}
    | {"length": 1024},
}


class Training:
    """A model with its optimizer; `step` takes one optimizer step."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 64),
            tie_word_embeddings=True,
            use_cache=False,
        )
        with self.device:
            self.model = LlamaForCausalLM(config).train()
        self.run: Any = self.model
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=fused)
        self.ids = torch.randint(
            options.vocabulary, (options.batch, options.length), device=self.device
        )

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            loss = self.run(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()


@dataclass
class Way:
    """A way of recording: what is done around a training, and after each of its steps."""

    name: str
    training: Training
    after_step: Callable[[], object] = lambda: None
    steps: int = 1
    prepare: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)

    def take(self) -> float:
        """Return the seconds of a step, the mean over some after one that does not count."""
        self.prepare()
        self.step()
        synchronize(self.training.device)
        start = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        synchronize(self.training.device)
        return (time.perf_counter() - start) / self.steps

    def step(self) -> None:
        self.training.step()
        self.after_step()
        self.training.optimizer.zero_grad()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]


Statistic = Callable[[Tensor], list[Tensor]]


def moments(x: Tensor) -> list[Tensor]:
    """What TensorStats takes without its histogram, as torch operations would: two passes."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    center = rows - rows.mean()
    square = center * center
    magnitude = rows.abs()
    found = [rows.mean(), square.sum(), (square * center).sum(), (square * square).sum()]
    return [*found, magnitude.amax(0), magnitude.amax(1), (rows * rows).sum(0)]


def sums(x: Tensor) -> list[Tensor]:
    values = x.detach().float()
    square = values * values
    return [values.sum(), square.sum(), (square * square).sum(), values.abs().amax()]


@contextmanager
def hooked(training: Training, statistic: Statistic) -> Iterator[Callable[[], None]]:
    """Compute a statistic of each input in a hook and of each weight after the step."""
    kept: list[list[Tensor]] = []
    modules = linears(training.model)

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        with torch.no_grad():
            kept.append(statistic(args[0]))

    def after_step() -> None:
        with torch.no_grad():
            kept.extend(statistic(module.weight) for _, module in modules)
        kept.clear()

    handles = [module.register_forward_pre_hook(hook) for _, module in modules]
    try:
        yield after_step
    finally:
        for handle in handles:
            handle.remove()


def histograms(training: Training) -> None:
    for parameter in training.model.parameters():
        for values in (parameter.detach(), parameter.grad):
            if values is not None:
                flat = values.flatten().float()
                low, high = flat.min().item(), flat.max().item()
                flat.histc(bins=64, min=low, max=high).cpu()


@contextmanager
def inspected(training: Training) -> Iterator[Callable[[], None]]:
    """Log the statistics of nvdlfw-inspect; raises ImportError where it is not installed."""
    import nvdlfw_inspect.api as api

    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        config = Path(directory) / "config.yaml"
        config.write_text(
            "all:\n  enabled: True\n  layers:\n    layer_name_regex_pattern: .*\n"
            "  base:\n    LogTensorStats:\n      enabled: True\n"
            "      tensors: [input, weight]\n"
            "      stats: [min, max, mean, std, l1_norm, l2_norm]\n      freq: 1\n"
        )
        api.initialize(config_file=str(config), feature_dirs=[], log_dir=directory)

        def log(name: str, kind: str, x: Tensor) -> None:
            with torch.no_grad():
                api.log_tensor_stats(name, tensor_name=kind, tensor=x, skip_reduction=True)

        def hook(name: str) -> Callable[..., None]:
            return lambda module, args: log(name, "input", args[0].detach())

        def after_step() -> None:
            for name, module in linears(training.model):
                log(name, "weight", module.weight.detach())
            api.step()

        for name, module in linears(training.model):
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield after_step
        api.end_debug()


def ways(options: argparse.Namespace, stack: ExitStack) -> Iterator[Way]:
    """Enter every way of recording; a training of its own for each set of hooks."""
    yield Way("plain", Training(options), steps=2 * options.steps)
    errors = tuple(options.formats.split(","))
    for formats in (errors,) if options.compile else ((), errors):
        training = Training(options)
        recorder = stack.enter_context(Recorder(training.model, formats=formats))
        for every in GOALS:
            label = ", ".join((f"Recorder, every {every}", *formats))
            steps = max(every, options.steps)
            prepare = partial(setattr, recorder, "every", every)
            yield Way(label, training, recorder.step, steps, prepare)
    if options.compile:  # the hooks of the others break the graph at every linear
        return
    for name, statistic in (("torch hooks", moments), ("sums on the device", sums)):
        training = Training(options)
        after = stack.enter_context(hooked(training, statistic))
        yield Way(name, training, after, options.steps)
    training = Training(options)
    yield Way("histograms", training, lambda: histograms(training), options.steps)
    try:
        training = Training(options)
        after = stack.enter_context(inspected(training))
        yield Way("nvdlfw-inspect", training, after, options.steps)
    except ImportError:
        print("nvdlfw-inspect is not installed: left out")


def measure(options: argparse.Namespace) -> list[Way]:
    with ExitStack() as stack:
        found = list(ways(options, stack))
        for training in dict.fromkeys(way.training for way in found):
            if options.compile:
                training.run = torch.compile(training.model)
        for way in found:
            for _ in range(2):
                way.step()
            print(f"  ready: {way.name}", flush=True)
        for _ in range(options.rounds):
            for way in found:
                way.seconds.append(way.take())
    return found


def table(found: list[Way]) -> list[dict[str, Any]]:
    plain = found[0].seconds
    rows = []
    for way in found:
        ratios = [a / b for a, b in zip(way.seconds, plain, strict=True)]
        rows.append(
            {
                "way": way.name,
                "step_ms": round(1e3 * statistics.median(way.seconds), 3),
                "ratio": round(statistics.median(ratios), 4),
                "ratio_lowest": round(min(ratios), 4),
                "ratio_highest": round(max(ratios), 4),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps at a time")
    parser.add_argument("--formats", default="int4-g128")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name, value in SIZES[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    found = measure(options)
    rows = table(found)
    for row in rows:
        print(f"{row['way']:40} {row['step_ms']:10.2f} ms  x{row['ratio']:.4f}")
    parameters = sum(p.numel() for p in found[0].training.model.parameters())
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    result = {
        "device": device,
        "parameters": parameters,
        "tokens_a_step": options.batch * options.length,
        "options": {k: v for k, v in vars(options).items() if k != "results"},
        "goal_ratios": GOALS,
        "ways": rows,
        "versions": versions(),
    }
    options.results.mkdir(parents=True, exist_ok=True)
    name = f"recorder_cost_{options.device}{'_compiled' if options.compile else ''}.json"
    write_json(options.results / name, result)


if __name__ == "__main__":
    main()
