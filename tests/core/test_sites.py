import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitplan.errors import PlanError
from bitplan.families import FAMILIES
from bitplan.sites import PLANNED_ROLES, ROLES, Linear, Site, describe


@given(
    st.from_regex(r"[a-z0-9_]+(\.[a-z0-9_]+)*", fullmatch=True),
    st.sampled_from(["input", "weight"]),
)
def test_sites_print_and_parse(module: str, operand: str) -> None:
    site = Site.parse(f"{module}:{operand}")
    assert (site.module, site.operand, str(site)) == (module, operand, f"{module}:{operand}")


@pytest.mark.parametrize("text", ["", "a", "a:", ":input", "a:output", "a.input"])
def test_what_is_no_site_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="no site"):
        Site.parse(text)


def role(module: str, family: str | None = None, shape: tuple[int, int] = (8, 8)) -> str:
    (linear,) = describe([Linear(module, *shape)], family=family, hidden_size=8)
    return linear.role


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("llama", "model.layers.0.self_attn.v_proj", "qkv"),
        ("gpt2", "transformer.h.3.attn.c_proj", "o"),
        ("gpt2", "transformer.h.3.mlp.c_proj", "fc2"),
        ("gpt2", "h.3.mlp.c_fc", "fc1"),
        ("bert", "bert.encoder.layer.1.attention.output.dense", "o"),
        ("bert", "bert.encoder.layer.1.output.dense", "fc2"),
        ("gpt_neox", "gpt_neox.layers.0.attention.dense", "o"),
        ("gpt_neox", "embed_out", "lm_head"),
        ("opt", "model.decoder.layers.0.fc2", "fc2"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "router"),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.2.w2", "fc2"),
        ("qwen3_moe", "model.layers.0.mlp.experts.7.gate_up_proj", "fc1"),
        ("qwen3_moe", "model.layers.0.mlp.gate", "router"),
        ("phi3", "model.layers.0.self_attn.qkv_proj", "qkv"),
        (None, "model.layers.0.mlp.down_proj", "fc2"),
    ],
)
def test_the_table_names_roles(family: str | None, module: str, expected: str) -> None:
    assert role(module, family) == expected


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        ("net.blocks.4.attention.wq", (8, 8), "other"),
        ("net.blocks.4.attention.query_proj", (8, 8), "qkv"),
        ("net.blocks.4.attn.out", (8, 8), "o"),
        ("net.blocks.4.ffn.a", (8, 32), "fc1"),
        ("net.blocks.4.ffn.b", (32, 8), "fc2"),
        ("net.blocks.4.adapter.x", (8, 32), "other"),
        ("net.projector", (8, 32), "other"),
    ],
)
def test_unknown_families_fall_back_on_structure_or_other(
    module: str, shape: tuple[int, int], expected: str
) -> None:
    assert role(module, "a-new-family", shape) == expected


def test_block_expert_and_fused_groups() -> None:
    names = [f"model.layers.11.self_attn.{p}_proj" for p in "qkvo"]
    names += [f"model.layers.11.mlp.experts.3.{p}_proj" for p in ("gate", "up", "down")]
    q, k, v, o, gate, up, down = describe([Linear(n, 8, 8) for n in names], family="qwen3_moe")
    assert {x.block for x in (q, o, gate, down)} == {11}
    assert q.fused == k.fused == v.fused is not None
    assert gate.fused == up.fused is not None
    assert gate.fused != q.fused
    assert o.fused is None
    assert down.fused is None
    assert (gate.expert, q.expert) == (3, None)


def test_every_row_of_the_table_names_a_role_there_is() -> None:
    assert {row.role for rows in FAMILIES.values() for row in rows} <= set(ROLES)
    assert set(PLANNED_ROLES) < set(ROLES)
