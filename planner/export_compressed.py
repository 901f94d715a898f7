"""Files for compressed-tensors, llm-compressor and vLLM: one scheme per pair of formats.

compressed-tensors describes a linear by the arguments of its weight and of its input, and by how it
is stored; vLLM chooses a kernel from both. A recipe of llm-compressor is the same description, and
makes the checkpoint that vLLM reads. JSON is YAML, so both files are written alike.
"""

import json
from collections.abc import Sequence
from typing import Any

from bitplan.formats import Format, Operand
from bitplan.planner.layers import Group, patterns

CONFIG, RECIPE, USE = "quantization_config.json", "recipe.yaml", "use.py"
E4M3, E8M0 = "torch.float8_e4m3fn", "torch.uint8"

_APPLY = '''"""Give every linear of a model its scheme of compressed-tensors."""

import json
from pathlib import Path

from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

CONFIG = Path(__file__).with_name("quantization_config.json")


def apply(model):
    """Attach the planned scheme to every linear; calibrate or train, then compress and save."""
    config = QuantizationConfig.model_validate(json.loads(CONFIG.read_text()))
    apply_quantization_config(model, config)
    return config
'''
_ONESHOT = '''"""Quantize a checkpoint with llm-compressor: python use.py MODEL OUT"""

import sys
from pathlib import Path

from llmcompressor import oneshot

RECIPE = Path(__file__).with_name("recipe.yaml")


def quantize(model, out, **calibration):
    """Write the quantized checkpoint; NVFP4 inputs want dataset=... to be calibrated on."""
    oneshot(model=str(model), recipe=str(RECIPE), output_dir=str(out), **calibration)


if __name__ == "__main__":
    quantize(*sys.argv[1:3])
'''


def compressed_tensors(groups: Sequence[Group], plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the quantization config and the code that applies it."""
    return {CONFIG: _json(_config(groups, plain)), USE: head + _APPLY}


def llm_compressor(groups: Sequence[Group], plain: Sequence[str], head: str) -> dict[str, str]:
    """Return a recipe and the code that runs it."""
    modifier = {"ignore": _targets(plain), "config_groups": _schemes(groups)}
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    return {RECIPE: head + _json(recipe), USE: head + _ONESHOT}


def vllm(groups: Sequence[Group], plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the recipe, and the config of the checkpoint it makes, which vLLM reads."""
    return llm_compressor(groups, plain, head) | {CONFIG: _json(_config(groups, plain))}


def _config(groups: Sequence[Group], plain: Sequence[str]) -> dict[str, Any]:
    storages = {group.storage for group in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": storages.pop() if len(storages) == 1 else "mixed-precision",
        "ignore": _targets(plain),
        "config_groups": _schemes(groups),
    }


def _schemes(groups: Sequence[Group]) -> dict[str, Any]:
    return {
        group.name: {
            "targets": _targets(group.modules),
            "weights": arguments(group.weight, "weight"),
            "input_activations": arguments(group.input, "input"),
            "format": group.storage,
        }
        for group in groups
    }


def _targets(modules: Sequence[str]) -> list[str]:
    return [f"re:^{pattern}$" for pattern in patterns(modules)]


def arguments(fmt: Format, operand: Operand) -> dict[str, Any] | None:
    """Return the QuantizationArgs of an operand in a format; None where it is not quantized."""
    if not fmt.is_quantized:
        return None
    dynamic = operand == "input"
    common = {"num_bits": fmt.bits, "symmetric": True, "dynamic": dynamic}
    scale = {"group_size": fmt.group_size, "strategy": "group"}
    match fmt.kind:
        case "nvfp4":
            local = {"dynamic": "local", "observer": "static_minmax"} if dynamic else {}
            types = {"type": "float", "scale_dtype": E4M3, "zp_dtype": E4M3}
            return {**common, **scale, **types, "strategy": "tensor_group", **local}
        case "mxfp4":
            return {**common, **scale, "type": "float", "scale_dtype": E8M0, "zp_dtype": E8M0}
        case "fp8":
            return {**common, "type": "float", "strategy": "token" if dynamic else "channel"}
        case _:
            row = {"strategy": fmt.granularity}
            return {**common, "type": "int", **(scale if fmt.granularity == "group" else row)}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
