"""Files for AutoRound: a `layer_config`, module name to its scheme."""

import json
from collections.abc import Sequence
from typing import Any

from bitplan.formats import Format
from bitplan.planner.layers import Group

CONFIG, USE = "layer_config.json", "use.py"
WHOLE_ROW = -1
PLAIN = {"bits": 16, "act_bits": 16}

_USE = '''"""Quantize a checkpoint with AutoRound: python use.py MODEL OUT"""

import json
import sys
from pathlib import Path

from auto_round import AutoRound

CONFIG = Path(__file__).with_name("layer_config.json")


def rounder(model, **options):
    """Return AutoRound with the planned scheme of every linear; iters=0 rounds to nearest."""
    return AutoRound(str(model), layer_config=json.loads(CONFIG.read_text()), **options)


if __name__ == "__main__":
    rounder(sys.argv[1]).quantize_and_save(sys.argv[2], format="auto_round")
'''


def autoround(groups: Sequence[Group], plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the layer_config and the code that runs it; linears left alone are named too."""
    config = {name: _scheme(group) for group in groups for name in group.modules}
    config |= dict.fromkeys(plain, PLAIN)
    return {CONFIG: json.dumps(config, indent=1) + "\n", USE: head + _USE}


def _scheme(group: Group) -> dict[str, Any]:
    weight = {"bits": group.weight.bits, **_scale(group.weight)}
    if not group.input.is_quantized:
        return weight | {"act_bits": PLAIN["act_bits"]}
    inputs = {"bits": group.input.bits, **_scale(group.input), "dynamic": True}
    return weight | {f"act_{key}": value for key, value in inputs.items()}


def _scale(fmt: Format) -> dict[str, Any]:
    return {
        "group_size": fmt.group_size or WHOLE_ROW,
        "sym": True,
        "data_type": "int" if fmt.kind == "int" else "mx_fp",
    }
