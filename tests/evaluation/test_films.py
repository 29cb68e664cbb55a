"""Metrics of films alone: equations, perfect and copied rollouts, intervals, files."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
from lander import MASS, PURPLE, film
from sae_diffusion.evaluation import pictures
from sae_diffusion.evaluation.features import FEATURES, frame_features, frechet_distance
from sae_diffusion.evaluation.films import copied, evaluate_films, read_films
from sae_diffusion.evaluation.intervals import Bootstrap
from sae_diffusion.evaluation.objects import Object
from sae_diffusion.evaluation.pictures import mean_squared_error, psnr, ssim
from sae_diffusion.rollout import Rollout

LANDER = Object(PURPLE)
GIVEN, NEW = 2, 3


def recorded(films=6, size=24):
    """A lander that flies to the right and down, from another place in every film; grey grain on the ground."""
    videos = np.stack([film([(2 + i % 3 + t, 1 + i + 3 * t) for t in range(GIVEN + NEW)], size) for i in range(films)])
    grain = np.random.default_rng(0).integers(0, 40, size=(films, 1, 6, size, 1), dtype=np.uint8)
    videos[:, :, -6:] -= grain
    return videos


@pytest.fixture(scope="module")
def truth():
    videos = recorded()
    videos.flags.writeable = False
    return videos


def noisy(truth, seed=0):
    made = truth.copy()
    noise = np.random.default_rng(seed).normal(0, 8, size=made[:, GIVEN:].shape)
    made[:, GIVEN:] = np.clip(made[:, GIVEN:] + noise.round(), 0, 255).astype(np.uint8)
    return made


def test_psnr_is_its_equation():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(mean_squared_error(a, a)).tolist() == [math.inf, math.inf]
    b = a.copy()
    b[1] += 5
    b[0, 0, 0, 0] = 12
    assert psnr(mean_squared_error(a, b)) == pytest.approx([10 * math.log10(255**2 / (144 / 48)), 20 * math.log10(51)])


def test_ssim_is_its_equation():
    """Wang et al. 2004, window by window in plain loops."""
    generator = np.random.default_rng(1)
    a = generator.integers(256, size=(2, 13, 14, 3), dtype=np.uint8)
    b = np.clip(a + generator.normal(0, 30, a.shape), 0, 255).astype(np.uint8)
    k = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    window = np.outer(k, k) / np.outer(k, k).sum()
    expected = []
    for frame in range(2):
        values = []
        for channel in range(3):
            for y in range(3):
                for x in range(4):
                    p, q = (v[frame, y : y + 11, x : x + 11, channel].astype(float) for v in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    c1, c2 = 2.55**2, 7.65**2
                    values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        expected.append(np.mean(values))
    assert ssim(a, b) == pytest.approx(expected, rel=1e-12)
    assert ssim(a, a) == pytest.approx([1, 1], abs=1e-12)
    assert ssim(a[:, :6, :5], b[:, :6, :5]).shape == (2,)  # smaller than the window


def test_ssim_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(2)
    a = generator.integers(256, size=(32, 40, 3), dtype=np.uint8)
    b = np.clip(a + generator.normal(0, 20, a.shape), 0, 255).astype(np.uint8)
    theirs = metrics.structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1
    )
    assert ssim(a[None], b[None])[0] == pytest.approx(theirs, rel=1e-9)


def test_frechet_distance_of_normals_is_the_closed_form():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(500, 4))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + [3, 0, 4, 0]) == pytest.approx(25)
    # covariances that commute: the distance is the sum of (s1 - s2)^2
    scale = np.array([1.0, 2.0, 3.0, 0.5])
    white = np.linalg.qr(x - x.mean(0))[0] * math.sqrt(499)
    assert frechet_distance(white, white * scale) == pytest.approx(np.square(scale - 1).sum())
    # and some that do not: from the eigenvalues of A B
    y = x @ generator.normal(size=(4, 4))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a + b)
    expected -= 2 * np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    assert frechet_distance(x, y) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"b: must be \(n, 4\) with n >= 2, got \(1, 4\)"):
        frechet_distance(x, y[:1])


def test_features_see_blur_noise_flicker_and_a_lander_that_is_gone(truth):
    real = frame_features(truth)
    assert real.shape == (6, GIVEN + NEW - 1, FEATURES)
    sharp, soft = truth.astype(float), truth.astype(float)
    soft[..., 1:-1, :] = (sharp[..., :-2, :] + sharp[..., 1:-1, :] + sharp[..., 2:, :]) / 3
    gone, flicker = np.stack([film([None] * (GIVEN + NEW), 24)] * 6), truth.copy()
    gone[:, :, -6:], flicker[:, ::2] = truth[:, :, -6:], flicker[:, ::2] // 8 * 7
    for other in (soft.astype(np.uint8), noisy(truth), flicker, gone):
        assert frechet_distance(real.reshape(-1, FEATURES), frame_features(other).reshape(-1, FEATURES)) > 1
    grey = frame_features(truth[..., :1])
    assert grey.shape == real.shape and np.isfinite(frame_features(truth[:, :, :1, :1])).all()


def test_perfect_films_have_perfect_scores(truth):
    result = evaluate_films(Rollout(truth.copy(), truth, GIVEN), wanted=LANDER)
    found = result["object"]
    assert result["films"] == found["films"] == 6 and found["shown"] == [6] * NEW
    assert found["typical_mass"] == pytest.approx(MASS, abs=0.3)
    for table in ("detected", "hit", "mass", "sharpness"):
        assert found["generated"][table]["by_horizon"] == {key: [1.0] * NEW for key in ("value", "low", "high")}
        assert found["generated"][table]["all"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert result["ssim"]["generated"]["all"]["value"] == pytest.approx(1, abs=1e-12)
    assert result["psnr"]["generated"]["all"]["value"] is None, "infinite, which JSON has not"
    assert result["frechet"]["generated"] == pytest.approx(0, abs=1e-6) and result["frechet"]["copy"] > 1


def test_copying_is_the_copy_baseline(truth):
    films = Rollout(truth.copy(), truth, GIVEN)
    made = copied(films)
    assert (made[:, GIVEN:] == truth[:, GIVEN - 1 : GIVEN]).all() and (made[:, :GIVEN] == truth[:, :GIVEN]).all()
    result = evaluate_films(Rollout(made, truth, GIVEN), wanted=LANDER)
    for part in ("psnr", "ssim"):
        assert result[part]["generated"] == result[part]["copy"]
        assert result[part]["gain"]["all"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert result["object"]["generated"] == result["object"]["copy"]
    assert result["frechet"]["generated"] == result["frechet"]["copy"] > 0
    hit, detected = (result["object"]["copy"][name]["by_horizon"]["value"] for name in ("hit", "detected"))
    assert detected == [1.0] * NEW and hit == [0.0] * NEW, "3 pixels to the right and 1 down are more than 3"


def test_numbers_are_those_of_the_films_counted_by_hand(truth):
    """Half of the films keep the lander, the others lose it after the first new frame."""
    made = truth.copy()
    for i in range(3):
        made[i, GIVEN + 1 :] = film([None] * (NEW - 1), 24)
    result = evaluate_films(Rollout(made, truth, GIVEN), wanted=LANDER)
    detected = result["object"]["generated"]["detected"]
    assert detected["by_horizon"]["value"] == [1.0, 0.5, 0.5] and detected["all"]["value"] == pytest.approx(12 / 18)
    mse = np.square(made.astype(float) - truth)[:, GIVEN:].mean((0, 2, 3, 4))
    got = result["psnr"]["generated"]["by_horizon"]["value"]
    assert got[0] is None and got[1:] == pytest.approx(10 * np.log10(255**2 / mse[1:]))


def test_only_films_whose_context_ends_with_the_object_count(truth):
    made, real = noisy(truth), truth.copy()
    real[2, GIVEN - 1] = film([None], 24)
    result = evaluate_films(Rollout(made, real, GIVEN), wanted=LANDER)
    assert result["object"]["films"] == 5 and result["object"]["shown"] == [5] * NEW and result["films"] == 6
    assert result["notes"][0].startswith("the first 2 frames, the context, differ")
    empty = np.stack([film([None] * 5, 24)] * 2)
    result = evaluate_films(Rollout(empty, empty, GIVEN), wanted=LANDER)
    assert result["object"] is None and any("is in no film's last given frame" in note for note in result["notes"])
    assert evaluate_films(Rollout(empty, empty, GIVEN))["object"] is None


def test_intervals_hold_the_value_shrink_with_films_and_come_again_with_the_seed():
    generator = np.random.default_rng(0)
    widths = []
    for films in (10, 160):
        table = generator.normal(5, 2, size=(films, 4))
        curve = Bootstrap(films, seed=3).curve(table)
        assert curve == Bootstrap(films, seed=3).curve(table) != Bootstrap(films, seed=4).curve(table)
        assert curve["all"]["value"] == pytest.approx(table.mean())
        assert curve["by_horizon"]["value"] == pytest.approx(table.mean(0))
        for low, value, high in zip(*(curve["by_horizon"][key] for key in ("low", "value", "high"))):
            assert low < value < high
        widths.append(curve["all"]["high"] - curve["all"]["low"])
    # 95 % of a mean of 640 independent normals: 3.92 x 2 / sqrt(640) = 0.31
    assert widths[1] == pytest.approx(3.92 * 2 / math.sqrt(640), rel=0.25) and widths[0] > 2 * widths[1]


def test_films_of_one_group_are_drawn_together():
    table = np.repeat(np.arange(4.0), 8)[:, None]
    alone, together = (Bootstrap(32, groups).curve(table)["all"] for groups in (None, np.arange(32) // 8))
    assert alone["value"] == together["value"] == 1.5
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])
    one = Bootstrap(32, ["a"] * 32)
    assert one.groups == 1 and one.curve(table)["all"] == {"value": 1.5, "low": 1.5, "high": 1.5}
    with pytest.raises(ValueError, match="groups: must be one for each of 3 films"):
        Bootstrap(3, ["a"])


def test_what_is_not_there_is_left_out_of_means_and_intervals():
    table = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    curve = Bootstrap(3).curve(table)
    assert curve["all"]["value"] == 2 and curve["by_horizon"]["value"] == [2, None]
    assert curve["by_horizon"]["low"] == [1, None] and curve["by_horizon"]["high"] == [3, None]


def test_differences_are_paired():
    """PSNR of films that vary widely, against the same with a little more noise: the difference is certain."""
    spread = np.repeat(np.array([4.0, 400.0, 40.0, 4000.0])[:, None], 2, axis=1)
    gain = Bootstrap(4).curve(spread * 1.1, spread, of=lambda a, b: psnr(a) - psnr(b))["all"]
    assert list(gain.values()) == pytest.approx([-10 * math.log10(1.1)] * 3)


def test_a_file_of_films_is_read_as_sample_writes_it(truth, tmp_path):
    path = tmp_path / "films.npz"
    made = noisy(truth)
    Rollout(made, truth, GIVEN).save(path)
    films = read_films(path, 4)
    assert films.context == GIVEN and np.array_equal(films.frames, made) and np.array_equal(films.truth, truth)
    np.savez(path, recorded=truth, generated=made)
    assert read_films(path, 3).context == 3


def test_what_is_no_file_of_films_is_refused(truth, tmp_path):
    path = tmp_path / "films.npz"
    with pytest.raises(FileNotFoundError):
        read_films(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"^films: .*films.npz must be an npz file, is unreadable"):
        read_films(path)
    np.savez(path, generated=truth)
    with pytest.raises(ValueError, match=r"^films: .* must have an array 'recorded', has generated"):
        read_films(path)
    np.savez(path, generated=truth, recorded=truth, context=[1, 2])
    with pytest.raises(ValueError, match=r"^films: .*: context must be one integer, got int64 \(2,\)"):
        read_films(path)
    for made, real, given, message in (
        (truth, None, 2, "films: must have recorded frames to compare with, got none"),
        (truth / 255, truth, 2, r"films: generated must be uint8 \(N, T, Y, X, 3 or 1\), got float64"),
        (truth[0], truth[0], 2, "films: generated must be uint8"),
        (truth[:3], truth, 2, "films: recorded and generated must have one shape"),
        (truth, truth, 5, r"context: must be in \[1, 5\), a frame to be generated, got 5"),
        (truth, truth, 0, "context: must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_films(Rollout(made, real, given))


def test_lpips_is_measured_where_package_and_weights_are_and_not_fetched(truth, monkeypatch, tmp_path):
    import torch

    class Network(torch.nn.Module):
        """Mean distance of what it is shown, in [-1, 1]."""

        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex" and verbose is False

        def forward(self, x, y):
            assert x.shape[1:] == y.shape[1:] == (3, 24, 24) and x.min() >= -1 and x.max() <= 1
            return (x - y).abs().mean((1, 2, 3), keepdim=True)

    films = Rollout(noisy(truth), truth, GIVEN)
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    result = evaluate_films(films)
    assert result["lpips"] is None and result["notes"] == [
        "LPIPS is not measured: the packages lpips and torchvision are not both installed"
    ]
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(__import__("sys").modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert evaluate_films(films)["notes"][0].endswith("is not there, and nothing is downloaded")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / pictures.LPIPS_WEIGHTS).write_bytes(b"")
    result = evaluate_films(films)
    expected = np.abs(films.frames.astype(float) - truth)[:, GIVEN:].mean() / 127.5
    assert result["lpips"]["generated"]["all"]["value"] == pytest.approx(expected, rel=1e-5) and not result["notes"]
