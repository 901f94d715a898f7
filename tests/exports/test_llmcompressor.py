"""llm-compressor 0.14.0.1: `oneshot` with the recipe, saved, loaded again by transformers."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bitplan.planner.targets import TARGETS

pytestmark = pytest.mark.skipif(
    find_spec("llmcompressor") is None, reason="llmcompressor is not installed: make test-exports"
)


def spelled(args: Any) -> str:
    """Spell QuantizationArgs as a format of bitplan."""
    if args is None:
        return "bf16"
    named = {(4, "tensor_group", 16): "nvfp4", (4, "group", 32): "mxfp4"}
    if args.type == "float":
        return named.get((args.num_bits, args.strategy, args.group_size), f"fp{args.num_bits}-e4m3")
    scope = f"g{args.group_size}" if args.strategy == "group" else args.strategy
    return f"int{args.num_bits}-{scope}"


@pytest.mark.parametrize("target", ["llm-compressor", "vllm"])
def test_the_saved_checkpoint_is_quantized_as_planned(
    target: str,
    every_pair: Any,
    exported: Any,
    use: Any,
    llama: Any,
    saved: Any,
    planned: Any,
    errors_beside_ours: Any,
    tmp_path: Path,
) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    layers = every_pair(target)
    # NVFP4 inputs have a scale for the whole tensor, which is calibrated.
    rows = {"input_ids": [list(range(16))] * 2, "attention_mask": [[1] * 16] * 2}
    use(exported(target, layers)).quantize(
        saved(layers),
        tmp_path / "out",
        dataset=Dataset.from_dict(rows),
        num_calibration_samples=2,
        max_seq_length=16,
    )

    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = {
        name: (spelled(scheme.weights), spelled(scheme.input_activations))
        for name, module in model.named_modules()
        if (scheme := getattr(module, "quantization_scheme", None)) is not None
    }
    assert found == planned(layers)
    for group in TARGETS[target].groups(layers):
        for name in group.modules:
            module = model.get_submodule(name)
            assert module.quantization_scheme.format == group.storage
            if group.storage == "pack-quantized":
                bits, columns = group.weight.bits, module.in_features
                assert module.weight_packed.dtype == torch.int32
                assert module.weight_packed.shape[1] == -(-columns * bits // 32)
    model(torch.arange(8)[None])  # decompresses the weights
    ratios = errors_beside_ours(layers, llama(layers), model)
    # NVFP4 inputs are scaled for the text they were calibrated on.
    dynamic = [ratio for name, ratio in ratios.items() if not name.endswith("nvfp4 nvfp4")]
    assert all(0.5 < ratio < 2 for ratio in dynamic), ratios
