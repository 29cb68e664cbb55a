"""The object metric on frames drawn by hand, where every number is known."""

from __future__ import annotations

import numpy as np
import pytest
from lander import MASS, PURPLE, SHAPE, SHARPNESS, draw, film, scene
from sae_diffusion.evaluation.objects import (
    COLOURS,
    Object,
    count,
    find,
    object_tables,
    parse_colour,
    presence,
    typical_mass,
)

LANDER = Object(PURPLE)
# a share of 102 grey levels comes out of a rounded pixel with half a level's error, at both of its channels
ROUNDING = SHAPE.size / 102


def moved(by, context=1, recorded=((20, 20), (20, 20))):
    """Tables of one film whose generated frame has the lander `by` (rows, columns) away from the recorded one."""
    truth = film(list(recorded))[None]
    made = truth.copy()
    made[0, context] = scene() if by is None else draw(scene(), 20 + by[0], 20 + by[1])
    tables = object_tables(find(truth, LANDER), find(made, LANDER), MASS, LANDER.within, context)
    return {name: table.item() for name, table in tables.items()}


def test_a_whole_lander_is_found_with_its_mass_peak_sharpness_and_centroid():
    found = find(film([(20, 30)]), LANDER)
    assert found.mass == pytest.approx(MASS, abs=ROUNDING)
    assert found.peak == 1
    assert found.sharpness == pytest.approx(SHARPNESS, abs=ROUNDING / MASS)
    assert found.y == pytest.approx(22.5, abs=ROUNDING / MASS) and found.x == pytest.approx(31.5, abs=ROUNDING / MASS)
    assert found.detected(MASS).all()


@pytest.mark.parametrize("place", [(0, 0), (58, 0), (0, 60), (58, 60)])
def test_it_is_found_in_every_corner_and_on_any_grey(place):
    for grey in (0, 100, 255):
        found = find(draw(np.full((64, 64, 3), grey, np.uint8), *place), LANDER)
        assert found.mass == pytest.approx(MASS, abs=ROUNDING)
        assert found.y == pytest.approx(place[0] + 2.5, abs=ROUNDING / MASS)
        assert found.x == pytest.approx(place[1] + 1.5, abs=ROUNDING / MASS)


def test_where_nothing_is():
    found = find(scene(), LANDER)
    assert found.mass == found.peak == found.sharpness == 0 and np.isnan(found.y) and np.isnan(found.x)
    assert not found.detected(MASS) and count(scene(), LANDER, MASS) == 0


def test_moved_by_two_pixels_is_a_hit_and_by_four_is_none():
    assert moved((0, 0)) == {"detected": 1, "hit": 1, "mass": 1, "sharpness": 1}
    for by in ((2, 0), (0, 2), (0, 3), (2, 2)):  # at 2, 2, 3 and 2.83 pixels
        assert moved(by)["hit"] == 1, by
    for by in ((4, 0), (0, -4), (3, 3), (2, -3)):  # the last one at 3.6
        assert moved(by)["hit"] == 0 and moved(by)["detected"] == 1, by
    assert moved(None) == {"detected": 0, "hit": 0, "mass": 0, "sharpness": 0}


def test_a_blob_of_the_same_mass_is_not_detected_and_not_sharp():
    """The lander's colour spread over 9 x 9 pixels: a fifth of it in each."""
    truth = film([(20, 20)])
    blob = draw(scene(), 18, 18, np.full((9, 9), MASS / 81))
    found = find(blob, LANDER)
    assert found.mass == pytest.approx(MASS, abs=81 / 102) and found.peak < 0.25
    assert not found.detected(MASS)
    assert found.sharpness == pytest.approx(MASS / 81, abs=1 / 102)
    tables = object_tables(find(truth[None], LANDER), find(blob[None, None], LANDER), MASS, 3.0, 0)
    assert tables["detected"] == tables["hit"] == 0
    assert tables["sharpness"] == pytest.approx(MASS / 81 / SHARPNESS, abs=0.03)


def test_too_small_and_too_heavy_are_not_detected():
    small, large = draw(scene(), 20, 20, np.ones((2, 4))), draw(scene(), 20, 20, np.ones((5, 7)))
    assert find(small, LANDER).mass == 8 and find(large, LANDER).mass == 35
    assert not find(small, LANDER).detected(MASS) and not find(large, LANDER).detected(MASS)
    assert find(small, LANDER).detected(16) and find(large, LANDER).detected(17.5)  # at the very borders


def test_the_heaviest_of_two_is_taken_and_both_are_counted():
    frame = draw(draw(scene(), 5, 5), 30, 40, np.minimum(SHAPE * 1.5, 1))
    found = find(frame, LANDER)
    assert (found.y, found.x) == (pytest.approx(32.5, abs=0.1), pytest.approx(41.5, abs=0.1))
    assert count(np.stack([frame, scene(), film([(9, 9)])[0]]), LANDER, MASS).tolist() == [2, 0, 1]


def test_frames_whose_recorded_one_shows_nothing_are_left_out():
    truth, made = film([(20, 20), None, (20, 20)])[None], film([(20, 20), (20, 20), (20, 20)])[None]
    tables = object_tables(find(truth, LANDER), find(made, LANDER), MASS, 3.0, 1)
    for table in tables.values():
        assert table.shape == (1, 2) and np.isnan(table[0, 0]) and table[0, 1] == 1


def test_the_typical_mass_is_the_median_of_frames_that_show_it():
    truth = film([(20, 20), (20, 20), None, None, None, (20, 62)])
    assert typical_mass(find(truth, LANDER)) == pytest.approx(MASS, abs=ROUNDING)
    assert np.isnan(typical_mass(find(film([None]), LANDER)))


@pytest.mark.parametrize(
    ("colour", "split"),
    [
        ((128, 102, 230), ([2], [0, 1], 102)),
        ((255, 0, 0), ([0], [1, 2], 255)),
        ((204, 204, 0), ([0, 1], [2], 204)),
        ((92, 186, 92), ([1], [0, 2], 94)),
    ],
)
def test_a_colour_splits_at_its_widest_gap(colour, split):
    assert Object(colour).split() == split
    shares = presence(np.array([[colour, (90, 90, 90), (255, 255, 255)]], np.uint8), Object(colour))
    assert shares.tolist() == [[split[2], 0, 0]]
    one = np.zeros((1, 1, 3), np.uint8)
    one[..., split[0][0]] = 255  # of yellow, red alone is none of it
    assert presence(one, Object(colour)).item() == (0 if len(split[0]) > 1 else split[2])


def test_refusals():
    assert parse_colour("lunar-lander") == PURPLE == COLOURS["lunar-lander"] and parse_colour("1, 2,3") == (1, 2, 3)
    for text in ("purplish", "1,2", "1,2,x", "1,2,3,4", ""):
        with pytest.raises(ValueError, match="object_colour: must be r,g,b or one of lunar-lander, "):
            parse_colour(text)
    with pytest.raises(ValueError, match="colour: must be red, green, blue from 0 to 255"):
        Object((0, 0, 256))
    with pytest.raises(ValueError, match="colour: must have channels at least 32 apart"):
        Object((236, 236, 230))
    with pytest.raises(ValueError, match="side: must be at least 1"):
        Object(PURPLE, side=0)
    with pytest.raises(ValueError, match="within: must be > 0"):
        Object(PURPLE, within=0)
    with pytest.raises(
        ValueError, match=r"frames: must be uint8 \(..., Y, X, 3\) to look for a colour, got uint8 \(8, 8, 1\)"
    ):
        find(np.zeros((8, 8, 1), np.uint8), LANDER)


def test_a_square_larger_than_the_frame_is_the_frame():
    small = draw(np.zeros((8, 9, 3), np.uint8), 1, 2)
    assert find(small, Object(PURPLE, side=13)).mass == pytest.approx(MASS, abs=ROUNDING)


def test_the_lander_of_the_game_weighs_what_its_polygons_cover():
    gymnasium = pytest.importorskip("gymnasium")
    pytest.importorskip("Box2D")
    from sae_diffusion.data.format import resize_frames

    env = gymnasium.make("LunarLander-v3", render_mode="rgb_array")
    env.reset(seed=0)
    frames = []
    for _ in range(40):
        env.step(0)
        frames.append(env.render())
    env.close()
    found = find(resize_frames(np.stack(frames), (64, 64)), LANDER)
    inside = (found.y > 8) & (found.y < 56)
    assert inside.sum() > 5
    hull, legs = 34 * 10 + (34 + 28) / 2 * 17, 2 * 4 * 16  # in pixels of 400 x 600
    outline = 34 + 28 + 2 * (10 + 17.3) + 2 * 2 * (4 + 16)  # drawn in a darker purple, up to a pixel further out
    pixel = 400 * 600 / 64**2
    assert ((hull + legs) / pixel <= found.mass[inside]).all()
    assert (found.mass[inside] <= (hull + legs + outline) / pixel).all()
    assert (found.peak[inside] == 1).all() and (
        count(resize_frames(np.stack(frames), (64, 64)), LANDER, 18.0)[inside] == 1
    ).all()
