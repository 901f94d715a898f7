"""A tiny checkpoint on disk with a byte-level tokenizer, text, and a run directory with a plan."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitplan.formats import BF16, parse_format
from bitplan.options import VerifyOptions
from bitplan.planner.plan import Plan, Predicted, SiteChoice
from bitplan.probe.checkpoint import load_checkpoint
from bitplan.probe.modules import find_linears
from bitplan.rundir import RunDir
from bitplan.sites import PLANNED_ROLES

LOW, HIGH = "int4-g16", "int8-g16"
VOCABULARY = 257  # 256 bytes and the end of text

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "narrow": lambda: transformers.LlamaConfig(**_GROUPED | {"vocab_size": 100}),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=16
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128
    ),
    "bert": lambda: transformers.BertConfig(**_SIZES),
}


def build_model(family: str) -> Any:
    config = CONFIGS[family]()
    auto = transformers.AutoModelForMaskedLM if family == "bert" else None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (auto or transformers.AutoModelForCausalLM).from_config(config).eval()


@pytest.fixture(scope="session")
def build() -> Callable[[str], Any]:
    """Build a tiny randomly initialized model of a family."""
    return build_model


def _words(seed: int, count: int) -> str:
    """Text with something to learn: words of a small vocabulary that follow each other."""
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    return "\n".join(
        " ".join(words[(start + i * step) % 8] for i in range(8))
        for start, step in ((rng.randrange(8), rng.choice([1, 3, 5])) for _ in range(count))
    )


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of text files."""
    path = tmp_path_factory.mktemp("text")
    for i in range(24):
        (path / f"{i}.txt").write_text(_words(i, 60) + "\n")
    return path


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str], Path]:
    """Save a tiny checkpoint of a family, with a tokenizer trained on the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in sorted(text.glob("*.txt"))], trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    saved: dict[str, Path] = {}

    def save(family: str) -> Path:
        if family not in saved:
            saved[family] = tmp_path_factory.mktemp(family)
            build_model(family).save_pretrained(saved[family])
            fast.save_pretrained(saved[family])
        return saved[family]

    return save


def make_plan(model: Any, provenance: dict[str, Any], *, high: tuple[str, ...]) -> Plan:
    """The inputs of the roles in `high` at 8 bits, everything else planned at 4."""
    choices = []
    for item in find_linears(model):
        linear = item.linear
        planned = linear.role in PLANNED_ROLES
        for operand in ("weight", "input") if item.has_input else ("weight",):
            name = HIGH if operand == "input" and linear.role in high else LOW
            fmt = parse_format(name) if planned else BF16
            choices.append(
                SiteChoice(
                    site=str(linear.site(operand)),
                    format=fmt,
                    role=linear.role,
                    block=linear.block,
                    planned=planned,
                    bits=fmt.effective_bits(linear.in_features),
                    delta_loss=None,
                    raw_delta_loss=None,
                    stderr=None,
                    method=None,
                    relative_error=None,
                    forced="rule",
                    next_best=None,
                    reason="by hand",
                )
            )
    predicted = Predicted(
        objective=0.0,
        delta_loss=None,
        delta_loss_weights=None,
        delta_loss_inputs=None,
        R=None,
        weight_bits=None,
        input_bits=None,
        bit_ops=None,
        bytes=1.0,
    )
    return Plan(
        made_by="rule fc2",
        sites=tuple(choices),
        predicted=predicted,
        budget={},
        formats=(LOW, HIGH),
        provenance=provenance,
    )


@dataclass(frozen=True)
class Ready:
    """A run directory with a plan, and options that verify it in a second or two."""

    run: Path
    options: VerifyOptions
    plan: Plan


@pytest.fixture
def ready(tmp_path: Path, checkpoints: Callable[[str], Path], text: Path) -> Callable[..., Ready]:
    """Make a run directory as profile and plan would leave it."""

    def make(
        family: str = "llama", high: tuple[str, ...] = ("fc2",), name: str = "run", **options: Any
    ) -> Ready:
        source = checkpoints(family)
        checkpoint = load_checkpoint(str(source), device="cpu")
        run = RunDir.create(tmp_path / name)
        with run.lock():
            run.finish("profile", {}, [], model=checkpoint.facts())
        plan = make_plan(checkpoint.model, run.provenance(), high=high)
        run.write_json("plan.json", plan.as_json())
        asked = {
            "steps": 4,
            "seeds": 2,
            "batch_size": 2,
            "seq_len": 32,
            "eval_tokens": 256,
            "lr": 1e-3,
            "data": (str(text),),
            "device": "cpu",
        }
        return Ready(tmp_path / name, VerifyOptions(**(asked | options)), plan)

    return make
