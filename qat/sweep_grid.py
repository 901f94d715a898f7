"""The grid of a sweep: a TOML file to cells, checked before anything is trained. Pure.

    tokens = [1e6, 4e6]                 # D: training tokens
    group_sizes = [32, 128, "row"]      # G: elements to a scale; "row": one scale a row
    precisions = ["bf16", "w4a4", "w4a4-fc2-8"]
    seeds = 2                           # or a list; a seed draws the weights and orders the data
    eval_tokens = 262144
    data = ["texts/"]                   # default: Python's standard library
    tokenizer = "path"                  # default: the embedded checkpoint's
    tokenized = "sweep/tokens"          # in their place: the tokens of another sweep
    repeat = false                      # more than one epoch, where the text is too short

    [recipe]                            # any field of recipe.py but steps
    batch_size = 64
    seq_len = 256
    lr = 2e-3

    [[models]]                          # a row of the Llama family, or config = "config.json"
    layers = 4
    hidden = 256
    ffn = 704
    heads = 4
    kv_heads = 2                        # default: heads
    lr = 1.5e-3                         # a row may set recipe fields of its own

    [[parts]]                           # optional: sub-grids, each with what differs from above
    tokens = [1e6]
    seeds = [2, 3]

    [[parts]]                           # branched: arms go on from points of a bf16 training
    trunk_tokens = [1e6, 4e6]           # the points
    trunk_warmup_steps = 50             # then the peak rate, at every point
    trunk_seed = 0                      # the trunk's weights and data; seeds order those of arms
    tokens = [1e6]                      # of each arm, from there

The cells are the union over the parts of models x trunk tokens x tokens x seeds x precisions x
group sizes; one that several parts name is one cell, and bf16 has no group size. Every quantized
cell needs the bf16 of its model, tokens, seed, recipe and trunk, as its delta is the difference of
the two.
"""

import itertools
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from bitplan.errors import BitplanError
from bitplan.formats import Format, Operand, parse_format
from bitplan.qat.recipe import Recipe

BASELINE = "bf16"
ROW = "row"
DEFAULT_EVAL_TOKENS = 262_144
DEFAULT_TRUNK_WARMUP_STEPS = 50
MODEL_KEYS = ("layers", "hidden", "ffn", "heads")


@dataclass(frozen=True)
class Precision:
    """Bits of the weights, of the inputs, and of the inputs of FC2."""

    weight_bits: int
    input_bits: int
    fc2_input_bits: int

    def format(self, role: str, operand: Operand, group_size: int | str | None) -> Format | None:
        """Return the format of a planned site; None where it stays bf16."""
        bits = self.weight_bits
        if operand == "input":
            bits = self.fc2_input_bits if role == "fc2" else self.input_bits
        if bits == 16:
            return None
        row = "channel" if operand == "weight" else "token"
        return parse_format(f"int{bits}-{row if group_size == ROW else f'g{group_size}'}")


PRECISIONS = {
    BASELINE: Precision(16, 16, 16),
    "w4a4": Precision(4, 4, 4),
    "w4a16": Precision(4, 16, 16),
    "w16a4": Precision(16, 4, 4),
    "w4a4-fc2-8": Precision(4, 4, 8),
    "w16a4-fc2-8": Precision(16, 4, 8),
}


@dataclass(frozen=True)
class Shape:
    """A model of a grid: a row of the Llama family, or a config.json of any."""

    name: str
    config: tuple[tuple[str, int], ...] | Path
    """MODEL_KEYS and kv_heads with their values, or the file."""


@dataclass(frozen=True)
class Trunk:
    """What an arm goes on from: the first steps of a bf16 training, with the arm's recipe."""

    steps: int
    warmup_steps: int
    seed: int


@dataclass(frozen=True)
class Cell:
    """One training of a grid."""

    shape: Shape
    recipe: Recipe
    precision: str
    group_size: int | str | None
    """None for bf16."""
    seed: int
    trunk: Trunk | None = None
    """None for a training from scratch."""

    @property
    def trunk_tokens(self) -> int:
        """Tokens of the trunk, 0 from scratch."""
        steps = 0 if self.trunk is None else self.trunk.steps
        return steps * self.recipe.step_tokens

    @property
    def tokens(self) -> int:
        """Training tokens, D: whole steps, those of the trunk among them."""
        return self.trunk_tokens + self.recipe.tokens

    @property
    def arm(self) -> str:
        """The arm's name in its run directory."""
        if self.group_size is None:
            return self.precision
        return f"{self.precision}-{'row' if self.group_size == ROW else f'g{self.group_size}'}"


@dataclass(frozen=True)
class Grid:
    """The cells of a grid, and the text that all of them share."""

    cells: tuple[Cell, ...]
    data: tuple[str, ...]
    tokenizer: str | None
    tokenized: Path | None
    eval_tokens: int
    seq_len: int
    repeat: bool

    @property
    def longest(self) -> int:
        """The largest D."""
        return max(cell.tokens for cell in self.cells)


_TRUNK_KEYS = {"trunk_warmup_steps", "trunk_seed"}
_KEYS = {
    "tokens",
    "trunk_tokens",
    *_TRUNK_KEYS,
    "group_sizes",
    "precisions",
    "seeds",
    "models",
    "recipe",
    "data",
    "tokenizer",
    "tokenized",
    "eval_tokens",
    "repeat",
    "parts",
}
_SHARED = {"data", "tokenizer", "tokenized", "eval_tokens", "repeat", "parts"}
_NAME = re.compile(r"\w[\w.-]*")  # a part of a directory's name
_RECIPE_KEYS = {field.name for field in fields(Recipe)} - {"steps"}


def read_grid(path: Path) -> Grid:
    """Return the grid of a TOML file; raise BitplanError that says what is wrong with it.

    Paths in it are relative to the file.
    """
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BitplanError(f"grid {path} cannot be read: {error}") from error
    try:
        return parse_grid(value, path.parent)
    except BitplanError as error:
        raise BitplanError(f"grid {path}: {error}") from error


def parse_grid(value: Mapping[str, Any], base: Path = Path()) -> Grid:
    """Return the grid that a parsed TOML file spells; raise BitplanError otherwise."""
    _table(value, _KEYS, "the grid")
    cells: dict[Cell, None] = {}
    recipe = _table(value.get("recipe", {}), _RECIPE_KEYS, "recipe")
    for part in _values(value, "parts") if "parts" in value else [{}]:
        _table(part, _KEYS - _SHARED, "a part")
        own = _table(part.get("recipe", {}), _RECIPE_KEYS, "recipe")
        merged = {**value, **part, "recipe": {**recipe, **own}}
        cells.update(dict.fromkeys(_cells(merged, base)))
    lengths = {cell.recipe.seq_len for cell in cells}
    if len(lengths) > 1:
        raise BitplanError(
            f"seq_len {', '.join(map(str, sorted(lengths)))}: cells share their held-out text, so "
            "give one sequence length"
        )
    _check_baselines(cells)
    repeat = value.get("repeat", False)
    if not isinstance(repeat, bool):
        raise BitplanError(f"repeat is {repeat!r}: write true or false")
    eval_tokens = value.get("eval_tokens", DEFAULT_EVAL_TOKENS)
    tokenizer, tokenized = value.get("tokenizer"), value.get("tokenized")
    if tokenized is not None and (tokenizer is not None or value.get("data")):
        raise BitplanError("tokenized stands in the place of data and tokenizer: give it alone")
    return Grid(
        cells=tuple(cells),
        data=tuple(_place(str(e), base) for e in _values(value, "data")) if "data" in value else (),
        tokenizer=None if tokenizer is None else _place(str(tokenizer), base),
        tokenized=None if tokenized is None else Path(_place(str(tokenized), base)),
        eval_tokens=_whole(eval_tokens, "eval_tokens"),
        seq_len=lengths.pop(),
        repeat=repeat,
    )


def _place(path: str, base: Path) -> str:
    return str((base / Path(path).expanduser()).resolve())


def _table(value: Any, known: set[str], where: str) -> Mapping[str, Any]:
    """Return a table of no other keys than these."""
    if not isinstance(value, Mapping):
        raise BitplanError(f"{where} is {value!r}: write a table of {', '.join(sorted(known))}")
    if unknown := sorted(set(value) - known):
        raise BitplanError(
            f"{where} has no {unknown[0]!r}: the keys are {', '.join(sorted(known))}"
        )
    return value


def _cells(part: Mapping[str, Any], base: Path) -> Iterator[Cell]:
    """Yield the cells of one part: every combination of its values."""
    seeds = part.get("seeds", 1)
    listed = (
        _values(part, "seeds") if isinstance(seeds, list) else list(range(_whole(seeds, "seeds")))
    )
    tokens = _values(part, "tokens")
    groups = [_group_size(g) for g in _values(part, "group_sizes")] if "group_sizes" in part else []
    precisions = _values(part, "precisions")
    for name in precisions:
        if str(name) not in PRECISIONS:
            raise BitplanError(f"no precision {name!r}: there are {', '.join(PRECISIONS)}")
        if name != BASELINE and not groups:
            raise BitplanError(f'{name} needs group_sizes, e.g. [32, 128, "row"]')
    points = _values(part, "trunk_tokens") if "trunk_tokens" in part else [None]
    if points == [None] and (given := sorted(_TRUNK_KEYS & set(part))):
        raise BitplanError(f"{given[0]} is of a trunk: give trunk_tokens as well, or leave it out")
    for row, point, count, seed in itertools.product(
        _values(part, "models"), points, tokens, listed
    ):
        shape, recipe = _shape(row, base), _recipe(part["recipe"], row, count)
        trunk = None if point is None else _trunk(part, recipe, point)
        for name in precisions:
            for group in [None] if name == BASELINE else groups:
                yield Cell(shape, recipe, name, group, _whole(seed, "seeds", least=0), trunk)


def _trunk(part: Mapping[str, Any], recipe: Recipe, tokens: Any) -> Trunk:
    """Return the trunk of so many tokens; raise BitplanError where its warmup is not over."""
    warmup = part.get("trunk_warmup_steps", DEFAULT_TRUNK_WARMUP_STEPS)
    trunk = Trunk(
        steps=_steps(tokens, "trunk_tokens", recipe.batch_size, recipe.seq_len),
        warmup_steps=_whole(warmup, "trunk_warmup_steps"),
        seed=_whole(part.get("trunk_seed", 0), "trunk_seed", least=0),
    )
    if trunk.steps <= trunk.warmup_steps:
        raise BitplanError(
            f"trunk_tokens has {tokens:,.0f}, {trunk.steps} steps, of which {trunk.warmup_steps} "
            "are warmup: give more, or fewer trunk_warmup_steps"
        )
    return trunk


def _values(part: Mapping[str, Any], key: str) -> list[Any]:
    value = part.get(key)
    if not isinstance(value, list) or not value:
        raise BitplanError(f"{key} is {value!r}: give a list of at least one")
    return value


def _group_size(value: Any) -> int | str:
    return ROW if value == ROW else _whole(value, "group_sizes", least=2)


def _whole(value: Any, key: str, least: int = 1) -> int:
    """Return a whole number, which TOML may spell 1e6."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value != int(value) or value < least:
        raise BitplanError(f"{key} has {value!r}: give whole numbers of at least {least}")
    return int(value)


def _shape(row: Any, base: Path) -> Shape:
    known = {*MODEL_KEYS, "kv_heads", "config", "name"} | _RECIPE_KEYS
    _table(row, known, "a model")
    if not _NAME.fullmatch(str(row.get("name", "model"))):
        raise BitplanError(
            f"a model's name is {row['name']!r}: letters, digits, - . and _ make one"
        )
    if "config" in row:
        if given := sorted({*MODEL_KEYS, "kv_heads"} & set(row)):
            raise BitplanError(f"a model has config and {given[0]}: give one of them")
        path = Path(_place(str(row["config"]), base))
        return Shape(str(row.get("name", path.stem)), path)
    if missing := [key for key in MODEL_KEYS if key not in row]:
        raise BitplanError(f"a model lacks {', '.join(missing)}: give them, or a config")
    found = {key: _whole(row[key], f"a model's {key}") for key in MODEL_KEYS}
    found["kv_heads"] = _whole(row.get("kv_heads", found["heads"]), "a model's kv_heads")
    if found["hidden"] % found["heads"] or found["heads"] % found["kv_heads"]:
        raise BitplanError(
            f"a model has hidden {found['hidden']}, heads {found['heads']}, kv_heads "
            f"{found['kv_heads']}: each must be a multiple of the next"
        )
    if found["hidden"] // found["heads"] % 2:
        raise BitplanError(
            f"a model has {found['hidden'] // found['heads']} channels a head: rotary positions "
            "need an even number"
        )
    name = str(row.get("name", f"l{found['layers']}-h{found['hidden']}"))
    return Shape(name, tuple(found.items()))


def _recipe(table: Mapping[str, Any], row: Mapping[str, Any], tokens: Any) -> Recipe:
    """Return the recipe of a model at D tokens: whole steps, as near to D as they come."""
    given = {**table, **{key: row[key] for key in row if key in _RECIPE_KEYS}}
    if missing := sorted({"batch_size", "seq_len", "lr"} - set(given)):
        raise BitplanError(f"recipe lacks {', '.join(missing)}")
    batch_size, seq_len = (_whole(given[key], key) for key in ("batch_size", "seq_len"))
    steps = _steps(tokens, "tokens", batch_size, seq_len)
    for field in fields(Recipe):
        if field.name in given and not _fits(given[field.name], field.type):
            kinds = get_args(field.type) or (field.type,)
            takes = ", ".join(k if isinstance(k, str) else k.__name__ for k in kinds)
            raise BitplanError(f"recipe has {field.name} = {given[field.name]!r}: it takes {takes}")
    if not given["lr"] > 0:
        raise BitplanError(f"lr {given['lr']}: a learning rate is above 0")
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    return Recipe(**{**given, "steps": steps, "batch_size": batch_size, "seq_len": seq_len})


def _steps(tokens: Any, key: str, batch_size: int, seq_len: int) -> int:
    """Return the whole steps that are nearest to so many tokens."""
    count = _whole(tokens, key)
    if count < batch_size * seq_len:
        raise BitplanError(
            f"{key} has {count:,}, less than one batch of {batch_size} x {seq_len} = "
            f"{batch_size * seq_len:,}"
        )
    return round(count / (batch_size * seq_len))


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a TOML value is one of a recipe's field of this type."""
    if options := get_args(kind):
        if isinstance(value, list):
            return len(value) == len(options) and all(map(_fits, value, options))
        return value in options
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is bool:
        return isinstance(value, bool)
    return number and math.isfinite(value) and (kind is float or value == int(value) > 0)


def _check_baselines(cells: Mapping[Cell, None]) -> None:
    have = {(c.shape, c.recipe, c.seed, c.trunk) for c in cells if c.precision == BASELINE}
    for cell in cells:
        if (cell.shape, cell.recipe, cell.seed, cell.trunk) not in have:
            raise BitplanError(
                f"{cell.arm} of {cell.shape.name} at {cell.tokens:,} tokens, seed {cell.seed}, has "
                'no bf16 to be compared with: add "bf16" to its precisions'
            )
