r"""What other libraries can run, as a table; their rules as constraints on pairs of formats.

A target is a row: the (weight, input) pairs it runs, each pattern matched against a format's
spelling, how it stores them, and which roles it quantizes at all. Beyond the table: every group of
elements that shares a scale must divide the row, linears that run fused must agree in both formats,
and experts kept as one parameter have no names of their own to configure. Where bitplan and a
target round a value differently (the divisor of AbsMax, the tie), the target's own rounding holds.

Sources, with the versions that they were read at:
    vLLM 0.33.0         compressed_tensors.py `_get_scheme_from_parts`, schemes/, humming/schema.py
    compressed-tensors  0.20.0 quant_scheme.py, quant_args.py
    llm-compressor      0.14.0.1 QuantizationModifier
    torchao             0.18.0 quant_api.py, qat/
    ModelOpt            nvidia-modelopt 0.47.0 quantization/config.py
    AutoRound           auto-round 0.16.1 schemes.py
    llama.cpp           b11434 tools/quantize, src/llama-quant.cpp
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from bitplan.errors import PlanError
from bitplan.formats import BF16, Format
from bitplan.planner.layers import Group, Layer
from bitplan.sites import PLANNED_ROLES

ANY_INT = r"int[2-8]-(?:g\d+|channel)"
TOKEN_INT = r"int[48]-token"
LINEARS = (*PLANNED_ROLES, "lm_head", "other")
PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
# Families whose linears are Conv1D modules, [in_features, out_features].
CONV1D = ("gpt2", "openai-gpt")
SHOWN = 3


class Shape(Protocol):
    """What the rules need to know of a linear."""

    @property
    def role(self) -> str: ...  # noqa: D102
    @property
    def expert(self) -> int | None: ...  # noqa: D102
    @property
    def in_features(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Scheme:
    """Pairs that a target runs alike: patterns of the weight's and the input's format."""

    weight: str
    input: str
    storage: str = ""
    """How the target keeps the weights, in its own words, where its file says so."""
    runs_as: str = ""
    """The target's name for it."""

    def takes(self, weight: Format, input_: Format) -> bool:
        """Whether the pair is one of these."""
        pairs = ((self.weight, weight), (self.input, input_))
        return all(re.fullmatch(pattern, str(found)) for pattern, found in pairs)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A library, the pairs it runs, and what to know before using it."""

    name: str
    library: str
    schemes: tuple[Scheme, ...]
    formats: tuple[str, ...]
    """Formats to profile with for a plan that mixes 4 and 8 bits here."""
    fuses: bool = False
    """Whether linears that bitplan plans together must agree for it to run right."""
    roles: tuple[str, ...] = LINEARS
    conv1d: bool = False
    """Whether it is known to take the families in CONV1D."""
    names_all: bool = False
    """Whether it quantizes what its file does not name."""
    notes: tuple[str, ...] = ()
    checked: str
    """What the tests compare, in the library itself."""

    def scheme(self, weight: Format, input_: Format) -> Scheme | None:
        """Return the scheme of a pair of formats, or None where there is none."""
        return next((s for s in self.schemes if s.takes(weight, input_)), None)

    def objection(self, linear: Shape, weight: Format, input_: Format) -> str | None:
        """Say why the target cannot run a linear so, or return None."""
        plain = not (weight.is_quantized or input_.is_quantized)
        if plain and (linear.expert is None or not self.names_all):
            return None
        if linear.expert is not None:
            return "experts of a layer are one parameter, without names to configure"
        if linear.role not in self.roles:
            return f"role {linear.role} is not quantized there"
        if self.scheme(weight, input_) is None:
            return f"{weight} weights with {input_} inputs"
        for size in (weight.group_size, input_.group_size):
            if size is not None and linear.in_features % size:
                return f"groups of {size} do not divide rows of {linear.in_features}"
        return None

    def objections(self, layers: Sequence[Layer]) -> dict[str, list[str]]:
        """Return what the target cannot run of a plan: reason to modules; empty: it runs it all."""
        out: dict[str, list[str]] = defaultdict(list)
        for layer in layers:
            if reason := self.objection(layer, layer.weight, layer.input):
                out[reason].append(layer.module)
        fused: dict[str, list[Layer]] = defaultdict(list)
        for layer in layers:
            if self.fuses and layer.fused is not None:
                fused[layer.fused].append(layer)
        for members in fused.values():
            if len({(m.weight, m.input) for m in members}) > 1:
                out["linears that run fused differ"].extend(m.module for m in members)
        return dict(out)

    def plain(self, layers: Sequence[Layer]) -> list[str]:
        """Return the modules that the plan leaves alone and that the target has to be told of."""
        return [
            layer.module
            for layer in layers
            if layer.is_plain
            and layer.expert is None
            and (layer.role != "embed" or "embed" in self.roles)
        ]

    def groups(self, layers: Sequence[Layer]) -> list[Group]:
        """Return the quantized layers by pair of formats, in the order of the model."""
        found: dict[tuple[Format, Format], list[str]] = defaultdict(list)
        for layer in layers:
            if not layer.is_plain:
                found[layer.weight, layer.input].append(layer.module)
        schemes = {pair: self.scheme(*pair) for pair in found}
        return [
            Group(
                weight=weight,
                input=input_,
                storage=scheme.storage if (scheme := schemes[weight, input_]) else "",
                modules=tuple(modules),
            )
            for (weight, input_), modules in found.items()
        ]


# Order matters: the first row that takes a pair says how it is stored.
COMPRESSED = (
    Scheme("int8-channel", "int8-token", INT, "W8A8Int8"),
    Scheme(ANY_INT, r"int4-(?:token|g\d+)", PACKED, "WNA4Int"),
    Scheme(ANY_INT, r"int8-(?:token|g\d+)", PACKED, "WNA8Int"),
    Scheme(ANY_INT, "bf16", PACKED, "WNA16"),
    Scheme("fp8-e4m3", "fp8-e4m3", FLOAT, "W8A8Fp8"),
    Scheme("nvfp4", "nvfp4|bf16", NVFP4, "W4A4Fp4"),
    Scheme("mxfp4", "mxfp4", MXFP4, "W4A4Mxfp4"),
    Scheme("mxfp4", "fp8-e4m3", MXFP4, "W4A8Mxfp4"),
)
COMPRESSED_FORMATS = ("int4-g32", "int4-token", "int8-token")
NO_NVFP4_MIX = (
    "8-bit inputs beside 4-bit ones: as integers (int4-token and int8-token, or groups) or with "
    "MXFP4 weights (mxfp4 and fp8-e4m3 inputs), not as NVFP4: its weights take NVFP4 inputs or none"
)
TARGETS = {
    target.name: target
    for target in (
        Target(
            name="vllm",
            library="vLLM 0.33.0",
            schemes=COMPRESSED,
            formats=COMPRESSED_FORMATS,
            fuses=True,
            notes=(
                NO_NVFP4_MIX,
                "read in its source, not run: of the packed integer schemes only the Humming "
                "kernels (--linear-backend humming) quantize inputs, 4-bit ones to 8 bits or more "
                "from compute capability 9.0 on, 8-bit ones not at all beside weights in groups "
                "(beside int4-channel they do); int8-channel with int8-token runs at 8 bits",
                "MXFP4 inputs run at 4 bits on compute capability 10.0 and at 16 elsewhere; "
                "fp8-e4m3 inputs fall back to that, with a warning, where no kernel takes them",
            ),
            checked="a transcription of its predicates, on the file; not vLLM itself",
        ),
        Target(
            name="compressed-tensors",
            library="compressed-tensors 0.20.0",
            schemes=(*COMPRESSED, Scheme("fp8-e4m3", "bf16", FLOAT)),
            formats=COMPRESSED_FORMATS,
            notes=(NO_NVFP4_MIX,),
            checked="`quantization_scheme` of every module after `apply_quantization_config`",
        ),
        Target(
            name="llm-compressor",
            library="llm-compressor 0.14.0.1",
            schemes=COMPRESSED,
            formats=COMPRESSED_FORMATS,
            fuses=True,
            notes=(NO_NVFP4_MIX, "give `oneshot` a directory, not a model in memory"),
            checked="scheme and storage of every module, saved and loaded again, errors",
        ),
        Target(
            name="torchao",
            library="torchao 0.18.0",
            schemes=(
                Scheme(ANY_INT, "int8-token", runs_as="Int8DynamicActivationIntxWeightConfig"),
                Scheme(ANY_INT, "bf16", runs_as="IntxWeightOnlyConfig"),
            ),
            formats=("int4-g32", "int8-g32", "int8-token"),
            notes=(
                "inputs of 4 bits exist in training only: target torchao-qat",
                "8-bit inputs have a zero point there, which can only make them finer",
            ),
            checked="type of every quantized weight after `quantize_`, the JSON round trip, errors",
        ),
        Target(
            name="torchao-qat",
            library="torchao 0.18.0",
            schemes=(Scheme(ANY_INT, rf"{TOKEN_INT}|bf16", runs_as="QATConfig"),),
            formats=("int4-g32", "int4-token", "int8-token"),
            notes=(
                "fake quantization for training; what it runs afterwards is target torchao",
                "inputs have a zero point there, which can only make them finer",
            ),
            checked="both fake quantizers of every module, a backward pass, errors",
        ),
        Target(
            name="modelopt",
            library="nvidia-modelopt 0.47.0",
            schemes=(
                Scheme(rf"{ANY_INT}|fp8-e4m3|bf16", rf"{TOKEN_INT}|fp8-e4m3|bf16"),
                Scheme("nvfp4|mxfp4", r"nvfp4|mxfp4|fp8-e4m3|bf16"),
            ),
            formats=("int4-g32", "int4-token", "int8-token"),
            notes=("NVFP4 and MXFP4 are simulated on CUDA only",),
            checked="both quantizers of every module, a backward pass, errors",
        ),
        Target(
            name="autoround",
            library="auto-round 0.16.1",
            schemes=(
                Scheme(ANY_INT, r"int[48]-(?:token|g\d+)|bf16"),
                Scheme("mxfp4", "mxfp4|bf16"),
            ),
            formats=("int4-g32", "int4-token", "int8-token"),
            names_all=True,
            notes=("keep the `__main__` guard: AutoRound starts a process",),
            checked="`layer_config` as it gives it back, every module's attributes, errors",
        ),
        Target(
            name="llama.cpp",
            library="llama.cpp b11434",
            schemes=(
                Scheme("int4-g32", "bf16", "q4_0"),
                Scheme("int5-g32", "bf16", "q5_0"),
                Scheme("int8-g32", "bf16", "q8_0"),
                Scheme("mxfp4", "bf16", "mxfp4"),
            ),
            formats=("int4-g32", "int5-g32", "int8-g32", "bf16"),
            roles=(*LINEARS, "embed"),
            conv1d=True,
            names_all=True,
            notes=("weights only: the inputs' width is the kernel's own; plan them as bf16",),
            checked="types of every tensor in the file that `llama-quantize` wrote",
        ),
    )
}


def find_target(name: str) -> Target:
    """Return the target of a name; raise PlanError for an unknown one."""
    if name not in TARGETS:
        raise PlanError(f"unknown target {name!r}: the targets are {', '.join(TARGETS)}")
    return TARGETS[name]


def check_family(target: Target, family: str | None) -> None:
    """Raise PlanError for a family of models whose linears the target would pass over."""
    if family in CONV1D and not target.conv1d:
        others = ", ".join(t.name for t in TARGETS.values() if t.conv1d)
        raise PlanError(
            f"{target.name} ({target.library}) is not known to quantize the Conv1D modules of "
            f"{family}: plan for {others}, or without --target"
        )


def check_formats(target: Target, formats: Iterable[Format], *, inputs: bool = True) -> None:
    """Raise PlanError where no pair of the formats is one that the target runs.

    `inputs`: whether inputs were profiled; where not, they are bf16.
    """
    formats = tuple(formats)
    weights = [f for f in formats if f.applies_to("weight")]
    others = [f for f in formats if f.applies_to("input")] if inputs else [BF16]
    if any(target.scheme(w, i) for w in weights for i in others):
        return
    raise PlanError(
        f"{target.name} ({target.library}) runs no pair of {', '.join(map(str, formats))}: "
        f"profile and plan with formats it has, e.g. --formats {','.join(target.formats)}"
    )


def some(modules: Sequence[str]) -> str:
    """Name a few modules and count the rest."""
    more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
    return ", ".join(modules[:SHOWN]) + more
