"""`bitplan law`: forecasts from the scaling law, and its constants from trainings."""

from pathlib import Path
from typing import Any

import click

from bitplan.cli_options import PATH, json_flag, show


@click.group()
def law() -> None:
    """Forecast what 4-bit training costs from parameters, tokens and group size alone.

    \b
    bitplan law predict --params 594.5e6 --tokens 100e9
    bitplan law crossover --chart crossover.html
    bitplan law budget --flops 1e21
    bitplan law fit RUN... -o law.json
    bitplan law design RUN...
    """


_law = click.option(
    "--law",
    "asked",
    metavar="NAME|FILE",
    help="paper, another that ships, or a file that `law fit` wrote.  [default: the one that was "
    "fitted nearest to N and D]",
)

_gpu = click.option(
    "--gpu",
    default="H100",
    show_default=True,
    help="QAT computes in bf16: its rate there.",
)
_utilization = click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Share of that rate that a training reaches.",
)
_kind = click.option(
    "--branched/--from-scratch",
    default=None,
    help="Use only arms that branched from a trunk, or only those from scratch.",
)

_schedule = click.option(
    "--schedule",
    type=click.Choice(["cosine", "wsd"]),
    help="Take the trainings whose learning rate fell so alone.",
)


@law.command()
@click.option("--params", type=float, required=True, help="Non-embedding parameters, e.g. 594.5e6.")
@click.option("--tokens", type=float, required=True, help="Training tokens, e.g. 100e9.")
@click.option("--group-size", type=float, default=128, show_default=True, help="Elements a scale.")
@click.option("--precision", default="w4a4", show_default=True, help="w4a4, w4a16 or w16a4.")
@_law
@json_flag
def predict(
    params: float,
    tokens: float,
    group_size: float,
    precision: str,
    asked: str | None,
    as_json: bool,
) -> None:
    """Predict delta, final loss and R, with and without 8 bits at the inputs of FC2.

    Example: bitplan law predict --params 594.5e6 --tokens 100e9 --group-size 128
    """
    from bitplan.forecast import predict
    from bitplan.law_choice import find_law

    laws = find_law(asked, needs=[precision], params=params, tokens=tokens)
    show(predict(params, tokens, group_size, precision, laws), as_json)


@law.command()
@click.option("--params", type=float, multiple=True, help="Parameters; may be repeated.")
@click.option("--group-size", "groups", type=float, multiple=True, help="May be repeated.")
@click.option("--chart", type=PATH, metavar="FILE.html", help="Draw it as well, in one file.")
@_law
@json_flag
def crossover(
    params: tuple[float, ...],
    groups: tuple[float, ...],
    chart: Path | None,
    asked: str | None,
    as_json: bool,
) -> None:
    """Tell the training tokens at which the weights come to cost more than the inputs.

    Example: bitplan law crossover --params 1e9 --group-size 32 --group-size 128
    """
    from bitplan import forecast
    from bitplan.law_choice import find_law

    params = params or forecast.CROSSOVER_PARAMS
    laws = find_law(asked, needs=forecast.CROSSOVER_NEEDS, params=params)
    found = forecast.crossover(params, groups or forecast.CROSSOVER_GROUPS, laws)
    if chart is not None:
        from bitplan.reports.law_page import write_crossover

        write_crossover(found, chart)
    show(found, as_json)


@law.command()
@click.option("--flops", type=float, help="Floating-point operations of the training, 6 N D.")
@click.option("--gpu-hours", type=float, help="The same as hours of a GPU.")
@_gpu
@_utilization
@click.option("--bytes", "size_bytes", type=float, help="Bytes of the weights that are served.")
@click.option("--weight-bits", type=float, help="The same as bits of all weights.")
@click.option("--params", type=float, help="N, under compute.  [default: the best for each]")
@click.option("--tokens", type=float, help="Training tokens, for a serving budget.")
@click.option("--group-size", type=float, default=128, show_default=True, help="Elements a scale.")
@_law
@json_flag
def budget(
    flops: float | None,
    gpu_hours: float | None,
    gpu: str,
    utilization: float,
    size_bytes: float | None,
    weight_bits: float | None,
    params: float | None,
    tokens: float | None,
    group_size: float,
    asked: str | None,
    as_json: bool,
) -> None:
    """Compare 4 bits, FC2 inputs at 8 bits and 8 bits for one budget, of compute or of bytes.

    Give one of --flops, --gpu-hours, --bytes and --weight-bits; the last two with --tokens.

    Example: bitplan law budget --bytes 4e9 --tokens 100e9
    """
    from bitplan import budget as arithmetic
    from bitplan.law_choice import find_law
    from bitplan.planner.devices import find_device

    given = [v for v in (flops, gpu_hours, size_bytes, weight_bits) if v is not None]
    if len(given) != 1:
        raise click.UsageError("give one of --flops, --gpu-hours, --bytes and --weight-bits")
    if flops is not None or gpu_hours is not None:
        if tokens is not None:
            raise click.UsageError("--tokens is for --bytes: compute gives D by itself")
        if gpu_hours is not None:
            flops = gpu_hours * 3600 * find_device(gpu).rates_tops["bf16"] * 1e12 * utilization
        assert flops is not None
        known: dict[str, Any] = (
            {"flops": flops} if params is None else {"flops": flops, "params": params}
        )
        laws = find_law(asked, needs=arithmetic.NEEDS, **known)
        found = arithmetic.for_compute(flops, group_size, params=params, laws=laws)
    else:
        if tokens is None or params is not None:
            raise click.UsageError("--bytes and --weight-bits go with --tokens, without --params")
        size = size_bytes if weight_bits is None else weight_bits / 8
        assert size is not None
        most = 8 * size / arithmetic.FEWEST_BITS
        laws = find_law(asked, needs=arithmetic.NEEDS, params=most, tokens=tokens)
        found = arithmetic.for_serving(size, tokens, group_size, laws=laws)
    show(found, as_json)


@law.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--output", type=PATH, help="Where to write the law, as JSON.")
@_schedule
@click.option("--force", is_flag=True, help="Pool trainings on different text or tokens.")
@_kind
@json_flag
def fit(
    runs: tuple[Path, ...],
    output: Path | None,
    schedule: str | None,
    force: bool,
    branched: bool | None,
    as_json: bool,
) -> None:
    """Fit the law's constants, with intervals, to trainings from scratch, or to branched ones.

    RUN is a run directory of `verify --from-scratch`, the directory of a `sweep`, or a Parquet file
    of trainings (docs/formats.md).

    Example: bitplan law fit runs/* -o law.json
    """
    from bitplan.qat.law_result import fit_law

    show(fit_law(runs, output, schedule=schedule, force=force, branched=branched), as_json)


@law.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("--precision", help="w4a4, w4a16, ...  [default: the first that RUN has]")
@click.option(
    "--exponent",
    default="all",
    show_default=True,
    help="gamma_n, gamma_d or gamma_g: whose interval to narrow.",
)
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Trainings.")
@click.option("--params", type=float, multiple=True, help="N to choose from; may be repeated.")
@click.option("--tokens", type=float, multiple=True, help="D to choose from; may be repeated.")
@click.option("--group-size", "groups", type=float, multiple=True, help="G to choose from.")
@_gpu
@_utilization
@_schedule
@click.option("--force", is_flag=True, help="Pool trainings on different text or tokens.")
@_kind
@json_flag
def design(
    runs: tuple[Path, ...], gpu: str, utilization: float, as_json: bool, **options: Any
) -> None:
    """Say which further trainings would narrow the law's intervals most per hour.

    RUN is as for `law fit`. Hours follow from the tokens per second on record, where there are any,
    else from the GPU's rate. It also says how few of the trainings at hand would have done.

    Example: bitplan law design sweep --exponent gamma_d
    """
    from bitplan.planner.devices import find_device
    from bitplan.qat.law_design import design_law

    rate = find_device(gpu).rates_tops["bf16"] * 1e12 * utilization
    show(design_law(runs, flops_per_second=rate, **options), as_json)
