"""Every format against a scalar loop written from its definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.formats import Format, parse_format
from bitplan.quantize import quantize_dequantize

E2M1 = sorted({s * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for s in (-1, 1)})
# All finite E4M3 values: 4 exponent bits (bias 7), 3 mantissa bits, subnormals, no infinity.
E4M3 = sorted(
    {
        sign * value
        for e in range(16)
        for m in range(8)
        if not (e == 15 and m == 7)
        for value in [m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2 ** (e - 7)]
        for sign in (-1, 1)
    }
)


def nearest(value: float, grid: list[float]) -> set[float]:
    """The grid's values nearest to `value`: two of them at a tie."""
    best = min(abs(value - g) for g in grid)
    return {g for g in grid if abs(value - g) <= best * (1 + 1e-6)}


def groups(row_length: int, fmt: Format) -> list[slice]:
    size = fmt.group_size or row_length
    return [slice(s, min(s + size, row_length)) for s in range(0, row_length, size)]


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.integers(1, 70), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_integers_equal_the_papers_definition(seed: int, bits: int, cols: int, size: int) -> None:
    x = np.random.default_rng(seed).standard_normal((3, cols)).astype(np.float32) * 5
    fmt = parse_format(f"int{bits}-g{size}")
    expected = np.empty_like(x)
    for row in range(3):
        for part in groups(cols, fmt):
            scale = np.float32(np.abs(x[row, part]).max() / np.float32(2 ** (bits - 1)))
            for column in range(part.start, part.stop):
                steps = round(float(x[row, column] / scale))  # round() is half to even
                steps = min(max(steps, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
                expected[row, column] = np.float32(steps) * scale
    assert np.array_equal(quantize_dequantize(torch.from_numpy(x), fmt).numpy(), expected)


@pytest.mark.parametrize("name", ["int8-token", "int4-channel", "int4-tensor"])
def test_rows_and_tensors_share_one_scale(name: str) -> None:
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    fmt = parse_format(name)
    half = 2 ** (fmt.bits - 1)
    absmax = x.abs().amax() if fmt.granularity == "tensor" else x.abs().amax(1, keepdim=True)
    scale = absmax / half
    expected = torch.clamp(torch.round(x / scale), -half, half - 1) * scale
    assert torch.equal(quantize_dequantize(x, fmt), expected)


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8-e4m3"])
@pytest.mark.parametrize("cols", [64, 37])
def test_floats_land_on_the_nearest_value_of_their_grid(name: str, cols: int) -> None:
    fmt = parse_format(name)
    x = torch.randn(4, cols, generator=torch.Generator().manual_seed(1)) * 3
    got = quantize_dequantize(x, fmt)
    tensor_scale = float(x.abs().max()) / (448 * 6)
    for row in range(4):
        for part in groups(cols, fmt):
            absmax = float(x[row, part].abs().max())
            if name == "mxfp4":
                scale, grid = 2.0 ** (math.floor(math.log2(absmax)) - 2), E2M1
            elif name == "nvfp4":
                (block,) = nearest(absmax / 6 / tensor_scale, E4M3)
                scale, grid = block * tensor_scale, E2M1
            else:
                scale, grid = absmax / 448, E4M3
            for column in range(part.start, part.stop):
                options = nearest(float(x[row, column]) / scale, grid)
                value = float(got[row, column])
                assert any(
                    math.isclose(value, o * scale, rel_tol=1e-5, abs_tol=1e-9) for o in options
                )


def test_the_positive_extreme_loses_one_step_and_the_negative_none() -> None:
    x = torch.tensor([[-8.0, 8.0, 1.0, 0.0]])
    assert quantize_dequantize(x, parse_format("int4-g4")).tolist() == [[-8.0, 7.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", ["int4-g8", "fp8-e4m3", "nvfp4", "mxfp4", "int4-tensor"])
def test_zeros_stay_zero_and_non_finite_groups_are_nan_not_finite(name: str) -> None:
    fmt = parse_format(name)
    assert torch.equal(quantize_dequantize(torch.zeros(2, 24), fmt), torch.zeros(2, 24))
    x = torch.ones(1, 8)
    x[0, 3] = float("nan")
    assert quantize_dequantize(x, fmt)[0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_and_shape_are_kept_and_arithmetic_is_float32(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(2)).to(dtype)
    fmt = parse_format("int4-g8")
    got = quantize_dequantize(x, fmt)
    assert got.dtype == dtype
    assert got.shape == x.shape
    assert torch.equal(got, quantize_dequantize(x.float(), fmt).to(dtype))


def test_bf16_is_the_tensor_itself() -> None:
    x = torch.randn(2, 2)
    assert quantize_dequantize(x, parse_format("bf16")) is x
