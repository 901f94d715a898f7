"""The estimate against what it estimates: finite differences, and models with sites quantized."""

import contextlib
import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from bitplan.formats import parse_format
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.inputs import measure_inputs
from bitplan.probe.interventions import Intervention, measure_interventions
from bitplan.probe.modules import find_linears
from bitplan.probe.sensitivity import (
    GradientSensitivity,
    Rows,
    drawn_labels,
    standing_out,
    summed_loss,
    weight_terms,
    window_terms,
)
from bitplan.probe.text import load_text, tokenize
from bitplan.quantize import quantize_dequantize

COARSE = parse_format("int3-g64")
INT4, INT8 = parse_format("int4-g16"), parse_format("int8-g16")
SEQUENCES, TOKENS = 3, 8


def estimates(model, ids, formats=(INT4, INT8)):
    items = find_linears(model)
    found = measure_inputs(model, items, ids, formats, has_loss=True, sensitivity=True)
    return {(row["site"], row["format"]): row for row in found.sensitivity}


def loss_of(model, ids, labels=None):
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()
        return float(summed_loss(logits, ids if labels is None else labels))


def labels_drawn(model, ids):
    """Return the draws that three sequences get: as many as make 32 sequences."""
    with torch.no_grad():
        return [drawn_labels(model(input_ids=ids).logits, 0, draw) for draw in range(11)]


@contextlib.contextmanager
def moved_input(items, fmt, amount):
    """Add an amount [rows] of its quantization error to what these linears are handed."""

    def hook(_, args):
        x = args[0]
        error = (quantize_dequantize(x, fmt) - x).flatten(0, -2) * amount[:, None]
        return (x + error.view_as(x), *args[1:])

    handles = [item.module.register_forward_pre_hook(hook) for item in items]
    yield
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def moved_output(item, fmt, amount):
    """Add to a linear's output, by an amount [rows], what the error of its weight adds."""

    def hook(_, args, y):
        error = quantize_dequantize(item.weight(), fmt) - item.weight()
        change = args[0].flatten(0, -2) @ error.T * amount[:, None]
        return y + change.view_as(y)

    handle = item.module.register_forward_hook(hook)
    yield
    handle.remove()


def row_slopes(model, ids, labels, moved, step=1e-4):
    """Return d loss / d amount of every row by central differences, [sequences, tokens]."""
    slopes = []
    for row in range(ids.numel()):
        amount = torch.zeros(ids.numel(), dtype=torch.float64)
        losses = []
        for sign in (1, -1):
            amount[row] = sign * step
            with moved(amount):
                losses.append(loss_of(model, ids, labels))
        slopes.append((losses[0] - losses[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64).view(ids.shape)


def expected(model, ids, moved, near=1, wide=1):
    """Return the estimate from finite differences: true labels, and the ones that are drawn.

    near, wide: rows whose slopes are summed before they are squared.
    """
    slopes = row_slopes(model, ids, ids, moved)
    draws = torch.stack(
        [row_slopes(model, ids, labels, moved) for labels in labels_drawn(model, ids)]
    )
    predicted = TOKENS - 1

    def kl_of(width):
        sums = [draws[..., i : i + width].sum(-1) for i in range(0, TOKENS, width)]
        return torch.stack(sums).square().sum(0).mean(0) / 2 / predicted

    def stderr(by_sequence):
        return by_sequence.std().item() / math.sqrt(SEQUENCES)

    kl, more = kl_of(near), kl_of(wide) - kl_of(near)
    if wide > near:
        kl = kl + max(0.0, 1 - (stderr(more) / more.mean().item()) ** 2) * more
    change = slopes.sum(1) / predicted + kl
    return {
        "delta_loss": change.mean().item(),
        "stderr": stderr(change),
        "kl": kl.mean().item(),
        "kl_stderr": stderr(kl),
    }


@pytest.fixture(scope="module")
def opt(build):
    """A model in float64 throughout, whose attention and MLP read the residual stream itself."""
    model = build("opt", num_hidden_layers=1, do_layer_norm_before=False, init_std=0.3).double()
    ids = torch.randint(257, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitplan.probe.sensitivity._NEAR", 3)  # the last window is short
        patch.setattr("bitplan.probe.sensitivity._FAR", 2)
        yield model, ids, estimates(model, ids)


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
@pytest.mark.parametrize("role", ["qkv", "o", "fc1", "fc2", "lm_head"])
def test_inputs_agree_with_finite_differences(opt, role, fmt):
    model, ids, found = opt
    items = [item for item in find_linears(model) if item.linear.role == role]
    whole = expected(model, ids, lambda amount: moved_input(items, fmt, amount))
    for item in items:
        row = found[str(item.linear.site("input")), fmt.name]
        for name, value in whole.items():
            assert row[name] * len(items) == pytest.approx(value, rel=1e-5, abs=1e-11)


@pytest.mark.parametrize("fmt", [INT4, INT8], ids=str)
@pytest.mark.parametrize("module", ["self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"])
def test_weights_agree_with_finite_differences(opt, module, fmt):
    model, ids, found = opt
    (item,) = [item for item in find_linears(model) if item.linear.module.endswith(module)]
    whole = expected(model, ids, lambda amount: moved_output(item, fmt, amount), near=3, wide=6)
    row = found[str(item.linear.site("weight")), fmt.name]
    for name, value in whole.items():
        assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-11)


def test_the_batch_split_changes_nothing(opt, monkeypatch):
    model, ids, found = opt
    monkeypatch.setattr("bitplan.probe.inputs.batch_size", lambda *_: 1)
    for key, row in estimates(model, ids).items():
        for name in ("delta_loss", "stderr", "kl", "kl_stderr"):
            assert row[name] == pytest.approx(found[key][name], rel=1e-9, abs=1e-15)


def test_small_errors_are_measured_changes_of_loss(opt):
    """At 8 bits the estimate of an input is nearly what quantizing it does to the loss."""
    model, ids, found = opt
    base = loss_of(model, ids)
    everywhere = torch.ones(ids.numel(), dtype=torch.float64)
    for role in ("qkv", "o", "fc1", "fc2", "lm_head"):
        items = [item for item in find_linears(model) if item.linear.role == role]
        with moved_input(items, INT8, everywhere):
            change = (loss_of(model, ids) - base) / (SEQUENCES * (TOKENS - 1))
        rows = [found[str(item.linear.site("input")), INT8.name] for item in items]
        assert sum(row["delta_loss"] for row in rows) == pytest.approx(change, rel=0.2)


def test_experts_agree_with_finite_differences(build):
    model = build("mixtral", num_hidden_layers=1, initializer_range=0.3)
    unfuse_experts(model)
    ids = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS) * 7 % 257
    found = estimates(model, ids, (INT4,))
    checked = 0
    for item in find_linears(model):
        if item.linear.expert is None:
            continue
        # The model's norms and routers are float32: a wide step, and one sum over rows.
        losses = []
        for amount in (1e-2, -1e-2):
            with moved_input([item], INT4, torch.tensor([amount])):
                losses.append(loss_of(model, ids))
        row = found[str(item.linear.site("input")), INT4.name]
        slope = (losses[0] - losses[1]) / 2e-2 / (SEQUENCES * (TOKENS - 1))
        assert row["delta_loss"] - row["kl"] == pytest.approx(slope, rel=0.05, abs=2e-4)
        checked += 1
    assert checked == 8


def test_what_no_token_reached_has_no_estimate(build):
    model = build("mixtral", num_local_experts=16, num_experts_per_tok=1, num_hidden_layers=1)
    unfuse_experts(model)
    found = estimates(model, torch.tensor([[1, 2, 3]]))
    experts = {site for site, _ in found if ".experts." in site}
    assert 0 < len(experts) <= 3 * 4  # three tokens, each to one expert of two linears
    one = found["lm_head:input", INT4.name]
    assert one["stderr"] is None
    assert one["delta_loss"] != 0


def test_bf16_changes_nothing(build):
    ids = torch.arange(20).view(2, 10)
    for row in estimates(build("llama"), ids, (parse_format("bf16"),)).values():
        assert (row["delta_loss"], row["stderr"], row["kl"]) == (0, 0, 0)


def test_formats_are_kept_to_the_operands_they_apply_to(build):
    formats = [parse_format(name) for name in ("int8-token", "int8-channel", "nvfp4")]
    found = estimates(build("llama"), torch.arange(20).view(2, 10), formats)
    by_operand = {
        operand: {fmt for site, fmt in found if site.endswith(operand)}
        for operand in ("input", "weight")
    }
    assert by_operand == {"input": {"int8-token", "nvfp4"}, "weight": {"int8-channel", "nvfp4"}}


@pytest.fixture(scope="module")
def trained(build, tokenizer, prose):
    """A tiny Llama, trained a little, and calibration tokens."""
    model = build("llama", hidden_size=64, intermediate_size=128, num_hidden_layers=3).train()
    corpus = load_text((str(prose),))
    ids = tokenize(corpus, tokenizer, "train", tokens=80 * 16 * 64, seq_len=64, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in ids.split(16):
        loss = summed_loss(model(input_ids=batch).logits, batch) / batch.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    held = tokenize(corpus, tokenizer, "calibration", tokens=4096, seq_len=64, seed=0)
    return model.eval(), held


@pytest.mark.slow
def test_the_order_of_sites_is_that_of_exhaustive_measurement(trained):
    model, ids = trained
    found = estimates(model, ids, (COARSE,))
    base, measured, estimated = loss_of(model, ids), [], []
    groups: dict[str, list] = {}
    for item in find_linears(model):
        if item.linear.role in ("qkv", "o", "fc1", "fc2"):
            groups.setdefault(item.linear.fused or item.linear.module, []).append(item)
    for items in groups.values():
        with moved_input(items, COARSE, torch.ones(1)):
            measured.append((loss_of(model, ids) - base) / (len(ids) * 63))
        rows = [found[str(item.linear.site("input")), COARSE.name] for item in items]
        estimated.append(sum(row["delta_loss"] for row in rows))
    assert len(measured) == 12
    assert spearmanr(estimated, measured).statistic > 0.8
    total = sum(map(abs, measured))  # their signs differ, and their sum is near zero
    assert sum(estimated) == pytest.approx(sum(measured), abs=0.2 * total)


def test_labels_are_drawn_from_the_predictions():
    shares = torch.tensor([0.5, 0.3, 0.2, 0.0])
    logits = shares.log().expand(4, 20_001, 4)
    labels = drawn_labels(logits, 7, 2)
    for sequence in labels[:, 1:]:
        assert (sequence.bincount(minlength=4) / 20_000).tolist() == pytest.approx(
            shares.tolist(), abs=0.015
        )
    assert len({tuple(sequence.tolist()) for sequence in labels}) == 4
    assert torch.equal(drawn_labels(logits[1:3], 8, 2), labels[1:3])
    assert not torch.equal(drawn_labels(logits[1:3], 8, 1), labels[1:3])


@pytest.mark.parametrize(("sequences", "draws"), [(1, 32), (2, 16), (5, 7), (32, 1), (1000, 1)])
def test_few_sequences_are_drawn_more_often(sequences, draws):
    device = torch.device("cpu")
    estimate = GradientSensitivity((INT4,), sequences=sequences, seq_len=8, device=device)
    assert estimate.draws == draws


@pytest.mark.slow
def test_the_divergence_is_that_of_exhaustive_measurement(trained):
    """In nats, without a factor: the median over inputs and weights is right within 20 %."""
    model, ids = trained
    items = [i for i in find_linears(model) if i.linear.role in ("o", "fc2")]
    found = estimates(model, ids, (COARSE,))
    sites = [item.linear.site(operand) for item in items for operand in ("input", "weight")]
    asked = [Intervention(str(site), {site: COARSE}) for site in sites]
    waves = measure_interventions(model, find_linears(model), ids, asked)
    measured = {effect.intervention.name: effect.kl for wave in waves for effect in wave}
    ratios = [found[str(site), COARSE.name]["kl"] / measured[str(site)] for site in sites]
    assert len(ratios) == 12
    assert np.median(ratios) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(("tokens", "width"), [(8, 8), (8, 4), (7, 3), (3, 8)])
def test_sums_by_window_are_those_of_the_rows(tokens, width):
    generator = torch.Generator().manual_seed(tokens)
    x, gradient, errors = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, tokens, 5), (2, tokens, 6), (3, 6, 5))
    )
    rows = weight_terms(x.flatten(0, 1), gradient.flatten(0, 1), errors).view(3, 2, tokens)
    expected = [rows[..., i : i + width].sum(-1) for i in range(0, tokens, width)]
    found = window_terms(x, gradient, errors, width)
    torch.testing.assert_close(found.view(3, 2, -1), torch.stack(expected, dim=-1))


@pytest.mark.parametrize("seq_len", [32, 70, 300])
def test_rows_of_experts_are_summed_by_the_same_windows(build, seq_len):
    """Rows that come in no order of the text, as an expert's, give what whole sequences give."""
    (item, *_) = [i for i in find_linears(build("llama")) if i.linear.role == "fc2"]
    generator = torch.Generator().manual_seed(0)
    shape = item.weight().shape
    x = torch.randn(2 * seq_len, shape[1], generator=generator)
    gradients = torch.randn(17, 2 * seq_len, shape[0], generator=generator)
    sequences = torch.arange(2).repeat_interleave(seq_len)
    positions = torch.arange(seq_len).repeat(2)
    order = torch.randperm(2 * seq_len, generator=generator)
    found = []
    for index, whole in ((slice(None), True), (order, False)):
        estimate = GradientSensitivity(
            (INT4, INT8), sequences=2, seq_len=seq_len, device=torch.device("cpu")
        )
        y = torch.zeros(2 * seq_len, shape[0], requires_grad=True)[index]
        estimate.output(item, x[index], y, Rows(sequences[index], positions[index], whole=whole))
        for number in range(estimate.passes):
            estimate.start(number)
            torch.autograd.backward(y, gradients[number][index], retain_graph=True)
        found.append(list(estimate.rows([item])))
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys()
        for name in ("delta_loss", "stderr", "kl", "kl_stderr"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_only_what_stands_out_of_its_noise_counts():
    assert standing_out(torch.tensor([2.0])) == 0
    assert standing_out(torch.tensor([1.0, -1.0])) == 0
    values = torch.tensor([1.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    stderr = np.std(values.numpy(), ddof=1) / 2
    assert standing_out(values) == pytest.approx(1 - (stderr / 2) ** 2)
    assert standing_out(-values) == standing_out(values)
    assert standing_out(torch.tensor([3.0, 3.0])) == 1
