"""The pass of a training step: gradients are this batch's alone, captured or not."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitplan.formats import parse_format
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.modules import find_linears
from bitplan.qat.convert import convert
from bitplan.qat.recipe import sequence_losses
from bitplan.qat.step import WARMUP_STEPS, Step, alike, cause
from bitplan.sites import OPERANDS, PLANNED_ROLES

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_gradients_are_those_of_the_last_batch() -> None:
    layer = nn.Linear(3, 1, bias=False)

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        loss = layer(batch).sum()
        loss.backward()
        assert layer.weight.grad is not None
        return loss.detach(), layer.weight.grad.norm()

    step = Step(run, layer, capture=False)
    for value in (1.0, 2.0):
        batch = torch.full((1, 3), value)
        loss, norm = step(batch)
        assert layer.weight.grad is not None
        assert layer.weight.grad.equal(batch)
        assert float(norm) == pytest.approx(value * 3**0.5)
        assert float(loss) == pytest.approx(float(layer.weight.detach().sum()) * value)
    assert not step.is_captured


def test_a_replay_that_lost_gradients_is_told_from_one_that_rounds() -> None:
    assert alike([5.0, 1.70], [5.004, 1.71])
    assert not alike([5.0, 1.70], [5.0, 1.07])
    assert not alike([5.0, 1.70], [6.0, 1.70])
    assert alike([math.nan, 1.0], [math.nan, 1.0])  # that training stops by itself


def test_a_refusal_names_the_first_error_and_where_it_came_from() -> None:
    def launch() -> None:
        raise RuntimeError("not permitted\nFor debugging consider ...")

    def capture() -> None:
        try:
            launch()
        finally:
            raise RuntimeError("failed due to a previous error")

    with pytest.raises(RuntimeError, match="previous error") as caught:
        capture()
    assert re.fullmatch(
        r"RuntimeError: not permitted \(test_step.py:\d+ capture > test_step.py:\d+ launch\)",
        cause(caught.value),
    )


def trained(
    model: nn.Module, *, capture: bool, compiled: bool = False, recorded: tuple[int, ...] = ()
) -> Any:
    """Train a copy for ten steps of quantized training; return its losses, norms and weights."""
    torch.manual_seed(0)
    convert(
        model,
        {
            item.linear.site(operand): parse_format("int4-g16")
            for item in find_linears(model)
            for operand in OPERANDS
            if item.linear.role in PLANNED_ROLES
        },
    )
    model.cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    calls = []

    def run(batch: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(None)
        with torch.autocast("cuda", torch.bfloat16):
            loss = sequence_losses(model, batch).mean()
        loss.backward()
        return loss.detach(), nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    step, found = Step(run, model, capture=capture, compiled=compiled), []
    for i in range(10):
        batch = torch.randint(0, 257, (4, 32), device="cuda")
        torch.manual_seed(i)  # dropout
        loss, norm = step(batch, recorded=i in recorded)
        optimizer.step()
        found.append((float(loss), float(norm)))
    weights = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
    return step, len(calls), torch.tensor(found), weights


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("family", "compiled"), [("llama", False), ("llama", True), ("gpt2", False)]
)
def test_replayed_steps_train_as_plain_ones_do(
    checkpoints: Callable[[str], Path], family: str, compiled: bool
) -> None:
    source = str(checkpoints(family))
    _, calls, plain, weights = trained(load_checkpoint(source, device="cpu").model, capture=False)
    assert calls == 10
    step, calls, captured, captured_weights = trained(
        load_checkpoint(source, device="cpu").model,
        capture=True,
        compiled=compiled,
        recorded=(1, 7),
    )
    assert step.is_captured
    # The capture and what it is compared with, perhaps a compilation, two that hooks had to see.
    assert calls == WARMUP_STEPS + 2 + compiled + 2
    torch.testing.assert_close(captured, plain, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(captured_weights, weights, rtol=0, atol=2e-3)


@pytest.mark.gpu
@on_gpu
def test_models_that_cannot_be_captured_run_plainly(checkpoints: Callable[[str], Path]) -> None:
    model = load_checkpoint(str(checkpoints("qwen3_moe")), device="cpu").model
    step, calls, *_ = trained(model, capture=True)
    assert calls == 10
    assert not step.is_captured

    layer = nn.Linear(3, 1).cuda()

    def reads_on_the_host(batch: Tensor) -> tuple[Tensor, Tensor]:
        loss = layer(batch).sum()
        if loss.item() == 0:
            loss = loss + 1
        loss.backward()
        return loss.detach(), loss.detach()

    step = Step(reads_on_the_host, layer, capture=True)
    for i in range(6):
        loss, _ = step(torch.full((1, 3), float(i), device="cuda"))
        expected = layer(torch.full((1, 3), float(i), device="cuda")).sum()
        torch.testing.assert_close(loss, expected.detach())
    assert not step.is_captured
