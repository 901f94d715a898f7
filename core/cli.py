"""The command line: options to stage calls, results to stdout, errors to one line and exit codes.

Stages are imported inside their commands, so that `--help` answers without torch. Exit codes: 0
done; 1 the answer is no (verify: not converged); 2 wrong use or bad input.
"""

import os
import sys
from pathlib import Path
from typing import Any

import click

from bitplan import progress
from bitplan.cli_law import law
from bitplan.cli_options import (
    PATH,
    count,
    data_option,
    json_flag,
    list_option,
    option,
    refuse_others,
    show,
    trust_option,
)
from bitplan.errors import BitplanError, FirstProcessError
from bitplan.options import PlanOptions, ProfileOptions, SweepOptions, VerifyOptions

EXIT_NO = 1
EXIT_BAD_INPUT = 2


class _Group(click.Group):
    """A group whose commands end in one line on stderr, never a traceback, when input is bad."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FirstProcessError:
            ctx.exit(EXIT_BAD_INPUT)
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
    bitplan sweep GRID.toml -o SWEEP       train a grid of models, for a law of your own
    """


@main.command()
@click.argument("model", required=False)
@click.option("-o", "--output", "run", type=PATH, help="Run directory to write.")
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Say what changed from A to B: profiled run directories, or statistics of a training as "
    "RUN/arms/ARM/seed-K@STEP.",
)
@data_option
@option(
    ProfileOptions,
    "tokens",
    "--tokens",
    type=click.IntRange(1),
    show_default=True,
    help="Calibration tokens.",
)
@option(
    ProfileOptions,
    "seq_len",
    "--seq-len",
    type=click.IntRange(2),
    show_default=True,
    help="Tokens per sequence.",
)
@list_option(
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
@option(
    ProfileOptions,
    "interventions",
    "--interventions",
    callback=count,
    metavar="N|all",
    show_default=True,
    help="Measure the N least certain estimates under quantization, a pass over the tokens each.",
)
@option(ProfileOptions, "device", "--device", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@option(
    ProfileOptions,
    "seed",
    "--seed",
    type=int,
    show_default=True,
    help="Chooses the calibration text.",
)
@trust_option
@json_flag
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
        refuse_others("--compare", "compare", "as_json")
        from bitplan.probe.compare import compare as compare_snapshots
        from bitplan.probe.snapshot import load_snapshot

        show(compare_snapshots(*map(load_snapshot, compare)), as_json)
        return
    if model is None or run is None:
        lacks = "MODEL" if model is None else "-o RUN"
        raise click.UsageError(f"{lacks} is missing: bitplan profile MODEL -o RUN")
    from bitplan.probe.profile import profile_checkpoint

    asked = ProfileOptions(model=model, sensitivity=not no_sensitivity, **options)
    show(profile_checkpoint(run, asked), as_json)


@main.command()
@click.argument("run", type=PATH, required=False)
@option(
    PlanOptions, "input_bits", "--input-bits", type=float, help="Average bits of inputs, by MACs."
)
@option(PlanOptions, "weight_bits", "--weight-bits", type=float, help="Average bits of weights.")
@option(PlanOptions, "bit_ops", "--bit-ops", type=float, help="Bit operations per token.")
@option(PlanOptions, "bytes", "--bytes", type=float, help="Bytes of the planned weights.")
@option(
    PlanOptions,
    "time",
    "--time",
    metavar="DEVICE=MS",
    help="Matmul time on a device, e.g. H200=3.5.",
)
@option(PlanOptions, "rule", "--rule", metavar="NAME", help="Take a rule's plan, e.g. fc2.")
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
@list_option(
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
    help="Train scales: lwc, lsq (weights), lac (inputs) or absmax; or rotate both operands: "
    "hadamard.  [default: lac for inputs from 256 elements a scale on]",
)
@option(
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
@option(
    PlanOptions,
    "tokens",
    "--tokens",
    type=float,
    help="Tokens of the training to come, e.g. 100e9: plan for what the scaling law leaves of the "
    "losses, and say where the next bit should go.",
)
@option(
    PlanOptions,
    "params",
    "--params",
    type=float,
    help="Non-embedding parameters, with --tokens.  [default: the checkpoint's]",
)
@option(
    PlanOptions,
    "law",
    "--law",
    metavar="NAME|FILE",
    help="paper, another that ships, or a file that `law fit` wrote; with --tokens.  [default: the "
    "one that was fitted nearest to N and D]",
)
@click.option(
    "--explain",
    metavar="GLOB",
    help="Only tell why sites of RUN's plan have their formats, e.g. 'fc2:input'.",
)
@click.option(
    "--diff",
    nargs=2,
    type=PATH,
    metavar="A B",
    help="Only tell what changed between two plans: run directories or plan.json files.",
)
@option(
    PlanOptions,
    "target",
    "--target",
    metavar="NAME",
    help="Plan what a library runs: vllm, torchao, ... (names as for export --to).",
)
@json_flag
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
        refuse_others("--diff", "diff", "as_json")
        from bitplan.planner.diff import diff_plans

        show(diff_plans(*diff), as_json)
        return
    if run is None:
        raise click.UsageError("RUN is missing: bitplan plan RUN")
    if explain is not None:
        refuse_others("--explain", "explain", "run", "as_json")
        from bitplan.planner.explain import explain_sites

        show(explain_sites(run, explain), as_json)
        return
    asked = PlanOptions(**options)
    if asked.measure:
        from bitplan.qat.measure import make_measured_plan

        show(make_measured_plan(run, asked), as_json)
        return
    from bitplan.planner.stage import make_plan

    show(make_plan(run, asked), as_json)


@main.command()
@click.argument("run", type=PATH)
@option(VerifyOptions, "steps", "--steps", type=click.IntRange(1), help="Optimizer steps per arm.")
@option(
    VerifyOptions,
    "tokens",
    "--tokens",
    type=click.IntRange(1),
    help=f"Training tokens per arm.  [default: {VerifyOptions.DEFAULT_TOKENS}]",
)
@option(
    VerifyOptions,
    "seeds",
    "--seeds",
    type=click.IntRange(1),
    show_default=True,
    help="Seeds per arm; at the most, with --until-settled.",
)
@click.option(
    "--until-settled",
    is_flag=True,
    help="Look at the verdict after each seed from the third on, and stop when it is settled.",
)
@option(
    VerifyOptions,
    "confidence",
    "--confidence",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    show_default=True,
    help="Of the intervals and of the verdict.",
)
@option(
    VerifyOptions,
    "batch_size",
    "--batch-size",
    type=click.IntRange(1),
    show_default=True,
    help="Sequences per step.",
)
@option(
    VerifyOptions,
    "accumulate",
    "--accumulate",
    type=click.IntRange(1),
    show_default=True,
    help="Parts to take a step's sequences in, for less memory; the training is the same.",
)
@option(
    VerifyOptions,
    "seq_len",
    "--seq-len",
    type=click.IntRange(2),
    show_default=True,
    help="Tokens per sequence.",
)
@option(
    VerifyOptions,
    "eval_tokens",
    "--eval-tokens",
    type=click.IntRange(1),
    show_default=True,
    help="Held-out tokens.",
)
@option(
    VerifyOptions,
    "lr",
    "--lr",
    type=float,
    help=f"Peak learning rate.  [default: {VerifyOptions.DEFAULT_LR:g}; "
    f"{VerifyOptions.SCRATCH_LR:g} from scratch]",
)
@option(
    VerifyOptions,
    "schedule",
    "--schedule",
    type=click.Choice(["cosine", "wsd"]),
    show_default=True,
    help="How the rate falls; wsd: warmup, stable, decay.",
)
@option(
    VerifyOptions,
    "average_tail",
    "--average-tail",
    type=click.FloatRange(0, 1),
    show_default=True,
    help="Judge the average of the weights over this last share of the steps.",
)
@click.option(
    "--compiled",
    is_flag=True,
    help="Compile the blocks and replay steps as a CUDA graph: faster for small models.",
)
@option(
    VerifyOptions,
    "from_scratch",
    "--from-scratch",
    metavar="CONFIG",
    help="Start from random weights of this config.json (or its directory), not the checkpoint.",
)
@data_option
@list_option(
    VerifyOptions,
    "arms",
    "--arms",
    help="Arms to train; w4a4-hadamard (fc2 rotated) only if named.  [default: all others]",
)
@click.option(
    "--attribute",
    is_flag=True,
    help="Also train w4a4 with each role's inputs, and weights, at 8 bits.",
)
@option(VerifyOptions, "device", "--device", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@option(
    VerifyOptions,
    "gpus",
    "--gpus",
    type=click.IntRange(1),
    help="Train on this many GPUs, an arm on each.",
)
@option(
    VerifyOptions,
    "workers",
    "--workers",
    type=click.IntRange(1),
    help="Arms side by side on each device.  [default: 1]",
)
@option(VerifyOptions, "seed", "--seed", type=int, show_default=True, help="First seed.")
@trust_option
@json_flag
def verify(run: Path, as_json: bool, **options: Any) -> None:
    """Train the plan's arms from the checkpoint and say whether the errors converge.

    Exit code 1 means the answer is no (activation-limited, weight-limited or undetermined).
    A killed verify continues where it stopped when it is called again.

    \b
    Example: bitplan verify run --tokens 65536 --seeds 3
    On several GPUs, all for one arm: accelerate launch -m bitplan verify run
    """
    from bitplan.qat.verify import verify_plan

    verdict = verify_plan(run, VerifyOptions(**options))
    if not progress.is_silent():
        show(verdict, as_json)
    if verdict.verdict != "converged":
        raise click.exceptions.Exit(EXIT_NO)


@main.command()
@click.argument("grid", type=PATH)
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("sweep"),
    show_default=True,
    help="Directory of the sweep; several machines may share it.",
)
@option(SweepOptions, "device", "--device", show_default=True, help="cpu, cuda, cuda:1 or auto.")
@option(SweepOptions, "gpus", "--gpus", type=click.IntRange(1), help="Train on this many GPUs.")
@option(
    SweepOptions,
    "workers",
    "--workers",
    type=click.IntRange(1),
    help="Trainings side by side on each device.  [default: 1]",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Train on a Ray cluster whose machines share the directory; without ADDRESS, on one that "
    "is started here.",
)
@click.option("--dry-run", is_flag=True, help="Say what there is to train, and train nothing.")
@json_flag
def sweep(grid: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Train a grid of models, tokens, group sizes, precisions and seeds, from scratch or a trunk.

    GRID is a TOML file (docs/sweep.md). What is finished is never trained again: a killed sweep
    goes on when it is called again, and a grid may grow. Exit code 1 means some trainings failed.

    Example: bitplan sweep grid.toml -o sweep --gpus 4 --workers 4
    """
    from bitplan.qat.sweep import run_sweep

    found = run_sweep(grid, output, SweepOptions(**options))
    show(found, as_json)
    if found.failed:
        raise click.exceptions.Exit(EXIT_NO)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--output", type=PATH, help="HTML file.  [default: RUN/report.html]")
@json_flag
def report(runs: tuple[Path, ...], output: Path | None, as_json: bool) -> None:
    """Render run directories as one self-contained HTML file.

    Example: bitplan report run
    """
    from bitplan.reports.report import write_report

    show(write_report(list(runs), output), as_json)


@main.command()
@click.argument("run", type=PATH)
@click.option("--to", "target", required=True, metavar="TARGET", help="What is to load the plan.")
@click.option("-o", "--output", type=PATH, help="Directory.  [default: RUN/export/TARGET]")
@json_flag
def export(run: Path, target: str, output: Path | None, as_json: bool) -> None:
    """Write the plan as files that another library loads, or say what it cannot run.

    TARGET is vllm, compressed-tensors, llm-compressor, torchao, torchao-qat, modelopt, autoround or
    llama.cpp. A plan that it cannot run is refused, with the nearest one that it can.

    Example: bitplan export run --to vllm
    """
    from bitplan.planner.export import export_plan

    show(export_plan(run, target, output), as_json)


@main.command()
@click.option(
    "-o",
    "--output",
    "run",
    type=PATH,
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


main.add_command(law)
