"""torchao 0.18.0: the type of every weight after `quantize_`, the fake quantizers of QAT."""

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: make test-exports"
)


def test_every_weight_is_quantized_as_planned(
    every_pair: Any, exported: Any, use: Any, llama: Any, planned: Any, errors_beside_ours: Any
) -> None:
    layers = every_pair("torchao")
    model = llama(layers).float()
    use(exported("torchao", layers)).quantize(model)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or type(weight.data) in (torch.Tensor, torch.nn.Parameter):
            continue
        rows, size = weight.block_size
        assert rows == 1
        scope = "channel" if size == module.in_features else f"g{size}"
        bits = str(weight.target_dtype).removeprefix("torch.int")
        activation = weight.activation_quantization
        assert activation in (None, "int8_asym_per_token")
        found[name] = (f"int{bits}-{scope}", "int8-token" if activation else "bf16")
    assert found == planned(layers)
    ratios = errors_beside_ours(layers, llama(layers), model)
    assert all(0.3 < ratio < 2 for ratio in ratios.values()), ratios


def test_the_json_is_what_torchao_writes(every_pair: Any, exported: Any, use: Any) -> None:
    from torchao.core.config import config_to_dict

    place = exported("torchao", every_pair("torchao"))
    text = json.loads((place / "fqn_to_config.json").read_text())
    assert config_to_dict(use(place).load()) == text


def test_every_module_trains_under_the_planned_fake_quantizers(
    every_pair: Any, exported: Any, use: Any, llama: Any, planned: Any, errors_beside_ours: Any
) -> None:
    layers = every_pair("torchao-qat")
    model = llama(layers).float()
    code = use(exported("torchao-qat", layers))
    code.prepare(model)
    found = {
        name: (fake(module.weight_fake_quantizer), fake(module.activation_fake_quantizer))
        for name, module in model.named_modules()
        if hasattr(module, "weight_fake_quantizer")
    }
    assert found == planned(layers)
    ratios = errors_beside_ours(layers, llama(layers), model)
    # Zero points make inputs finer than ours.
    assert all(0.3 < ratio < 2 for ratio in ratios.values()), ratios
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    code.convert(model)
    assert not any(hasattr(module, "weight_fake_quantizer") for module in model.modules())


def fake(quantizer: Any) -> str:
    """Spell a fake quantizer as a format of bitplan."""
    if quantizer is None:
        return "bf16"
    config = quantizer.config
    per_token = type(config.granularity).__name__ == "PerToken"
    assert config.mapping_type.name == ("ASYMMETRIC" if per_token else "SYMMETRIC")
    assert config.is_dynamic
    bits = str(config.dtype).removeprefix("torch.int")
    match type(config.granularity).__name__:
        case "PerGroup":
            return f"int{bits}-g{config.granularity.group_size}"
        case "PerToken":
            return f"int{bits}-token"
        case "PerAxis" if config.granularity.axis == 0:
            return f"int{bits}-channel"
    raise AssertionError(config)
