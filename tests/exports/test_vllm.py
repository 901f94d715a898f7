"""vLLM 0.33.0: which scheme its predicates choose for the file, transcribed here from its source.

vLLM itself is not run. Source: `CompressedTensorsConfig._get_scheme_from_parts` and `_is_*`, and
`find_matched_target` with its fused mapping, in vllm/model_executor/layers/quantization/
compressed_tensors of the 0.33.0 wheel; compute capability 8.0.
"""

import itertools
import json
import re
from typing import Any

import pytest

from bitplan.formats import parse_format
from bitplan.planner.export_compressed import arguments
from bitplan.planner.targets import TARGETS

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def chosen(weights: dict[str, Any], inputs: dict[str, Any] | None, storage: str) -> str | None:
    """Name the scheme that vLLM takes, or None where it raises."""

    def is_(args: dict[str, Any] | None, kind: str, bits: int, strategy: str, size: int) -> bool:
        found = args and (args["type"], args["num_bits"], args["strategy"], args.get("group_size"))
        return found == (kind, bits, strategy, size)

    kind = weights["type"], inputs and inputs["type"]
    bits = weights["num_bits"], inputs and inputs["num_bits"]
    rowwise = weights["strategy"] in ("channel", "group")
    if is_(weights, "float", 4, "tensor_group", 16):
        return "W4A4Fp4" if inputs is None or is_(inputs, "float", 4, "tensor_group", 16) else None
    if is_(weights, "float", 4, "group", 32):
        a8 = inputs and kind[1] == "float" and bits[1] == 8 and inputs["dynamic"]
        return "W4A8Mxfp4" if a8 and inputs["strategy"] in ("token", "group") else "W4A4Mxfp4"
    if is_(weights, "float", 8, "group", 32) and weights.get("scale_dtype") == "torch.uint8":
        return "W8A8Mxfp8"
    packed = storage == "pack-quantized"
    narrow = kind == ("int", "int") and inputs and inputs["strategy"] in ("token", "group")
    if packed and rowwise and narrow and inputs["dynamic"] and inputs["symmetric"]:
        return f"WNA{bits[1]}Int" if bits[1] in (4, 8) else None
    if packed and rowwise and inputs is None:
        return "WNA16"
    if storage in ("int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized"):
        scaled = weights["strategy"] in ("tensor", "channel", "block")
        if kind == ("float", "float") and scaled:
            return "W8A8Fp8"
        if kind[0] == "float" and scaled:
            return "W8A16Fp8"
        token = inputs and inputs["strategy"] == "token" and inputs["dynamic"]
        if bits == (8, 8) and weights["strategy"] in ("tensor", "channel") and token:
            return "W8A8Int8"
        if bits == (4, 8) and kind == ("int", "int") and rowwise and token:
            return "W4A8Int"
    return None


def matched(name: str, config: dict[str, Any]) -> str | None:
    """Return the group that vLLM takes for a module's name: of a fused one, its first part's."""
    targets = [(t, g) for g, row in config["config_groups"].items() for t in row["targets"]]

    def first(value: str) -> str | None:
        return next((g for t, g in targets if re.match(t.removeprefix("re:"), value)), None)

    if found := first(name):
        return found
    leaf = next((key for key in FUSED if name.endswith(key)), None)
    parts = [first(name.replace(leaf, part)) for part in FUSED[leaf]] if leaf else [None]
    return parts[0] if all(parts) else None


def test_it_chooses_the_scheme_of_the_table_for_every_pair(every_pair: Any, exported: Any) -> None:
    layers = every_pair("vllm")
    place = exported("vllm", layers)
    config = json.loads((place / "quantization_config.json").read_text())
    seen = set()
    for layer in layers:
        name = layer.module
        for leaf, parts in FUSED.items():
            name = re.sub(rf"({'|'.join(parts)})$", leaf, name)
        group = matched(name, config)
        if layer.is_plain:
            assert group is None
            continue
        row = config["config_groups"][group]
        taken = chosen(row["weights"], row["input_activations"], row["format"])
        scheme = TARGETS["vllm"].scheme(layer.weight, layer.input)
        assert scheme is not None
        assert (group, taken) == (f"{layer.weight}_{layer.input}", scheme.runs_as)
        seen.add(taken)
    assert seen == {s.runs_as for s in TARGETS["vllm"].schemes}


@pytest.mark.parametrize(
    ("weight", "input_", "storage", "taken"),
    [
        ("nvfp4", "fp8-e4m3", "nvfp4-pack-quantized", None),
        ("nvfp4", "int8-token", "nvfp4-pack-quantized", None),
        ("int4-g32", "int4-token", "int-quantized", None),
        # Not rejected but taken for something else, without a word.
        ("mxfp4", "int8-token", "mxfp4-pack-quantized", "W4A4Mxfp4"),
        ("mxfp4", "bf16", "mxfp4-pack-quantized", "W4A4Mxfp4"),
        ("fp8-e4m3", "int8-token", "float-quantized", "W8A16Fp8"),
        ("int8-channel", "fp8-e4m3", "int-quantized", "W8A8Int8"),
    ],
)
def test_pairs_it_rejects_or_mistakes_are_not_written(
    weight: str, input_: str, storage: str, taken: str | None
) -> None:
    pair = parse_format(weight), parse_format(input_)
    weights, inputs = arguments(pair[0], "weight"), arguments(pair[1], "input")
    assert weights is not None
    assert chosen(weights, inputs, storage) == taken
    scheme = TARGETS["vllm"].scheme(*pair)
    assert scheme is None or scheme.storage != storage


def test_of_a_fused_layer_whose_parts_differ_it_takes_the_first() -> None:
    groups = {
        "low": {"targets": [r"re:^model\.layers\.0\.self_attn\.(k|v)_proj$"]},
        "high": {"targets": [r"re:^model\.layers\.0\.self_attn\.q_proj$"]},
    }
    for order in itertools.permutations(groups):
        config = {"config_groups": {name: groups[name] for name in order}}
        assert matched("model.layers.0.self_attn.qkv_proj", config) == "high"
