"""`bitplan export`: the plan as files that another library loads.

What the target cannot run is refused, with the linears and the nearest plan that it can: the best
one under the same budgets among the profiled formats, solved with the target's rules as
constraints. Nothing is approximated in silence.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from bitplan.errors import BitplanError, PlanError
from bitplan.formats import BF16, parse_formats
from bitplan.options import PlanOptions, spell
from bitplan.planner.constrain import listed
from bitplan.planner.export_autoround import autoround
from bitplan.planner.export_compressed import compressed_tensors, llm_compressor, vllm
from bitplan.planner.export_llamacpp import llama_cpp
from bitplan.planner.export_modelopt import modelopt
from bitplan.planner.export_torchao import torchao, torchao_qat
from bitplan.planner.layers import Group, Layer
from bitplan.planner.plan import Plan, read_plan
from bitplan.planner.quantizers import HADAMARD
from bitplan.planner.stage import plan_of
from bitplan.planner.targets import Target, check_family, find_target, some
from bitplan.rundir import RunDir, write_all
from bitplan.tables import ERRORS, PROFILE

EXPORT_DIR = "export"
Writer = Callable[[Sequence[Group], Sequence[str], str], dict[str, str]]
WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "vllm": vllm,
        "compressed-tensors": compressed_tensors,
        "llm-compressor": llm_compressor,
        "torchao": torchao,
        "torchao-qat": torchao_qat,
        "modelopt": modelopt,
        "autoround": autoround,
        "llama.cpp": llama_cpp,
    }
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, for which target, and what to know about it."""

    target: Target
    plan_id: str
    groups: tuple[Group, ...]
    plain: int
    files: tuple[Path, ...]

    def as_text(self) -> str:
        """Return a line per pair of formats, the target's notes, and the files."""
        rows = [
            f"{len(g.modules):6} linears: {g.weight} weights, {g.input} inputs" for g in self.groups
        ]
        notes = [f"note: {note}" for note in self.target.notes]
        return "\n".join(
            [
                f"plan {self.plan_id} for {self.target.library}",
                *rows,
                f"{self.plain:6} linears: left alone",
                *notes,
                f"wrote: {', '.join(map(str, self.files))}",
                f"next: see {self.files[-1]}",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Return the same as a JSON value."""
        return {
            "target": self.target.name,
            "library": self.target.library,
            "plan_id": self.plan_id,
            "groups": [
                {"weight": str(g.weight), "input": str(g.input), "modules": list(g.modules)}
                for g in self.groups
            ],
            "notes": list(self.target.notes),
            "written": [str(path) for path in self.files],
        }


def export_plan(run: Path, name: str, output: Path | None = None) -> Exported:
    """Write RUN's plan for a target into `output`, by default RUN/export/TARGET.

    Raises RunError for a run without a plan, and PlanError for a plan that the target cannot run or
    that is of another checkpoint. Nothing is written then.
    """
    target = find_target(name)
    directory = RunDir.open(run)
    with directory.lock():
        check_family(target, directory.manifest.get("model", {}).get("family"))
        plan = read_plan(directory)
        if rotated := [site for site, q in plan.quantizers.items() if q == HADAMARD]:
            raise PlanError(
                f"{target.name} ({target.library}) cannot run this plan: {len(rotated)} sites are "
                f"rotated ({HADAMARD}), {rotated[0]} first, and no target has a place for the "
                "transform of the input; plan again without that --quantizer"
            )
        layers = read_layers(plan, directory.read_table(PROFILE.file))
        if found := target.objections(layers):
            raise PlanError(
                f"{target.name} ({target.library}) cannot run this plan: {listed(found)}; "
                f"{_nearest(directory, target)}"
            )
        groups, plain = target.groups(layers), target.plain(layers)
        files = WRITERS[name](groups, plain, _head(plan, target))
        place = output or directory.path / EXPORT_DIR / name
        contents = {place / file: text.encode() for file, text in sorted(files.items())}
        write_all(
            {
                path: lambda file, content=content: file.write(content)  # type: ignore[misc]
                for path, content in contents.items()
            }
        )
    return Exported(
        target=target,
        plan_id=plan.plan_id,
        groups=tuple(groups),
        plain=len(plain),
        files=tuple(contents),
    )


def read_layers(plan: Plan, profile: pl.DataFrame) -> list[Layer]:
    """Return the plan's linears with the shapes of the profile it was made from.

    Raises PlanError where the two name different sites.
    """
    rows = profile.filter(pl.col("step") == 0).unique("site", keep="first", maintain_order=True)
    plan.check_sites(rows["site"])
    names = ["module", "role", "fused", "expert", "in_features"]
    formats = plan.assignment
    return [
        Layer(
            **row,
            weight=formats.get(f"{row['module']}:weight", BF16),
            input=formats.get(f"{row['module']}:input", BF16),
        )
        for row in rows.unique("module", keep="first", maintain_order=True)
        .select(names)
        .iter_rows(named=True)
    ]


def _head(plan: Plan, target: Target) -> str:
    lines = [f"Plan {plan.plan_id} of bitplan, for {target.library}.", *target.notes]
    return "".join(f"# {line}\n" for line in lines)


def _nearest(directory: RunDir, target: Target) -> str:
    """Name the command that makes the nearest plan which the target runs, and what it changes."""
    now = read_plan(directory).assignment
    asked = replace(_options_of(directory), target=target.name, rule=None, converge=False)
    refused = ""
    for formats in _menus(directory, asked, target):
        options = replace(asked, formats=formats)
        words = ["bitplan", "plan", str(directory.path), *spell(PlanOptions, asdict(options))]
        command = f"`{shlex.join(words)}`"
        try:
            nearest, _ = plan_of(directory, options)
        except BitplanError as error:
            refused = refused or f"nor is there a plan that it can, by {command}: {error}"
            continue
        changed = [site for site, fmt in nearest.assignment.items() if fmt != now[site]]
        left_alone = str(BF16) in formats and str(BF16) not in target.formats
        more = f"; for narrower inputs profile with --formats {','.join(target.formats)}"
        return (
            f"the nearest plan it can: {command}, which changes {len(changed)} of {len(now)} sites "
            f"({some(changed)}){more if left_alone else ''}"
        )
    return refused


def _menus(directory: RunDir, asked: PlanOptions, target: Target) -> list[tuple[str, ...]]:
    """Return candidate formats to plan with, nearest to the plan's own first, bf16 last."""
    profiled = parse_formats(directory.read_table(ERRORS.file)["format"].to_list())
    known = (*profiled, BF16)
    usable = [f for f in profiled if any(target.scheme(f, i) or target.scheme(i, f) for i in known)]
    own = [f for f in usable if str(f) in asked.formats]
    # Formats of one operand alone leave the other operand's menu as it was.
    one_sided = [f for f in usable if not (f.applies_to("weight") and f.applies_to("input"))]
    menus = (own, own + one_sided, usable)
    return [
        tuple(dict.fromkeys(map(str, (*menu, *more))))
        for more in ((), (BF16,))
        for menu in menus
        if menu
    ]


def _options_of(directory: RunDir) -> PlanOptions:
    """Return the options that the run's plan was made with."""
    asked: dict[str, Any] = directory.manifest["stages"]["plan"]["options"]
    names = [field.name for field in fields(PlanOptions) if field.name in asked]
    lists = {name: tuple(asked[name]) for name in names if isinstance(asked[name], list)}
    return PlanOptions(**{**{name: asked[name] for name in names}, **lists})
