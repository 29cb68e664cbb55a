"""Generators against their equations; files in all formats, and what is refused of them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from sae_diffusion.series import Source
from sae_diffusion.series.data import (
    SeriesStats,
    gen,
    gen_dataset,
    permutation,
    read_series,
    split_series,
)

CHAINS = [
    Source("logistic", 20, "natural"),
    Source("logistic", 20, "backward"),
    Source("logistic", 20, "swaps", 6),
    Source("logistic", 24, "block-shuffle", 4),
    Source("logistic", 12, "shuffled"),
    Source("stochastic", 10, "swaps", 3),
    Source("one-minus-x", 9, "backward"),
]


def test_mixture_is_its_equation():
    x = gen_dataset(50, 30, 1.0, seed=3)[:, :, 0]
    assert x.shape == (50, 30) and ((x >= 0) & (x <= 1)).all()
    np.testing.assert_array_equal(x[:, 1:], 3.9993 * x[:, :-1] * (1 - x[:, :-1]))
    noise = gen_dataset(50, 30, 0.0, seed=3)[:, :, 0]
    np.testing.assert_allclose(gen_dataset(50, 30, 0.3, seed=3)[:, :, 0], 0.3 * x + 0.7 * noise)


def test_mixture_noise_has_a_mean_per_series():
    noise = gen_dataset(4000, 25, 0.0, seed=1)[:, :, 0]
    # variance 1 + 1 per point, covariance 1 between points; five standard errors of 4000 series
    covariance = np.cov(noise[:, 0], noise[:, 24])
    assert abs(covariance[0, 0] - 2) < 5 * 2 * np.sqrt(2 / 4000)
    assert abs(covariance[0, 1] - 1) < 5 * np.sqrt(5 / 4000)


def test_generators_depend_on_their_seed_alone_and_extend():
    sources = [Source(order="swaps", step=4), Source("stochastic"), Source("white-noise")]
    for sample in (lambda n, s: gen_dataset(n, 7, 0.4, seed=s), *(source.sample for source in sources)):
        np.testing.assert_array_equal(sample(3, 5), sample(8, 5)[:3])
        assert (sample(3, 5) != sample(3, 6)).any()
    np.testing.assert_array_equal(gen(7, 0.4, seed=5), gen_dataset(2, 7, 0.4, seed=5)[0, :, 0])


@pytest.mark.parametrize("source", CHAINS, ids=lambda s: f"{s.kind}-{s.order}-{s.step}")
def test_true_series_have_no_clause_error(source):
    x = source.sample(64, 0)
    assert x.shape == (64, source.length, 1)
    np.testing.assert_allclose(source.clause_error(x), 0, atol=1e-24)
    # moved at one point, a series breaks the one or two links that it is part of
    for position in (0, source.length // 2, source.length - 1):
        moved = x.copy()
        moved[:, position] += 0.3
        assert (source.clause_error(moved) > 1e-6).all() or source.kind == "logistic"
        assert np.median(source.clause_error(moved)) > 1e-3


def test_clause_error_is_the_sum_over_links():
    source = Source("logistic", 4, "swaps", 2)  # 1 0 3 2
    x = np.array([[0.2, 0.4, 0.7, 0.1]])[:, :, None]
    f = lambda p: 3.993 * p * (1 - p)  # noqa: E731
    expected = (f(0.4) - 0.2) ** 2 + (f(0.2) - 0.1) ** 2 + (f(0.1) - 0.7) ** 2
    np.testing.assert_allclose(source.clause_error(x), expected, rtol=1e-12)
    steps = Source("stochastic", 3)
    np.testing.assert_allclose(steps.clause_error(np.array([[0.0, 0.1, 1.3]])[:, :, None]), 0.1**2 + 0.2**2, rtol=1e-12)


def test_logistic_links_follow_the_permutation():
    source = Source("logistic", 20, "swaps", 4)
    x, perm = source.sample(5, 1)[:, :, 0], source.permutation()
    for k in range(1, 20):
        p = x[:, perm[k - 1]]
        np.testing.assert_array_equal(x[:, perm[k]], 3.993 * p * (1 - p))


def test_permutations():
    assert permutation("natural", 5).tolist() == [0, 1, 2, 3, 4]
    assert permutation("backward", 5).tolist() == [4, 3, 2, 1, 0]
    assert permutation("swaps", 5, 1).tolist() == [0, 1, 2, 3, 4]
    assert permutation("swaps", 7, 3).tolist() == [2, 1, 0, 5, 4, 3, 6]
    for order, step in (("block-shuffle", 6), ("block-shuffle", 2), ("block-shuffle", 3), ("shuffled", 1)):
        perm = permutation(order, 12, step)
        assert sorted(perm) == list(range(12))
        np.testing.assert_array_equal(perm, permutation(order, 12, step))
        if order == "block-shuffle":
            blocks = perm.reshape(-1, step)
            np.testing.assert_array_equal(blocks - blocks[0], np.arange(0, 12, step)[:, None].repeat(step, 1))
            inversions = sum(a > b for i, a in enumerate(blocks[0]) for b in blocks[0][i + 1 :])
            most = step * (step - 1) / 2
            assert 0.4 * most <= inversions <= max(0.6 * most, np.ceil(most / 2))
    assert permutation("shuffled", 12, seed=0).tolist() != permutation("shuffled", 12, seed=1).tolist()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permutation("sorted", 5), "order: must be one of"),
        (lambda: permutation("swaps", 5, 6), r"step: must be in \[1, 5\], got 6"),
        (lambda: permutation("block-shuffle", 5, 2), "step: must divide the length 5"),
        (lambda: permutation("natural", 1), "length: must be at least 2"),
        (lambda: Source("cubic"), "kind: must be one of"),
        (lambda: Source("mixture", chaos_ratio=1.5), r"chaos_ratio: must be in \[0, 1\], got 1.5"),
        (lambda: gen_dataset(2, 5, -0.1), "chaos_ratio"),
        (lambda: gen_dataset(0, 5), "count: must be at least 1"),
        (lambda: Source().sample(0, 0), "count: must be at least 1"),
        (lambda: Source("mixture").clause_error(np.zeros((1, 20, 1))), "kind: must be one of logistic"),
        (lambda: Source().clause_error(np.zeros((2, 19, 1))), r"x: must have shape \(count, 20, 1\), got \(2, 19, 1\)"),
        (lambda: split_series(np.zeros((5, 2, 1)), 0.0), "heldout_fraction"),
        (lambda: split_series(np.zeros((1, 2, 1)), 0.5), "at least two series"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_stats_normalise_each_position_and_come_back():
    x = Source().sample(512, 0)
    x = np.concatenate([5 + 3 * x, x, np.full_like(x, 2.5)], axis=2)
    stats = SeriesStats.estimate(x)
    z = stats.normalize(x).double().numpy()
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(z.std(axis=0)[:, :2], 1, atol=1e-5)
    assert (z[:, :, 2] == 0).all() and (stats.std[:, 2] == 1).all()
    np.testing.assert_allclose(stats.denormalize(stats.normalize(x)), x, atol=1e-5)
    assert stats.log_det == pytest.approx(np.log(x.std(axis=0)[:, :2]).sum())
    again = SeriesStats.from_json(stats.to_json())
    np.testing.assert_array_equal(again.mean, stats.mean)
    np.testing.assert_array_equal(again.std, stats.std)


def test_split_is_a_partition_and_deterministic():
    x = np.arange(20.0)[:, None, None]
    train, heldout = split_series(x, 0.25, seed=1)
    assert len(heldout) == 5
    assert sorted(np.concatenate([train, heldout]).ravel()) == list(range(20))
    np.testing.assert_array_equal(heldout, split_series(x, 0.25, seed=1)[1])
    assert (heldout != split_series(x, 0.25, seed=2)[1]).any()


WANTED = np.arange(24.0).reshape(2, 4, 3)


def long_table(x=WANTED, labels=("b", "a")):
    count, length, channels = x.shape
    columns = {"time": np.tile(np.arange(length) * 10, count), "series": np.repeat(labels, length)}
    columns |= {f"c{c}": x[:, :, c].ravel() for c in range(channels)}
    return pa.table(columns)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_long_tables(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    table = long_table()
    shuffled = table.take([3, 0, 1, 2, 7, 5, 6, 4])  # order within a series is that of time
    (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(shuffled, path)
    np.testing.assert_array_equal(read_series(path), WANTED)
    (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(
        table.rename_columns(["when", "who", "c0", "c1", "c2"]), path
    )
    np.testing.assert_array_equal(read_series(path, series_column="who", time_column="when"), WANTED)


def test_time_may_be_timestamps(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("series,time,v\na,2026-01-02T00:00:00,2\na,2026-01-01T12:00:00,1\n")
    assert read_series(path).ravel().tolist() == [1, 2]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_wide_tables(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    table = pa.table({str(t): WANTED[:, t, 0] for t in range(4)})
    (pa.csv.write_csv if suffix == "csv" else pa.parquet.write_table)(table, path)
    np.testing.assert_array_equal(read_series(path), WANTED[:, :, :1])


def test_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, other=np.zeros(3), series=WANTED.astype(np.float32))
    np.testing.assert_array_equal(read_series(path), WANTED)
    np.testing.assert_array_equal(read_series(path, key="series").dtype, np.float64)
    np.savez(path, anything=WANTED[:, :, 0].astype(np.int32))
    np.testing.assert_array_equal(read_series(path), WANTED[:, :, :1])


def csv(text):
    return "x.csv", lambda path: path.write_text(text)


def npz(**arrays):
    return "x.npz", lambda path: np.savez(path, **arrays)


REFUSED = {
    "ragged": (csv("series,time,v\na,0,1\na,1,2\nb,0,3\n"), "ragged: .* 1 points in series 'b' and 2 in series 'a'"),
    "ragged-row": (csv("p,q\n1,2\n3\n"), "every row must have the header's columns"),
    "nan": (csv("series,time,v\na,0,1\na,1,nan\nb,0,3\nb,1,4\n"), "got nan in series 0, point 1, channel 0"),
    "missing": (csv("p,q\n1,2\n3,\n"), "got nan in series 1, point 1, channel 0"),
    "inf": (npz(series=np.array([[1.0, np.inf]])), "must be finite, got inf"),
    "text": (csv("series,time,v\na,0,x\na,1,y\n"), "column 'v' must hold numbers, got string"),
    "half-long": (csv("series,v\na,1\n"), "got 'series' only"),
    "no-values": (csv("series,time\na,1\n"), "must have a column of values"),
    "repeated": (
        csv("series,time,v\na,0,1\na,0,2\n"),
        "series 'a' must have one point at each time, got two at time 0",
    ),
    "no-time": (csv("series,time,v\na,0,1\na,,2\n"), "column 'time' must have no missing values"),
    "time-text": (
        csv("series,time,v\na,early,1\na,late,2\n"),
        "column 'time' must hold numbers or timestamps, got string",
    ),
    "no-header": (csv("0.5,0.25\n0.1,0.2\n"), "must begin with a header line"),
    "same-names": (csv("p,p\n1,2\n"), "column names must differ"),
    "empty": (csv("p,q\n"), "column 'p' must hold numbers|at least one series"),
    "nothing": (csv(""), "cannot be read"),
    "dims": (npz(series=np.zeros((2, 3, 4, 5))), r"must have shape \(count, length, channels\), got \(2, 3, 4, 5\)"),
    "complex": (npz(series=np.zeros((2, 3), dtype=complex)), "must hold real numbers, got complex128"),
    "objects": (npz(series=np.array([[1], [1, 2]], dtype=object)), "ragged .object. arrays are refused"),
    "many": (npz(a=np.zeros((1, 2)), b=np.zeros((1, 2))), "must hold an array 'series' or a single one, got a, b"),
    "broken": (("x.npz", lambda path: path.write_bytes(b"PK\x03\x04 no")), "cannot be read as npz"),
    "broken-parquet": (("x.parquet", lambda path: path.write_bytes(b"PAR1")), "cannot be read"),
    "suffix": (("x.txt", lambda path: path.write_text("1")), "must end in .csv, .parquet or .npz"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, name):
    (file, write), message = REFUSED[name]
    write(tmp_path / file)
    with pytest.raises(ValueError, match=message) as error:
        read_series(tmp_path / file)
    assert file in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_series(tmp_path / "x.csv")
