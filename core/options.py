"""What each stage can be asked for: frozen options with defaults, read by the CLI and by code.

No stage imports happen here, so that the CLI can show defaults without torch. `spell` is the way
back, from options to what one would type for them.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from bitplan.formats import DEFAULT_HIGH, DEFAULT_LOW

DEFAULT_FORMATS = (DEFAULT_LOW, DEFAULT_HIGH)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """How to profile a checkpoint."""

    model: str
    """Hugging Face directory or hub name, GGUF file, or (weights only) safetensors file."""
    data: tuple[str, ...] = ()
    """Text, tables or data sets (probe/documents.py); empty: Python's standard library."""
    tokens: int = 16_384
    """Calibration tokens to run."""
    seq_len: int = 512
    """Tokens per sequence."""
    formats: tuple[str, ...] = DEFAULT_FORMATS
    """Candidate formats whose error and sensitivity are recorded."""
    weights_only: bool = False
    """Stream the weights alone: no model code, no text, no inputs."""
    stream: bool | None = None
    """Run the model block by block, not loaded whole; None: where it does not fit in memory."""
    sensitivity: bool = True
    """Estimate the change of loss per (site, format) from backward passes."""
    interventions: int | Literal["all"] = 0
    """Measure these many of the least certain estimates, a forward pass over all tokens each."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto (cuda where there is one)."""
    seed: int = 0
    """Chooses the calibration text."""
    trust_remote_code: bool = False
    """Let the checkpoint's own Python code run."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan may cost and must respect."""

    input_bits: float | None = None
    """Average effective bits of the inputs, weighted by multiply-accumulates."""
    weight_bits: float | None = None
    """Average effective bits of the weights."""
    bit_ops: float | None = None
    """Bit operations per token: multiply-accumulates times both operands' bits."""
    bytes: float | None = None
    """Bytes of the planned weights, scales included."""
    time: str | None = None
    """DEVICE=MS: time of a forward pass over 4,096 tokens at the device's published rates."""
    rule: str | None = None
    """Take a rule's plan (fc2, uniform, ...) in place of the optimum."""
    converge: bool = False
    """Find the cheapest inputs whose predicted error equals that of the weights."""
    pins: tuple[str, ...] = ()
    """GLOB=FORMAT over site or module names."""
    shares: tuple[str, ...] = ()
    """GLOB=FORMAT>=X or <=X: at least or at most a share X of the sites takes the format."""
    formats: tuple[str, ...] = DEFAULT_FORMATS
    """Formats the planner may choose from; int4-g* stands for every group size."""
    per_role: bool = False
    """One format per role and operand."""
    quantizers: tuple[str, ...] = ()
    """GLOB=NAME: how training rounds; default: lac for inputs of groups from 256 on."""
    measure: int = 0
    """Measure the plan whole, and at most these many plans to refine it; 0: predict alone."""
    tokens: float | None = None
    """Training tokens to come: predictions are brought to the scaling law's forecast for them."""
    params: float | None = None
    """Non-embedding parameters for that forecast; None: the checkpoint's."""
    law: str | None = None
    """For that forecast: a law's name or file; None: the shipped one fitted nearest to N and D."""
    target: str | None = None
    """A library that has to run the plan: its pairs of formats only."""

    DEFAULT_MEASURE = 16


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """How long, how often and on what the arms are trained."""

    steps: int | None = None
    """Optimizer steps per arm; default from `tokens`."""
    tokens: int | None = None
    """Training tokens per arm; default DEFAULT_TOKENS."""
    seeds: int = 5
    """Seeds per arm; each fixes one data order, shared by all arms."""
    until_settled: bool = False
    """From the third seed on, stop as soon as the verdict is settled; `seeds` are the most."""
    confidence: float = 0.95
    """Of the intervals, and of the verdict they give."""
    batch_size: int = 8
    """Sequences per optimizer step."""
    accumulate: int = 1
    """Parts that the sequences of a step pass through the model in, one by one."""
    seq_len: int = 256
    """Tokens per sequence."""
    eval_tokens: int = 24_576
    """Held-out tokens that final losses are measured on."""
    lr: float | None = None
    """Peak learning rate; default DEFAULT_LR, or SCRATCH_LR from scratch."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """How the rate falls: along a cosine, or held at the peak and then down in the last fifth."""
    average_tail: float = 0.0
    """Share of the steps, the last ones, over which the weights that are judged are averaged."""
    compiled: bool = False
    """Compile the model's blocks and replay steps as a CUDA graph: one GPU to a training."""
    from_scratch: str | None = None
    """A config.json or its directory: arms start from its random weights, not the checkpoint."""
    data: tuple[str, ...] = ()
    """Text, tables or data sets (probe/documents.py); empty: Python's standard library."""
    arms: tuple[str, ...] = ()
    """Arms to train; empty: all."""
    attribute: bool = False
    """Train an arm for each role and operand at 8 bits, the rest at 4: what each one costs."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    gpus: int | None = None
    """GPUs to train on, an arm at a time on each."""
    workers: int | None = None
    """Arms trained side by side on each device; None: one."""
    seed: int = 0
    """First seed."""
    trust_remote_code: bool = False
    """Let the checkpoint's own Python code run."""

    DEFAULT_TOKENS = 20_480
    DEFAULT_LR = 1e-4
    SCRATCH_LR = 1.5e-3


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Where the cells of a grid are trained, and how many at once."""

    device: str = "auto"
    """cpu, cuda, cuda:1 or auto."""
    gpus: int | None = None
    """GPUs to train on."""
    workers: int | None = None
    """Trainings side by side on each device; None: one."""
    ray: str | None = None
    """Address of a Ray cluster to train on, or `local` for one of this machine."""
    dry_run: bool = False
    """Say what there is to train, and train nothing."""


# Options given once per value, and what says no to one that is on by default or decided later.
_REPEATED = {"data": "--data", "pins": "--pin", "shares": "--share", "quantizers": "--quantizer"}
_OFF = {"sensitivity": "--no-sensitivity", "stream": "--no-stream"}


def spell(options: type, given: Mapping[str, Any]) -> list[str]:
    """Return the words that ask a command for these options, those that differ from the defaults.

    given: names to values, as a manifest keeps them; what is no field of `options` is passed over.
    """
    defaults = {f.name: () if f.default is MISSING else f.default for f in fields(options)}
    words = []
    for name, value in given.items():
        if name in defaults and _plain(value) != defaults[name]:
            words += _spell(name, value)
    return words


def _plain(value: Any) -> Any:
    """Return lists, which is how JSON keeps them, as the tuples that options are."""
    return tuple(value) if isinstance(value, list) else value


def _spell(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if name in _REPEATED:
        return [word for item in value for word in (_REPEATED[name], str(item))]
    if isinstance(value, bool):
        return [flag] if value else [_OFF[name]] if name in _OFF else []
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]
