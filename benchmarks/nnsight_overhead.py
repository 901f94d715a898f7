"""nnsight against plain hooks: statistics of every input, and interventions.

    python benchmarks/nnsight_overhead.py [MODEL]

Reading: a forward pass alone, with the full statistics of every linear's input in hooks, and with
the same in a trace. Interventions: the inputs of every linear in blocks at 4 bits, the same tokens
and the same sums throughout (checked), one intervention in a pass or several, as rows of a repeated
batch or as nnsight's batched invokes. Each way runs in a process of its own, forked when the model
is loaded, on one thread: CPU time, the smallest of several runs, and what its memory grew by at
most. Everything is written to benchmarks/results/nnsight_overhead.json.
"""

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import parse_format, parse_formats
from bitplan.probe import interventions as engine
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.interventions import Intervention
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.probe.tensor_stats import TensorStats
from bitplan.probe.text import load_text, tokenize
from bitplan.probe.trace import Tracer, traced
from bitplan.quantize import quantize_dequantize
from bitplan.rundir import hardware, versions, write_json
from bitplan.sites import PLANNED_ROLES

RESULT = Path(__file__).parent / "results" / "nnsight_overhead.json"
EMBEDDED = Path(__file__).parents[1] / "core" / "embedded"
FORMAT = parse_format("int4-g128")
STATISTICS = parse_formats(("int4-g128", "int8-g128"))
HEAD = "lm_head"

# What a way of doing it returns: a number that all ways must agree on.
Work = Callable[[], float]


class Setup:
    """A model, its linears, tokens, and one intervention for each input of a block."""

    def __init__(self, model: Any, items: Sequence[LinearModule], ids: Tensor) -> None:
        self.model, self.ids = model, ids
        self.items = [item for item in items if item.has_input]
        planned = [item for item in items if item.linear.role in PLANNED_ROLES]
        self.asked = [
            Intervention(item.linear.module, {item.linear.site("input"): FORMAT})
            for item in planned
        ]
        self.modules = {item.linear.module: item.module for item in self.items}


# --- reading -----------------------------------------------------------------------------------


class Reader:
    """Full statistics of every input it is shown, fresh for each pass."""

    def __init__(self, setup: Setup) -> None:
        self.stats = {
            item.linear.module: TensorStats(
                item.linear.in_features, operand="input", formats=STATISTICS
            )
            for item in setup.items
        }

    def on_input(self, name: str, x: Tensor) -> None:
        self.stats[name].update(x)

    def on_output(self, name: str, y: Tensor) -> None:
        pass

    def checksum(self) -> float:
        return sum(stats.summary().row()["std"] for stats in self.stats.values())


@contextlib.contextmanager
def input_hooks(
    setup: Setup, hooks: dict[str, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    def of(hook: Callable[[Tensor], Tensor | None]) -> Callable[..., Any]:
        return lambda module, args: None if (x := hook(args[0])) is None else (x, *args[1:])

    handles = [
        setup.modules[name].register_forward_pre_hook(of(hook)) for name, hook in hooks.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def read_plain(setup: Setup) -> Work:
    return lambda: float(setup.model(setup.ids).logits.sum() * 0)


def read_hooks(setup: Setup) -> Work:
    def work() -> float:
        reader = Reader(setup)
        with input_hooks(setup, {n: partial(reader.on_input, n) for n in setup.modules}):
            setup.model(setup.ids)
        return reader.checksum()

    return work


def read_trace(setup: Setup) -> Work:
    tracer = Tracer(wrapped(setup), list(setup.modules), every_pass=False)

    def work() -> float:
        reader = Reader(setup)
        tracer.run(setup.ids, reader)
        return reader.checksum()

    return work


def wrapped(setup: Setup) -> Any:
    """Wrap the model for as long as the process lives."""
    import nnsight

    class Batched(nnsight.NNsight):
        """The wrapper of any module, taught to stack the ids of several invokes."""

        def _batch_size(self, *args: Any, input_ids: Tensor | None = None, **kwargs: Any) -> int:
            return 0 if input_ids is None else len(input_ids)

        def _batch(self, invokes: Any, fn: Any) -> tuple[tuple[()], dict[str, Tensor]]:
            return (), {"input_ids": torch.cat([kwargs["input_ids"] for _, kwargs in invokes])}

    return Batched(setup.model)


# --- interventions -----------------------------------------------------------------------------


def waves(setup: Setup, size: int) -> list[list[Intervention]]:
    return [setup.asked[i : i + size] for i in range(0, len(setup.asked), size)]


def names_of(wave: Sequence[Intervention]) -> list[str]:
    return [site.module for each in wave for site in each.formats]


def total(sums: Sequence[Tensor]) -> float:
    """Return the KL divergences of all interventions, summed."""
    return float(torch.cat(list(sums))[:, 1].sum())


def hooks_repeated(setup: Setup, size: int) -> Work:
    """Hooks that quantize an intervention's rows of a repeated batch."""
    sequences = len(setup.ids)

    def one(slot: int, x: Tensor) -> Tensor:
        x = x.clone()
        rows = slice(slot * sequences, (slot + 1) * sequences)
        x[rows] = quantize_dequantize(x[rows], FORMAT)
        return x

    def run(wave: Sequence[Intervention]) -> Tensor:
        hooks = {name: partial(one, slot) for slot, name in enumerate(names_of(wave), start=1)}
        hidden: list[Tensor] = []
        with input_hooks(setup, hooks | {HEAD: hidden.append}):
            logits = setup.model(setup.ids.repeat(len(wave) + 1, 1), use_cache=False).logits
        return engine._sums(hidden[0], logits, ids=setup.ids, slots=len(wave) + 1)

    return lambda: total([run(wave) for wave in waves(setup, size)])


def trace_repeated(setup: Setup, size: int) -> Work:
    """What bitplan does: one trace of a repeated batch."""
    tracer = Tracer(wrapped(setup), [*names_of(setup.asked), HEAD], every_pass=False)
    return lambda: total(
        [engine._pass(tracer, setup.ids, wave, HEAD) for wave in waves(setup, size)]
    )


def trace_invokes(setup: Setup, size: int) -> Work:
    """An invoke for each intervention; the last one, without tokens of its own, sees all rows."""
    from nnsight import save

    model = wrapped(setup)
    envoys = {path.removeprefix("model."): envoy for path, envoy in model.named_modules()}

    def run(wave: Sequence[Intervention]) -> Tensor:
        chosen, slots = [envoys[name] for name in names_of(wave)], len(wave) + 1
        with model.trace(use_cache=False) as tracer:
            with tracer.invoke(input_ids=setup.ids):
                _ = envoys[HEAD].input  # a body must not be empty
            for envoy in chosen:
                with tracer.invoke(input_ids=setup.ids):
                    envoy.input = quantize_dequantize(envoy.input, FORMAT)
            with tracer.invoke():
                hidden = envoys[HEAD].input
                sums = save(engine._sums(hidden, model.output.logits, ids=setup.ids, slots=slots))
        return sums

    return lambda: total([run(wave) for wave in waves(setup, size)])


# --- measuring ---------------------------------------------------------------------------------


def memory_bytes(key: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def child(pipe: Any, make: Callable[[], Work], repeats: int) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        work = make()
        before = memory_bytes("VmRSS")
        value, times = work(), []
        for _ in range(repeats):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    pipe.send((min(times), memory_bytes("VmHWM") - before, value))


def measure(make: Callable[[], Work], repeats: int) -> tuple[float, float, float]:
    """Return CPU seconds, MB of memory growth and the checksum of a way, in a fork."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=child, args=(there, make, repeats))
    process.start()
    there.close()
    seconds, growth, value = here.recv()
    process.join()
    return seconds, growth / 1e6, value


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=str(EMBEDDED))
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--sizes", default="1,2,4,8,14")
    parser.add_argument("--interventions", type=int, default=1 << 30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(asked.model, device="cpu")
    tokens = asked.sequences * asked.seq_len
    ids = tokenize(
        load_text(),
        checkpoint.tokenizer,
        "calibration",
        tokens=tokens,
        seq_len=asked.seq_len,
        seed=0,
    )
    setup = Setup(checkpoint.model, find_linears(checkpoint.model), ids)
    setup.asked = setup.asked[: asked.interventions]
    rows: list[dict[str, Any]] = []

    def record(what: str, how: str, size: int | None, make: Callable[[], Work]) -> None:
        seconds, growth, value = measure(make, asked.repeats)
        per = 1e3 * seconds / (len(setup.asked) if size else 1)
        rows.append(
            {
                "what": what,
                "how": how,
                "in_a_pass": size,
                "cpu_ms": round(per, 2),
                "memory_mb": round(growth, 1),
                "checksum": value,
            }
        )
        print(f"{what:14} {how:22} {size or '':>4} {per:10.1f} ms {growth:8.0f} MB  {value:.6f}")

    with traced(torch.nn.Linear(1, 1), []):
        pass  # nnsight is imported before the forks
    record("statistics", "forward pass alone", None, partial(read_plain, setup))
    record("statistics", "hooks", None, partial(read_hooks, setup))
    record("statistics", "trace", None, partial(read_trace, setup))
    for size in map(int, asked.sizes.split(",")):
        for how, way in (
            ("hooks, repeated batch", hooks_repeated),
            ("trace, repeated batch", trace_repeated),
            ("trace, invokes", trace_invokes),
        ):
            record("interventions", how, size, partial(way, setup, size))
    for what in ("statistics", "interventions"):
        values = [
            r["checksum"] for r in rows if r["what"] == what and r["how"] != "forward pass alone"
        ]
        assert max(values) - min(values) < 1e-4 * abs(max(values)), values
    result = {
        "model": Path(asked.model).name,
        "content_hash": checkpoint.content_hash,
        "sequences": len(ids),
        "seq_len": asked.seq_len,
        "linears": len(setup.items),
        "interventions": len(setup.asked),
        "unit": "CPU ms of a pass (statistics) or of an intervention, one thread, best of "
        f"{asked.repeats}; memory: growth of the process at its peak",
        "rows": rows,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(asked.output, result)


if __name__ == "__main__":
    main()
