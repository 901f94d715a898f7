"""What commands share: options made from fields of options classes, and how results show."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def option(options: type, name: str, *flags: str, **kwargs: Any) -> Callable[[Command], Command]:
    """Make a click option whose default is that of the field `name` of an options class."""
    default = next(field.default for field in fields(options) if field.name == name)
    return click.option(*flags, name, default=default, **kwargs)


def _comma(_ctx: click.Context, _param: click.Parameter, value: Any) -> tuple[str, ...]:
    """Split a comma-separated option; defaults come as tuples already."""
    if isinstance(value, tuple):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def count(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Return a number from 0 on, or the word `all`."""
    return value if value == "all" else click.IntRange(0).convert(value, param, ctx)


def list_option(options: type, name: str, flag: str, **kwargs: Any) -> Callable[[Command], Command]:
    """Make a comma-separated option from a tuple field of an options class."""
    default = next(field.default for field in fields(options) if field.name == name)
    assert isinstance(default, tuple)
    return click.option(
        flag, name, default=",".join(default), callback=_comma, metavar="A,B", **kwargs
    )


json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
data_option = click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="Text, Parquet or JSON Lines, a directory of them, or hf://datasets/OWNER/NAME; "
    "PATH::COLUMN names a text column; may be repeated.  [default: Python's standard library]",
)
trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Let the checkpoint's own Python code run."
)
PATH = click.Path(path_type=Path)


def show(result: Any, as_json: bool) -> None:
    """Print a stage's result: its `.as_json()` for machines, its `.as_text()` for people."""
    if as_json:
        click.echo(json.dumps(result.as_json(), indent=1, allow_nan=False))
    else:
        click.echo(result.as_text())


def refuse_others(flag: str, *allowed: str) -> None:
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
