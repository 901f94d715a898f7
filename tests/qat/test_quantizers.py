"""Fake quantization: forward as an independent numpy loop rounds, backward the identity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.formats import parse_format
from bitplan.qat.quantizers import (
    InputQuantizer,
    WeightQuantizer,
    factor_shape,
    fake_quantize,
    first_step,
    scaled_fake_quantize,
)


def naive(x: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The paper's AbsMax, group by group and number by number, in float32."""
    half = np.float32(2 ** (bits - 1))
    out = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], group):
            values = x[row, start : start + group]
            scale = np.float32(max(abs(v) for v in values) / half)
            for j, v in enumerate(values):
                q = np.rint(v / scale) if scale else np.float32(0)
                out[row, start + j] = min(max(q, -half), half - 1) * scale
    return out


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(1, 150),
    st.sampled_from([1, 7, 32, 128]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=80, deadline=None)
def test_forward_equals_the_papers_definition_exactly(
    seed: int, bits: int, cols: int, group: int, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((3, cols)) * rng.lognormal(0, 3, (3, 1))
    values[0, : cols // 2] = 0
    x = torch.tensor(values.clip(-6e4, 6e4)).to(dtype)  # within what float16 holds
    expected = torch.tensor(naive(x.float().numpy(), bits, group)).to(dtype)
    found = fake_quantize(x, parse_format(f"int{bits}-g{group}"))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["int4-g128", "int8-token", "fp8-e4m3", "nvfp4", "mxfp4"])
def test_the_gradient_passes_as_if_nothing_were_rounded(name: str) -> None:
    x = torch.randn(4, 130, generator=torch.manual_seed(0), requires_grad=True)
    weights = torch.randn(4, 130, generator=torch.manual_seed(1))
    (fake_quantize(x, parse_format(name)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights, atol=0, rtol=0)


def test_readers_of_one_tensor_share_one_rounding_and_nothing_stays() -> None:
    quantize = InputQuantizer(parse_format("int4-g32"), num_readers=3)
    x = torch.randn(2, 32, generator=torch.manual_seed(0), requires_grad=True)
    seen = [quantize(x) for _ in range(3)]
    assert len({each.data_ptr() for each in seen}) == 1
    assert quantize._slot is None
    sum(s.sum() for s in seen).backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 3), atol=0, rtol=0)


def test_a_changed_or_another_tensor_is_rounded_anew() -> None:
    quantize = InputQuantizer(parse_format("int4-g32"), num_readers=3)
    x = torch.randn(2, 32, generator=torch.manual_seed(0))
    fmt = quantize.format
    quantize(x)
    x.mul_(3)
    assert torch.equal(quantize(x), fake_quantize(x, fmt))
    other = torch.randn(2, 32, generator=torch.manual_seed(1))
    assert torch.equal(quantize(other), fake_quantize(other, fmt))
    assert torch.equal(quantize(x), fake_quantize(x, fmt))


def test_a_weight_is_rounded_once_per_value_in_evaluation_and_always_in_training() -> None:
    quantize = WeightQuantizer(parse_format("int4-g32"))
    weight = torch.nn.Parameter(torch.randn(4, 32, generator=torch.manual_seed(0)))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    with torch.no_grad():
        first = quantize(weight)
        assert quantize(weight) is first
    trained = quantize(weight)
    torch.testing.assert_close(trained, first, atol=0, rtol=0)
    assert trained.requires_grad
    trained.square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(
            quantize(weight), fake_quantize(weight, quantize.format), atol=0, rtol=0
        )
        assert not torch.equal(quantize(weight), first)


def test_a_weight_written_without_a_version_is_not_stale_in_training() -> None:
    quantize = WeightQuantizer(parse_format("int4-g32"))
    weight = torch.nn.Parameter(torch.randn(4, 32, generator=torch.manual_seed(0)))
    with torch.no_grad():
        quantize(weight)
    weight.data.mul_(2)  # moves no version counter
    assert torch.equal(quantize(weight), fake_quantize(weight, quantize.format))


def test_inference_mode_works() -> None:
    with torch.inference_mode():
        x = torch.randn(2, 32)
        fmt = parse_format("int4-g32")
        assert torch.equal(InputQuantizer(fmt, num_readers=2)(x), fake_quantize(x, fmt))
        assert torch.equal(WeightQuantizer(fmt)(x), fake_quantize(x, fmt))


def scaled_by_hand(
    x: np.ndarray, bits: int, group: int, factor: np.ndarray, step: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounded values, and the surrogate's dq/dx and dq/dfactor of every element, number by number.

    factor and step: one for each row and group.
    """
    half = 2 ** (bits - 1)
    out, to_x, to_factor = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for row in range(x.shape[0]):
        for j in range(x.shape[1]):
            g = j // group
            values = x[row, g * group : (g + 1) * group]
            base = np.abs(values).max() / half if step is None else step[row, g]
            base = base or 1.0
            scale = factor[row, g] * base
            u = x[row, j] / scale
            q = np.clip(np.rint(u), -half, half - 1)
            clipped = np.rint(u) != q
            out[row, j] = q * scale
            to_x[row, j] = 0.0 if clipped else 1.0
            to_factor[row, j] = base * (q if clipped else np.rint(u) - u)
    return out, to_x, to_factor


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 4, 8]),
    st.sampled_from(["lwc", "lac", "lsq"]),
    st.integers(1, 40),
    st.sampled_from([7, 16, 64]),
)
@settings(max_examples=60, deadline=None)
def test_trained_scales_round_and_pass_gradients_as_the_surrogate_does(
    seed: int, bits: int, quantizer: str, cols: int, group: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, cols, generator=generator, dtype=torch.float32).requires_grad_()
    fmt = parse_format(f"int{bits}-g{group}")
    shape = factor_shape(x.detach(), fmt, quantizer)
    factor = (torch.rand(shape, generator=generator) + 0.3).requires_grad_()
    step = first_step(x, fmt) if quantizer == "lsq" else None
    weights = torch.randn(3, cols, generator=generator)
    found = scaled_fake_quantize(x, fmt, factor, step)
    (found * weights).sum().backward()

    groups = -(-cols // group)
    spread = np.broadcast_to(factor.detach().double().numpy().reshape(-1, groups), (3, groups))
    steps = None if step is None else step.double().numpy().reshape(3, groups)
    exact = x.detach().double().numpy()
    out, to_x, to_factor = scaled_by_hand(exact, bits, group, spread, steps)
    # A value on the edge between two steps may round either way in float32.
    scale = np.abs(exact).max()
    near = np.isclose(out, found.detach().numpy(), rtol=1e-5, atol=1e-6 * scale)
    assert near.mean() > 0.97
    if near.all() and x.grad is not None and factor.grad is not None:
        np.testing.assert_array_equal(x.grad, weights.numpy() * to_x)
        share = np.add.reduceat(weights.double().numpy() * to_factor, range(0, cols, group), axis=1)
        if quantizer == "lac":
            share = share.sum(0, keepdims=True)
        np.testing.assert_allclose(
            factor.grad.numpy().reshape(share.shape), share, rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.parametrize("name", ["int4-g32", "int4-token", "int8-tensor", "int2-g128"])
def test_a_factor_of_one_is_absmax(name: str) -> None:
    fmt = parse_format(name)
    x = torch.randn(5, 100, generator=torch.manual_seed(0))
    x[2] = 0
    factor = torch.ones(factor_shape(torch.randn(8, 100), fmt, "lac"))
    torch.testing.assert_close(
        scaled_fake_quantize(x, fmt, factor, None), fake_quantize(x, fmt), atol=0, rtol=0
    )


def test_the_gradient_of_a_factor_is_that_of_its_finite_difference() -> None:
    # Between two roundings the output is linear in the factor, but for the roundings held still.
    fmt = parse_format("int4-g4")
    x = torch.tensor([[0.9, -0.31, 0.12, 1.0]], dtype=torch.float64).float()
    factor = torch.ones((1, 1, 1), requires_grad=True)
    scaled_fake_quantize(x, fmt, factor, None).sum().backward()
    assert factor.grad is not None
    step = 1.0 / 8
    u = x / step
    held = u.round().clamp(-8, 7) - u
    inside = u.round() <= 7

    def surrogate(value: float) -> float:
        clamped = 7 * value * step
        return float(torch.where(inside, x + held * value * step, clamped).sum())

    difference = (surrogate(1.01) - surrogate(0.99)) / 0.02
    assert factor.grad.item() == pytest.approx(difference, rel=1e-4)


def test_a_trained_weight_is_rounded_anew_when_its_factor_moves() -> None:
    fmt = parse_format("int4-g32")
    weight = torch.nn.Parameter(torch.randn(4, 64, generator=torch.manual_seed(0)))
    factor = torch.nn.Parameter(torch.ones(factor_shape(weight.detach(), fmt, "lwc")))
    quantize = WeightQuantizer(fmt, factor=factor)
    with torch.no_grad():
        first = quantize(weight)
        assert quantize(weight) is first
        factor.mul_(0.5)
        assert not torch.equal(quantize(weight), first)


def test_training_a_factor_lowers_the_error_of_a_heavy_tail() -> None:
    fmt = parse_format("int4-token")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator)
    x[:, 3] *= 6  # one channel that spoils every token's scale
    factor = torch.nn.Parameter(torch.ones(factor_shape(torch.empty(8, 256), fmt, "lac")))
    optimizer = torch.optim.Adam([factor], lr=1e-2)

    def error() -> torch.Tensor:
        return (scaled_fake_quantize(x, fmt, factor, None) - x).square().mean()

    before = error().item()
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.9 * before
    assert factor.item() < 0.95
