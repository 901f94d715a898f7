"""compressed-tensors 0.20.0: the scheme of every module once the config is applied."""

import json
from importlib.util import find_spec
from typing import Any

import pytest

from bitplan.planner.targets import TARGETS

pytestmark = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: make test-exports",
)


def spelled(args: Any) -> str:
    """Spell QuantizationArgs as a format of bitplan."""
    if args is None:
        return "bf16"
    assert args.symmetric
    size = args.group_size
    match (args.type, args.num_bits, args.strategy, str(args.scale_dtype)):
        case ("float", 4, "tensor_group", "torch.float8_e4m3fn") if size == 16:
            return "nvfp4"
        case ("float", 4, "group", "torch.uint8") if size == 32:
            return "mxfp4"
        case ("float", 8, "token" | "channel", "None"):
            return "fp8-e4m3"
        case ("int", bits, "group", "None"):
            return f"int{bits}-g{size}"
        case ("int", bits, strategy, "None"):
            return f"int{bits}-{strategy}"
    raise AssertionError(args)


def decisions(model: Any) -> dict[str, tuple[str, str]]:
    found = {}
    for name, module in model.named_modules():
        if scheme := getattr(module, "quantization_scheme", None):
            found[name] = (spelled(scheme.weights), spelled(scheme.input_activations))
            assert not scheme.weights.dynamic
            assert scheme.input_activations is None or scheme.input_activations.dynamic
    return found


def test_every_module_has_the_planned_scheme(
    every_pair: Any, exported: Any, use: Any, llama: Any, planned: Any
) -> None:
    layers = every_pair("compressed-tensors")
    model = llama(layers)
    use(exported("compressed-tensors", layers)).apply(model)
    assert decisions(model) == planned(layers)
    for group in TARGETS["compressed-tensors"].groups(layers):
        for name in group.modules:
            assert model.get_submodule(name).quantization_scheme.format == group.storage


def test_the_config_that_vllm_reads_says_the_same(
    every_pair: Any, exported: Any, llama: Any, planned: Any
) -> None:
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    layers = every_pair("vllm")
    text = (exported("vllm", layers) / "quantization_config.json").read_text()
    model = llama(layers)
    apply_quantization_config(model, QuantizationConfig.model_validate(json.loads(text)))
    assert decisions(model) == planned(layers)
