"""Files for torchao: an `FqnToConfig`, as JSON to quantize with, or as code to train with.

The JSON is what torchao's `config_to_dict` writes. Fake quantization (QAT) has no such form, so
there the table of formats is JSON and the code next to it builds the config.
"""

import json
from collections.abc import Sequence
from typing import Any

from bitplan.formats import Format
from bitplan.planner.layers import Group, patterns

CONFIG, TABLE, USE = "fqn_to_config.json", "formats.json", "use.py"

_QUANTIZE = '''"""Quantize a model with torchao."""

import json
from pathlib import Path

from torchao.core.config import config_from_dict
from torchao.quantization import quantize_

CONFIG = Path(__file__).with_name("fqn_to_config.json")


def quantize(model):
    """Quantize the planned linears in place; with transformers, give load() to TorchAoConfig."""
    quantize_(model, load(), filter_fn=None)


def load():
    """Return the FqnToConfig."""
    return config_from_dict(json.loads(CONFIG.read_text()))
'''
_PREPARE = '''"""Train a model under the plan: prepare(model), train, convert(model)."""

import json
from pathlib import Path

import torch
from torchao.quantization import FqnToConfig, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

TABLE = Path(__file__).with_name("formats.json")


def prepare(model):
    """Put the planned fake quantizers into the model, in place."""
    configs = {
        f"re:{pattern}": QATConfig(
            activation_config=fake(row["input"]), weight_config=fake(row["weight"]), step="prepare"
        )
        for row in json.loads(TABLE.read_text())
        for pattern in row["modules"]
    }
    quantize_(model, FqnToConfig(configs), filter_fn=None)


def convert(model):
    """Take the fake quantizers out again; the trained weights stay."""
    quantize_(model, QATConfig(step="convert"))


def fake(fmt):
    """Return the fake quantizer of a format: bits, and granularity or group_size; or None."""
    if fmt is None:
        return None
    scope = {key: value for key, value in fmt.items() if key != "bits"}
    return IntxFakeQuantizeConfig(getattr(torch, f"int{fmt['bits']}"), **scope)
'''


def torchao(groups: Sequence[Group], _plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the config as JSON and the code that applies it."""
    configs = {
        f"re:{pattern}": _config(group) for group in groups for pattern in patterns(group.modules)
    }
    both = _typed("FqnToConfig", fqn_to_config=configs, module_fqn_to_config=configs)
    return {CONFIG: _json(both), USE: head + _QUANTIZE}


def torchao_qat(groups: Sequence[Group], _plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the table of formats and the code that prepares and converts a model."""
    table = [
        {"modules": patterns(g.modules), "weight": _fake(g.weight), "input": _fake(g.input)}
        for g in groups
    ]
    return {TABLE: _json(table), USE: head + _PREPARE}


def _fake(fmt: Format) -> dict[str, Any] | None:
    if not fmt.is_quantized:
        return None
    if fmt.group_size is not None:
        return {"bits": fmt.bits, "group_size": fmt.group_size}
    # Tokens with a symmetric scale are not implemented there.
    symmetric = fmt.granularity != "token"
    scope = f"per_{fmt.granularity}"
    return {"bits": fmt.bits, "granularity": scope, "is_symmetric": symmetric}


def _config(group: Group) -> dict[str, Any]:
    """Return a pair's config as torchao spells it: symmetric but for inputs, which cannot be."""
    weight = {"_type": "torch.dtype", "_data": f"int{group.weight.bits}"}
    size = group.weight.group_size
    scope = _typed("PerAxis", axis=0) if size is None else _typed("PerGroup", group_size=size)
    symmetric = {"_type": "MappingType", "_data": "SYMMETRIC"}
    common = {
        "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
        "intx_choose_qparams_algorithm": {
            "_type": "IntxChooseQParamsAlgorithm",
            "_data": "AFFINE",
        },
    }
    if not group.input.is_quantized:
        return _typed(
            "IntxWeightOnlyConfig",
            version=2,
            weight_dtype=weight,
            granularity=scope,
            mapping_type=symmetric,
            scale_dtype=None,
            **common,
        )
    return _typed(
        "Int8DynamicActivationIntxWeightConfig",
        version=2,
        weight_dtype=weight,
        weight_granularity=scope,
        weight_mapping_type=symmetric,
        weight_scale_dtype=None,
        act_mapping_type={"_type": "MappingType", "_data": "ASYMMETRIC"},
        **common,
    )


def _typed(name: str, *, version: int = 1, **data: Any) -> dict[str, Any]:
    return {"_type": name, "_version": version, "_data": data}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"
