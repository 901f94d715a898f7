import shlex
from dataclasses import asdict

from click.testing import CliRunner

from bitplan.cli import main
from bitplan.options import PlanOptions, ProfileOptions, VerifyOptions
from bitplan.reports.commands import reproduce


def test_only_what_differs_from_the_defaults_is_spelled() -> None:
    stages = {
        "profile": {"options": asdict(ProfileOptions(model="/my models/x", sensitivity=False))},
        "plan": {"options": asdict(PlanOptions(input_bits=5.5, pins=("*.0.*=bf16", "a=bf16")))},
        "verify": {"options": asdict(VerifyOptions(seeds=97, arms=("bf16", "w4a4")))},
    }
    assert reproduce({"stages": stages}, "run") == [
        "bitplan profile '/my models/x' -o run --no-sensitivity",
        "bitplan plan run --input-bits 5.5 --pin '*.0.*=bf16' --pin a=bf16",
        "bitplan verify run --seeds 97 --arms bf16,w4a4",
        "bitplan report run",
    ]


def test_lists_read_back_from_json_are_still_defaults() -> None:
    options = asdict(ProfileOptions(model="m")) | {"formats": list(ProfileOptions.formats)}
    assert reproduce({"stages": {"profile": {"options": options}}}, "r")[0] == (
        "bitplan profile m -o r"
    )


def test_an_unknown_option_is_kept_as_a_note() -> None:
    stages = {"plan": {"options": {"input_bits": 5.0, "later": 1, "data_hash": "ab", "inputs": {}}}}
    assert reproduce({"stages": stages}, "r")[0] == "bitplan plan r --input-bits 5.0  # and later"


def test_every_spelled_option_is_one_the_command_line_has() -> None:
    changed = {
        "profile": ProfileOptions(
            model="m",
            data=("a", "b"),
            tokens=1,
            seq_len=2,
            formats=("nvfp4",),
            weights_only=True,
            stream=False,
            sensitivity=False,
            interventions="all",
            device="cpu",
            seed=3,
            trust_remote_code=True,
        ),
        "plan": PlanOptions(
            input_bits=5,
            weight_bits=5,
            bit_ops=1,
            bytes=1,
            time="H200=3",
            rule="fc2",
            converge=True,
            pins=("a=bf16",),
            formats=("nvfp4",),
            per_role=True,
            shares=("fc2:input=int8-*>=0.5",),
            quantizers=("fc2=lac",),
            measure=4,
            tokens=1e9,
            params=1e6,
            law="law.json",
            target="vllm",
        ),
        "verify": VerifyOptions(
            steps=1,
            tokens=2,
            seeds=1,
            batch_size=1,
            seq_len=2,
            eval_tokens=3,
            lr=1.0,
            data=("a",),
            arms=("bf16",),
            attribute=True,
            schedule="wsd",
            from_scratch="config.json",
            gpus=2,
            workers=2,
            device="cpu",
            seed=1,
            trust_remote_code=True,
        ),
    }
    stages = {name: {"options": asdict(options)} for name, options in changed.items()}
    for command in reproduce({"stages": stages}, "run")[:-1]:
        _, stage, *words = shlex.split(command)
        shown = CliRunner().invoke(main, [stage, "--help"]).output
        flags = [word for word in words if word.startswith("--")]
        assert len(set(flags)) >= 9 or stage == "plan"
        assert [flag for flag in flags if f"{flag} " not in shown] == []


def test_a_plan_that_stands_on_trainings_says_so_and_hashes_are_no_options() -> None:
    plan = asdict(PlanOptions(converge=True)) | {"inputs": {"trained.parquet": "ab" * 32}}
    verify = asdict(VerifyOptions(seeds=7)) | {"plan": "0123456789abcdef", "text": "f" * 32}
    stages = {"plan": {"options": plan}, "verify": {"options": verify}}
    found = reproduce({"stages": stages}, "r")
    assert found[0].startswith("bitplan plan r --converge  # from trained.parquet: other plans")
    assert found[1] == "bitplan verify r --seeds 7"
