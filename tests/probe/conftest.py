"""Tiny models of every family, built from configs, and checkpoints of them on disk."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 257  # 256 bytes and the end of text
EOS = 256
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "bos_token_id": EOS, "eos_token_id": EOS}
_EXPERTS = {"num_experts_per_tok": 2}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **k: transformers.LlamaConfig(**_GROUPED | k),
    "smollm": lambda **k: transformers.LlamaConfig(**_GROUPED | {"tie_word_embeddings": True} | k),
    "mistral": lambda **k: transformers.MistralConfig(**_GROUPED | k),
    "qwen2": lambda **k: transformers.Qwen2Config(**_GROUPED | k),
    "qwen3": lambda **k: transformers.Qwen3Config(**_GROUPED, head_dim=8, **k),
    "gemma3": lambda **k: transformers.Gemma3TextConfig(**_GROUPED | {"head_dim": 8} | k),
    "phi3": lambda **k: transformers.Phi3Config(**_GROUPED, pad_token_id=0, **k),
    "olmo2": lambda **k: transformers.Olmo2Config(**_GROUPED | k),
    "gpt2": lambda **k: transformers.GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": EOS,
            "eos_token_id": EOS,
        }
        | k
    ),
    "gpt_neox": lambda **k: transformers.GPTNeoXConfig(
        **_SIZES, bos_token_id=EOS, eos_token_id=EOS, **k
    ),
    "opt": lambda **k: transformers.OPTConfig(
        **{**_SIZES, "ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32} | k
    ),
    "mixtral": lambda **k: transformers.MixtralConfig(
        **_GROUPED | _EXPERTS | {"num_local_experts": 4} | k
    ),
    "qwen3_moe": lambda **k: transformers.Qwen3MoeConfig(
        **_GROUPED | _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8} | k
    ),
    "gpt_oss": lambda **k: transformers.GptOssConfig(
        **_GROUPED | _EXPERTS | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 16} | k
    ),
    "bert": lambda **k: transformers.BertConfig(**_SIZES | {"max_position_embeddings": 128} | k),
}


def build_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny randomly initialized model of a family, in eval mode."""
    config = CONFIGS[name](**changes)
    auto = (
        transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Build a model of a family by its name in CONFIGS."""
    return build_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: token i is byte i in the byte-level alphabet, 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab={**vocabulary, "<end>": EOS}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


@pytest.fixture(scope="session")
def save(
    tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Save a tiny checkpoint of a family and return its directory."""

    def save_checkpoint(name: str, **changes: Any) -> Path:
        directory = tmp_path_factory.mktemp(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what transformers thinks of tiny configs
            build_model(name, **changes).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save_checkpoint


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty different text files."""
    directory = tmp_path_factory.mktemp("text")
    for index in range(30):
        lines = (f"line {line} of file {index}: {line * index % 97}\n" for line in range(60))
        (directory / f"{index:02}.txt").write_text("".join(lines))
    return directory
