"""The commands that make a run again, spelled from the options its manifest recorded.

Only what differs from the defaults is spelled; an option this version does not know is kept in a
comment, never dropped.
"""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from bitplan.options import PlanOptions, ProfileOptions, VerifyOptions

STAGES: dict[str, type] = {
    "profile": ProfileOptions,
    "plan": PlanOptions,
    "verify": VerifyOptions,
}
_REPEATED = {"data": "--data", "pins": "--pin", "quantizers": "--quantizer"}
_OFF = {"sensitivity": "--no-sensitivity"}


def reproduce(manifest: Mapping[str, Any], run: str) -> list[str]:
    """Return one command a stage that the manifest says is done, in the order of the flow."""
    stages = manifest.get("stages") or {}
    commands = [
        _command(stage, options, stages[stage].get("options") or {}, run)
        for stage, options in STAGES.items()
        if stage in stages
    ]
    return [*commands, shlex.join(["bitplan", "report", run])]


def _command(stage: str, options: type, given: Mapping[str, Any], run: str) -> str:
    known: dict[str, Field[Any]] = {f.name: f for f in fields(options)}
    words = ["bitplan", stage]
    words += [str(given.get("model", "MODEL")), "-o", run] if stage == "profile" else [run]
    for name, value in given.items():
        if name in known and name != "model" and not _is_default(known[name], value):
            words += _spell(name, value)
    unknown = sorted(name for name in set(given) - set(known) if not _is_hash(name, given[name]))
    note = f"  # and {', '.join(unknown)}" if unknown else ""
    return shlex.join(words) + note


def _is_hash(name: str, value: Any) -> bool:
    """Whether a recorded key is no option but identifies what the stage read."""
    return name.endswith("hash") or isinstance(value, Mapping)


def _is_default(option: Field[Any], value: Any) -> bool:
    default = () if option.default is MISSING else option.default
    return (tuple(value) if isinstance(value, list | tuple) else value) == default


def _spell(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name in _REPEATED:
        return [word for item in value for word in (_REPEATED[name], str(item))]
    if isinstance(value, bool):
        return [flag] if value else [_OFF[name]] if name in _OFF else []
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]
