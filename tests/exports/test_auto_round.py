"""auto-round 0.16.1: the layer_config it gives back, and what it left on every module."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("auto_round") is None, reason="auto-round is not installed: make test-exports"
)


def spelled(scheme: Any, prefix: str = "") -> str:
    """Spell one operand of a scheme as a format of bitplan."""
    bits = scheme[f"{prefix}bits"]
    if bits == 16:
        return "bf16"
    assert scheme[f"{prefix}sym"]
    size = scheme[f"{prefix}group_size"]
    kind = scheme[f"{prefix}data_type"]
    # After rounding, a module names the function that rounded it, `rtn_int_sym` or `mx_fp4`.
    if "mx_fp" in kind:
        assert size == 32
        return f"mxfp{bits}"
    assert kind in ("int", "int_sym", "rtn_int_sym")
    whole = "token" if prefix else "channel"
    return f"int{bits}-{whole if size == -1 else f'g{size}'}"


def test_every_module_is_rounded_as_planned(
    every_pair: Any,
    exported: Any,
    use: Any,
    llama: Any,
    saved: Any,
    planned: Any,
    errors_beside_ours: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # it keeps a work folder in the current one
    layers = every_pair("autoround")
    place = saved(layers)
    code = use(exported("autoround", layers))
    rounder = code.rounder(
        place, iters=0, disable_opt_rtn=True, device_map="cpu", nsamples=1, seqlen=8
    )
    model, config = rounder.quantize()
    given = {name: (spelled(row), spelled(row, "act_")) for name, row in config.items()}
    assert {name: pair for name, pair in given.items() if pair != ("bf16", "bf16")} == planned(
        layers
    )
    left = {}
    for name, module in model.named_modules():
        if getattr(module, "bits", 16) < 16 or getattr(module, "act_bits", 16) < 16:
            row = vars(module)
            left[name.removesuffix(".orig_layer")] = (spelled(row), spelled(row, "act_"))
    assert left == planned(layers)
    ratios = errors_beside_ours(layers, llama(layers), model)
    assert all(0.3 < ratio < 2 for ratio in ratios.values()), ratios
