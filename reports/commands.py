"""The commands that make a run again, spelled from the options its manifest recorded.

Only what differs from the defaults is spelled; an option this version does not know is kept in a
comment, never dropped. So is that a plan stands on what plans before it have trained, of which the
manifest keeps the results and not the options.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from bitplan.options import PlanOptions, ProfileOptions, VerifyOptions, spell
from bitplan.tables import TRAINED

_HASH = re.compile(r"[0-9a-f]{16,}")
STAGES: dict[str, type] = {
    "profile": ProfileOptions,
    "plan": PlanOptions,
    "verify": VerifyOptions,
}


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
    known = {f.name for f in fields(options)}
    words = ["bitplan", stage]
    words += [str(given.get("model", "MODEL")), "-o", run] if stage == "profile" else [run]
    words += spell(options, {name: v for name, v in given.items() if name != "model"})
    unknown = sorted(name for name in set(given) - known if not _is_hash(name, given[name]))
    notes = [f"and {', '.join(unknown)}"] if unknown else []
    if TRAINED.file in (given.get("inputs") or ()):
        notes.append(
            f"from {TRAINED.file}: other plans of this run were planned and verified first"
        )
    return "  # ".join([shlex.join(words), *notes])


def _is_hash(name: str, value: Any) -> bool:
    """Whether a recorded key is no option but identifies what the stage read."""
    if isinstance(value, Mapping) or name.endswith("hash"):
        return True
    return isinstance(value, str) and _HASH.fullmatch(value) is not None
