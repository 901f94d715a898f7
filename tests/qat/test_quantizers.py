"""Fake quantization: forward as an independent numpy loop rounds, backward the identity."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.formats import parse_format
from bitplan.qat.quantizers import InputQuantizer, WeightQuantizer, fake_quantize


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
    x = torch.tensor(values).to(dtype)
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
    assert seen[0] is seen[1] is seen[2]
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
