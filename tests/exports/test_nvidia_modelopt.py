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


def test_the_model_trains_and_its_inputs_are_rounded_token_by_token(
    every_pair: Any, exported: Any, use: Any, llama: Any
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
    tokens = torch.randn(5, 64) * torch.tensor([1.0, 10, 0.1, 3, 100])[:, None]
    seen = set()
    for layer in layers:
        if layer.input.kind != "int" or layer.in_features != 64 or str(layer.input) in seen:
            continue
        seen.add(str(layer.input))
        quantizer = model.get_submodule(layer.module).input_quantizer
        rounded = quantizer(tokens[None])[0]
        # A scale of its own for each token: the error follows the token's size.
        error = (rounded - tokens).abs().amax(dim=1) / tokens.abs().amax(dim=1)
        assert (error <= 0.51 / (2 ** (layer.input.bits - 1) - 1)).all()
        assert all(len(row.unique()) <= 2**layer.input.bits for row in rounded)
    assert seen == {"int4-token", "int8-token"}
