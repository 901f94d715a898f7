"""The average over the tail, against the mean of what was kept by hand."""

import io

import pytest
import torch
from torch import nn

from bitplan.qat.average import TailAverage


def walk(model: nn.Module, average: TailAverage, steps: range) -> list[torch.Tensor]:
    """Move the weights at random, the same at each step; return the weights after each."""
    seen = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            model.weight.add_(torch.randn(model.weight.shape, generator=generator))
        average.add(step)
        seen.append(model.weight.detach().double().clone())
    return seen


@pytest.mark.parametrize(("share", "tail"), [(0.0, 1), (0.1, 1), (0.3, 3), (1.0, 10)])
def test_it_is_the_mean_of_the_last_weights(share: float, tail: int) -> None:
    model = nn.Linear(3, 2, bias=False)
    average = TailAverage(model, steps=10, share=share)
    seen = walk(model, average, range(10))
    average.apply()
    expected = torch.stack(seen[-tail:]).mean(0)
    torch.testing.assert_close(model.weight.detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_frozen_weights_stay_and_the_dtype_is_kept() -> None:
    model = nn.Linear(3, 2).to(torch.bfloat16)
    model.weight.requires_grad_(False)
    before = model.weight.clone()
    average = TailAverage(model, steps=2, share=1.0)
    for step, value in enumerate((1.0, 2.0)):
        with torch.no_grad():
            model.bias.fill_(value)
        average.add(step)
    average.apply()
    assert torch.equal(model.weight, before)
    assert torch.equal(model.bias, torch.full((2,), 1.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("stopped", [3, 7])
def test_it_goes_on_from_its_state_to_the_bit(stopped: int) -> None:
    whole, other = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    other.load_state_dict(whole.state_dict())
    average = TailAverage(whole, steps=10, share=0.5)
    walk(whole, average, range(10))
    average.apply()

    first = TailAverage(other, steps=10, share=0.5)
    walk(other, first, range(stopped))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = TailAverage(other, steps=10, share=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    walk(other, second, range(stopped, 10))
    second.apply()
    assert torch.equal(whole.weight, other.weight)
