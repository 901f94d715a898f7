"""Block by block against the whole model: the same tables, bit for bit, whatever is interrupted."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch
import transformers

from bitplan.errors import CheckpointError, RunError
from bitplan.options import DEFAULT_FORMATS, ProfileOptions
from bitplan.probe import blocks, inputs, memory, partial, profile
from bitplan.probe.profile import profile_checkpoint
from bitplan.rundir import PARTIAL

FILES = ("profile.parquet", "errors.parquet", "sensitivity.parquet", "outliers.parquet")
# Three batches of sequences, the last of them shorter: sizes are those of tiny models.
SEQUENCES, SEQ_LEN, BATCH = 7, 32, 3
GEMMA = ("sliding_attention", "full_attention")
FAMILIES = {
    "llama": {},
    "smollm": {},
    "qwen2": {},
    "gemma3": {"num_hidden_layers": 4, "sliding_window": 8, "layer_types": [*GEMMA, *GEMMA]},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {},
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {},
    "gpt_oss": {},
    "bert": {},
}


@pytest.fixture
def small_batches(monkeypatch):
    for module in (inputs, sys.modules["bitplan.probe.streamed"]):
        monkeypatch.setattr(module, "batch_size", lambda *_: BATCH)


@pytest.fixture(scope="module")
def options(save, text_directory):
    return ProfileOptions(
        model=str(save("llama", initializer_range=0.2, num_hidden_layers=3)),
        data=(str(text_directory),),
        tokens=SEQUENCES * SEQ_LEN,
        seq_len=SEQ_LEN,
        formats=("int4-g16", "int8-token", "fp8-e4m3"),
        device="cpu",
    )


def tables(run: Path) -> dict[str, pl.DataFrame]:
    return {name: pl.read_parquet(run / name) for name in FILES if (run / name).is_file()}


def assert_same(run: Path, expected: Path) -> None:
    found, wanted = tables(run), tables(expected)
    assert found.keys() == wanted.keys()
    for name, table in wanted.items():
        for column in table.columns:
            assert found[name][column].equals(table[column], null_equal=True), (name, column)
        assert (run / name).read_bytes() == (expected / name).read_bytes()


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("family", "sensitivity"),
    [*((family, True) for family in FAMILIES), ("gemma3", False), ("mixtral", False)],
)
def test_the_tables_are_those_of_the_whole_model(save, options, tmp_path, family, sensitivity):
    model = save(family, initializer_range=0.2, **FAMILIES[family])
    asked = replace(options, model=str(model), sensitivity=sensitivity)
    whole = profile_checkpoint(tmp_path / "whole", replace(asked, stream=False))
    streamed = profile_checkpoint(tmp_path / "streamed", replace(asked, stream=True))
    assert_same(tmp_path / "streamed", tmp_path / "whole")
    assert (streamed.sensitivity is None) == (not sensitivity or family == "bert")
    assert set(streamed.notes) - set(whole.notes) == {
        "the model was run block by block, as was asked"
    }
    assert not (tmp_path / "streamed" / PARTIAL).exists()
    if family == "gemma3":
        assert sensitivity is False or streamed.sensitivity["delta_loss"].is_finite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_tables_are_those_of_the_whole_model_on_a_gpu(save, options, tmp_path, family):
    asked = replace(options, model=str(save(family, initializer_range=0.2)), device="cuda")
    whole = profile_checkpoint(tmp_path / "whole", replace(asked, stream=False))
    found = profile_checkpoint(tmp_path / "streamed", replace(asked, stream=True))
    for name in ("kurtosis", "absmax", "std"):
        assert found.profile[name].to_list() == pytest.approx(whole.profile[name].to_list())
    expected = whole.sensitivity["delta_loss"].to_list()
    assert found.sensitivity["delta_loss"].to_list() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_half_precision_on_disk_and_shards(build, tokenizer, options, tmp_path):
    model = build("llama", initializer_range=0.2, num_hidden_layers=2).bfloat16()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "model")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    asked = replace(options, model=str(tmp_path / "model"), tokens=64)
    profile_checkpoint(tmp_path / "whole", replace(asked, stream=False))
    profile_checkpoint(tmp_path / "streamed", replace(asked, stream=True))
    assert_same(tmp_path / "streamed", tmp_path / "whole")


@pytest.mark.usefixtures("small_batches")
def test_a_vision_tower_of_as_many_layers_is_only_weighed(tokenizer, options, tmp_path):
    text = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = replace(options, model=str(tmp_path / "model"))
    profile_checkpoint(tmp_path / "whole", replace(asked, stream=False))
    result = profile_checkpoint(tmp_path / "streamed", replace(asked, stream=True))
    assert_same(tmp_path / "streamed", tmp_path / "whole")
    vision_rows = result.profile.filter(pl.col("module").str.contains("vision"))
    assert vision_rows.filter(pl.col("operand") == "weight")["count"].min() > 0
    assert vision_rows.filter(pl.col("operand") == "input")["count"].max() == 0


def test_a_model_that_hands_embeddings_to_every_block_is_refused(tokenizer, options, tmp_path):
    config = transformers.Gemma3nTextConfig(
        vocab_size=257,
        vocab_size_per_layer_input=257,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=2,
        num_kv_shared_layers=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=8,
        layer_types=list(GEMMA),
        activation_sparsity_pattern=[0.0, 0.0],
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = replace(options, model=str(tmp_path / "model"), stream=True)
    with pytest.raises(CheckpointError, match=r"cannot be run block by block .*--no-stream"):
        profile_checkpoint(tmp_path / "run", asked)
    assert not (tmp_path / "run").exists()


def test_never_more_than_one_block_is_in_memory(options, tmp_path, monkeypatch):
    largest = []

    def mount(self, names, original=blocks.PartedModel._mount):
        saved = original(self, names)
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in real(self)}
        largest.append(sum(held.values()))
        return saved

    def real(parted):
        return [p for p in parted.model.parameters() if p.stride() != (0,) * p.dim()]

    monkeypatch.setattr(blocks.PartedModel, "_mount", mount)
    profile_checkpoint(tmp_path, replace(options, stream=True))
    per_block = 4 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32)
    embedding = 4 * 257 * 32
    # Embeddings; three blocks; norm and head; three blocks backward.
    expected = [embedding, *[per_block] * 3, embedding + 4 * 32, *[per_block] * 3]
    assert largest == expected


# --- interrupted -------------------------------------------------------------------------------


class Killed(BaseException):
    """What stands for a kill: no handler of errors sees it."""


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    profile_checkpoint(path, replace(options, stream=True))
    return path


@pytest.mark.parametrize("part", range(8))
def test_an_interrupted_profile_goes_on_at_its_part(options, whole, tmp_path, monkeypatch, part):
    asked = replace(options, stream=True)
    mounted = []

    def mount(self, names, original=blocks.PartedModel._mount):
        mounted.append(names)
        if len(mounted) == part + 1 and (tmp_path / "cut") not in done:
            raise Killed
        return original(self, names)

    done = set()
    monkeypatch.setattr(blocks.PartedModel, "_mount", mount)
    with pytest.raises(Killed):
        profile_checkpoint(tmp_path / "cut", asked)
    assert [path.name for path in (tmp_path / "cut").glob("*.parquet")] == []
    done.add(tmp_path / "cut")
    mounted.clear()
    result = profile_checkpoint(tmp_path / "cut", asked)
    assert_same(tmp_path / "cut", whole)
    # Embeddings run again for what they hand the blocks; nothing else that was finished does.
    assert len(mounted) == 8 - part + (part > 0)
    assert any(f"{part} of its parts were done" in note for note in result.notes) == (part > 0)
    assert not (tmp_path / "cut" / PARTIAL).exists()


def test_a_killed_profile_ends_with_the_tables_of_one_that_was_not(options, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = ["--data", options.data[0], "--tokens", "2048", "--seq-len", "32", "--stream"]
    command = [sys.executable, "-m", "bitplan", "profile", options.model, *words, "--device", "cpu"]
    with subprocess.Popen([*command, "-o", str(killed)], stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not (killed / PARTIAL / "forward-0001.json").exists() and process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "run.json").exists()
    asked = replace(options, tokens=2048, formats=DEFAULT_FORMATS, stream=True)
    result = profile_checkpoint(killed, asked)
    assert any("was continued" in note for note in result.notes)
    profile_checkpoint(whole, asked)
    assert_same(killed, whole)
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_parts_of_another_question_are_not_used(options, tmp_path, monkeypatch):
    asked = replace(options, stream=True)
    cut_before(monkeypatch, 3)
    with pytest.raises(Killed):
        profile_checkpoint(tmp_path / "cut", asked)
    assert (tmp_path / "cut" / PARTIAL).is_dir()
    monkeypatch.undo()
    other = replace(asked, seed=1)
    result = profile_checkpoint(tmp_path / "cut", other)
    assert not any("continued" in note for note in result.notes)
    profile_checkpoint(tmp_path / "fresh", other)
    assert_same(tmp_path / "cut", tmp_path / "fresh")


def test_a_whole_profile_clears_what_an_interrupted_one_left(options, tmp_path, monkeypatch):
    cut_before(monkeypatch, 3)
    with pytest.raises(Killed):
        profile_checkpoint(tmp_path, replace(options, stream=True))
    monkeypatch.undo()
    profile_checkpoint(tmp_path, replace(options, stream=False))
    assert not (tmp_path / PARTIAL).exists()


def cut_before(monkeypatch, part):
    count = iter(range(100))

    def mount(self, names, original=blocks.PartedModel._mount):
        if next(count) == part:
            raise Killed
        return original(self, names)

    monkeypatch.setattr(blocks.PartedModel, "_mount", mount)


# --- refusals and the choice -------------------------------------------------------------------


def test_bad_weights_leave_nothing(build, tokenizer, options, tmp_path):
    model = build("llama", num_hidden_layers=3)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = replace(options, model=str(tmp_path / "model"), stream=True)
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj\.weight has 1 of"):
        profile_checkpoint(tmp_path / "run", asked)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_before_anything_runs(options, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(partial.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RunError, match="profile fewer --tokens, or pass --no-sensitivity"):
        profile_checkpoint(tmp_path / "run", replace(options, stream=True))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_in_the_middle_keeps_what_is_finished(options, tmp_path, monkeypatch):
    def save(self, name, batches, original=partial.Partial.save_states):
        if name == "hidden-0002":
            raise RunError("cannot write")
        original(self, name, batches)

    monkeypatch.setattr(partial.Partial, "save_states", save)
    with pytest.raises(RunError, match="cannot write"):
        profile_checkpoint(tmp_path / "run", replace(options, stream=True))
    monkeypatch.undo()
    result = profile_checkpoint(tmp_path / "run", replace(options, stream=True))
    assert any("continued" in note for note in result.notes)


def test_a_model_that_does_not_fit_is_streamed_and_says_so(options, tmp_path, monkeypatch):
    for free, streams in ((10**12, False), (10**5, True), (None, False)):
        monkeypatch.setattr(profile, "available_bytes", lambda _, free=free: free)
        result = profile_checkpoint(tmp_path / f"run-{free}", replace(options, tokens=64))
        notes = [note for note in result.notes if "its weights take 0.0 GB in float32" in note]
        assert bool(notes) == streams
    # The way does not matter for what is there.
    assert profile_checkpoint(
        tmp_path / "run-None", replace(options, tokens=64, stream=True)
    ).up_to_date


def test_memory_is_that_of_the_machine_or_its_container(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.available_bytes(cpu) == 5000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1500000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 250000\n")
    assert memory.available_bytes(cpu) == 1_750_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes(cpu) == 5000 * 1024
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "none")
    assert memory.available_bytes(cpu) is None
