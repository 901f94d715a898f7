import logging
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.formats import Format, parse_formats
from bitplan.probe import onepass_cpu
from bitplan.probe.histogram import _BINS
from bitplan.probe.moments import pool
from bitplan.probe.onepass import ROW, eager, one_pass, passes
from bitplan.probe.totals import Totals, empty_totals

TOLERANCE = 1e-3
FORMATS = parse_formats(["int4-g128", "int8-g128", "int4-g32", "bf16", "int3-g16"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "far from zero": lambda x: 100 + x,
    "little spread": lambda x: 0.1 + 1e-2 * x,
    "heavy tails": lambda x: x**5,
    "small": lambda x: 1e-6 * x,
    "large": lambda x: 1e4 * x,
    "beyond the histogram": lambda x: 1e11 * x,
    "one-sided": lambda x: x.exp(),
    "sparse": lambda x: x.relu() * (x > 1),
    "constant": lambda x: torch.full_like(x, -0.3),
    "ties": lambda x: (2 * x).round() / 2,
}

compiled = pytest.mark.skipif(
    not onepass_cpu.available(torch.device("cpu")), reason="no C compiler was found"
)
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PATHS = (
    pytest.param((eager, "cpu"), id="eager"),
    pytest.param((one_pass, "cpu"), id="compiled", marks=compiled),
    pytest.param((one_pass, "cuda"), id="gpu", marks=gpu),
)
Path_ = tuple[Callable[[Tensor, tuple[Format, ...], Totals], Tensor], str]


class Rows(NamedTuple):
    moments: Tensor
    absmax: Tensor
    errors: Tensor


def run(path: Path_, chunks: list[Tensor], formats: tuple[Format, ...]) -> tuple[Rows, Totals]:
    """Everything on the CPU that a path finds in chunks read one after another."""
    read, device = path
    totals = empty_totals(chunks[0].shape[1], torch.device(device))
    found = [read(chunk.to(device), formats, totals) for chunk in chunks]
    rows = torch.cat(found).cpu()
    return Rows(rows[:, :5], rows[:, 5], rows[:, ROW:]), Totals(*(total.cpu() for total in totals))


def central(values: np.ndarray) -> list[float]:
    """n, mean and central power sums in float64."""
    if values.size == 0:
        return [0.0] * 5
    d = values - values.mean()
    return [values.size, values.mean(), *((d**k).sum() for k in (2, 3, 4))]


def naive_errors(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Squared error of each row in float64, group by group."""
    if fmt.group_size is None:
        return np.zeros(len(x))
    half, total = 2 ** (fmt.bits - 1), np.zeros(len(x))
    for start in range(0, x.shape[1], fmt.group_size):
        part = x[:, start : start + fmt.group_size]
        scale = np.abs(part).max(1, keepdims=True) / half
        scale[scale == 0] = 1
        q = np.clip(np.round(part / scale), -half, half - 1) * scale
        total += ((q - part) ** 2).sum(1)
    return total


def naive_histogram(x: np.ndarray) -> np.ndarray:
    """The bins of histogram.py, [2, bins], by its description; the first ones are not compared."""
    counts = np.zeros((2, _BINS), dtype=np.int64)
    mantissa, exponent = np.frexp(np.abs(x.astype(np.float64)))  # in [1/2, 1)
    place = (exponent + 63).astype(np.int64) * 1024 + np.floor((mantissa * 2 - 1) * 1024)
    place = np.where(x == 0, 0, np.clip(place, 0, _BINS - 1)).astype(np.int64)
    np.add.at(counts, (np.signbit(x).astype(int), place), 1)
    return counts[:, 1:]


def check(path: Path_, x: Tensor, splits: int = 1) -> None:
    """Compare what a path finds with float64 loops over the same values."""
    rows, totals = run(path, list(x.tensor_split(splits)), FORMATS)
    raw = x.float().numpy()
    keep = np.isfinite(raw)
    values = np.where(keep, raw, 0)
    exact = values.astype(np.float64)

    want = np.array(
        [central(row[kept].astype(np.float64)) for row, kept in zip(raw, keep, strict=True)]
    )
    found = rows.moments.numpy()
    np.testing.assert_array_equal(found[:, 0], want[:, 0])
    n, mean, m2, m3, m4 = want.T
    spread = np.sqrt(m2 / np.maximum(n, 1))
    np.testing.assert_allclose(found[:, 1] - mean, 0, atol=1e-30 + 2e-6 * spread.max())
    # What float64 makes of a row of one value is rounding.
    real = spread > 1e-12 * np.abs(mean)
    np.testing.assert_allclose(found[real, 2], m2[real], rtol=TOLERANCE)
    np.testing.assert_allclose(found[real, 4], m4[real], rtol=TOLERANCE)
    size = (n * spread**3)[real]
    np.testing.assert_allclose(found[real, 3] / size, m3[real] / size, rtol=TOLERANCE, atol=1e-3)
    assert not found[~real, 2:].any()

    np.testing.assert_array_equal(rows.absmax.numpy(), np.abs(values).max(1))
    for i, fmt in enumerate(FORMATS):
        np.testing.assert_allclose(
            rows.errors[:, i],
            naive_errors(exact, fmt),
            rtol=TOLERANCE,
            atol=1e-12 * (exact**2).max(),
        )
    np.testing.assert_array_equal(totals.absmax.numpy(), np.abs(values).max(0))
    np.testing.assert_allclose(totals.squares.numpy(), (exact**2).sum(0), rtol=1e-5)
    np.testing.assert_array_equal(totals.counts.numpy(), keep.sum(0))
    assert totals.nonfinite.tolist() == [np.isnan(raw).sum(), np.isinf(raw).sum()]
    counts = totals.histogram.view(2, -1)[:, 1:].numpy()
    np.testing.assert_array_equal(counts, naive_histogram(values))


def make(
    kind: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0, bad: float = 0.0
) -> Tensor:
    """Data of a kind, of which a share is NaN, infinite or, in half precision, overflows."""
    generator = torch.Generator().manual_seed(seed)
    x = KINDS[kind](torch.randn(shape, generator=generator)).to(dtype)
    special = torch.tensor([math.nan, math.inf, -math.inf, 1e30]).to(dtype)
    if dtype != torch.float16:
        special = special[:3]
    which = torch.rand(shape, generator=generator) < bad
    drawn = special[torch.randint(len(special), shape, generator=generator)]
    return torch.where(which, drawn, x)


@pytest.mark.parametrize("path", PATHS)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 300)),
    bad=st.sampled_from([0.0, 0.0, 0.02, 1.0]),
    splits=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_agrees_with_float64_loops(
    path: Path_,
    kind: str,
    dtype: torch.dtype,
    shape: tuple[int, int],
    bad: float,
    splits: int,
    seed: int,
) -> None:
    check(path, make(kind, shape, dtype, seed, bad), min(splits, shape[0]))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 1024, 1536, 2056, 4096])
def test_widths_of_models(path: Path_, dtype: torch.dtype, width: int) -> None:
    x = make("normal", (300, width), dtype)
    x[7] *= 1000
    x[20, width // 2] = 3e4
    check(path, x)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_more_rows_than_a_thread_takes(path: Path_, kind: str) -> None:
    check(path, make(kind, (1500, 256), torch.bfloat16, bad=1e-4), 2)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1e12, 1e18])
def test_extreme_scales(path: Path_, scale: float) -> None:
    x = (make("normal", (64, 512), torch.float32).double() * scale).float().bfloat16()
    rows, totals = run(path, [x], ())
    want = np.array([central(row) for row in x.double().numpy()])
    np.testing.assert_allclose(rows.moments[:, [2, 4]], want[:, [2, 4]], rtol=TOLERANCE)
    assert torch.equal(totals.absmax, x.float().abs().amax(0))


@pytest.mark.parametrize("path", PATHS)
def test_a_kurtosis_above_a_hundred_thousand(path: Path_) -> None:
    x = make("normal", (2000, 512), torch.bfloat16)
    x[700, 3], x[1500, 400] = 30_000.0, -20_000.0
    moments = run(path, [x], ())[0].moments
    n, mean, m2, _, m4 = pool(moments).tolist()
    want = central(x.double().numpy().ravel())
    kurtosis = want[4] / want[0] / (want[2] / want[0]) ** 2
    assert kurtosis > 1e5
    assert m4 / n / (m2 / n) ** 2 == pytest.approx(kurtosis, rel=TOLERANCE)
    assert mean == pytest.approx(want[1], rel=TOLERANCE)


@pytest.mark.parametrize("path", PATHS)
def test_formats_that_no_pass_measures(path: Path_) -> None:
    names = "nvfp4,int8-g128,mxfp4,int8-tensor,int4-g128,int8-token,fp8-e4m3,int4-g48"
    formats = parse_formats(names.split(","))
    x = make("heavy tails", (70, 200), torch.bfloat16, bad=0.01)
    rows, _ = run(path, [x], formats)
    want, _ = run((eager, "cpu"), [x], formats)
    torch.testing.assert_close(rows.errors, want.errors, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_the_same_data_gives_the_same_bits(path: Path_) -> None:
    x = make("heavy tails", (3000, 384), torch.bfloat16, bad=1e-3)
    (first, one), (second, other) = (run(path, [x], FORMATS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((*first, *one), (*second, *other), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_read_together_are_read_as_alone(device: str, dtype: torch.dtype) -> None:
    shapes = [(1 + 40 * i % 301, (96, 256, 768, 2056)[i % 4]) for i in range(150)]
    tensors = [make("heavy tails", s, dtype, i, 1e-3).to(device) for i, s in enumerate(shapes)]
    together, alone = (
        [empty_totals(width, torch.device(device)) for _, width in shapes] for _ in range(2)
    )
    rows = passes(tensors, FORMATS, together)
    for x, found, total, expected in zip(tensors, rows, together, alone, strict=True):
        assert torch.equal(found, one_pass(x, FORMATS, expected))
        torch.testing.assert_close(total.squares, expected.squares, rtol=1e-6, atol=0)
        left, right = (totals._replace(squares=totals.counts) for totals in (total, expected))
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@compiled
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(onepass_cpu, "_THREAD_ELEMENTS", 100)
    check((one_pass, "cpu"), make("normal", (70, 96), torch.float32, bad=0.01))


def test_rows_that_do_not_lie_one_after_another() -> None:
    x = make("normal", (40, 96), torch.float32)
    check((one_pass, "cpu"), x[::2, 1:80])


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing compiled yet, and an empty cache."""
    monkeypatch.setenv("BITPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BITPLAN_COMPILE", raising=False)
    onepass_cpu._library.cache_clear()
    yield tmp_path
    onepass_cpu._library.cache_clear()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_a_warning_and_torch_operations(
    compiler: str,
    nothing_compiled: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.WARNING, logger="bitplan"):
        check((one_pass, "cpu"), make("normal", (4, 40), torch.float32))
        check((one_pass, "cpu"), make("normal", (4, 40), torch.float32))
    assert len(caplog.records) == 1
    assert compiler in caplog.text
    assert list(nothing_compiled.rglob("*.so")) == []


def test_compiling_can_be_declined(
    nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BITPLAN_COMPILE", "0")
    assert not onepass_cpu.available(torch.device("cpu"))
    assert caplog.records == []


@compiled
def test_compiled_once_and_kept(nothing_compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = subprocess.run

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", counted)
    for _ in range(2):
        onepass_cpu._library.cache_clear()
        assert onepass_cpu.available(torch.device("cpu"))
    assert len(calls) == 1
    assert len(list(nothing_compiled.rglob("*"))) == 2  # the folder and the library


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_dtypes_are_read_as_float32(path: Path_, dtype: torch.dtype) -> None:
    x = make("normal", (50, 96), torch.float32).to(dtype)
    rows, totals = run(path, [x], FORMATS)
    want, wanted = run(path, [x.float()], FORMATS)
    assert all(torch.equal(a, b) for a, b in zip(rows, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(totals, wanted, strict=True))
