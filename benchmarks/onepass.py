"""One pass over a tensor against what else one could run: python benchmarks/onepass.py [--compile]

Times every statistic of a tensor, with the errors of int4-g128 and int8-g128, on the CPU and, where
there is one, on a CUDA GPU: against a plain sum (the speed of memory), against |x|.max() and two
moments, and against the same statistics in torch operations; with --compile, which takes a minute,
also against torch.compile of those. Each ratio is of one run. Compares the kurtosis
of outlier-heavy data with float64. Writes results/onepass_{cpu,cuda}.json beside this file.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitplan.formats import parse_formats
from bitplan.probe import TensorStats
from bitplan.probe.moments import moments_of, pool, shape_of
from bitplan.probe.onepass import eager, one_pass
from bitplan.probe.totals import empty_totals

FORMATS = parse_formats(("int4-g128", "int8-g128"))
RESULTS = Path(__file__).parent / "results"
# Shape and dtype; the last of the GPU's are inputs of a small training step.
CPU = [((4096, 1536), "float32"), ((4096, 1536), "bfloat16"), ((1024, 8192), "bfloat16")]
CUDA = [
    ((8192, 14336), "bfloat16"),
    ((8192, 14336), "float16"),
    ((8192, 14336), "float32"),
    ((32768, 768), "bfloat16"),
    ((4096, 768), "bfloat16"),
]


def typical_ms(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median of several runs, or on a CPU, which others may use, the smallest.

    There one thread is timed by the seconds that it runs, which others cannot add to.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # half a millisecond, in which launches queue up
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = clock()
            work()
            times.append(1e3 * (clock() - start))
        if i == 1:
            times = []
    return statistics.median(times) if device == "cuda" else min(times)


def outlier_heavy(shape: tuple[int, int], dtype: str, device: str) -> Tensor:
    """Normal data with one massive value in 65536."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=device)
    x.view(-1)[:: 1 << 16] *= 3000
    return x.to(getattr(torch, dtype))


def kurtosis(x: Tensor) -> float:
    """The reference, in float64 on all of the data at once."""
    return float(shape_of(moments_of(x.double().flatten()))[2])


def measure(
    shape: tuple[int, int], dtype: str, device: str, alternative: Callable[..., Any] | None
) -> dict[str, Any]:
    x = outlier_heavy(shape, dtype, device)
    totals = empty_totals(shape[1], x.device)
    rows = one_pass(x, FORMATS, totals)
    found, want = float(shape_of(pool(rows[:, :5]))[2]), kurtosis(x)
    stats = TensorStats(shape[1], operand="weight", formats=FORMATS, device=device)
    few, many = (7, 15) if device == "cpu" else (5, 50)
    work = {
        "one pass": (lambda: one_pass(x, FORMATS, totals), many),
        "one pass, no formats": (lambda: one_pass(x, (), totals), many),
        "update": (lambda: stats.update(x), many),
        "sum": (lambda: x.sum(), many),
        "absmax and two moments": (
            lambda: (x.abs().amax(), x.sum(dtype=torch.float32), (x * x).sum(dtype=torch.float32)),
            many,
        ),
        "eager": (lambda: eager(x, FORMATS, totals), few),
    }
    if alternative is not None:
        work["torch.compile"] = (lambda: alternative(x, FORMATS, totals), few)
    times = {name: typical_ms(run, device, repeats) for name, (run, repeats) in work.items()}
    ours = times["one pass"]
    start = time.perf_counter()
    for _ in range(20):
        one_pass(x, FORMATS, totals)
    host_us = (time.perf_counter() - start) / 20 * 1e6
    return {
        "shape": shape,
        "dtype": dtype,
        "ms": {name: round(value, 4) for name, value in times.items()},
        "gb_per_s": round(x.numel() * x.element_size() / ours / 1e6, 1),
        "share_of_sum_bandwidth": round(times["sum"] / ours, 3),
        "times_absmax_and_two_moments": round(ours / times["absmax and two moments"], 2),
        "eager_over_one_pass": round(times["eager"] / ours, 1),
        "compiled_over_one_pass": round(times.get("torch.compile", 0) / ours, 1) or None,
        "host_us": round(host_us, 1) if device == "cuda" else None,
        "kurtosis": want,
        "kurtosis_error": abs(found / want - 1),
    }


def report(device: str, cases: list[tuple[tuple[int, int], str]], compiled: bool) -> None:
    alternative = torch.compile(eager) if compiled else None
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    threads = torch.get_num_threads()
    print(f"\n{device}: {name}, torch {torch.__version__}, {threads} threads")
    rows = []
    for i, (shape, dtype) in enumerate(cases):
        rows.append(row := measure(shape, dtype, device, alternative if i == 0 else None))
        print(f"{shape!s:>14} {dtype:8}", "  ".join(f"{k} {v:.3f}" for k, v in row["ms"].items()))
        print(
            " " * 24 + f"{row['share_of_sum_bandwidth']:.0%} of sum's bandwidth, "
            f"{row['times_absmax_and_two_moments']} x absmax and two moments, "
            f"eager {row['eager_over_one_pass']} x, compiled {row['compiled_over_one_pass']} x, "
            f"kurtosis {row['kurtosis']:.3g} within {row['kurtosis_error']:.1e}",
            flush=True,
        )
    record = {"device": name, "torch": torch.__version__, "threads": threads, "cases": rows}
    label = f"cpu_{threads}" if device == "cpu" else device
    (RESULTS / f"onepass_{label}.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    compiled = "--compile" in sys.argv
    if "--cuda" not in sys.argv:
        for threads in sorted({1, torch.get_num_threads()}):
            torch.set_num_threads(threads)
            report("cpu", CPU, compiled)
    if torch.cuda.is_available():
        report("cuda", CUDA, compiled)


if __name__ == "__main__":
    main()
