"""nvidia-modelopt 0.47.0: bits, blocks and state of both quantizers of every linear."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("modelopt") is None, reason="nvidia-modelopt is not installed: make test-exports"
)


def spelled(quantizer: Any, operand: str) -> str:
    """Spell a TensorQuantizer as a format of bitplan."""
    if not quantizer.is_enabled:
        return "bf16"
    blocks = quantizer.block_sizes or {}
    match (quantizer.num_bits, blocks.get(-1), blocks.get("scale_bits")):
        case ((2, 1), 16, (4, 3)):
            return "nvfp4"
        case ((2, 1), 32, (8, 0)):
            return "mxfp4"
        case ((4, 3), None, None):
            return "fp8-e4m3"
        case (int(bits), None, None):
            return f"int{bits}-{'token' if operand == 'input' else 'channel'}"
        case (int(bits), size, None):
            return f"int{bits}-g{size}"
    raise AssertionError(quantizer)


def decisions(model: Any) -> dict[str, tuple[str, str]]:
    found = {}
    for name, module in model.named_modules():
        if not hasattr(module, "weight_quantizer"):
            continue
        assert not module.output_quantizer.is_enabled
        pair = (
            spelled(module.weight_quantizer, "weight"),
            spelled(module.input_quantizer, "input"),
        )
        if pair != ("bf16", "bf16"):
            found[name] = pair
    return found


def test_every_quantizer_is_as_planned(
    every_pair: Any, exported: Any, use: Any, llama: Any, planned: Any
) -> None:
    layers = every_pair("modelopt")
    model = use(exported("modelopt", layers)).quantize(llama(layers))
    assert decisions(model) == planned(layers)


def test_the_model_trains_and_loses_what_the_planner_measured(
    every_pair: Any, exported: Any, use: Any, llama: Any, errors_beside_ours: Any
) -> None:
    # FP4 is simulated on CUDA only.
    layers = [
        layer
        for layer in every_pair("modelopt")
        if "fp4" not in str(layer.weight) + str(layer.input)
    ]
    model = use(exported("modelopt", layers)).quantize(llama(every_pair("modelopt")).float())
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    ratios = errors_beside_ours(layers, llama(every_pair("modelopt")), model)
    # It divides AbsMax by 2^(b-1) - 1: one step less of three is what 2-bit weights feel.
    assert all(0.5 < r < (4 if " int2-" in name else 2) for name, r in ratios.items()), ratios
