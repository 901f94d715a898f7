"""Files for NVIDIA ModelOpt: an ordered `quant_cfg` list, off by default, then each quantizer.

Block sizes are keyed by a dimension, an integer, which JSON has no keys of: so the file is Python.
"""

import json
from collections.abc import Sequence
from typing import Any

from bitplan.formats import Format, Operand
from bitplan.planner.layers import Group

USE = "use.py"
LAST = -1

_HEAD = '''"""Quantize a model with NVIDIA ModelOpt, to train it or to export it."""

import modelopt.torch.quantization as mtq

# (weight quantizer, input quantizer, linears); None: not quantized.
GROUPS = [
'''
_TAIL = ''']


def quant_cfg():
    """Return the config: everything off, then the planned quantizers; the last match wins."""
    entries = [{"quantizer_name": "*", "enable": False}]
    for weight, input_, modules in GROUPS:
        for name in modules:
            for operand, cfg in (("weight", weight), ("input", input_)):
                if cfg is not None:
                    quantizer = f"{name}.{operand}_quantizer"
                    entries.append({"quantizer_name": quantizer, "enable": True, "cfg": cfg})
    return {"quant_cfg": entries, "algorithm": "max"}


def quantize(model, forward_loop=None):
    """Put the planned quantizers into the model; forward_loop(model) calibrates static ones."""
    return mtq.quantize(model, quant_cfg(), forward_loop)
'''


def modelopt(groups: Sequence[Group], _plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the code with the table of quantizers in it."""
    rows = "".join(
        f"    (\n        {quantizer(g.weight, 'weight')},\n        {quantizer(g.input, 'input')},\n"
        f"        {_names(g.modules)},\n    ),\n"
        for g in groups
    )
    return {USE: head + _HEAD + rows + _TAIL}


def quantizer(fmt: Format, operand: Operand) -> dict[str, Any] | None:
    """Return the attributes of ModelOpt's quantizer for an operand in a format, or None.

    Inputs are scaled token by token as they come, `block_sizes={-1: None}`.
    """
    if not fmt.is_quantized:
        return None
    match fmt.kind:
        case "nvfp4":
            blocks = {LAST: fmt.group_size, "type": "dynamic", "scale_bits": (4, 3)}
            return {"num_bits": (2, 1), "block_sizes": blocks}
        case "mxfp4":
            blocks = {LAST: fmt.group_size, "type": "dynamic", "scale_bits": (8, 0)}
            return {"num_bits": (2, 1), "block_sizes": blocks}
    bits = (4, 3) if fmt.kind == "fp8" else fmt.bits
    if operand == "input":
        return {"num_bits": bits, "type": "dynamic", "block_sizes": {LAST: None}}
    if fmt.group_size is not None:
        return {"num_bits": bits, "block_sizes": {LAST: fmt.group_size, "type": "static"}}
    return {"num_bits": bits, "axis": 0}


def _names(modules: Sequence[str]) -> str:
    return json.dumps(list(modules), indent=4).replace("\n", "\n        ")
