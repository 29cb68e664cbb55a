"""`sae evaluate` end to end on a run of one step, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from lander import film
from PIL import Image
from sae_diffusion import cli
from sae_diffusion.disk import write_json

SIZE, FRAMES = 32, 12
MODEL = (
    f"--model.height={SIZE} --model.width={SIZE} --model.model-channels=4 --model.channel-mult 1 2 "
    "--model.video-attention=8 --model.window=None --clip-length=4 --batch-size=2 --num-workers=0 --no-tensorboard "
    "--clips.heldout-fraction=0.5 --clips.clip-stride=2 --device=cpu --steps=1 --sampler.sampling-steps=1"
).split()
SAME = ["--device=cpu", "--samples=9", "--frames=3", "--context=2"]
QUICK = [*SAME, "--drift-frames=0", "--loss-clips=0"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, trained for one step on landers that fly about; its data lie in it."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "data").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        places = [(2 + number + t, 1 + 2 * t) for t in range(FRAMES)]
        np.savez(
            folder / "data" / f"{number}.npz", frames=film(places, SIZE), actions=generator.integers(3, size=FRAMES - 1)
        )
    assert cli.main(["train", f"--data={folder / 'data'}", f"--run-dir={folder / 'run'}", *MODEL]) == 0
    return folder / "run"


def evaluate(run: Path, *options: str) -> int:
    return cli.main(["evaluate", f"--run-dir={run}", *QUICK, *options])


def test_a_run_is_measured_on_clips_of_its_own_data(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert evaluate(run, f"--out={out}", f"--npz={tmp_path / 'films.npz'}", "--object-colour=lunar-lander") == 0
    shown, said = capsys.readouterr()
    for text in ("9 films of 3 frames after 2 given ones", "PSNR, dB", "copying", "SSIM", "detected, of 9", "Fréchet"):
        assert text in shown, text
    assert "note: LPIPS is not measured" in said and str(out / "evaluation.json") in shown
    result = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert (result["format"], result["version"]) == ("sae-evaluation", 1)
    assert result["about"]["step"] == 1 and result["about"]["data"] == str(run.parent / "data")
    assert result["about"]["sampler"]["sampling_steps"] == 1 and result["about"]["evaluation"]["samples"] == 9
    films = result["films"]
    assert (films["films"], films["context"], films["frames"]) == (9, 2, 3) and 1 < films["groups"] < 9
    assert films["object"]["films"] == 9 and len(films["psnr"]["generated"]["by_horizon"]["low"]) == 3
    with Image.open(out / "strip.png") as picture:
        assert picture.size[0] > 5 * 2 * SIZE
    assert (out / "horizon.png").stat().st_size > 0
    assert result["errors"] is None and result["drift"] is None and not (out / "drift.png").exists()
    # the films alone say the same, but for the intervals, which no longer know the episodes
    assert cli.main(["evaluate", f"--films={tmp_path / 'films.npz'}", "--object-colour=128,102,230"]) == 0
    alone = json.loads((tmp_path / "films-evaluation" / "evaluation.json").read_text())["films"]
    assert alone["groups"] == 9
    for part in ("psnr", "ssim"):
        for name in ("generated", "copy", "gain"):
            assert alone[part][name]["by_horizon"]["value"] == films[part][name]["by_horizon"]["value"]
    for name in ("detected", "hit", "mass", "sharpness"):
        assert alone["object"]["copy"][name]["all"]["value"] == films["object"]["copy"][name]["all"]["value"]
    assert alone["frechet"] == films["frechet"]


@pytest.mark.parametrize("actions", ["random", "recorded"])
def test_errors_and_drift_are_measured_too(run, tmp_path, capsys, actions):
    options = [
        "--loss-clips=3", "--loss-frames=4", "--drift-frames=20", "--drift-samples=2",
        f"--drift-actions={actions}", "--object-colour=lunar-lander",
    ]  # fmt: skip
    assert evaluate(run, *options, f"--out={tmp_path}", "--samples=3") == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    errors, drift = result["errors"], result["drift"]
    assert errors["clips"] == 3 and len(errors["full_context"]["value"]) == len(errors["sigma"]) == 7
    assert len(errors["by_frame"]["full_context"]["value"][0]) == len(errors["by_frame"]["copy"]["value"]) == 4
    assert (drift["at"], drift["films"], drift["actions"]) == ([16], 2, actions)
    assert drift["objects"]["value"][0] is not None and drift["terrain_psnr"]["value"][0] > 0
    for text in (
        "Squared error of 3 clips",
        "noise 0.2",
        f"2 long films with {actions} actions",
        "terrain",
        "frame 16",
    ):
        assert text in shown, text
    for name in ("strip.png", "drift.png", "horizon.png", "errors.png"):
        assert (tmp_path / name).stat().st_size > 0 and str(tmp_path / name) in shown


def test_the_films_are_those_of_sample(run, tmp_path):
    assert evaluate(run, f"--out={tmp_path}", f"--npz={tmp_path / 'a.npz'}", "--split=all", "--seed=3") == 0
    options = [
        "--device=cpu",
        "--samples=9",
        "--frames=3",
        "--context=2",
        "--split=all",
        "--seed=3",
        f"--data={run.parent / 'data'}",
    ]
    assert cli.main(["sample", f"--run-dir={run}", *options, f"--npz={tmp_path / 'b.npz'}", f"--out={tmp_path}"]) == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a) == set(b) == {"recorded", "generated", "context"} and a["context"] == 2
        for name in ("recorded", "generated"):
            assert a[name].dtype == np.uint8 and a[name].shape == (9, 5, SIZE, SIZE, 3)
            assert np.array_equal(a[name], b[name])


def test_the_same_seed_gives_the_same_numbers(run, tmp_path):
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["--drift-frames=4", "--loss-clips=2", "--drift-samples=2", f"--seed={seed}"]
        assert evaluate(run, f"--out={tmp_path / name}", *options) == 0
        result = json.loads((tmp_path / name / "evaluation.json").read_text())
        texts.append([result[part] for part in ("films", "errors", "drift")])
    assert texts[0] == texts[1] and all(a != b for a, b in zip(texts[0], texts[2]))


def test_the_lander_is_followed_in_data_of_lunar_lander_alone(run, tmp_path, capsys):
    from sae_diffusion.evaluation.run import default_colour

    assert default_colour(run.parent / "data") is None
    for name, expected in (
        ("LunarLander-v3", "lunar-lander"),
        ("LunarLanderContinuous-v3", "lunar-lander"),
        ("CartPole-v1", None),
    ):
        description = {
            "format": "sae-episodes", "version": 1, "env_id": name, "size": [8, 8], "action_space": {"kind": "discrete"},
        }  # fmt: skip
        write_json(tmp_path / "dataset.json", description)
        assert default_colour(tmp_path) == expected
    assert evaluate(run, f"--out={tmp_path}") == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["films"]["object"] is None
    assert "detected" not in capsys.readouterr().out


def test_refusals_are_one_line(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.move(copy / "config.yaml", tmp_path / "kept.yaml")
    for options, message in (
        (["evaluate"], "run_dir, films: name a run with --run-dir or films with --films, one of them"),
        (["evaluate", f"--run-dir={run}", f"--films={tmp_path / 'x.npz'}"], "run_dir, films: name a run"),
        (["evaluate", f"--run-dir={copy}", "--device=cpu"], f"data: {copy} does not say what it was trained on"),
        (["evaluate", f"--run-dir={run}", "--hold=0"], "hold: must be at least 1"),
        (["evaluate", f"--run-dir={tmp_path / 'none'}", f"--data={run.parent / 'data'}"], "must be a checkpoint or a run"),
        (["evaluate", f"--films={tmp_path / 'none.npz'}"], "No such file"),
        (["evaluate", f"--run-dir={run}", "--object-colour=mauve"], "object_colour: must be r,g,b or one of lunar-lander"),
        (["evaluate", f"--run-dir={run}", "--object-colour=9,9,9"], "colour: must have channels at least 32 apart"),
        (["evaluate", f"--run-dir={run}", "--in-flight=2"], "in_flight: must be None unless the network was trained with"),
    ):  # fmt: skip
        code, said = cli.main([*options]), capsys.readouterr().err
        assert code == 2 and message in said and said.strip().count("\n") == 0, (options, said)
