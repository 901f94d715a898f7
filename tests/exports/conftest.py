"""Every pair of formats that a target claims, spread over the linears of a tiny Llama.

A test exports them, lets the library read the files, and asks it module by module what it decided.
Each library is tested in an environment of its own (`make test-exports`); elsewhere it is skipped.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitplan.formats import BF16, Format, parse_format
from bitplan.planner.export import WRITERS
from bitplan.planner.layers import Layer
from bitplan.planner.targets import TARGETS
from bitplan.quantize import quantize_dequantize
from bitplan.sites import Linear, describe

HIDDEN, INTERMEDIATE, VOCAB = 64, 96, 256
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
# One of each kind and bits; every group divides both row lengths.
NAMES = (
    *(f"int{bits}-{scope}" for bits in range(2, 9) for scope in ("g32", "channel", "token")),
    *("int4-g16", "fp8-e4m3", "nvfp4", "mxfp4", "bf16"),
)
FORMATS = tuple(parse_format(name) for name in NAMES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            # What other libraries warn of is not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def pairs_of(target: str) -> list[tuple[Format, Format]]:
    weights = [f for f in FORMATS if f.applies_to("weight")]
    inputs = [f for f in FORMATS if f.applies_to("input")]
    row = TARGETS[target]
    found = [(w, i) for w, i in itertools.product(weights, inputs) if row.scheme(w, i)]
    return [pair for pair in found if pair != (BF16, BF16)]


def llama_layers(pairs: Sequence[tuple[Format, Format]]) -> list[Layer]:
    """Give each fused group of as many blocks as it takes the next pair; embeddings stay bf16."""
    blocks = -(-len(pairs) // 4)
    linears = [Linear("model.embed_tokens", HIDDEN, VOCAB)]
    for block in range(blocks):
        linears += [Linear(f"model.layers.{block}.{n}", *shape) for n, shape in SHAPES.items()]
    linears.append(Linear("lm_head", HIDDEN, VOCAB))
    described = describe(linears, family="llama", hidden_size=HIDDEN)
    groups = dict.fromkeys(x.fused or x.module for x in described if x.block is not None)
    given = dict(zip(groups, itertools.cycle(pairs), strict=False))
    return [
        Layer(
            module=linear.module,
            role=linear.role,
            fused=linear.fused,
            expert=None,
            in_features=linear.in_features,
            weight=given.get(linear.fused or linear.module, (BF16, BF16))[0],
            input=given.get(linear.fused or linear.module, (BF16, BF16))[1],
        )
        for linear in described
    ]


@pytest.fixture(scope="session")
def every_pair() -> Callable[[str], list[Layer]]:
    """Return a maker of layers that between them have every pair of a target."""

    def make(target: str) -> list[Layer]:
        layers = llama_layers(pairs_of(target))
        assert TARGETS[target].objections(layers) == {}
        return layers

    return make


@pytest.fixture
def exported(tmp_path: Path) -> Callable[[str, list[Layer]], Path]:
    """Return a writer of a target's files for some layers; it returns their directory."""

    def write(target: str, layers: list[Layer]) -> Path:
        row = TARGETS[target]
        files = WRITERS[target](row.groups(layers), row.plain(layers), "# head\n")
        place = tmp_path / target
        place.mkdir()
        for name, text in files.items():
            (place / name).write_text(text)
        return place

    return write


@pytest.fixture
def use() -> Callable[[Path], ModuleType]:
    """Return a loader of the code that an export comes with."""

    def load(place: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location("exported_use", place / "use.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["exported_use"] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def llama() -> Callable[[list[Layer]], Any]:
    """Return a maker of the Llama that has these layers."""

    def make(layers: list[Layer]) -> Any:
        torch.manual_seed(0)
        blocks = sum(layer.module.endswith("o_proj") for layer in layers)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)

    return make


@pytest.fixture
def saved(llama: Callable[[list[Layer]], Any], tmp_path: Path) -> Callable[[list[Layer]], Path]:
    """Return a writer of the Llama that has these layers, with a tokenizer; it returns its path."""

    def save(layers: list[Layer]) -> Path:
        place = tmp_path / "model"
        llama(layers).save_pretrained(place)
        words = {str(i): i for i in range(VOCAB)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(place)
        return place

    return save


@pytest.fixture(scope="session")
def planned() -> Callable[[list[Layer]], dict[str, tuple[str, str]]]:
    """Return a maker of what a library has to say: quantized module to its two formats."""

    def of(layers: list[Layer]) -> dict[str, tuple[str, str]]:
        return {x.module: (str(x.weight), str(x.input)) for x in layers if not x.is_plain}

    return of


@pytest.fixture(scope="session")
def errors_beside_ours() -> Callable[[list[Layer], Any, Any], dict[str, float]]:
    """Return a measurer of a library's error over that of bitplan's rounding, for each module.

    It shows that groups run along the right dimension and tokens have scales of their own: the
    library loses about what the planner predicted from.
    """

    def measure(layers: list[Layer], exact: Any, model: Any) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        out = {}
        for layer in layers:
            if layer.is_plain:
                continue
            # Tokens and channels of very different size, as in trained models.
            x = torch.randn(2, 16, layer.in_features, generator=generator)
            x *= torch.logspace(-1, 1, 16)[:, None]
            x[..., 3] *= 8
            weight = exact.get_submodule(layer.module).weight.float()
            wanted = F.linear(x, weight)
            ours = F.linear(
                quantize_dequantize(x, layer.input), quantize_dequantize(weight, layer.weight)
            )
            with torch.no_grad():
                theirs = model.get_submodule(layer.module)(x.to(model.dtype)).float()
            # Of every token, that the large ones do not hide the small.
            error, own = (
                ((y - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
                for y in (theirs, ours)
            )
            out[f"{layer.module} {layer.weight} {layer.input}"] = float(error / own)
        return out

    return measure
