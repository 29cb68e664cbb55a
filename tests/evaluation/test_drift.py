"""Drift on films drawn by hand, where every number is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lander import MASS, PURPLE, draw, scene
from sae_diffusion.evaluation.drift import drift_tables, marks_of, shown_at, summarise_drift
from sae_diffusion.evaluation.intervals import Bootstrap
from sae_diffusion.evaluation.objects import Object
from sae_diffusion.rollout import Rollout

LANDER = Object(PURPLE)
GIVEN, MARKS = 2, [1, 3]


def still(new: int = 3) -> np.ndarray:
    """One film (1, T, 64, 64, 3) of a lander at rest."""
    return np.repeat(draw(scene(), 20, 20)[None, None], GIVEN + new, axis=1)


def table(films: np.ndarray) -> dict[str, list[float]]:
    return {name: values[0].tolist() for name, values in drift_tables(films, GIVEN, MARKS, LANDER, MASS).items()}


def test_a_film_that_stands_still_does_not_drift():
    assert table(still()) == {
        "frame": [0, 0], "terrain": [0, 0], "sky": [0, 0], "sky_level": [0, 0], "detail": [1, 1], "objects": [1, 1],
    }  # fmt: skip


def test_terrain_and_sky_are_measured_apart_and_without_the_object():
    films = still()
    films[0, -1, 48:] -= 20  # the ground
    films[0, -1, :10] += 30  # ten of the 48 rows of the sky
    draw(films[0, -1], 40, 44)  # a second lander in the sky
    got = table(films)
    assert got["terrain"] == [0, 400] and got["objects"] == [1, 2]
    # of the sky are missing: the flag, and 8 x 6 pixels around each lander, the first of which hides as many
    sky = 48 * 64 - 2 - 2 * 8 * 6
    assert got["sky"] == [0, pytest.approx(900 * 640 / sky)]
    assert got["sky_level"][1] == pytest.approx(30 * math.sqrt(640 / sky))
    assert got["frame"][1] > 0 and got["detail"][1] < 1  # the ground is less bright


def test_a_lander_that_lands_hides_the_terrain_below_it():
    films = still()
    draw(films[0, -1], 45, 10)
    assert table(films)["terrain"] == [0, 0]


def test_detail_falls_with_blur_and_objects_are_counted_where_there_was_one():
    films = np.concatenate([still(), still()])
    films[0, -1, :, 1:-1] = films[0, -1].astype(float)[:, :-2] / 2 + films[0, -1].astype(float)[:, 2:] / 2
    films[1, GIVEN - 1] = scene()
    tables = drift_tables(films, GIVEN, MARKS, LANDER, MASS)
    assert tables["detail"][0, 1] < 0.99 and np.isnan(tables["objects"][1]).all()
    plain = drift_tables(films, GIVEN, MARKS)
    assert np.isnan(plain["objects"]).all() and plain["frame"].shape == (2, 2)


def test_films_without_bright_pixels_have_no_terrain():
    films = np.full((2, 5, 8, 8, 1), 100, np.uint8)
    result = summarise_drift(drift_tables(films, GIVEN, MARKS), MARKS, Bootstrap(2))
    assert (
        result["terrain_psnr"]["value"] == result["sky_psnr"]["value"] == result["sky_level"]["value"] == [None, None]
    )
    assert result["at"] == MARKS and result["films"] == 2


def test_the_summary_is_of_mean_squared_errors():
    tables = {
        name: np.array([[100.0], [300.0]]) for name in ("frame", "terrain", "sky", "sky_level", "detail", "objects")
    }
    result = summarise_drift(tables, [16], Bootstrap(2))
    assert result["terrain_psnr"]["value"] == [pytest.approx(10 * math.log10(255**2 / 200))]
    assert result["sky_level"]["value"] == [200] and result["groups"] == 2


def test_marks_and_the_picture_of_them():
    assert marks_of(256) == [16, 64, 256] and marks_of(100) == [16, 64] and marks_of(7) == [7]
    films = Rollout(np.arange(20, dtype=np.uint8).reshape(1, 20, 1, 1, 1), None, 4)
    assert shown_at(films, [1, 16]).frames.ravel().tolist() == [3, 4, 19]
