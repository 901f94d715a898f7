"""Effects against a naive loop: swap the weight, hook the input, run the model, subtract."""

import contextlib
import copy
import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitplan.errors import CheckpointError, PlanError
from bitplan.formats import parse_format
from bitplan.probe import interventions
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.interventions import Intervention, measure_interventions
from bitplan.probe.modules import find_linears
from bitplan.probe.trace import Tracer
from bitplan.quantize import quantize_dequantize
from bitplan.sites import Site

INT4, INT8 = parse_format("int4-g16"), parse_format("int8-g16")
IDS = torch.randint(257, (5, 12), generator=torch.Generator().manual_seed(0))
FAMILIES = ("llama", "smollm", "gpt2", "gpt_neox", "opt", "gemma3", "mixtral", "gpt_oss")


@contextlib.contextmanager
def quantized(items, formats):
    """The model with these sites really quantized: hooks on inputs, other values in weights."""
    handles, saved = [], []
    for item in items:
        name = item.linear.module
        if fmt := formats.get(Site(name, "input")):

            def hook(_, args, fmt=fmt):
                return (quantize_dequantize(args[0], fmt), *args[1:])

            handles.append(item.module.register_forward_pre_hook(hook))
        if fmt := formats.get(Site(name, "weight")):
            # A new parameter: a head tied to the embedding must not change that.
            saved.append((item.module, item.module.weight))
            value = quantize_dequantize(item.weight().detach().contiguous(), fmt)
            item.module.weight = nn.Parameter(value.T if item.transposed else value)
    yield
    for handle in handles:
        handle.remove()
    for module, weight in saved:
        module.weight = weight


def states(model, items, sequence, formats):
    """Return the last hidden states and the logits of a sequence in float64."""
    seen = []
    head = model.get_output_embeddings()
    # This hook comes first: it sees what the head is handed before that is quantized.
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with quantized(items, formats):
        logits = model(input_ids=sequence[None]).logits.double()
    handle.remove()
    return seen[0], logits


@torch.no_grad()
def naive(model, items, ids, formats):
    """Return delta_loss, stderr, kl, kl_stderr and last_layer_error, a sequence at a time."""
    losses, kls, error, norm = [], [], 0.0, 0.0
    for sequence in ids:
        hidden, logits = states(model, items, sequence, {})
        other_hidden, other_logits = states(model, items, sequence, formats)
        base, other = logits[0, :-1].log_softmax(-1), other_logits[0, :-1].log_softmax(-1)
        labels = sequence[1:, None]
        losses.append((base.gather(1, labels) - other.gather(1, labels)).mean().item())
        kls.append((base.exp() * (base - other)).sum(1).mean().item())
        error += (other_hidden - hidden).square().sum().item()
        norm += hidden.square().sum().item()

    def summary(values):
        values = torch.tensor(values, dtype=torch.float64)
        return values.mean().item(), values.std().item() / math.sqrt(len(values))

    return (*summary(losses), *summary(kls), error / norm)


def prepared(build, family):
    model = build(family, **{"init_std" if family == "opt" else "initializer_range": 0.2})
    unfuse_experts(model)
    return model, find_linears(model)


def singles(items, fmt=INT4):
    """Return an intervention for each site of each linear."""
    return [
        Intervention(str(site), {site: fmt})
        for item in items
        if item.linear.role in ("qkv", "o", "fc1", "fc2", "lm_head")
        for site in (item.linear.site("input"), item.linear.site("weight"))
    ]


def assert_equal(effect, expected):
    found = (effect.delta_loss, effect.stderr, effect.kl, effect.kl_stderr, effect.last_layer_error)
    assert found == pytest.approx(expected, abs=2e-6), effect.intervention.name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_what_a_naive_loop_measures(build, family):
    model, items = prepared(build, family)
    asked = singles(items)
    found = [e for wave in measure_interventions(model, items, IDS, asked) for e in wave]
    assert [effect.intervention for effect in found] == asked
    for effect in found:
        assert_equal(effect, naive(model, items, IDS, effect.intervention.formats))
    assert max(effect.kl for effect in found) > 1e-3


def measured(model, items, *interventions, ids=IDS):
    return [e for wave in measure_interventions(model, items, ids, interventions) for e in wave]


def test_a_whole_plan_is_measured_at_once(build):
    model, items = prepared(build, "mixtral")
    plan = {
        item.linear.site(operand): INT8 if item.linear.role == "fc2" else INT4
        for item in items
        if item.linear.role in ("qkv", "o", "fc1", "fc2")
        for operand in ("input", "weight")
    }
    whole, part = measured(
        model, items, Intervention("plan", plan), Intervention("part", dict([*plan.items()][:5]))
    )
    assert_equal(whole, naive(model, items, IDS, plan))
    assert_equal(part, naive(model, items, IDS, part.intervention.formats))
    assert whole.kl > part.kl > 0


def test_one_reader_of_a_shared_input_is_not_the_group(build):
    model, items = prepared(build, "llama")
    group = [item.linear for item in items if item.linear.fused and item.linear.role == "qkv"][:3]
    assert len({linear.fused for linear in group}) == 1
    readers = [Intervention(one.module, {one.site("input"): INT4}) for one in group]
    everyone = Intervention("qkv", {linear.site("input"): INT4 for linear in group})
    *single, together = measured(model, items, *readers, everyone)
    for effect in (*single, together):
        assert_equal(effect, naive(model, items, IDS, effect.intervention.formats))
    assert len({round(effect.kl, 5) for effect in (*single, together)}) == 4


@pytest.mark.parametrize(("slots", "sequences"), [(2, 1), (3, 2), (9, 5)])
def test_how_passes_are_cut_changes_nothing(build, monkeypatch, slots, sequences):
    model, items = prepared(build, "mixtral")
    asked = singles(items)[:7]
    expected = measured(model, items, *asked)
    monkeypatch.setattr("bitplan.probe.interventions._shape_of_pass", lambda *_: (slots, sequences))
    monkeypatch.setattr("bitplan.probe.interventions._CHUNK_ELEMENTS", 5 * 257)  # of 11 tokens
    waves = list(measure_interventions(model, items, IDS, asked))
    assert len(waves[0]) == min(slots - 1, 7)
    for effect, other in zip((e for wave in waves for e in wave), expected, strict=True):
        assert effect.intervention == other.intervention
        assert effect.kl == pytest.approx(other.kl, abs=1e-6)
        assert effect.delta_loss == pytest.approx(other.delta_loss, abs=1e-6)
        assert effect.last_layer_error == pytest.approx(other.last_layer_error, abs=1e-6)


def test_logits_of_more_tokens_are_not_held_at_once(build, monkeypatch):
    """The rows of a pass are bounded whatever the tokens and the interventions."""
    model, items = prepared(build, "llama")
    monkeypatch.setitem(interventions._PASS_BYTES, "cpu", 4 * 12 * (257 + 6 * 80) * 6)
    seen = []
    handle = model.register_forward_hook(lambda _, args, output: seen.append(len(output.logits)))
    measured(model, items, *singles(items), ids=IDS.repeat(3, 1))
    handle.remove()
    assert max(seen) == 6
    monkeypatch.setitem(interventions._PASS_BYTES, "cpu", 1)
    assert interventions._shape_of_pass(items, "lm_head", 9, 12, torch.device("cpu")) == (2, 1)


def test_a_single_sequence_has_no_standard_error(build):
    model, items = prepared(build, "llama")
    (effect,) = measured(model, items, singles(items)[0], ids=IDS[:1])
    assert effect.stderr is effect.kl_stderr is None
    assert effect.kl > 0


def test_what_is_in_front_of_the_head_is_untouched_by_the_head(build):
    model, items = prepared(build, "smollm")
    for effect in measured(model, items, *singles(items)[-2:]):
        assert effect.last_layer_error == 0
        assert effect.kl > 0


def test_the_model_is_left_as_it_was(build):
    model, items = prepared(build, "llama")
    before = copy.deepcopy(model.state_dict())
    passes = measure_interventions(model, items, IDS, singles(items))
    next(passes)
    passes.close()  # interrupted
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_interventions_are_no_passes(build):
    model, items = prepared(build, "llama")
    assert list(measure_interventions(model, items, IDS, [])) == []


class Twice(nn.Module):
    """A language model of linears, the first of them run twice and another never."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(257, 8), nn.Linear(8, 257)
        self.twice, self.never = nn.Linear(8, 8), nn.Linear(8, 8)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.twice(self.twice(self.embed(input_ids)))))


@pytest.mark.parametrize(
    ("site", "error", "message"),
    [
        ("twice:input", CheckpointError, "twice run more than once in a pass"),
        ("never:weight", CheckpointError, "never did not run on text"),
        ("embed:weight", PlanError, "Embedding is no plain linear"),
        ("elsewhere:input", PlanError, "no linear elsewhere"),
    ],
)
def test_what_cannot_be_measured_is_refused(site, error, message):
    model = Twice()
    with pytest.raises(error, match=message):
        measured(model, find_linears(model), Intervention("it", {Site.parse(site): INT4}))


def test_experts_whose_rows_nobody_can_place_are_refused(build):
    model, items = prepared(build, "mixtral")
    experts = model.model.layers[0].mlp.experts
    experts[0] = nn.ModuleDict(
        {"gate_up_proj": experts[0].gate_up_proj, "down_proj": nn.Linear(4, 4)}
    )
    name = "model.layers.0.mlp.experts.0.gate_up_proj:input"
    with pytest.raises(PlanError, match="which of its rows belong to which sequence"):
        measured(model, items, Intervention("it", {Site.parse(name): INT4}))


def test_a_pass_could_run_elsewhere(build, tokenizer, monkeypatch):
    """nnsight's dry run ships the block by value, and runs it where bitplan cannot be imported."""
    import nnsight
    from nnsight.modeling.transformers import TransformersModel

    model, items = prepared(build, "llama")
    asked = singles(items)[:8]
    wrapped = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
    names = sorted({"lm_head", *(site.module for each in asked for site in each.formats)})
    tracer = Tracer(wrapped, names, every_pass=False)
    nnsight.register("bitplan")
    monkeypatch.setattr(sys, "path", [*sys.path])  # the dry run changes its order
    monkeypatch.setitem(wrapped.__dict__, "trace", partial(wrapped.trace, remote="local"))
    sums = interventions._pass(tracer, IDS, asked, "lm_head")
    for effect, shipped in zip(measured(model, items, *asked), sums, strict=True):
        kl = shipped[1].mean().item() / (IDS.shape[1] - 1)
        assert effect.kl == pytest.approx(kl, abs=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees(build):
    model, items = prepared(build, "mixtral")
    expected = measured(model, items, *singles(items))
    model.cuda()
    for effect, other in zip(measured(model, items, *singles(items)), expected, strict=True):
        assert effect.kl == pytest.approx(other.kl, rel=0.05, abs=1e-5)
