import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitplan.formats import parse_format, parse_formats
from bitplan.probe import onepass
from bitplan.probe import tensor_stats as module
from bitplan.probe.tensor_stats import TensorStats, fetch, settle, stats, to_host
from bitplan.tables import ERRORS, PROFILE

TOLERANCE = 1e-3
QUANTILES = {"abs_p50": 0.5, "abs_p99": 0.99, "abs_p999": 0.999}


def make(kind: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Data of one kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    match kind:
        case "normal":
            return x
        case "far from zero":
            return 1000 + x
        case "little spread":
            return 0.1 + 1e-3 * x
        case "heavy tails":
            return x**7
        case "small":
            return 1e-12 * x
        case "large":
            return 1e7 * x
        case "one-sided":
            return x.exp()
        case "bf16":
            return x.bfloat16().float()
        case "sparse":
            return x.relu() * (x > 1)
    raise AssertionError(kind)


KINDS = (
    "normal",
    "far from zero",
    "little spread",
    "heavy tails",
    "small",
    "large",
    "one-sided",
    "bf16",
    "sparse",
)


def expected(x: Tensor) -> dict[str, float]:
    """The float64 reference on all of the data at once."""
    values = x.double().numpy().ravel()
    magnitude = np.abs(values)
    return {
        "count": values.size,
        "std": values.std(),
        "skewness": float(scipy.stats.skew(values)),
        "kurtosis": float(scipy.stats.kurtosis(values, fisher=False)),
        "absmax": magnitude.max(),
        "max_over_rms": magnitude.max() / math.sqrt((values**2).mean()),
        **{name: float(np.quantile(magnitude, q)) for name, q in QUANTILES.items()},
    }


def assert_agrees(row: dict[str, Any], x: Tensor) -> None:
    want = expected(x)
    noise = 1e-5 if abs(want["skewness"]) < 1e-2 else 0  # a skewness near 0 has no relative error
    for name, value in want.items():
        tolerance = noise if name == "skewness" else 0
        assert row[name] == pytest.approx(value, rel=TOLERANCE, abs=tolerance), name
    values = x.double().numpy()
    assert row["mean"] == pytest.approx(values.mean(), rel=1e-6, abs=1e-6 * values.std())


def streamed(chunks: list[Tensor], formats: str = "int4-g128", operand: str = "input") -> Any:
    found = TensorStats(
        chunks[0].shape[-1],
        operand=operand,  # type: ignore[arg-type]
        formats=parse_formats(formats.split(",")),
    )
    for chunk in chunks:
        found.update(chunk)
    return found


@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(2, 40),
    length=st.integers(1, 8),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_any_split_agrees_with_scipy_on_the_whole(
    kind: str, width: int, length: int, cuts: list[int], seed: int
) -> None:
    x = make(kind, (sum(cuts), length, width), seed)
    row = streamed(list(x.split(cuts))).row()
    if x.numel() > 2 and float(x.std()) > 0:
        assert_agrees(row, x)


@given(
    kind=st.sampled_from(KINDS),
    cuts=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    left_first=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_merging_is_the_same_as_reading_on(kind: str, cuts: list[int], left_first: bool) -> None:
    chunks = list(make(kind, (sum(cuts), 6, 16)).split(cuts))
    parts = [streamed([chunk]) for chunk in chunks]
    if left_first:
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.joined(part)
    else:
        whole = parts[-1]
        for part in reversed(parts[:-1]):
            whole = part.joined(whole)
    merged, read = whole.row(), streamed(chunks).row()
    assert merged.keys() == read.keys()
    assert merged["top_tokens"] == read["top_tokens"]
    for name in (*expected(torch.eye(2)), "kurtosis_without_top_tokens", "outlier_share"):
        assert merged[name] == pytest.approx(read[name], rel=1e-9, nan_ok=True), name
    assert whole.errors() == pytest.approx(streamed(chunks).errors(), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_tensor_of_many_blocks(kind: str) -> None:
    x = make(kind, (8, 512, 160))
    assert_agrees(streamed(list(x.split(3))).row(), x)
    assert_agrees(streamed([x], operand="weight").row(), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype: torch.dtype) -> None:
    x = make("normal", (2, 16, 32)).to(dtype)
    assert_agrees(streamed([x]).row(), x.float())


def test_a_kurtosis_of_a_hundred_thousand() -> None:
    x = make("normal", (4, 512, 160))
    x[2, 7, 3] = 30_000.0
    row = streamed(list(x.split(1))).row()
    assert row["kurtosis"] > 1e5
    assert_agrees(row, x)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1000.1, 1e-20])
def test_a_constant_has_no_kurtosis(value: float) -> None:
    x = torch.full((3, 5, 7), value)
    row = streamed(list(x.split(1))).row()
    assert row["mean"] == pytest.approx(float(x[0, 0, 0]), rel=1e-12)
    assert row["std"] == 0
    assert row["kurtosis"] is None
    assert row["skewness"] is None
    assert row["absmax"] == abs(float(x[0, 0, 0]))


def test_one_step_of_float32_is_spread() -> None:
    x = torch.ones(4, 4, 8)
    x[1, 2, 3] = 1 + 2.0**-23
    row = streamed([x]).row()
    assert row["kurtosis"] == pytest.approx(expected(x)["kurtosis"], rel=TOLERANCE)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 1001])
def test_quantiles_interpolate_as_numpy_does(count: int) -> None:
    x = torch.logspace(-6, 6, count).reshape(1, count, 1)
    row = streamed([x]).row()
    for name, q in QUANTILES.items():
        want = float(np.quantile(x.double().numpy(), q))
        assert row[name] == pytest.approx(want, rel=TOLERANCE)


def test_more_zeros_than_values() -> None:
    x = torch.zeros(1, 1000, 10)
    x[0, :, 0] = make("normal", (1000,))
    row = streamed([x]).row()
    assert row["abs_p50"] == 0
    assert row["max_over_median"] is None
    assert row["abs_p99"] == pytest.approx(float(np.quantile(x.abs().numpy(), 0.99)), rel=TOLERANCE)


@pytest.mark.parametrize("sign", [1, -1])
def test_outliers_lie_beyond_six_sigma_of_the_mean(sign: int) -> None:
    x = 2 + make("normal", (4, 256, 64))
    x[1, :5, 2] = sign * 12.0 + 2  # far on one side
    x[3, 0, :7] = 2 - sign * 20.0
    x = x * sign
    values = x.double().numpy()
    want = (np.abs(values - values.mean()) > 6 * values.std()).mean()
    assert want > 0
    assert streamed(list(x.split(1))).row()["outlier_share"] == want


def test_outliers_closer_than_a_bin_are_not_guessed() -> None:
    assert streamed([1e6 + make("normal", (2, 64, 32))]).row()["outlier_share"] is None


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    x = make("far from zero", (3, 8, 16))
    bad = x.clone()
    bad[0, 1, 2:5] = math.nan
    bad[1, 0, 0] = math.inf
    bad[2, 7, 15] = -math.inf
    bad[2, 3] = math.nan  # a whole token
    keep = torch.isfinite(bad)
    found = streamed(list(bad.split(1)))
    row = found.row()
    assert row["nan_count"] == 3 + 16
    assert row["inf_count"] == 2
    assert_agrees(row, x[keep])
    zeroed = torch.where(keep, bad, 0)
    rms = (zeroed.double().square().sum((0, 1)) / keep.sum((0, 1))).sqrt()
    torch.testing.assert_close(found.channel_rms, rms, rtol=1e-6, atol=0)
    assert found.errors() == pytest.approx(streamed([zeroed]).errors(), rel=1e-6)


def test_nothing_finite_is_no_statistic() -> None:
    row = streamed([torch.full((1, 4, 8), math.nan)]).row()
    assert (row["count"], row["nan_count"], row["inf_count"]) == (0, 32, 0)
    assert all(row[name] is None for name in ("mean", "std", "kurtosis", "absmax", "abs_p50"))


def test_nothing_seen_is_no_statistic() -> None:
    row = TensorStats(8, operand="input", formats=parse_formats(["int4-g128"])).row()
    assert row["count"] == row["tokens"] == 0
    assert row["mean"] is None
    assert row["top_tokens"] == []


def test_channels() -> None:
    x = make("normal", (3, 50, 12)) * torch.arange(1, 13)
    x[1, 4, 0] = -500.0
    found = streamed(list(x.split(1)))
    values = x.double().numpy().reshape(-1, 12)
    rms = np.sqrt((values**2).mean(0))
    np.testing.assert_allclose(found.channel_rms.numpy(), rms, rtol=1e-6)
    np.testing.assert_array_equal(found.channel_absmax.numpy(), np.abs(values).max(0))
    row = found.row()
    assert row["channel_rms_kurtosis"] == pytest.approx(
        scipy.stats.kurtosis(rms, fisher=False), rel=1e-5
    )
    assert [c["channel"] for c in row["top_channels"]] == np.argsort(-rms)[:8].tolist()
    assert row["top_channels"][0]["absmax"] == 500
    assert row["top_channels"][0]["rms"] == pytest.approx(rms[0], rel=1e-6)


def kurtosis_without(x: Tensor, excluded: int) -> float:
    """Naive: drop first tokens, and the tokens with the largest |x| of all."""
    values = x.double().numpy()
    tokens = values.reshape(-1, values.shape[-1])
    first = np.zeros(values.shape[:2], dtype=bool)
    first[:, 0] = True
    order = np.argsort(-np.abs(tokens).max(1), kind="stable")
    keep = ~first.ravel()
    keep[order[:excluded]] = False
    return float(scipy.stats.kurtosis(tokens[keep].ravel(), fisher=False))


def massive(sequences: int = 6, length: int = 60, width: int = 20) -> Tensor:
    """Normal data with a massive first token in each sequence, and a few large ones."""
    x = make("normal", (sequences, length, width))
    x[:, 0, 3] = 1000.0 + torch.arange(sequences)
    x[1, 17, 5] = -300.0
    x[4, 2, 0] = 80.0
    return x


@pytest.mark.parametrize("split", [1, 2, 5, 6])
def test_kurtosis_without_first_and_top_tokens(split: int) -> None:
    x = massive()
    row = streamed(list(x.split(split))).row()
    assert row["tokens"] == 360
    assert row["kurtosis_without_first_token"] == pytest.approx(kurtosis_without(x, 0), rel=1e-5)
    # 1 % of 360 tokens are 4 of the 6 first tokens: the other large ones stay.
    assert row["kurtosis_without_top_tokens"] == pytest.approx(kurtosis_without(x, 4), rel=1e-5)
    assert row["kurtosis_without_first_token"] > 2 * row["kurtosis"] > 100


def test_top_tokens_come_with_their_place() -> None:
    row = streamed(list(massive().split(4))).row()
    places = [(t["sequence"], t["position"], t["absmax"]) for t in row["top_tokens"]]
    want = [(i, 0, 1000.0 + i) for i in reversed(range(6))] + [(1, 17, 300.0), (4, 2, 80.0)]
    assert places == want


@pytest.mark.parametrize("split", [1, 2, 6])
def test_more_tokens_than_are_kept(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOP_TOKENS", 7)
    monkeypatch.setattr(module, "TOP_SHARE", 0.1)
    x = massive()
    row = streamed(list(x.split(split))).row()
    assert_agrees(row, x)
    assert row["kurtosis_without_first_token"] == pytest.approx(kurtosis_without(x, 0), rel=1e-5)
    # 10 % would be 36 tokens: at the most the 7 kept ones are left out.
    assert row["kurtosis_without_top_tokens"] == pytest.approx(kurtosis_without(x, 7), rel=1e-5)


def test_ties_go_to_the_token_seen_first() -> None:
    x = torch.sign(make("normal", (5, 40, 4)))
    rows = [streamed(list(x.split(split))).row() for split in (1, 2, 5)]
    assert [t["position"] for t in rows[0]["top_tokens"]] == list(range(8))
    assert all(row["top_tokens"] == rows[0]["top_tokens"] for row in rows)


def test_rows_in_any_order_with_given_places() -> None:
    x = massive()
    order = torch.randperm(360, generator=torch.Generator().manual_seed(1))
    found = TensorStats(20, operand="input")
    for part in order.split(50):
        found.update(x.reshape(-1, 20)[part], positions=part % 60, sequences=part // 60)
    row, want = found.row(), streamed([x]).row()
    assert row["top_tokens"] == want["top_tokens"]
    for name in ("kurtosis", "kurtosis_without_first_token", "kurtosis_without_top_tokens"):
        assert row[name] == pytest.approx(want[name], rel=1e-9)


def test_rows_without_places_have_no_first_token() -> None:
    row = streamed([massive().reshape(-1, 20)]).row()
    assert row["kurtosis_without_first_token"] == pytest.approx(row["kurtosis"], rel=1e-12)
    assert {t["position"] for t in row["top_tokens"]} == {-1}


def test_weights_have_no_tokens() -> None:
    row = streamed([massive()], operand="weight").row()
    assert row["tokens"] is None
    assert row["top_tokens"] == []
    assert row["kurtosis_without_first_token"] is None


def naive_error(x: Tensor, bits: int, group: int) -> float:
    """Loop over groups in float64, with the paper's scale."""
    half = 2 ** (bits - 1)
    error = norm = 0.0
    for row in x.double().numpy().reshape(-1, x.shape[-1]):
        for start in range(0, row.size, group):
            part = row[start : start + group]
            scale = np.abs(part).max() / half or 1.0
            q = np.clip(np.round(part / scale), -half, half - 1) * scale
            error += float(((q - part) ** 2).sum())
            norm += float((part**2).sum())
    return error / norm


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one-sided", "far from zero"])
def test_errors_agree_with_a_float64_loop(kind: str) -> None:
    x = make(kind, (3, 20, 100))
    found = streamed(list(x.split(1)), "int4-g32,int8-g128,int8-token,bf16")
    want = {
        "int4-g32": naive_error(x, 4, 32),
        "int8-g128": naive_error(x, 8, 128),
        "int8-token": naive_error(x, 8, 100),
        "bf16": 0.0,
    }
    assert found.errors() == pytest.approx(want, rel=TOLERANCE)
    rows = {row["format"]: row for row in found.summary().error_rows()}
    assert rows["int4-g32"]["sqnr_db"] == pytest.approx(
        -10 * math.log10(want["int4-g32"]), rel=TOLERANCE
    )
    assert rows["bf16"]["sqnr_db"] is None


@pytest.mark.parametrize("name", ["int8-tensor", "nvfp4", "mxfp4", "fp8-e4m3", "int8-channel"])
def test_a_weight_s_error_does_not_depend_on_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = make("heavy tails", (40, 64))
    whole = stats(x, [parse_format(name)])[name]
    monkeypatch.setattr(onepass, "_CPU_BLOCK", 200)
    assert stats(x, [parse_format(name)])[name] == pytest.approx(whole, rel=1e-6)


def test_tensors_settle_together_as_they_do_alone() -> None:
    def several() -> list[TensorStats]:
        chunks = list(massive().split(3))
        more = TensorStats(20, operand="input", formats=parse_formats(["int4-g32"]))
        more.update(massive().reshape(-1, 20), positions=torch.arange(360) % 60)
        inputs = [streamed([scale * c for c in chunks], "int4-g32") for scale in (1, 2, 3)]
        return [*inputs, streamed(chunks[:1], "int4-g32"), more, streamed(chunks, operand="weight")]

    together, alone = several(), several()
    settle([*together, together[0]])
    assert not any(stats._pending for stats in together)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.summary().vector, other.summary().vector)


@pytest.mark.parametrize("limit", [1, 100])
def test_rows_that_are_many_are_settled(limit: int) -> None:
    want = streamed(list(massive().split(2))).row()
    found = TensorStats(20, operand="input", pending_rows=limit)
    for chunk in massive().split(2):
        found.update(chunk)
    assert sum(len(rows.found) for rows in found._pending) <= limit
    assert found.row()["top_tokens"] == want["top_tokens"]
    assert found.row()["kurtosis"] == pytest.approx(want["kurtosis"], rel=1e-12)


@pytest.mark.parametrize("split", [1, 4, 6])
def test_the_share_of_the_error_that_tokens_carry(split: int) -> None:
    x = massive()
    rows = streamed(list(x.split(split)), "int4-g32,bf16").summary().error_rows()
    tokens = x.reshape(-1, x.shape[-1])
    errors = np.array([naive_error(t, 4, 32) * float(t.double().square().sum()) for t in tokens])
    order = np.argsort(-tokens.abs().amax(1).numpy(), kind="stable")
    # The first tokens are the six largest, and 1 % of 360 tokens are four of them.
    first = errors[:: x.shape[1]].sum() / errors.sum()
    top = errors[order[:4]].sum() / errors.sum()
    assert 0.5 < top < first < 1
    assert rows[0]["first_tokens_error_share"] == pytest.approx(first, rel=TOLERANCE)
    assert rows[0]["top_tokens_error_share"] == pytest.approx(top, rel=TOLERANCE)
    assert rows[1]["top_tokens_error_share"] is None  # no error to share
    weight = streamed([x], "int4-g32", "weight").summary().error_rows()[0]
    assert weight["top_tokens_error_share"] is weight["first_tokens_error_share"] is None


def test_formats_of_the_other_operand_are_left_out() -> None:
    x = make("normal", (2, 3, 8))
    assert set(streamed([x], "int8-token,int8-channel").errors()) == {"int8-token"}
    assert set(streamed([x], "int8-token,int8-channel", "weight").errors()) == {"int8-channel"}


def test_the_error_of_zeros_is_undefined() -> None:
    summary = streamed([torch.zeros(1, 2, 4)]).summary()
    assert [row["relative_error"] for row in summary.error_rows()] == [None]


def test_update_and_summary_never_look_at_a_value() -> None:
    # A meta tensor has no values: reading one raises.
    found = TensorStats(
        64,
        operand="input",
        formats=parse_formats(["int4-g32", "int8-token", "nvfp4"]),
        device="meta",
    )
    for _ in range(2):
        found.update(torch.empty(2, 8, 64, device="meta"))
    assert found.joined(found).summary().vector.device.type == "meta"


def test_the_same_data_gives_the_same_bits() -> None:
    x = make("heavy tails", (4, 64, 48))
    first, second = (streamed(list(x.split(2)), "int4-g32,nvfp4").summary() for _ in range(2))
    assert torch.equal(first.vector, second.vector)


def test_only_like_merges_with_like() -> None:
    with pytest.raises(ValueError, match="one shape"):
        TensorStats(4, operand="input").merge(TensorStats(5, operand="input"))
    with pytest.raises(ValueError, match="one shape"):
        TensorStats(4, operand="input").merge(TensorStats(4, operand="weight"))


def test_an_empty_chunk_changes_nothing() -> None:
    x = make("normal", (2, 3, 8))
    with_empty = streamed([x[:1], x[:0], x[1:]])
    assert torch.equal(with_empty.summary().vector, streamed([x[:1], x[1:]]).summary().vector)


def test_rows_fit_the_tables() -> None:
    summary = streamed([massive()]).summary()
    assert summary.row().keys() <= PROFILE.schema.keys()
    assert PROFILE.frame([summary.row()])["kurtosis"][0] == summary.row()["kurtosis"]
    assert set(summary.error_rows()[0]) <= ERRORS.schema.keys()


def test_to_host_keeps_the_order() -> None:
    found = [streamed([make("normal", (1, 4, width))]).summary() for width in (3, 20, 9)]
    assert [s.row() for s in to_host(found)] == [s.row() for s in found]
    assert to_host([]) == []
    vectors = [torch.arange(n, dtype=torch.float64) for n in (2, 0, 3)]
    assert [v.tolist() for v in fetch(vectors)] == [[0, 1], [], [0, 1, 2]]


def test_tensor_stats_of_one_tensor() -> None:
    x = make("normal", (30, 64))
    found = stats(x, parse_formats(["int4-g32"]))
    assert found == stats(x, ["int4-g32"])
    assert_agrees(found, x)
    assert found["int4-g32"] == pytest.approx(naive_error(x, 4, 32), rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_cuda_agrees_and_never_waits(kind: str) -> None:
    x = make(kind, (4, 64, 96))
    formats = parse_formats(["int4-g32", "int8-token", "nvfp4", "mxfp4", "fp8-e4m3"])
    chunks = x.cuda().split(1)
    summaries = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            found = TensorStats(96, operand="input", formats=formats, device="cuda")
            for chunk in chunks:
                found.update(chunk)
            summaries.append(found.summary())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    first, second = to_host(summaries)
    assert torch.equal(first.vector, second.vector)
    assert_agrees(first.row(), x)
    want = streamed(list(x.split(1)), ",".join(map(str, formats))).errors()
    assert first.errors() == pytest.approx(want, rel=TOLERANCE)
