"""`bitplan law`: forecasts from the scaling law, and its constants from trainings."""

from pathlib import Path

import click

from bitplan.cli_options import PATH, json_flag, show


@click.group()
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
    type=PATH,
    metavar="FILE",
    help="A law that `law fit` wrote.  [default: the paper's]",
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
    law_file: Path | None,
    as_json: bool,
) -> None:
    """Predict delta, final loss and R, with and without 8 bits at the inputs of FC2.

    Example: bitplan law predict --params 594.5e6 --tokens 100e9 --group-size 128
    """
    from bitplan.forecast import predict
    from bitplan.law import read_laws

    show(predict(params, tokens, group_size, precision, read_laws(law_file)), as_json)


@law.command()
@click.option("--params", type=float, multiple=True, help="Parameters; may be repeated.")
@click.option("--group-size", "groups", type=float, multiple=True, help="May be repeated.")
@_law
@json_flag
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
    show(found, as_json)


@law.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=PATH)
@click.option("-o", "--output", type=PATH, help="Where to write the law, as JSON.")
@click.option("--force", is_flag=True, help="Pool trainings on different text or tokens.")
@json_flag
def fit(runs: tuple[Path, ...], output: Path | None, force: bool, as_json: bool) -> None:
    """Fit the law's constants, with intervals, to trainings from scratch.

    RUN is a run directory of `verify --from-scratch`, the directory of a `sweep`, or a Parquet file
    of trainings (docs/formats.md).

    Example: bitplan law fit runs/* -o law.json
    """
    from bitplan.qat.law_result import fit_law

    show(fit_law(runs, output, force=force), as_json)
