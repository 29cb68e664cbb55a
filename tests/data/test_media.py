"""Pictures and films: what is written is what was given."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from sae_diffusion import media

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """A test draws the same numbers in any order of tests."""
    global RNG
    RNG = np.random.default_rng(0)


def film(frames=6, size=(10, 14)):
    """Flat colours that neither a palette nor a codec changes much."""
    video = np.zeros((frames, *size, 3), np.uint8)
    for t in range(frames):
        video[t, :, : t + 2] = (200, 60, 20 * t)
    return video


def test_png_is_exact(tmp_path):
    image = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    media.write_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    media.write_png(tmp_path / "b.png", image[..., :1])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "b.png")), image[..., :1].repeat(3, -1))


@pytest.mark.parametrize(("fps", "centiseconds"), [(25, [4] * 6), (12.5, [8] * 6), (60, [2, 1, 2, 2, 1, 2])])
def test_gif_frames_and_times(tmp_path, fps, centiseconds):
    video = film()
    media.write_gif(tmp_path / "a.gif", video, fps, scale=2)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size, image.info["loop"]) == (6, (28, 20), 0)
        for t in range(6):
            image.seek(t)
            assert image.info["duration"] == 10 * centiseconds[t]
            np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[::2, ::2], video[t])


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
@pytest.mark.parametrize("size", [(16, 24), (15, 23)])
def test_mp4_frames_and_rate(tmp_path, monkeypatch, codec, size):
    monkeypatch.setattr(media, "_encoder", lambda: codec)
    video = film(8, size)
    media.write_mp4(tmp_path / "a.mp4", video, fps=12.5, scale=3)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 12.5
        got = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    want = video.repeat(3, 1).repeat(3, 2)
    assert got.shape == (8, want.shape[1] + want.shape[1] % 2, want.shape[2] + want.shape[2] % 2, 3)
    error = np.abs(got[:, : want.shape[1], : want.shape[2]].astype(int) - want)
    assert error.mean() < 0.25 * np.abs(np.diff(want.astype(int), axis=0)).mean()  # nearer than the next frame is


def test_the_encoder_is_one_that_exists():
    assert av.codec.Codec(media._encoder(), "w").is_encoder


def test_other_kinds_of_frames():
    grey = RNG.integers(0, 256, (2, 3, 4, 1), dtype=np.uint8)
    np.testing.assert_array_equal(media.to_rgb(grey), grey.repeat(3, -1))
    latents = np.zeros((2, 3, 4, 8), np.float32)
    latents[0, 0, 0], latents[1, 2, 3] = -2, 6
    shown = media.to_rgb(latents)
    assert (
        shown.shape == (2, 3, 4, 3) and shown[0, 0, 0, 0] == 0 and shown[1, 2, 3, 2] == 255 and shown[0, 1, 1, 1] == 64
    )
    assert (media.to_rgb(np.full((1, 2, 2, 4), 7.0)) == 128).all()
    with pytest.raises(ValueError, match=r"1 or 3 channels, got \(2, 3, 4, 4\)"):
        media.to_rgb(grey.repeat(4, -1))
    with pytest.raises(ValueError, match=r"\(T, Y, X, C\).*uint8 \(3, 4, 1\)"):
        media.to_rgb(grey[0])
    with pytest.raises(TypeError, match="got int64"):
        media.to_rgb(grey.astype(np.int64))
    with pytest.raises(ValueError, match="NaN"):
        media.to_rgb(np.full((1, 2, 2, 4), np.nan))


@pytest.mark.parametrize("writer", [media.write_gif, media.write_mp4, lambda p, v: media.write_png(p, v[0])])
def test_a_failure_leaves_the_old_file(tmp_path, monkeypatch, writer):
    path = tmp_path / "out.bin"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        writer(path, film())
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["out.bin"]
    monkeypatch.undo()
    writer(path, film())
    assert path.stat().st_size > 50


def find(image, frame):
    """Top-left corners at which `frame` stands in `image`."""
    h, w = frame.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(image, (h, w, 3))[:, :, 0]
    return [tuple(map(int, place)) for place in np.argwhere((windows == frame).all((2, 3, 4)))]


def test_strip_shows_every_frame_in_its_place():
    truth, made = (RNG.integers(60, 250, (n, 16, 12, 3), dtype=np.uint8) for n in (5, 4))
    image = media.strip([("truth", truth), ("generated", made)], gap=2, context=2)
    line = np.flatnonzero((image == media.GENERATED_BORDER).all(-1).all(0))
    columns = []
    for t in range(5):
        ((y, x),) = find(image, truth[t])
        columns.append(x)
        if t < 4:
            ((below, same_x),) = find(image, made[t])
            assert same_x == x and below == y + 16 + 2
    assert columns[1] - columns[0] == columns[4] - columns[3] == 14
    assert columns[1] + 12 <= line.min() and line.max() < columns[2]
    assert (image[:, : columns[0]] > 100).any()  # the labels
    blank = image[-10:, columns[4] : columns[4] + 12]
    assert (blank == media.BACKGROUND).all()
    plain = media.strip([("", truth)], gap=2)
    assert not (plain == media.GENERATED_BORDER).all(-1).any() and plain.shape == (20, 2 + 5 * 14, 3)


def test_strip_of_few_frames_keeps_the_ends_and_the_border():
    truth = RNG.integers(60, 250, (40, 12, 9, 3), dtype=np.uint8)
    image = media.strip([("t", truth)], scale=2, max_frames=5, context=20)
    big = truth.repeat(2, 1).repeat(2, 2)
    places = [find(image, frame) for frame in big]
    shown = [t for t in range(40) if places[t]]
    assert len(shown) == 5 and shown[0] == 0 and shown[-1] == 39
    line = np.flatnonzero((image == media.GENERATED_BORDER).all(-1).all(0))
    for t in shown:
        assert (places[t][0][1] < line.min()) == (t < 20)


def test_side_by_side():
    a, b = (RNG.integers(60, 250, (n, 12, 9, 3), dtype=np.uint8) for n in (5, 3))
    out = media.side_by_side([("a", a), ("b", b)], gap=3, context=2)
    assert len(out) == 5
    for t in range(5):
        ((ya, xa),), ((yb, xb),) = find(out[t], a[t]), find(out[t], b[min(t, 2)])
        assert ya == yb and xa < xb
        assert tuple(out[t, ya, xa - 1]) == (media.CONTEXT_BORDER if t < 2 else media.GENERATED_BORDER)
    with pytest.raises(ValueError, match="the same height"):
        media.side_by_side([("a", a), ("b", b[:, :5])])


def test_arguments(tmp_path: Path):
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="scale"):
            media.write_gif(tmp_path / "a.gif", film(), scale=wrong)
    for writer in (media.write_gif, media.write_mp4):
        with pytest.raises(ValueError, match="fps"):
            writer(tmp_path / "a", film(), fps=0)
    with pytest.raises(ValueError, match="rows"):
        media.strip([])
    with pytest.raises(ValueError, match="max_frames"):
        media.strip([("a", film())], max_frames=0)
    with pytest.raises(ValueError, match=r"rows\[0\] \(a\).*\(6, 10, 14\)"):
        media.strip([("a", film()[..., 0])])
    assert not list(tmp_path.iterdir())
