import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import scipy.stats
import torch
from polars.testing import assert_frame_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.errors import CheckpointError
from bitplan.formats import parse_format
from bitplan.probe import Recorder, recorder
from bitplan.probe.modules import find_linears
from bitplan.probe.tensor_stats import TensorStats, stats, update_all
from bitplan.tables import ERRORS, PROFILE

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    attention_dropout=0.0,
)
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).train()


def batches(count: int, rows: int = 2, length: int = 12) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(96, (rows, length), generator=generator) for _ in range(count)]


def train(
    model: nn.Module, data: list[Tensor], recorder: Recorder | None = None, micro: int = 1
) -> list[float]:
    """A user's loop: an optimizer step every `micro` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for i, ids in enumerate(data):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % micro == 0:
            optimizer.step()
            optimizer.zero_grad()
            if recorder is not None:
                recorder.step()
    return losses


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def kurtosis(x: Tensor) -> float:
    return float(scipy.stats.kurtosis(x.double().numpy().ravel(), fisher=False))


def test_what_is_recorded_is_what_the_linears_see(model: LlamaForCausalLM) -> None:
    data = batches(3)
    seen: list[Tensor] = []
    with Recorder(model, formats=("int4-g32",)) as found:
        handle = model.get_submodule(DOWN).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().clone())
        )
        train(model, data, found)
    handle.remove()
    frame = found.frame()
    inputs = frame.filter(site=f"{DOWN}:input").sort("step")
    assert inputs["step"].to_list() == [1, 2, 3]
    for row, x in zip(inputs.iter_rows(named=True), seen, strict=True):
        assert row["kurtosis"] == pytest.approx(kurtosis(x), rel=1e-3)
        assert row["absmax"] == float(x.abs().max())
        assert (row["tokens"], row["role"], row["block"]) == (24, "fc2", 1)
        assert (row["in_features"], row["out_features"]) == (80, 32)
    weight = frame.filter(site=f"{DOWN}:weight", step=3).row(0, named=True)
    after = model.get_submodule(DOWN).weight.detach()  # type: ignore[union-attr]
    assert weight["kurtosis"] == pytest.approx(kurtosis(after), rel=1e-3)
    error = found.errors_frame().filter(site=f"{DOWN}:weight", step=3)["relative_error"].item()
    assert error == stats(after, [parse_format("int4-g32")])["int4-g32"]


def test_every_site_has_its_row_and_the_columns_of_the_tables(model: LlamaForCausalLM) -> None:
    with Recorder(model, formats=("int4-g32", "int8-token", "int8-channel")) as found:
        train(model, batches(1), found)
    frame, errors = found.frame(), found.errors_frame()
    assert dict(frame.schema) == PROFILE.schema
    assert dict(errors.schema) == ERRORS.schema
    linears = find_linears(model)
    sites = {str(item.linear.site("weight")) for item in linears}
    sites |= {str(item.linear.site("input")) for item in linears if item.has_input}
    assert set(frame["site"]) == sites
    assert frame["site"].is_unique().all()
    formats = dict(errors.group_by("site").agg(pl.col("format").sort()).iter_rows())
    assert formats[f"{DOWN}:input"] == ["int4-g32", "int8-token"]
    assert formats[f"{DOWN}:weight"] == ["int4-g32", "int8-channel"]


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (6, [])])
def test_every_kth_step_is_recorded(model: LlamaForCausalLM, every: int, steps: list[int]) -> None:
    with Recorder(model, every=every) as found:
        train(model, batches(5), found)
    frame = found.frame()
    assert frame["step"].unique().sort().to_list() == steps
    assert found.steps == 5


def test_a_training_that_resumes_counts_on(model: LlamaForCausalLM) -> None:
    with Recorder(model, every=4, start=6) as found:
        train(model, batches(3), found)
    assert found.frame()["step"].unique().to_list() == [8]


def test_recording_changes_no_loss(model: LlamaForCausalLM) -> None:
    twin = copy.deepcopy(model)
    data = batches(4)
    with Recorder(model, formats=("int4-g32",), drift=True) as found:
        recorded = train(model, data, found)
    assert recorded == train(twin, data)


def test_two_trainings_record_the_same_bits(model: LlamaForCausalLM) -> None:
    twin = copy.deepcopy(model)
    frames = []
    for one in (model, twin):
        with Recorder(one, every=2) as found:
            train(one, batches(4), found)
        frames.append(found.frame())
    assert frames[0].equals(frames[1])


def test_hooks_go_when_the_block_ends(model: LlamaForCausalLM) -> None:
    before = hooks(model)
    with Recorder(model) as found:
        assert hooks(model) > before
        train(model, batches(1), found)
    assert hooks(model) == before
    assert found.frame().height > 0  # what was recorded outlives the hooks
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None


def test_errors_inside_the_block_come_out_and_hooks_go(model: LlamaForCausalLM) -> None:
    def body() -> None:
        with Recorder(model):
            model(input_ids=batches(1)[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert hooks(model) == 0


def test_a_forward_pass_that_fails_is_no_lasting_state(model: LlamaForCausalLM) -> None:
    with Recorder(model) as found:
        with pytest.raises(IndexError):
            model(input_ids=torch.full((1, 4), 1000))
        train(model, batches(1), found)
    assert found.frame().filter(operand="input")["tokens"].unique().to_list() == [24]


def test_evaluation_is_recorded_only_when_asked(model: LlamaForCausalLM) -> None:
    data = batches(2)
    with Recorder(model) as found:
        model.eval()
        model(input_ids=data[0])
        model.train()
        train(model, data[1:], found)
    assert set(found.frame().filter(operand="input")["tokens"]) == {24}
    model.eval()
    with Recorder(model, evaluation=True) as found:
        model(input_ids=data[0])
        found.step()
    assert set(found.frame().filter(operand="input")["tokens"]) == {24}


class Checkpointed(nn.Module):
    """A block that the backward pass runs again, unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.reentrant)


def test_inference_mode_and_autocast(model: LlamaForCausalLM) -> None:
    data = batches(1)[0]
    with Recorder(model, formats=("int4-g32",), evaluation=True) as found:
        with torch.inference_mode():
            model(input_ids=data)
        found.step()
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=data)
            found.step()
    frame = found.frame()
    for site, in_bf16 in frame.group_by("site"):
        one, two = in_bf16.sort("step")["std"]
        assert one == pytest.approx(two, rel=0.01), site
    weights = frame.filter(operand="weight").drop("step")
    half = weights.height // 2
    assert weights[:half].equals(weights[half:])


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_autocast_inputs_are_what_is_multiplied(backend: str | None, dynamo: Any) -> None:
    model = Forked().train()
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(3))
    with Recorder(model, sites=("input",)) as found:
        with torch.autocast("cpu", torch.bfloat16):
            run(x, 2 * x).float().sum().backward()
        found.step()
    assert not dynamo["graph_break"]
    for row, seen in zip(found.frame().iter_rows(named=True), (x, 2 * x), strict=True):
        assert row["absmax"] == float(seen.bfloat16().abs().max())
        assert row["kurtosis"] == pytest.approx(kurtosis(seen.bfloat16()), rel=1e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant: bool) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    frames = []
    for model in (Checkpointed(reentrant), Checkpointed(None)):
        with Recorder(model.train()) as found:
            model(x).square().sum().backward()
            found.step()
        frames.append(found.frame())
    assert set(frames[0].filter(operand="input")["tokens"]) == {10}
    assert frames[0].equals(frames[1])


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


# torch.compile itself looks at .grad of a graph's inputs, and inductor uses what torch deprecates.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "wrapped and run before", "block by block"])
@pytest.mark.parametrize("reentrant", [None, False])
def test_a_compiled_model_is_recorded_in_one_graph(
    backend: str, how: str, reentrant: bool | None, dynamo: Any
) -> None:
    if backend == "inductor" and how != "wrapped":
        pytest.skip("slow; how a model is compiled does not depend on the backend")
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))

    graphs = []

    def train_on(model: nn.Module, run: Any, found: Recorder) -> None:
        for _ in range(4):
            run(x).square().sum().backward()
            found.step()
            graphs.append(dynamo["stats"]["unique_graphs"])

    plain = Checkpointed(None).train()
    with Recorder(plain, every=2) as want:
        train_on(plain, plain, want)

    model = Checkpointed(reentrant).train()
    run: Any = model
    if how == "in place":
        model.compile(backend=backend)
    elif how == "block by block":
        model.block.compile(backend=backend)
    else:
        run = torch.compile(model, backend=backend)
    if how == "wrapped and run before":
        run(x)
        dynamo.clear()
    with Recorder(run, every=2) as found:
        train_on(model, run, found)
    assert not dynamo["graph_break"]
    assert graphs[-4] > 0
    assert len(set(graphs[-4:])) == 1  # the second step, which records, compiles nothing anew
    assert_frame_equal(found.frame(), want.frame(), rel_tol=1e-4)
    assert set(found.frame().filter(operand="input")["tokens"]) == {10}


def test_a_compiled_model_is_recorded_anew(dynamo: Any) -> None:
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    model = Checkpointed(None).train()
    run = torch.compile(model, backend="eager")
    frames = []
    for _ in range(2):
        with Recorder(model) as found:
            run(x)
            found.step()
        frames.append(found.frame())
        run(x)
    assert frames[0].filter(operand="input").height == 3
    assert frames[0].equals(frames[1])
    gone = weakref.ref(found)
    del found
    gc.collect()
    assert gone() is None


def test_a_compiled_llama_shares_inputs_and_evaluates_unseen(
    model: LlamaForCausalLM, dynamo: Any
) -> None:
    twin = copy.deepcopy(model)
    data = batches(2)
    frames = []
    for one, run in ((model, torch.compile(model, backend="aot_eager")), (twin, twin)):
        with Recorder(one, formats=("int4-g32",)) as found:
            for ids in data:
                one.eval()
                run(input_ids=ids, use_cache=False)
                one.train()
                run(input_ids=ids, use_cache=False).logits.square().mean().backward()
                found.step()
        frames.append(found.frame())
    assert not dynamo["graph_break"]
    assert_frame_equal(frames[0], frames[1], rel_tol=1e-4, abs_tol=1e-6)
    assert set(frames[0].filter(operand="input")["tokens"]) == {24}


def test_gradient_accumulation_counts_every_micro_batch(model: LlamaForCausalLM) -> None:
    data = batches(3)
    seen: list[Tensor] = []
    handle = model.get_submodule(DOWN).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone())
    )
    with Recorder(model) as found:
        train(model, data, found, micro=3)
    handle.remove()
    inputs = found.frame().filter(operand="input")
    assert set(inputs["tokens"]) == {72}
    row = inputs.row(by_predicate=pl.col("module") == DOWN, named=True)
    assert row["kurtosis"] == pytest.approx(kurtosis(torch.cat(seen)), rel=1e-3)
    assert {t["sequence"] for t in row["top_tokens"]} <= set(range(6))


def test_linears_that_share_an_input_compute_it_once(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    update = TensorStats.update

    def counted(self: TensorStats, x: Tensor, **kwargs: Any) -> None:
        calls.append(self.operand)
        update(self, x, **kwargs)

    monkeypatch.setattr(TensorStats, "update", counted)
    with Recorder(model, sites=("input",)) as found:
        train(model, batches(2), found, micro=2)
    # Two micro-batches of 2 blocks with 4 distinct inputs, and the head's.
    assert calls == ["input"] * 2 * (2 * 4 + 1)
    frame = found.frame()
    assert set(frame["operand"]) == {"input"}
    qkv = frame.filter(pl.col("fused") == "model.layers.0.self_attn:qkv")
    assert qkv.height == 3
    assert qkv["kurtosis"].n_unique() == 1


class Forked(nn.Module):
    """Two linears that share their input in the first pass and not in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.one(x) + self.two(y)
        return out


def test_inputs_shared_only_at_times_stay_apart() -> None:
    model = Forked().train()
    x, y = torch.randn(2, 3, 4), torch.full((2, 3, 4), 9.0)
    with Recorder(model) as found:
        model(x, x)
        model(x, y)
        found.step()
    rows = {r["module"]: r for r in found.frame().filter(operand="input").iter_rows(named=True)}
    assert rows["one"]["kurtosis"] == pytest.approx(kurtosis(torch.cat([x, x])), rel=1e-3)
    assert rows["two"]["kurtosis"] == pytest.approx(kurtosis(torch.cat([x, y])), rel=1e-3)
    assert rows["one"]["tokens"] == rows["two"]["tokens"] == 12


def test_an_input_changed_in_place_is_another_input() -> None:
    def double(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        args[0].mul_(2)

    model = Forked().train()
    x = torch.randn(2, 3, 4)
    largest = float(x.abs().max())
    model.one.register_forward_hook(double)
    with Recorder(model) as found, torch.no_grad():
        model(x, x)
        found.step()
    rows = {r["module"]: r for r in found.frame().filter(operand="input").iter_rows(named=True)}
    assert rows["one"]["absmax"] == largest
    assert rows["two"]["absmax"] == 2 * largest


def test_an_optimizer_can_mark_the_steps(model: LlamaForCausalLM) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    with Recorder(model, every=2, optimizer=optimizer) as found:
        for ids in batches(4):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    assert found.frame()["step"].unique().sort().to_list() == [2, 4]
    optimizer.step()
    assert found.steps == 4


def test_drift_and_gate_up_correlation(model: LlamaForCausalLM) -> None:
    start = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    with Recorder(model, drift=True, sites=("weight",)) as found:
        train(model, batches(2), found)
    rows = {r["module"]: r for r in found.frame().filter(step=2).iter_rows(named=True)}
    now = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    for name, row in rows.items():
        before, after = start[f"{name}.weight"], now[f"{name}.weight"]
        want = ((after - before) ** 2).sum() / (before**2).sum()
        assert row["drift"] == pytest.approx(want, rel=1e-3)
    gate, up = (now[f"model.layers.0.mlp.{leaf}_proj.weight"] for leaf in ("gate", "up"))
    norms = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1)
    cosines = np.abs((gate * up).sum(1) / norms)
    for leaf in ("gate", "up"):
        row = rows[f"model.layers.0.mlp.{leaf}_proj"]
        assert row["gate_up_correlation"] == pytest.approx(cosines.mean(), rel=1e-3)
        assert row["gate_up_correlation_max"] == pytest.approx(cosines.max(), rel=1e-3)
    assert rows[DOWN]["gate_up_correlation"] is None
    assert rows[DOWN]["gate_up_correlation_max"] is None


def test_without_drift_no_copy_is_kept(model: LlamaForCausalLM) -> None:
    with Recorder(model) as found:
        train(model, batches(1), found)
    assert found.frame()["drift"].null_count() == found.frame().height


def test_recording_never_waits_for_the_device() -> None:
    # On the meta device every look at a value raises.
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG).train()
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")
    with Recorder(model, formats=("int4-g32", "nvfp4"), drift=True) as found:
        for _ in range(2):
            model(input_ids=ids)
        found.step()


def test_one_transfer_brings_everything_to_the_host(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfers = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda self: transfers.append(self.numel()) or cpu(self))
    with Recorder(model, formats=("int4-g32",), drift=True) as found:
        train(model, batches(3), found)
        assert transfers == []
        found.frame()
        found.errors_frame()
    assert len(transfers) == 1


def test_frames_can_be_read_along_the_way(model: LlamaForCausalLM) -> None:
    heights = []
    with Recorder(model, formats=("int4-g32",)) as found:
        for ids in batches(3):
            train(model, [ids], found)
            heights.append((found.frame().height, found.errors_frame().height))
    assert heights == [(31 * n, 31 * n) for n in (1, 2, 3)]


def test_without_a_step_there_is_nothing_to_read(model: LlamaForCausalLM) -> None:
    with Recorder(model) as found:
        model(input_ids=batches(1)[0])
    with pytest.raises(RuntimeError, match=r"call step\(\)"):
        found.frame()


def test_a_model_without_linears_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no linear"), Recorder(nn.LayerNorm(4)):
        pass


def test_every_must_be_positive(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="every=0"):
        Recorder(model, every=0)


def test_importing_the_package_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import bitplan.probe, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert recorder.Recorder is Recorder
    with pytest.raises(ImportError):
        from bitplan.probe import Nothing  # type: ignore[attr-defined]  # noqa: F401


class Odd(nn.Module):
    """Linears that are called twice, never, or only when told."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.never = nn.Linear(4, 4), nn.Linear(4, 4)
        self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, whole: bool = True) -> Tensor:
        x = self.early(self.twice(self.twice(x)))
        out: Tensor = self.late(x) if whole else x
        return out


def test_linears_called_twice_never_and_at_times_in_changing_shapes() -> None:
    model = Odd().train()
    with Recorder(model) as found:
        for shape, whole in (((2, 3, 4), True), ((1, 7, 4), False), ((0, 3, 4), True)):
            model(torch.randn(shape), whole)
        found.step()
        model(torch.empty(2, 0, 4))
        found.step()
    inputs = found.frame().filter(operand="input")
    tokens = {(row["module"], row["step"]): row["tokens"] for row in inputs.iter_rows(named=True)}
    assert tokens == {
        **{("twice", 1): 26, ("early", 1): 13, ("late", 1): 6},
        **{("twice", 2): 0, ("early", 2): 0, ("late", 2): 0},
    }
    nothing = inputs.filter(step=2)
    assert nothing["count"].to_list() == [0, 0, 0]
    assert nothing["kurtosis"].null_count() == 3
    assert inputs["nan_count"].sum() == 0


def test_half_precision_overflow_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).half().train()
    with torch.no_grad():
        model[0].weight.fill_(6e4)  # type: ignore[operator]
    with Recorder(model, formats=("int4-g32",)) as found:
        model(torch.ones(1, 2, 4, dtype=torch.half))
        found.step()
    row = found.frame().row(by_predicate=pl.col("site") == "1:input", named=True)
    assert row["inf_count"] == 8
    assert row["kurtosis"] is None
    assert found.errors_frame()["relative_error"].is_finite().drop_nulls().all()


def test_tied_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        recorder, "update_all", lambda stats, x: calls.extend(x) or update_all(stats, x)
    )
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).train()
    model[1].weight = model[0].weight
    with Recorder(model, sites=("weight",), drift=True) as found:
        with torch.no_grad():
            model[0].weight.mul_(3)  # type: ignore[operator]
        found.step()
    assert len(calls) == 1
    frame = found.frame()
    assert frame["module"].to_list() == ["0", "1"]
    assert frame["drift"].to_list() == pytest.approx([4.0, 4.0])
    assert frame["std"].n_unique() == 1


def test_a_step_whose_forward_failed_half_way_warns_and_goes_on(model: LlamaForCausalLM) -> None:
    data = batches(3)
    attention = model.model.layers[0].self_attn
    with Recorder(model) as found:
        model(input_ids=data[0])
        handle = attention.k_proj.register_forward_pre_hook(lambda *args: 1 / 0, prepend=True)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=data[1])
        handle.remove()
        with pytest.warns(RuntimeWarning, match="not recorded there"):
            model(input_ids=data[2])
        found.step()
        model(input_ids=data[2])
        found.step()
    inputs = found.frame().filter(operand="input")
    first = {row["module"]: row["tokens"] for row in inputs.filter(step=1).iter_rows(named=True)}
    prefix = "model.layers.0.self_attn"
    assert first[f"{prefix}.q_proj"] == 72
    assert not {f"{prefix}.k_proj", f"{prefix}.v_proj"} & first.keys()
    assert set(inputs.filter(step=2)["tokens"]) == {24}
    assert inputs.filter(step=2).height == 15


def test_inputs_that_are_no_rows_of_the_matrix_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).train()
    with Recorder(model), pytest.raises(CheckpointError, match=r"called with \[3, 5\]"):
        model(torch.ones(3, 5))


def test_no_tensor_and_no_model_outlives_the_block() -> None:
    gone: list[weakref.ref[Any]] = []

    def body() -> Recorder:
        model = Odd().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gone.append(weakref.ref(model))
        gone.extend(weakref.ref(parameter) for parameter in model.parameters())
        with Recorder(model, every=2, optimizer=optimizer, drift=True) as found:
            gone.append(weakref.ref(found))
            for _ in range(3):
                x = torch.randn(2, 3, 4)
                gone.append(weakref.ref(x))
                model(x).sum().backward()
                optimizer.step()
        found.model, found.optimizer = nn.Identity(), None  # the user's own references
        return found

    kept = body()
    gc.collect()
    assert [ref() for ref in gone] == [kept if ref() is kept else None for ref in gone]
    assert kept.frame().height == 7
    del kept
    gc.collect()
    assert all(ref() is None for ref in gone)


def test_a_recording_step_leaves_memory_as_it_was() -> None:
    model = Odd().train()

    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    with Recorder(model) as found:
        counts = []
        for _ in range(4):
            model(torch.randn(2, 3, 4))
            found.step()
            found.flush()
            counts.append(tensors())
    assert counts[1] == counts[2] == counts[3]


class OnTwoDevices(nn.Module):
    """Two linears, each where `devices` says."""

    def __init__(self, devices: tuple[str, str]) -> None:
        super().__init__()
        self.devices = devices
        torch.manual_seed(0)
        self.first = nn.Linear(16, 32).to(devices[0])
        self.second = nn.Linear(32, 8).to(devices[1])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x.to(self.devices[0]))
        return self.second(hidden.relu().to(self.devices[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_on_several_devices_is_recorded_as_on_one() -> None:
    def recorded(devices: tuple[str, str]) -> tuple[pl.DataFrame, pl.DataFrame]:
        model = OnTwoDevices(devices).train()
        torch.manual_seed(1)
        batches = [torch.randn(4, 6, 16) for _ in range(3)]
        with Recorder(model, formats=["int4-g128"], drift=True) as found:
            for batch in batches:
                model(batch).sum().backward()
                found.step()
        return found.frame(), found.errors_frame()

    last = f"cuda:{torch.cuda.device_count() - 1}"
    plain = recorded(("cpu", "cpu"))
    for devices in (("cpu", last), ("cuda:0", last)):
        for found, expected in zip(recorded(devices), plain, strict=True):
            assert_frame_equal(found, expected, rel_tol=1e-4, abs_tol=1e-5)
