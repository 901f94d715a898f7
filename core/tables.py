"""The columns of every table bitplan writes: name, dtype, unit and meaning, in one place.

docs/formats.md is generated from here, writers select these columns in this order, and readers may
rely on them: columns are added freely and never renamed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import polars as pl

TOP_CHANNEL = pl.Struct(
    {"channel": pl.Int64, "absmax": pl.Float64, "rms": pl.Float64, "stability": pl.Float64}
)
TOP_TOKEN = pl.Struct(
    {"sequence": pl.Int64, "position": pl.Int64, "absmax": pl.Float64, "text": pl.String}
)


@dataclass(frozen=True)
class Column:
    """One column: its polars dtype, unit ("" where it has none) and meaning."""

    name: str
    dtype: Any
    unit: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """A file's columns, and what one row stands for."""

    file: str
    row: str
    columns: tuple[Column, ...]

    @property
    def schema(self) -> dict[str, Any]:
        """Column name to polars dtype, in order."""
        return {column.name: column.dtype for column in self.columns}

    def frame(self, rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
        """Return the rows as a frame of exactly these columns; what a row lacks is null.

        NaN and infinite floats become null: a file never carries them into a sum or a chart.
        """
        names = [column.name for column in self.columns]
        frame = pl.DataFrame(
            [{name: row.get(name) for name in names} for row in rows], schema=self.schema
        )
        floats = pl.selectors.float()
        return frame.with_columns(pl.when(floats.is_finite()).then(floats).otherwise(None))


def _c(name: str, dtype: Any, unit: str, meaning: str) -> Column:
    return Column(name, dtype, unit, meaning)


_SITE = _c("site", pl.String, "", "`module:operand`, the tensor this row is about")

PROFILE = Table(
    "profile.parquet",
    "a (site, step); also arms/<arm>/seed-<k>/stats.parquet",
    (
        _SITE,
        _c("module", pl.String, "", "name of the linear"),
        _c("operand", pl.String, "", "`weight` or `input`"),
        _c("role", pl.String, "", "qkv, o, fc1, fc2, lm_head, embed, router or other"),
        _c("block", pl.Int64, "", "index of the transformer block; null outside blocks"),
        _c("expert", pl.Int64, "", "index of the expert; null for dense linears"),
        _c("fused", pl.String, "", "linears of one value share their input and their formats"),
        _c("step", pl.Int64, "optimizer steps", "0 for a checkpoint"),
        _c("in_features", pl.Int64, "", "length of the linear's input dimension"),
        _c("out_features", pl.Int64, "", "length of the linear's output dimension"),
        _c("tokens", pl.Int64, "tokens", "inputs: tokens seen; weights: null"),
        _c("count", pl.Int64, "elements", "finite elements seen"),
        _c("mean", pl.Float64, "value", "mean of the elements"),
        _c("std", pl.Float64, "value", "population standard deviation"),
        _c("skewness", pl.Float64, "", "E[(x-mu)^3] / sigma^3; null where sigma is 0"),
        _c("kurtosis", pl.Float64, "", "Pearson, E[(x-mu)^4] / sigma^4; 3 for a normal"),
        _c("excess_kurtosis", pl.Float64, "", "kurtosis - 3"),
        _c("absmax", pl.Float64, "value", "largest |x|"),
        _c("max_over_median", pl.Float64, "", "largest |x| over the median |x|"),
        _c("max_over_rms", pl.Float64, "", "largest |x| over the root mean square"),
        _c("outlier_share", pl.Float64, "share", "share of elements with |x - mu| > 6 sigma"),
        _c("abs_p50", pl.Float64, "value", "median of |x|, from the log2 histogram"),
        _c("abs_p99", pl.Float64, "value", "99th percentile of |x|"),
        _c("abs_p999", pl.Float64, "value", "99.9th percentile of |x|"),
        _c("channel_rms_kurtosis", pl.Float64, "", "Pearson kurtosis of the rms of the channels"),
        _c(
            "kurtosis_without_first_token",
            pl.Float64,
            "",
            "inputs: kurtosis without the first token of each sequence",
        ),
        _c(
            "kurtosis_without_top_tokens",
            pl.Float64,
            "",
            "inputs: kurtosis without first tokens and the 1 % of tokens with the largest |x|",
        ),
        _c("nan_count", pl.Int64, "elements", "NaN elements, in no other statistic"),
        _c("inf_count", pl.Int64, "elements", "infinite elements, in no other statistic"),
        _c(
            "top_channels",
            pl.List(TOP_CHANNEL),
            "",
            "input channels with the largest rms; stability: share of the calibration sequences in "
            "which the channel is among the 8 largest",
        ),
        _c("top_channel_stability", pl.Float64, "share", "inputs: mean stability of top_channels"),
        _c(
            "top_channel_overlap",
            pl.Float64,
            "share",
            "inputs of qkv and fc1: share of top_channels that another one of them has too, mean",
        ),
        _c("top_tokens", pl.List(TOP_TOKEN), "", "inputs: tokens with the largest |x|"),
        _c("drift", pl.Float64, "", "weights: |W - W0|^2 / |W0|^2 against the initial checkpoint"),
        _c(
            "gate_up_correlation",
            pl.Float64,
            "",
            "gate and up weights: mean |cosine| of matching rows",
        ),
        _c(
            "gate_up_correlation_max",
            pl.Float64,
            "",
            "gate and up weights: largest |cosine| of matching rows",
        ),
    ),
)

OUTLIERS = Table(
    "outliers.parquet",
    "a finding: a channel with massive activations, or a super-weight candidate",
    (
        _c(
            "kind",
            pl.String,
            "",
            "`massive_activation`: |x| > 100 and > 1,000 times its sequence's median, after a "
            "block; `super_weight`: a weight that makes at least 0.2 of an fc2's largest massive "
            "output, from an input above 1,000 times its median",
        ),
        _c("module", pl.String, "", "the block, or the fc2 linear"),
        _c("block", pl.Int64, "", "index of the transformer block"),
        _c("expert", pl.Int64, "", "index of the expert; null for dense linears"),
        _c("channel", pl.Int64, "", "channel of the hidden state; row of the weight"),
        _c("value", pl.Float64, "value", "the largest, with its sign"),
        _c("value_over_median", pl.Float64, "", "|value| over the median |x| of its sequence"),
        _c("sequence", pl.Int64, "", "calibration sequence of that value"),
        _c("position", pl.Int64, "", "position in the sequence; -1 where not known"),
        _c("text", pl.String, "", "the token there"),
        _c("tokens", pl.Int64, "tokens", "massive activations: tokens where it is massive"),
        _c("first_tokens", pl.Int64, "tokens", "those of them at the start of a sequence"),
        _c("input_channel", pl.Int64, "", "super weights: channel of the input; column"),
        _c("input_value", pl.Float64, "value", "super weights: the input at the same token"),
        _c("input_over_median", pl.Float64, "", "|input_value| over the input's median |x|"),
        _c("weight", pl.Float64, "value", "super weights: the weight itself"),
        _c("share", pl.Float64, "share", "super weights: weight times input_value over value"),
    ),
)

ERRORS = Table(
    "errors.parquet",
    "a (site, step, format)",
    (
        _SITE,
        _c("step", pl.Int64, "optimizer steps", "0 for a checkpoint"),
        _c("format", pl.String, "", "number format, e.g. int4-g128"),
        _c("relative_error", pl.Float64, "", "squared quantization error over squared norm"),
        _c("sqnr_db", pl.Float64, "dB", "-10 log10(relative_error); null where it is 0"),
        _c(
            "top_tokens_error_share",
            pl.Float64,
            "share",
            "inputs: share of the squared error in the 1 % of tokens with the largest |x|",
        ),
        _c(
            "first_tokens_error_share",
            pl.Float64,
            "share",
            "inputs: share of the squared error in the first tokens of sequences",
        ),
    ),
)

SENSITIVITY = Table(
    "sensitivity.parquet",
    "a (site, format, method)",
    (
        _SITE,
        _c("format", pl.String, "", "number format"),
        _c("method", pl.String, "", "`gradient` (backward passes) or `intervention` (measured)"),
        _c(
            "delta_loss",
            pl.Float64,
            "nats per token",
            "change of loss when the site is quantized; readers of one input share it equally",
        ),
        _c("stderr", pl.Float64, "nats per token", "standard error of delta_loss over sequences"),
        _c("kl", pl.Float64, "nats per token", "KL divergence from the unquantized predictions"),
        _c("kl_stderr", pl.Float64, "nats per token", "standard error of kl over sequences"),
        _c(
            "last_layer_error",
            pl.Float64,
            "",
            "interventions: squared error of the last hidden states over their squared norm",
        ),
    ),
)

# Estimated over measured kl scatters by about this much: benchmarks/sensitivity_agreement.py.
ESTIMATE_SPREAD = 0.2

FRONTIER = Table(
    "frontier.parquet",
    "a plan: the best at a budget, or a rule's",
    (
        _c("label", pl.String, "", "`optimal`, `plan` (the one chosen), or the name of the rule"),
        _c("budget", pl.String, "", "the budgeted quantity, e.g. `input_bits`"),
        _c("limit", pl.Float64, "of the budget", "the limit asked for; null for a rule"),
        _c("cost", pl.Float64, "of the budget", "what the plan uses of it"),
        _c(
            "delta_loss", pl.Float64, "nats per token", "predicted change of loss, all sites summed"
        ),
        _c(
            "objective",
            pl.Float64,
            "",
            "what was minimized: delta_loss, or without sensitivities the weighted relative error",
        ),
        _c("weight_bits", pl.Float64, "bits", "average effective bits of the weights"),
        _c("input_bits", pl.Float64, "bits", "average effective bits of the inputs, by MACs"),
        _c("plan_id", pl.String, "", "hash of the plan's formats"),
    ),
)

MEASURED = Table(
    "measured.parquet",
    "a plan that was measured whole: all its sites quantized at once",
    (
        _c("plan_id", pl.String, "", "hash of the plan's formats"),
        _c("of", pl.String, "", "hash of the model and the tokens that it was measured on"),
        _c("delta_loss", pl.Float64, "nats per token", "change of loss under the plan"),
        _c("stderr", pl.Float64, "nats per token", "standard error of delta_loss over sequences"),
        _c("kl", pl.Float64, "nats per token", "KL divergence from the unquantized predictions"),
        _c("kl_stderr", pl.Float64, "nats per token", "standard error of kl over sequences"),
        _c("tokens", pl.Int64, "tokens", "calibration tokens it was measured on"),
    ),
)

METRICS = Table(
    "metrics.parquet",
    "a training step",
    (
        _c("step", pl.Int64, "optimizer steps", "steps taken, from 1"),
        _c("tokens", pl.Int64, "tokens", "tokens trained on so far"),
        _c("loss", pl.Float64, "nats per token", "training loss of the step's batch"),
        _c("lr", pl.Float64, "", "learning rate"),
        _c("grad_norm", pl.Float64, "", "gradient norm before clipping"),
        _c("seconds", pl.Float64, "s", "time since the arm started"),
    ),
)

HELDOUT = Table(
    "heldout.parquet",
    "a held-out sequence, after an arm's last step",
    (
        _c("sequence", pl.Int64, "", "index of the sequence, the same for all arms and seeds"),
        _c("loss", pl.Float64, "nats per token", "mean loss of the sequence's tokens"),
    ),
)

TRAINED = Table(
    "trained.parquet",
    "an assignment of formats to one operand that verify has trained, under one recipe",
    (
        _c("recipe", pl.String, "", "hash of what was trained how: model, text, steps, seeds"),
        _c("operand", pl.String, "", "the operand quantized; the other stayed in bf16"),
        _c("formats", pl.String, "", "JSON: the format of each quantized site"),
        _c("delta", pl.Float64, "nats per token", "held-out loss less that of bf16"),
        _c("low", pl.Float64, "nats per token", "lower bound of its interval"),
        _c("high", pl.Float64, "nats per token", "upper bound of its interval"),
        _c("seeds", pl.Int64, "", "seeds behind it"),
        _c("tokens", pl.Int64, "tokens", "training tokens of each"),
    ),
)

TRAININGS = Table(
    "trainings.parquet",
    "a training from scratch: what `law fit` reads, from run directories or from such a file",
    (
        _c("params", pl.Int64, "parameters", "non-embedding parameters, N"),
        _c("tokens", pl.Int64, "tokens", "training tokens, D"),
        _c(
            "group_size",
            pl.Int64,
            "elements",
            "elements that share a scale, G (of whole rows, their mean in log2); null for bf16",
        ),
        _c("precision", pl.String, "", "bf16, w4a4, w4a16, w16a4, w4a4+fc2 or w16a4+fc2"),
        _c("seed", pl.Int64, "", "trainings of one seed share weights and batches"),
        _c("loss", pl.Float64, "nats per token", "final held-out loss"),
        _c("text", pl.String, "", "hash of the held-out text"),
        _c("tokenizer", pl.String, "", "hash of what the tokenizer is from"),
        _c("schedule", pl.String, "", "how the learning rate fell, cosine or wsd; null: unknown"),
    ),
)

SWEEP = Table(
    "sweep.parquet",
    "a training of a sweep, finished; what `law fit` reads where the run directories are gone",
    (
        *TRAININGS.columns,
        _c("delta", pl.Float64, "nats per token", "loss less that of the bf16 of its seed"),
        _c("stderr", pl.Float64, "nats per token", "of delta, over the held-out sequences"),
        _c("trunk_tokens", pl.Int64, "tokens", "those of D before an arm branched; null: scratch"),
        _c("trunk", pl.String, "", "hash of the weights that a branched arm began from"),
        _c("lr", pl.Float64, "", "peak learning rate"),
        _c("batch_size", pl.Int64, "sequences", "sequences a step"),
        _c("seq_len", pl.Int64, "tokens", "tokens a sequence"),
        _c("seconds", pl.Float64, "s", "time of the training"),
        _c("tokens_per_second", pl.Float64, "tokens/s", "tokens, less the trunk's, over seconds"),
        _c("hardware", pl.String, "", "what trained it"),
        _c("run", pl.String, "", "name of its run directory"),
        _c("arm", pl.String, "", "name of its arm there"),
        _c("config_hash", pl.String, "", "hash of all that the loss depends on"),
    ),
)

RATIOS = Table(
    "ratios.parquet",
    "an (N, D, G) of a sweep, with or without 8 bits at the inputs of FC2",
    (
        *(c for c in TRAININGS.columns if c.name in ("params", "tokens", "group_size")),
        _c("trunk_tokens", pl.Int64, "tokens", "those of D before the arms branched"),
        _c("schedule", pl.String, "", "how the learning rate fell, cosine or wsd"),
        _c("fc2_at_8", pl.Boolean, "", "whether the inputs of FC2 have 8 bits"),
        _c("R", pl.Float64, "", "delta of the inputs over delta of the weights"),
        _c("low", pl.Float64, "", "lower bound of its interval; null where it has none"),
        _c("high", pl.Float64, "", "upper bound of its interval"),
        _c("verdict", pl.String, "", "as in verdict.json"),
        _c("seeds", pl.Int64, "", "seeds behind it"),
        _c("run", pl.String, "", "name of the run directory"),
    ),
)

TABLES = (
    PROFILE,
    ERRORS,
    SENSITIVITY,
    OUTLIERS,
    FRONTIER,
    MEASURED,
    METRICS,
    HELDOUT,
    TRAINED,
    TRAININGS,
    SWEEP,
    RATIOS,
)
