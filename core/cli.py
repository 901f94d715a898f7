"""The command line: options to stage calls, results to stdout, errors to one line and exit codes.

Stages are imported inside their commands, so that `--help` answers without torch. Exit codes: 0
done; 1 the answer is no (verify: not converged); 2 wrong use or bad input.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from bitplan.errors import BitplanError
from bitplan.options import PlanOptions, ProfileOptions, VerifyOptions

EXIT_NO = 1
EXIT_BAD_INPUT = 2

Command = Callable[..., Any]


class _Group(click.Group):
    """A group whose commands end in one line on stderr, never a traceback, when input is bad."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BitplanError as error:
            click.echo(f"error: {' '.join(str(error).split())}", err=True)
            ctx.exit(EXIT_BAD_INPUT)
        except BrokenPipeError:
            # The reader of our stdout left (`bitplan plan RUN | head`): nothing is wrong here.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="bitplan")
def main() -> None:
    """Choose which layers of a language model need 8 bits and which take 4, and verify by training.

    \b
    bitplan demo                           all of it, on the embedded checkpoint
    bitplan profile MODEL -o RUN           measure weights, inputs and sensitivity
    bitplan plan RUN --input-bits 5        choose formats under a budget
    bitplan verify RUN                     train the arms: do the errors converge?
    bitplan report RUN                     one HTML file
    bitplan export RUN --to TARGET         the plan as files that another library loads
    bitplan law predict ...                forecast the cost of a training
    """


def _option(options: type, name: str, *flags: str, **kwargs: Any) -> Callable[[Command], Command]:
    """Make a click option whose default is that of the field `name` of an options class."""
    default = next(field.default for field in fields(options) if field.name == name)
    return click.option(*flags, name, default=default, **kwargs)


def _comma(_ctx: click.Context, _param: click.Parameter, value: Any) -> tuple[str, ...]:
    """Split a comma-separated option; defaults come as tuples already."""
    if isinstance(value, tuple):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _count(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Return a number from 0 on, or the word `all`."""
    return value if value == "all" else click.IntRange(0).convert(value, param, ctx)


def _list_option(
    options: type, name: str, flag: str, **kwargs: Any
) -> Callable[[Command], Command]:
    """Make a comma-separated option from a tuple field of an options class."""
    default = next(field.default for field in fields(options) if field.name == name)
    assert isinstance(default, tuple)
    return click.option(
        flag, name, default=",".join(default), callback=_comma, metavar="A,B", **kwargs
    )


_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_data = click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Text file or directory; may be repeated.  [default: Python's standard library]",
)
_trust = click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint's own Python code run."
)
_RUN = click.Path(path_type=Path)


def _print(result: Any, as_json: bool) -> None:
    """Print a stage's result: its `.as_json()` for machines, its `.as_text()` for people."""
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1, allow_nan=False))
    else:
        click.echo(result.as_text())


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", "run", type=_RUN, help="Run directory to write.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Say what changed from A to B: profiled run directories, or statistics of a training as "
    "RUN/arms/ARM/seed-K@STEP.",
)
@_data
@_option(
    ProfileOptions,
    "tokens",
    "--tokens",
    type=click.IntRange(1),
    show_default=True,
    help="Calibration tokens.",
)
@_option(
    ProfileOptions,
    "seq_len",
    "--seq-len",
    type=click.IntRange(2),
    show_default=True,
    help="Tokens per sequence.",
)
@_list_option(
    ProfileOptions,
    "formats",
    "--formats",
    show_default=True,
    help="Candidate formats to measure; int4-g* is every group size.",
)
@click.option(
    "--weights-only",
    is_flag=True,
    help="Stream the weights of safetensors; no model code, no text.",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Run block by block, for models larger than memory.  [default: where it does not fit]",
)
@click.option("--no-sensitivity", is_flag=True, help="Skip the backward passes.")
@_option(
    ProfileOptions,
    "interventions",
    "--interventions",
    callback=_count,
    metavar="N|all",
    show_default=True,
    help="Measure the N least certain estimates under quantization, a pass over the tokens each.",
)
@_option(ProfileOptions, "device", "--device", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@_option(
    ProfileOptions,
    "seed",
    "--seed",
    type=int,
    show_default=True,
    help="Chooses the calibration text.",
)
@_trust
@_json
def profile(
    model: str | None,
    run: Path | None,
    compare: tuple[str, str] | None,
    no_sensitivity: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure a checkpoint: statistics of every weight and input, format errors, sensitivity.

    MODEL is a Hugging Face directory or hub name, a GGUF file, or (--weights-only) safetensors.

    Example: bitplan profile ./my-model -o run

    With --compare nothing is measured: two profiles, or two steps, are read and set side by side.

    Example: bitplan profile --compare before after
    """
    if compare is not None:
        _refuse_others("--compare", "compare", "as_json")
        from bitplan.probe.compare import compare as compare_snapshots
        from bitplan.probe.snapshot import load_snapshot

        _print(compare_snapshots(*map(load_snapshot, compare)), as_json)
        return
    if model is None or run is None:
        lacks = "MODEL" if model is None else "-o RUN"
        raise click.UsageError(f"{lacks} is missing: bitplan profile MODEL -o RUN")
    from bitplan.probe.profile import profile_checkpoint

    asked = ProfileOptions(model=model, sensitivity=not no_sensitivity, **options)
    _print(profile_checkpoint(run, asked), as_json)


def _refuse_others(flag: str, *allowed: str) -> None:
    """Raise a usage error where a parameter was given that a flag makes meaningless."""
    ctx = click.get_current_context()
    given = [
        param.human_readable_name if isinstance(param, click.Argument) else param.opts[-1]
        for param in ctx.command.params
        if param.name is not None
        and param.name not in allowed
        and ctx.get_parameter_source(param.name) == click.core.ParameterSource.COMMANDLINE
    ]
    if given:
        raise click.UsageError(f"{flag} goes without {', '.join(given)}")


@main.command()
@click.argument("run", type=_RUN, required=False)
@_option(
    PlanOptions, "input_bits", "--input-bits", type=float, help="Average bits of inputs, by MACs."
)
@_option(PlanOptions, "weight_bits", "--weight-bits", type=float, help="Average bits of weights.")
@_option(PlanOptions, "bit_ops", "--bit-ops", type=float, help="Bit operations per token.")
@_option(PlanOptions, "bytes", "--bytes", type=float, help="Bytes of the planned weights.")
@_option(
    PlanOptions,
    "time",
    "--time",
    metavar="DEVICE=MS",
    help="Matmul time on a device, e.g. H200=3.5.",
)
@_option(PlanOptions, "rule", "--rule", metavar="NAME", help="Take a rule's plan, e.g. fc2.")
@click.option(
    "--converge", is_flag=True, help="Cheapest inputs whose predicted error is the weights'."
)
@click.option(
    "--pin", "pins", multiple=True, metavar="GLOB=FORMAT", help="Fix sites, e.g. '*.0.*=int8-g128'."
)
@click.option(
    "--share",
    "shares",
    multiple=True,
    metavar="GLOB=FORMAT>=X",
    help="At least (>=) or at most (<=) a share of some sites, e.g. 'fc2:input=int8-g128>=0.5'.",
)
@_list_option(
    PlanOptions,
    "formats",
    "--formats",
    show_default=True,
    help="Formats to choose from; int4-g* is every group size.",
)
@click.option("--per-role", is_flag=True, help="One format per role and operand.")
@click.option(
    "--quantizer",
    "quantizers",
    multiple=True,
    metavar="GLOB=NAME",
    help="Train scales: lwc, lsq (weights), lac (inputs) or absmax.  [default: lac for inputs "
    "from 256 elements a scale on]",
)
@_option(
    PlanOptions,
    "measure",
    "--measure",
    is_flag=False,
    flag_value=PlanOptions.DEFAULT_MEASURE,
    type=click.IntRange(0),
    metavar="[N]",
    help="Measure the plan whole on the profile's text, and refine it with at most N plans.  "
    f"[default N: {PlanOptions.DEFAULT_MEASURE}]",
)
@_option(
    PlanOptions,
    "tokens",
    "--tokens",
    type=float,
    help="Tokens of the training to come, e.g. 100e9: plan for what the scaling law leaves of the "
    "losses, and say where the next bit should go.",
)
@_option(
    PlanOptions,
    "params",
    "--params",
    type=float,
    help="Non-embedding parameters, with --tokens.  [default: the checkpoint's]",
)
@_option(
    PlanOptions,
    "law",
    "--law",
    metavar="FILE",
    help="A law that `law fit` wrote, with --tokens.  [default: the paper's]",
)
@click.option(
    "--explain",
    metavar="GLOB",
    help="Only tell why sites of RUN's plan have their formats, e.g. 'fc2:input'.",
)
@click.option(
    "--diff",
    nargs=2,
    type=_RUN,
    metavar="A B",
    help="Only tell what changed between two plans: run directories or plan.json files.",
)
@_option(
    PlanOptions,
    "target",
    "--target",
    metavar="NAME",
    help="Plan what a library runs: vllm, torchao, ... (names as for export --to).",
)
@_json
def plan(
    run: Path | None,
    explain: str | None,
    diff: tuple[Path, Path] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose a format for every site under a budget, with a reason for each.

    Budgets count scales: int4-g128 is 4.125 bits. Several budgets hold together. Without one, the
    plan may spend the input bits that the paper's rule (every FC2 input at 8 bits) spends.

    Example: bitplan plan run --input-bits 5

    With --explain or --diff nothing is planned or written.

    Example: bitplan plan run --explain 'fc2:input'

    Example: bitplan plan --diff run other-run
    """
    if diff is not None:
        _refuse_others("--diff", "diff", "as_json")
        from bitplan.planner.diff import diff_plans

        _print(diff_plans(*diff), as_json)
        return
    if run is None:
        raise click.UsageError("RUN is missing: bitplan plan RUN")
    if explain is not None:
        _refuse_others("--explain", "explain", "run", "as_json")
        from bitplan.planner.explain import explain_sites

        _print(explain_sites(run, explain), as_json)
        return
    asked = PlanOptions(**options)
    if asked.measure:
        from bitplan.qat.measure import make_measured_plan

        _print(make_measured_plan(run, asked), as_json)
        return
    from bitplan.planner.stage import make_plan

    _print(make_plan(run, asked), as_json)


@main.command()
@click.argument("run", type=_RUN)
@_option(VerifyOptions, "steps", "--steps", type=click.IntRange(1), help="Optimizer steps per arm.")
@_option(
    VerifyOptions,
    "tokens",
    "--tokens",
    type=click.IntRange(1),
    help=f"Training tokens per arm.  [default: {VerifyOptions.DEFAULT_TOKENS}]",
)
@_option(
    VerifyOptions,
    "seeds",
    "--seeds",
    type=click.IntRange(1),
    show_default=True,
    help="Seeds per arm.",
)
@_option(
    VerifyOptions,
    "batch_size",
    "--batch-size",
    type=click.IntRange(1),
    show_default=True,
    help="Sequences per step.",
)
@_option(
    VerifyOptions,
    "seq_len",
    "--seq-len",
    type=click.IntRange(2),
    show_default=True,
    help="Tokens per sequence.",
)
@_option(
    VerifyOptions,
    "eval_tokens",
    "--eval-tokens",
    type=click.IntRange(1),
    show_default=True,
    help="Held-out tokens.",
)
@_option(
    VerifyOptions,
    "lr",
    "--lr",
    type=float,
    help=f"Peak learning rate.  [default: {VerifyOptions.DEFAULT_LR:g}; "
    f"{VerifyOptions.SCRATCH_LR:g} from scratch]",
)
@_option(
    VerifyOptions,
    "schedule",
    "--schedule",
    type=click.Choice(["cosine", "wsd"]),
    show_default=True,
    help="How the rate falls; wsd: warmup, stable, decay.",
)
@_option(
    VerifyOptions,
    "from_scratch",
    "--from-scratch",
    metavar="CONFIG",
    help="Start from random weights of this config.json (or its directory), not the checkpoint.",
)
@_data
@_list_option(VerifyOptions, "arms", "--arms", help="Arms to train.  [default: all]")
@click.option(
    "--attribute",
    is_flag=True,
    help="Also train w4a4 with each role's inputs, and weights, at 8 bits.",
)
@_option(VerifyOptions, "device", "--device", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@_option(
    VerifyOptions,
    "gpus",
    "--gpus",
    type=click.IntRange(1),
    help="Train on this many GPUs, an arm on each.",
)
@_option(
    VerifyOptions,
    "workers",
    "--workers",
    type=click.IntRange(1),
    help="Arms side by side on each device.  [default: 1]",
)
@_option(VerifyOptions, "seed", "--seed", type=int, show_default=True, help="First seed.")
@_trust
@_json
def verify(run: Path, as_json: bool, **options: Any) -> None:
    """Train the plan's arms from the checkpoint and say whether the errors converge.

    Exit code 1 means the answer is no (activation-limited, weight-limited or undetermined).
    A killed verify continues where it stopped when it is called again.

    Example: bitplan verify run --tokens 65536 --seeds 3
    """
    from bitplan.qat.verify import verify_plan

    verdict = verify_plan(run, VerifyOptions(**options))
    _print(verdict, as_json)
    if verdict.verdict != "converged":
        raise click.exceptions.Exit(EXIT_NO)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=_RUN)
@click.option("-o", "--output", type=_RUN, help="HTML file.  [default: RUN/report.html]")
@_json
def report(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Render run directories as one self-contained HTML file.

    Example: bitplan report run
    """
    from bitplan.reports.report import write_report

    _print(write_report(list(runs), output), as_json)


@main.command()
@click.argument("run", type=_RUN)
@click.option("--to", "target", required=True, metavar="TARGET", help="What is to load the plan.")
@click.option("-o", "--output", type=_RUN, help="Directory.  [default: RUN/export/TARGET]")
@_json
def export(run: Path, target: str, output: Path | None, as_json: bool) -> None:
    """Write the plan as files that another library loads, or say what it cannot run.

    TARGET is vllm, compressed-tensors, llm-compressor, torchao, torchao-qat, modelopt, autoround or
    llama.cpp. A plan that it cannot run is refused, with the nearest one that it can.

    Example: bitplan export run --to vllm
    """
    from bitplan.planner.export import export_plan

    _print(export_plan(run, target, output), as_json)


@main.command()
@click.option(
    "-o",
    "--output",
    "run",
    type=_RUN,
    default=Path("bitplan-demo"),
    show_default=True,
    help="Run directory.",
)
def demo(run: Path) -> None:
    """Profile, plan, verify and report on the embedded checkpoint; ends with the report's path.

    Example: bitplan demo -o demo
    """
    from bitplan.demo import run_demo

    for text in run_demo(run):
        click.echo(text)


@main.group()
def law() -> None:
    """Forecast what 4-bit training costs from parameters, tokens and group size alone.

    \b
    bitplan law predict --params 594.5e6 --tokens 100e9
    bitplan law crossover
    bitplan law fit RUN... -o law.json
    """


_law = click.option(
    "--law",
    "law_file",
    type=_RUN,
    metavar="FILE",
    help="A law that `law fit` wrote.  [default: the paper's]",
)


@law.command()
@click.option("--params", type=float, required=True, help="Non-embedding parameters, e.g. 594.5e6.")
@click.option("--tokens", type=float, required=True, help="Training tokens, e.g. 100e9.")
@click.option("--group-size", type=float, default=128, show_default=True, help="Elements a scale.")
@click.option("--precision", default="w4a4", show_default=True, help="w4a4, w4a16 or w16a4.")
@_law
@_json
def predict(
    params: float,
    tokens: float,
    group_size: float,
    precision: str,
    law_file: Path | None,
    as_json: bool,
) -> None:
    """Predict delta, final loss and R, with and without 8 bits at the inputs of FC2.

    Example: bitplan law predict --params 594.5e6 --tokens 100e9 --group-size 128
    """
    from bitplan.forecast import predict
    from bitplan.law import read_laws

    _print(predict(params, tokens, group_size, precision, read_laws(law_file)), as_json)


@law.command()
@click.option("--params", type=float, multiple=True, help="Parameters; may be repeated.")
@click.option("--group-size", "groups", type=float, multiple=True, help="May be repeated.")
@_law
@_json
def crossover(
    params: tuple[float, ...], groups: tuple[float, ...], law_file: Path | None, as_json: bool
) -> None:
    """Tell the training tokens at which the weights come to cost more than the inputs.

    Example: bitplan law crossover --params 1e9 --group-size 32 --group-size 128
    """
    from bitplan import forecast
    from bitplan.law import read_laws

    found = forecast.crossover(
        params or forecast.CROSSOVER_PARAMS,
        groups or forecast.CROSSOVER_GROUPS,
        read_laws(law_file),
    )
    _print(found, as_json)


@law.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=_RUN)
@click.option("-o", "--output", type=_RUN, help="Where to write the law, as JSON.")
@click.option("--force", is_flag=True, help="Pool trainings on different text or tokens.")
@_json
def fit(runs: tuple[Path, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Fit the law's constants, with intervals, to trainings from scratch.

    RUN is a run directory of `verify --from-scratch`, or a Parquet file of trainings
    (docs/formats.md).

    Example: bitplan law fit runs/* -o law.json
    """
    from bitplan.qat.law_result import fit_law

    _print(fit_law(runs, output, force=force), as_json)
