import pytest

from bitplan.errors import PlanError
from bitplan.formats import BF16, Format, parse_format
from bitplan.planner.export import WRITERS
from bitplan.planner.layers import Layer
from bitplan.planner.targets import TARGETS, check_formats, find_target

DOWN = "model.layers.0.mlp.down_proj"


def layer(
    weight: str, input_: str, *, module: str = DOWN, fused: str | None = None, role: str = "fc2"
) -> Layer:
    formats = parse_format(weight), parse_format(input_)
    return Layer(
        module=module,
        role=role,
        fused=fused,
        expert=None,
        in_features=160,
        weight=formats[0],
        input=formats[1],
    )


def pair(text: str) -> tuple[Format, Format]:
    weight, _, input_ = text.partition("/")
    return parse_format(weight), parse_format(input_)


# What the paper's rule needs, 8-bit inputs beside 4-bit ones at 4-bit weights, by number type.
@pytest.mark.parametrize(
    ("target", "four", "eight"),
    [
        ("vllm", "int4-g32/int4-token", "int4-g32/int8-token"),
        ("vllm", "int4-g128/int4-g128", "int4-g128/int8-g128"),
        ("vllm", "mxfp4/mxfp4", "mxfp4/fp8-e4m3"),
        ("llm-compressor", "int4-g32/int4-token", "int4-g32/int8-token"),
        ("torchao-qat", "int4-g32/int4-token", "int4-g32/int8-token"),
        ("modelopt", "int4-g32/int4-token", "int4-g32/int8-token"),
        ("autoround", "int4-g32/int4-token", "int4-g32/int8-token"),
    ],
)
def test_targets_that_can_raise_one_input_to_8_bits(target: str, four: str, eight: str) -> None:
    assert TARGETS[target].scheme(*pair(four)) is not None
    assert TARGETS[target].scheme(*pair(eight)) is not None


@pytest.mark.parametrize(
    ("target", "pairs"),
    [
        (
            "vllm",
            "nvfp4/fp8-e4m3 nvfp4/int8-token mxfp4/bf16 bf16/int8-token int4-tensor/int8-token",
        ),
        ("torchao", "int4-g32/int4-token int4-g32/int8-g32"),
        ("modelopt", "int4-g32/int4-g32 int4-g32/int8-tensor"),
        ("llama.cpp", "int4-g32/int8-token int4-g128/bf16 int4-channel/bf16"),
    ],
)
def test_pairs_that_a_target_has_not(target: str, pairs: str) -> None:
    for text in pairs.split():
        assert TARGETS[target].scheme(*pair(text)) is None


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_whole(name: str) -> None:
    target = TARGETS[name]
    formats = [parse_format(text) for text in target.formats]
    check_formats(target, formats)
    assert WRITERS.keys() == TARGETS.keys()
    # A linear that is left alone is everyone's to leave alone.
    assert target.objection(layer("bf16", "bf16", role="router"), BF16, BF16) is None
    # What it tells a user to profile with makes a plan that mixes.
    pairs = [(w, i) for w in formats for i in formats if target.scheme(w, i)]
    assert len({i.bits for _, i in pairs}) > 1 or len({w.bits for w, _ in pairs}) > 1


def test_objections_name_the_linears_by_reason() -> None:
    layers = [
        layer("int4-g32", "int4-token"),
        layer("int4-g128", "int4-token", module="a"),
        layer("nvfp4", "fp8-e4m3", module="b"),
        layer("int4-g32", "bf16", module="c", role="embed"),
    ]
    assert TARGETS["vllm"].objections(layers) == {
        "groups of 128 do not divide rows of 160": ["a"],
        "nvfp4 weights with fp8-e4m3 inputs": ["b"],
        "role embed is not quantized there": ["c"],
    }


def test_fused_linears_must_agree_where_the_target_fuses() -> None:
    layers = [
        layer("int4-g32", "int8-token", module="q", fused="x:qkv", role="qkv"),
        layer("int4-g32", "int4-token", module="k", fused="x:qkv", role="qkv"),
        layer("int4-g32", "int4-token", module="gate", fused="x:fc1", role="fc1"),
    ]
    assert TARGETS["vllm"].objections(layers) == {"linears that run fused differ": ["q", "k"]}
    assert TARGETS["modelopt"].objections(layers) == {}


def test_experts_are_refused() -> None:
    expert = Layer(
        module="experts.0.down_proj",
        role="fc2",
        fused=None,
        expert=0,
        in_features=64,
        weight=parse_format("int4-g32"),
    )
    assert list(TARGETS["vllm"].objections([expert])) == [
        "experts of a layer are one parameter, without names to configure"
    ]


def test_unknown_names_and_formats_are_one_line() -> None:
    with pytest.raises(PlanError, match="the targets are vllm, compressed-tensors"):
        find_target("tensorrt")
    with pytest.raises(PlanError, match="--formats int4-g32,int8-g32,int8-token"):
        check_formats(TARGETS["torchao"], [parse_format("int4-g128"), parse_format("int8-g128")])
    check_formats(TARGETS["torchao"], [parse_format("int4-g128")], inputs=False)
