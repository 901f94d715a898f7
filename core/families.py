r"""Model families as data: which module name plays which role.

A row is a regular expression for the end of a module's path and the role it plays. `FAMILIES` is
keyed by the config's `model_type` and read before `GENERIC`, whose rows hold the spellings that
mean one thing everywhere. A new family is a line here; nothing else in bitplan knows model names.
"""

from typing import NamedTuple


class Row(NamedTuple):
    """The end of a module's path, as a regular expression, and the role it plays."""

    pattern: str
    role: str


_LLAMA = (
    Row(r"self_attn\.[qkv]_proj", "qkv"),
    Row(r"self_attn\.o_proj", "o"),
    Row(r"mlp\.(gate|up)_proj", "fc1"),
    Row(r"mlp\.down_proj", "fc2"),
)
_MOE = (
    *_LLAMA[:2],
    Row(r"(mlp|block_sparse_moe)\.gate", "router"),
    Row(r"shared_expert_gate", "router"),
    Row(r"experts?(\.\d+)?\.(gate_up_proj|gate_proj|up_proj|w1|w3)", "fc1"),
    Row(r"experts?(\.\d+)?\.(down_proj|w2)", "fc2"),
    *_LLAMA[2:],
)
_BERT = (
    Row(r"attention\.self\.(query|key|value)", "qkv"),
    Row(r"attention\.output\.dense", "o"),
    Row(r"intermediate\.dense", "fc1"),
    Row(r"\d+\.output\.dense", "fc2"),
    Row(r"predictions\.decoder", "lm_head"),
)

FAMILIES: dict[str, tuple[Row, ...]] = {
    **dict.fromkeys(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "olmo",
            "olmo2",
            "olmo3",
            "smollm3",
            "granite",
            "starcoder2",
        ),
        _LLAMA,
    ),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _MOE),
    "phi3": (
        Row(r"self_attn\.qkv_proj", "qkv"),
        Row(r"self_attn\.o_proj", "o"),
        Row(r"mlp\.gate_up_proj", "fc1"),
        Row(r"mlp\.down_proj", "fc2"),
    ),
    "gpt2": (
        Row(r"attn\.c_attn", "qkv"),
        Row(r"crossattention\.(q_attn|c_attn)", "qkv"),
        Row(r"(attn|crossattention)\.c_proj", "o"),
        Row(r"mlp\.c_fc", "fc1"),
        Row(r"mlp\.c_proj", "fc2"),
    ),
    "gpt_neox": (
        Row(r"attention\.query_key_value", "qkv"),
        Row(r"attention\.dense", "o"),
        Row(r"mlp\.dense_h_to_4h", "fc1"),
        Row(r"mlp\.dense_4h_to_h", "fc2"),
        Row(r"embed_out", "lm_head"),
    ),
    "opt": (
        Row(r"self_attn\.[qkv]_proj", "qkv"),
        Row(r"self_attn\.out_proj", "o"),
        Row(r"layers\.\d+\.fc1", "fc1"),
        Row(r"layers\.\d+\.fc2", "fc2"),
    ),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
}

GENERIC: tuple[Row, ...] = (
    Row(r"lm_head|embed_out", "lm_head"),
    Row(r"embed_tokens|wte|embed_in|word_embeddings|shared", "embed"),
    Row(r"(self_)?(attn|attention)\.([qkv]_proj|qkv_proj)", "qkv"),
    Row(r"(self_)?(attn|attention)\.(o_proj|out_proj)", "o"),
    Row(r"router", "router"),
    Row(r"(mlp|experts(\.\d+)?)\.(gate|up|gate_up)_proj", "fc1"),
    Row(r"(mlp|experts(\.\d+)?)\.down_proj", "fc2"),
)

# Matrices that these families keep as [in_features, out_features], by the end of the name.
TRANSPOSED: dict[str, str] = {
    **dict.fromkeys(("gpt2", "openai-gpt"), r"(c_attn|c_proj|c_fc|q_attn)"),
    **dict.fromkeys(
        ("gpt_oss", "llama4", "llama4_text"), r"experts\.\d+\.(gate_up_proj|down_proj)"
    ),
}

# Families whose `gate_up_proj` alternates rows of gate and up; elsewhere the gate comes first.
INTERLEAVED: tuple[str, ...] = ("gpt_oss",)
