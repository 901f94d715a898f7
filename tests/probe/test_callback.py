from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bitplan.errors import RunError
from bitplan.probe import Recorder, RecorderCallback
from bitplan.tables import ERRORS, PROFILE

SITES_A_STEP = 2 * 7 * 2 + 3  # weights and inputs of two blocks; embedding; head's weight and input


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )


def make_trainer(
    model: LlamaForCausalLM,
    directory: Path,
    steps: int,
    *callbacks: TrainerCallback,
    **options: Any,
) -> Trainer:
    data = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids, "labels": ids} for ids in data]
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[*callbacks])


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def steps_of(path: Path) -> list[int]:
    return pl.read_parquet(path)["step"].unique().sort().to_list()


def test_one_line_records_a_training(tmp_path: Path) -> None:
    model = make_model()
    callback = RecorderCallback(every=2, formats=("int4-g32",), output=tmp_path / "stats")
    trainer = make_trainer(
        model,
        tmp_path,
        5,
        callback,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    stats = pl.read_parquet(tmp_path / "stats" / "stats.parquet")
    errors = pl.read_parquet(tmp_path / "stats" / "errors.parquet")
    assert dict(stats.schema) == PROFILE.schema
    assert dict(errors.schema) == ERRORS.schema
    assert stats.group_by("step").len().sort("step").rows() == [
        (2, SITES_A_STEP),
        (4, SITES_A_STEP),
    ]
    # Two micro-batches of 2 x 8 tokens, none of the evaluations.
    assert set(stats.filter(operand="input")["tokens"]) == {32}
    assert hooks(model) == 0
    assert sorted(p.name for p in (tmp_path / "stats").iterdir()) == [
        "errors.parquet",
        "stats.parquet",
    ]


def test_the_callback_records_what_the_recorder_does(tmp_path: Path) -> None:
    recorded, plain = make_model(), make_model()
    make_trainer(recorded, tmp_path, 2, RecorderCallback(every=2, output=tmp_path)).train()
    with Recorder(plain, every=2) as recorder:

        class Step(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                recorder.step()

        make_trainer(plain, tmp_path, 2, Step()).train()
    assert pl.read_parquet(tmp_path / "stats.parquet").equals(recorder.frame())


def test_a_training_that_resumes_keeps_its_rows(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    output = tmp_path / "bitplan"  # the default: beside the checkpoints
    whole = make_model()
    make_trainer(whole, tmp_path, 4, RecorderCallback(every=1), **options).train()
    uninterrupted = pl.read_parquet(output / "stats.parquet")
    assert steps_of(output / "stats.parquet") == [1, 2, 3, 4]
    # Resume from step 2: the rows of steps 3 and 4 are recorded anew, not twice.
    trainer = make_trainer(make_model(), tmp_path, 4, RecorderCallback(every=1), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = pl.read_parquet(output / "stats.parquet")
    assert resumed.equals(uninterrupted)


def test_saving_writes_what_there_is(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise KeyboardInterrupt

    callback = RecorderCallback(every=1, output=tmp_path / "stats")
    model = make_model()
    options = {"save_strategy": "steps", "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, tmp_path, 4, callback, Interrupt(), **options).train()
    assert steps_of(tmp_path / "stats" / "stats.parquet") == [1, 2]
    # The same callback starts over; the hooks of the broken training are gone with the new one.
    make_trainer(model, tmp_path, 1, callback).train()
    assert steps_of(tmp_path / "stats" / "stats.parquet") == [1]
    assert hooks(model) == 0


def test_files_that_cannot_be_read_stop_a_resume(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(make_model(), tmp_path, 1, RecorderCallback(every=1), **options).train()
    path = tmp_path / "bitplan" / "stats.parquet"
    path.write_bytes(b"damaged")
    trainer = make_trainer(make_model(), tmp_path, 2, RecorderCallback(every=1), **options)
    with pytest.raises(RunError, match="cannot be read"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert path.read_bytes() == b"damaged"
