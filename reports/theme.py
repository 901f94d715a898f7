"""Colors by meaning, for light and dark paper.

Charts and CSS name a color by its role ("theme:eight" is whatever marks 8 bits); the page fills the
names in when it draws, again whenever the reader's scheme changes. The hues keep apart under the
common color-vision deficiencies, and no chart relies on hue alone: cells carry their number, points
their shape, rows their name.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from bitplan.formats import Format, parse_format

PREFIX = "theme:"

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1b2029",
    "muted": "#5d6776",
    "faint": "#a3abb8",
    "grid": "#e6e9ee",
    "axis": "#c3c9d3",
    "band": "#e4efe9",
    "low": "#d5dae2",
    "low2": "#b3bbc8",
    "low3": "#8f99a9",
    "on_low": "#4c5563",
    "eight": "#1f5fbf",
    "eight2": "#5b8ed8",
    "eight3": "#0c3a80",
    "on_eight": "#ffffff",
    "full": "#2b313b",
    "on_full": "#ffffff",
    "qkv": "#7b5aa6",
    "o": "#1b8a7a",
    "fc1": "#8b8577",
    "fc2": "#c8471b",
    "other": "#5d6776",
    "bf16": "#2b313b",
    "w4a16": "#1b8a7a",
    "w16a4": "#7b5aa6",
    "w4a4": "#c8471b",
    "planned": "#1f5fbf",
    "heat0": "#f4f1ea",
    "heat1": "#f5d9a0",
    "heat2": "#ee9d4f",
    "heat3": "#c8471b",
    "heat4": "#7a1233",
    "heat5": "#33081f",
    "on_cool": "#4a3a20",
    "on_hot": "#fff4e6",
}
DARK = {
    "paper": "#181b21",
    "ink": "#e8eaee",
    "muted": "#9aa3b2",
    "faint": "#687182",
    "grid": "#2a2f38",
    "axis": "#414855",
    "band": "#20342c",
    "low": "#343b47",
    "low2": "#515b6b",
    "low3": "#768193",
    "on_low": "#aeb7c5",
    "eight": "#6aa5f7",
    "eight2": "#3f78cc",
    "eight3": "#a9ccff",
    "on_eight": "#0d1420",
    "full": "#dfe3ea",
    "on_full": "#181b21",
    "qkv": "#b79be0",
    "o": "#4cc3af",
    "fc1": "#b3ac9c",
    "fc2": "#f58157",
    "other": "#9aa3b2",
    "bf16": "#dfe3ea",
    "w4a16": "#4cc3af",
    "w16a4": "#b79be0",
    "w4a4": "#f58157",
    "planned": "#6aa5f7",
    "heat0": "#23262c",
    "heat1": "#4b2b33",
    "heat2": "#8f2f3c",
    "heat3": "#d8562f",
    "heat4": "#f6a64c",
    "heat5": "#fdeab4",
    "on_cool": "#cdb9b4",
    "on_hot": "#1d1408",
}
HEAT = tuple(f"{PREFIX}heat{i}" for i in range(6))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

CONFIG: dict[str, Any] = {
    "background": f"{PREFIX}paper",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": f"{PREFIX}muted",
        "labelFontSize": 12,
        "titleColor": f"{PREFIX}muted",
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "gridColor": f"{PREFIX}grid",
        "domainColor": f"{PREFIX}axis",
        "tickColor": f"{PREFIX}axis",
        "labelPadding": 5,
        "labelLimit": 220,
    },
    "legend": {
        "orient": "top",
        "labelColor": f"{PREFIX}ink",
        "titleColor": f"{PREFIX}muted",
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "symbolSize": 90,
        "symbolOpacity": 1,
        "labelLimit": 240,
        "offset": 10,
    },
    "text": {"fontSize": 12, "color": f"{PREFIX}ink"},
    "range": {"category": [f"{PREFIX}other"]},
}

_ROLES = ("qkv", "o", "fc1", "fc2")
_ARMS = ("bf16", "w4a16", "w16a4", "w4a4", "planned")


def role_color(role: str) -> str:
    """Return the color name of a role."""
    return PREFIX + (role if role in _ROLES else "other")


def arm_color(arm: str) -> str:
    """Return the color name of an arm; the plan's single-operand arms share those of 4 bits."""
    twin = {"planned-weights": "w4a16", "planned-inputs": "w16a4"}.get(arm, arm)
    return PREFIX + (twin if twin in _ARMS else "other")


def format_colors(formats: Sequence[str]) -> dict[str, str]:
    """Return a color name per format: neutral up to 4 bits, the accent up to 8, dark above."""
    colors: dict[str, str] = {}
    seen: dict[str, int] = {}
    for name in sorted(formats, key=lambda name: (parse_format(name).bits, name)):
        base = _bits_class(parse_format(name))
        shade = seen.get(base, 0) % 3 + 1 if base != "full" else 1
        seen[base] = seen.get(base, 0) + 1
        colors[name] = f"{PREFIX}{base}{shade if shade > 1 else ''}"
    return colors


def _bits_class(number_format: Format) -> str:
    return "low" if number_format.bits <= 4 else "eight" if number_format.bits <= 8 else "full"


def text_on(number_format: str) -> str:
    """Return the color name of text that is read on a format's color."""
    return f"{PREFIX}on_{_bits_class(parse_format(number_format))}"


def resolve(spec: Any, palette: Mapping[str, str]) -> Any:
    """Return a copy of a chart with its color names filled in; data values stay untouched."""
    if isinstance(spec, Mapping):
        return {
            key: copy.deepcopy(value) if key in ("datasets", "data") else resolve(value, palette)
            for key, value in spec.items()
        }
    if isinstance(spec, list):
        return [resolve(value, palette) for value in spec]
    if isinstance(spec, str) and spec.startswith(PREFIX):
        return palette[spec.removeprefix(PREFIX)]
    return spec
