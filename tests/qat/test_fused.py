"""The fused kernel rounds as the eager code does, to the last bit, inside graphs of both kinds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bitplan.formats import parse_format
from bitplan.probe.modules import find_linears
from bitplan.probe.observe import multiplied_dtype
from bitplan.qat import quantizers
from bitplan.qat.convert import FakeQuantizedLinear, convert, weights_held
from bitplan.qat.fused import is_fused, quantize_operand
from bitplan.qat.quantizers import InputQuantizer, WeightQuantizer, fake_quantize
from bitplan.quantize import quantize_dequantize
from bitplan.sites import OPERANDS, PLANNED_ROLES

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICES = ("cpu", pytest.param("cuda", marks=gpu))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT4 = parse_format("int4-g32")


def gpu_only(function: Callable[..., None]) -> Callable[..., None]:
    for mark in gpu:
        function = mark(function)
    return function


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether the values are the same with their signs; all NaN count as one."""
    integers = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    equal = found.view(integers) == expected.view(integers)
    both_nan = found.isnan() & expected.isnan()
    return found.dtype == expected.dtype and bool((equal | both_nan).all())


def hard(width: int, dtype: torch.dtype) -> Tensor:
    """Rows over all magnitudes, with zeros, NaN, infinities, ties, subnormals and extremes."""
    torch.manual_seed(width)
    x = torch.randn(64, width) * torch.exp(torch.randn(64, 1) * 12)
    limit = torch.finfo(dtype).max
    x = x.clamp(-limit, limit)
    ramp = torch.arange(width) - width / 2
    x[0], x[1, 0], x[2, width // 2], x[3, -1] = 0, torch.nan, torch.inf, -torch.inf
    x[4, ::2], x[5], x[6] = -0.0, ramp / 2, ramp * (limit / width)
    x[7], x[8], x[9] = ramp * 1e-45, ramp * 1e-38, ramp * 6e-8
    x[10:20] = (ramp + 0.5) * torch.arange(1, 11)[:, None] / 7  # ties, and what lies beside them
    x[20:30] = torch.nextafter(x[10:20], torch.tensor(torch.inf))
    return x.to(dtype)


@gpu_only
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scales", ["g1", "g7", "g32", "g128", "g1000", "token"])
def test_the_kernel_equals_the_eager_code_bit_for_bit(
    dtype: torch.dtype, bits: int, scales: str
) -> None:
    fmt = parse_format(f"int{bits}-{scales}")
    for width in (1, 31, 128, 300, 2048):
        x = hard(width, dtype)
        assert is_fused(x.cuda(), fmt)
        found = quantize_operand(x.cuda(), fmt).cpu()
        assert same_bits(found, quantize_dequantize(x, fmt)), (width, fmt)


@gpu_only
def test_every_quotient_of_bfloat16_values_is_rounded_right() -> None:
    """All 2^7 mantissas of the largest value against all values in seven binades below it."""
    values = torch.arange(0x3C80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    largest = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    rows = torch.minimum(values.expand(128, -1), largest[:, None])
    x = torch.cat([rows, -rows, largest[:, None]], 1).contiguous()
    for bits in (2, 4, 8):
        fmt = parse_format(f"int{bits}-token")
        assert same_bits(quantize_operand(x.cuda(), fmt).cpu(), quantize_dequantize(x, fmt))


@gpu_only
@pytest.mark.parametrize("seed", range(4))
def test_float32_quotients_next_to_ties_are_rounded_right(seed: int) -> None:
    torch.manual_seed(seed)
    largest = 1 + torch.rand(4096, 1)
    tie = (torch.randint(-8, 8, (4096, 120)) + 0.5) * (largest / 8)
    bits = tie.view(torch.int32) + torch.randint(-3, 4, tie.shape, dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32).clamp(-largest, largest), largest.expand(-1, 8)], 1)
    fmt = parse_format("int4-g128")
    assert same_bits(quantize_operand(x.cuda(), fmt).cpu(), quantize_dequantize(x, fmt))


@gpu_only
def test_views_and_large_tensors() -> None:
    fmt = parse_format("int4-g128")
    x = torch.randn(300, 257, device="cuda")
    assert same_bits(quantize_operand(x.t(), fmt), quantize_dequantize(x.t(), fmt))
    assert same_bits(quantize_operand(x[:, 1:], fmt), quantize_dequantize(x[:, 1:], fmt))
    large = torch.randn(1 << 19, 4096 + 64, device="cuda", dtype=torch.bfloat16)  # > 2^31 elements
    found = quantize_operand(large, fmt)
    assert same_bits(found[-99:], quantize_dequantize(large[-99:], fmt))
    assert same_bits(found[:99], quantize_dequantize(large[:99], fmt))


@gpu_only
def test_the_operator_keeps_the_contract_of_custom_operators() -> None:
    x = torch.randn(4, 300, device="cuda")
    torch.library.opcheck(torch.ops.bitplan.round_groups, (x, 4, 128, torch.bfloat16))


def test_the_operator_says_what_it_returns_without_computing_it() -> None:
    x = torch.empty(3, 2, 130, device="meta")
    found = torch.ops.bitplan.round_groups(x, 4, 128, torch.bfloat16)
    assert (found.shape, found.dtype, found.device) == (x.shape, torch.bfloat16, x.device)


def test_only_integers_with_scales_along_rows_have_a_kernel() -> None:
    x = torch.randn(2, 32)
    assert not is_fused(x, INT4)
    for name in ("int8-tensor", "nvfp4", "mxfp4", "fp8-e4m3", "int4-g16"):
        fmt = parse_format(name)
        assert torch.equal(quantize_operand(x, fmt), quantize_dequantize(x, fmt))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["int4-g32", "int8-token", "nvfp4"])
def test_under_autocast_weights_are_rounded_and_cast_and_inputs_cast_and_rounded(
    device: str, name: str
) -> None:
    fmt = parse_format(name)
    x = torch.randn(4, 96, device=device, requires_grad=True)
    grad = torch.randn(4, 96, device=device, dtype=torch.bfloat16)
    values = x.detach()
    with torch.autocast(device, torch.bfloat16):
        weight, inputs = WeightQuantizer(fmt)(x), InputQuantizer(fmt)(x)
        assert multiplied_dtype(x) is torch.bfloat16
    assert same_bits(weight.detach(), quantize_dequantize(values, fmt).bfloat16())
    assert same_bits(inputs.detach(), quantize_dequantize(values.bfloat16(), fmt))
    assert not torch.equal(weight, inputs)
    for found in (weight, inputs):
        x.grad = None
        found.backward(grad)
        assert x.grad is not None
        assert same_bits(x.grad, grad.float())
    assert multiplied_dtype(x) is torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_all_readers_are_added_in_the_dtype_of_their_input(device: str) -> None:
    quantize = InputQuantizer(INT4, num_readers=3)
    x = torch.randn(4, 32, device=device, requires_grad=True)
    grads = [torch.randn(4, 32, device=device).bfloat16() for _ in range(3)]
    with torch.autocast(device, torch.bfloat16):
        seen = [quantize(x) for _ in grads]
    torch.autograd.backward(seen, grads)
    expected = torch.stack([grad.float() for grad in grads]).sum(0)
    torch.testing.assert_close(x.grad, expected, atol=1e-6, rtol=1e-6)


def converted(build: Callable[[str], nn.Module], name: str = "int4-g16") -> nn.Module:
    model = build("llama")
    fmt = parse_format(name)
    linears = [item.linear for item in find_linears(model) if item.linear.role in PLANNED_ROLES]
    convert(model, {linear.site(operand): fmt for linear in linears for operand in OPERANDS})
    return model


def loss_of(model: nn.Module, device: str = "cpu", seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    ids = torch.randint(60, 100, (2, 16), device=device)
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    return loss


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_readers_compile_into_one_graph_with_the_same_gradients() -> None:
    shared = InputQuantizer(INT4, num_readers=2)
    readers = nn.ModuleList(FakeQuantizedLinear(64, 8) for _ in range(2))
    for reader in readers:
        reader.quantize_input, reader.quantize_weight = shared, WeightQuantizer(INT4)
    x = torch.randn(4, 64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        y: Tensor = sum(reader(x).square().sum() for reader in readers)
        return y

    loss(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(loss, fullgraph=True, backend="eager")(x).backward()
    torch.testing.assert_close(x.grad, expected)


@gpu_only
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_model_has_one_graph_and_the_same_gradients(
    build: Callable[[str], nn.Module],
) -> None:
    model = converted(build).cuda()
    eager = loss_of(model, "cuda")
    eager.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch._dynamo.reset()
    loss = loss_of(torch.compile(model, fullgraph=True), "cuda")
    loss.backward()
    torch.testing.assert_close(loss, eager)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


@gpu_only
def test_a_training_step_can_be_captured(build: Callable[[str], nn.Module]) -> None:
    model = converted(build).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    ids = torch.randint(60, 100, (2, 16), device="cuda")

    def step() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        return loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    losses = []
    for _ in range(5):
        graph.replay()
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)  # the weights move, and are rounded anew


def test_held_weights_are_rounded_once_for_all_micro_batches_and_train_alike(
    build: Callable[[str], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = converted(build)
    weights = sum(hasattr(module, "quantize_weight") for module in model.modules())
    calls = []

    def counting(x: Tensor, fmt: object) -> Tensor:
        calls.append(x.dim() == 2)  # inputs have three
        return quantize_operand(x, fmt)  # type: ignore[arg-type]

    monkeypatch.setattr(quantizers, "quantize_operand", counting)
    for seed in range(3):
        loss_of(model, seed=seed).backward()
    assert sum(calls) == 3 * weights
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls.clear()
    with weights_held(model):
        for seed in range(3):
            loss_of(model, seed=seed).backward()
    assert sum(calls) == weights
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=0, rtol=0)


@pytest.mark.parametrize("way", ["fused", "foreach", "in place"])
def test_a_held_weight_that_changes_all_the_same_is_not_stale(way: str) -> None:
    linear = nn.Linear(32, 4)
    model = nn.Sequential(linear)
    linear.quantize_weight = quantize = WeightQuantizer(INT4)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW([linear.weight], lr=0.1, **{way: True} if way[0] == "f" else {})
    with weights_held(model):
        first = quantize(linear.weight)
        assert quantize(linear.weight).data_ptr() == first.data_ptr()
        first.square().sum().backward()
        if way == "in place":
            with torch.no_grad():
                linear.weight.mul_(0.7)
        else:
            optimizer.step()
        second = quantize(linear.weight)
        assert not torch.equal(second, first)
        assert torch.equal(second, fake_quantize(linear.weight, INT4))
        assert quantize(linear.weight).data_ptr() == second.data_ptr()
        with torch.autocast("cpu", torch.bfloat16):
            assert quantize(linear.weight).dtype is torch.bfloat16
    linear.weight.data.mul_(0.7)  # moves no version counter: allowed where nothing is held
    assert torch.equal(quantize(linear.weight), fake_quantize(linear.weight, INT4))
