"""Published matrix rates of accelerators, and the rate a pair of formats runs at.

Rates are the vendor's peak for dense matrices, in 10^12 operations per second (a multiply and an
add are two). A multiplication runs in the number type of its wider operand, the other one being
widened on the way: 4-bit weights with 8-bit inputs run at the 8-bit rate. A type that a device has
no rate for runs at the next wider one that it has. These are ceilings: memory traffic, launches
and attention are not in them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bitplan.errors import PlanError
from bitplan.formats import Format

FORWARD_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device's dense matrix rates in 10^12 operations per second, by number type."""

    name: str
    rates_tops: Mapping[str, float]
    source: str


DEVICES = {
    device.name.lower().replace(" ", ""): device
    for device in (
        Device(
            name="A100",
            rates_tops={"bf16": 312.0, "int8": 624.0, "int4": 1248.0},
            source="NVIDIA A100 Tensor Core GPU Architecture whitepaper (SXM, without sparsity)",
        ),
        Device(
            name="H100",
            rates_tops={"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            source="NVIDIA H100 Tensor Core GPU Architecture whitepaper (SXM5, without sparsity)",
        ),
        Device(
            name="H200",
            rates_tops={"bf16": 989.4, "fp8": 1978.9, "int8": 1978.9},
            source="NVIDIA H200 Tensor Core GPU datasheet (SXM): half its rates with sparsity",
        ),
        Device(
            name="B200",
            rates_tops={"bf16": 2250.0, "fp8": 4500.0, "int8": 4500.0, "fp4": 9000.0},
            source="NVIDIA Blackwell architecture technical brief (HGX B200, 1,000 W, dense)",
        ),
        Device(
            name="RTX 4090",
            rates_tops={"bf16": 165.2, "fp8": 330.3, "int8": 660.6, "int4": 1321.2},
            source="NVIDIA Ada GPU Architecture whitepaper (dense, floats summed in fp32)",
        ),
        Device(
            name="MI300X",
            rates_tops={"bf16": 1307.4, "fp8": 2614.9, "int8": 2614.9},
            source="AMD Instinct MI300X data sheet (peak theoretical, without sparsity)",
        ),
    )
}


def find_device(name: str) -> Device:
    """Return the device of a name; raise PlanError, with those there are, for another."""
    device = DEVICES.get(name.strip().lower().replace(" ", ""))
    if device is None:
        known = ", ".join(device.name for device in DEVICES.values())
        raise PlanError(f"no rates of a device {name!r}: there are those of {known}")
    return device


def parse_time(text: str) -> tuple[Device, float]:
    """Return the device and the milliseconds of DEVICE=MS; raise PlanError for anything else."""
    name, _, value = text.rpartition("=")
    try:
        device = find_device(name)
    except PlanError as error:
        raise PlanError(f"--time {text!r}: write DEVICE=MS; {error}") from None
    try:
        limit_ms = float(value)
    except ValueError:
        limit_ms = math.nan
    if not (math.isfinite(limit_ms) and limit_ms > 0):
        raise PlanError(f"--time {text!r}: {value!r} is no number of milliseconds above 0")
    return device, limit_ms


def rate_tops(device: Device, weight: Format, input_: Format) -> float:
    """Return the rate in 10^12 operations per second that the pair of formats runs at."""
    wider = max((weight, input_), key=lambda f: (f.bits, f.kind != "int"))
    family = "int" if wider.kind == "int" else "fp"
    for bits in (4, 8):
        if wider.bits <= bits and f"{family}{bits}" in device.rates_tops:
            return device.rates_tops[f"{family}{bits}"]
    return device.rates_tops["bf16"]
