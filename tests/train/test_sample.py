"""`sae sample` takes what it is given: short data, one file, few own clips, any split, actions from a file, many videos."""

from __future__ import annotations

import json
import math

import av
import numpy as np
import pytest
from PIL import Image
from sae_diffusion import cli
from sae_diffusion.data.dataset import is_heldout
from sae_diffusion.media import SCREEN, fit_grid, write_mp4

SIZE = 16
FRACTION = 0.5
MODEL = (
    f"--model.height={SIZE} --model.width={SIZE} --model.model-channels=4 --model.channel-mult 1 2 --model.video-attention=4 "
    f"--model.window=None --clip-length=4 --batch-size=2 --num-workers=0 --no-tensorboard --clips.heldout-fraction={FRACTION} "
    "--device=cpu --steps=1 --sampler.sampling-steps=1"
).split()


def write_clips(folder, lengths, heldout, seed=0):
    """npz clips with actions of 3 kinds, all of which fall on one side of the split; returns their frames."""
    folder.mkdir(exist_ok=True)
    rng, names = np.random.default_rng(seed), (f"clip{i}.npz" for i in range(1000))
    videos = []
    for length in lengths:
        name = next(name for name in names if is_heldout(f"{name}/0", FRACTION) == heldout)
        frames = rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8)
        np.savez(
            folder / name, frames=frames, actions=rng.integers(0, 3, length) if length > 9 else np.arange(length) % 3
        )
        videos.append(frames)
    return videos


@pytest.fixture(scope="module")
def train_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "train"
    write_clips(folder, [8, 8, 8], heldout=False)
    return folder


@pytest.fixture(scope="module")
def run(train_data):
    out = train_data.parent / "run"
    assert cli.main(["train", f"--data={train_data}", f"--run-dir={out}", *MODEL]) == 0
    return out


def sample(run, tmp_path, *options):
    """Exit code, and the arrays written."""
    tmp_path.mkdir(exist_ok=True)
    npz = tmp_path / "videos.npz"
    npz.unlink(missing_ok=True)
    code = cli.main(
        [
            "sample",
            f"--run-dir={run}",
            f"--out={tmp_path}",
            f"--npz={npz}",
            "--scale=1",
            "--device=cpu",
            *map(str, options),
        ]
    )
    return code, (dict(np.load(npz)) if npz.exists() else None)


def test_short_clips_are_continued_as_far_as_they_go_with_a_note(run, tmp_path, capsys):
    folder = tmp_path / "data"
    videos = write_clips(folder, [9, 7, 7, 12], heldout=True)
    for options in ((), ("--frames=28",)):
        capsys.readouterr()
        code, arrays = sample(run, tmp_path / "out", "--data", folder, *options)
        assert code == 0
        assert "clips have 7 frames, so 4 are given and 3 generated instead of 4 and 28" in capsys.readouterr().err
        assert arrays["generated"].dtype == arrays["recorded"].dtype == np.uint8
        assert arrays["generated"].shape == arrays["recorded"].shape == (4, 7, SIZE, SIZE, 3) and arrays["context"] == 4
        assert np.array_equal(arrays["recorded"][:, :4], arrays["generated"][:, :4])
        shown = {film[i : i + 7].tobytes() for film in videos for i in range(len(film) - 6)}
        assert {film.tobytes() for film in arrays["recorded"]} <= shown
    # One film may take the longest clip; a context longer than the data gets shorter.
    assert sample(run, tmp_path / "out", "--data", folder, "--samples=1")[1]["generated"].shape[1] == 12
    code, arrays = sample(run, tmp_path / "out", "--data", folder, "--context=10", "--samples=4")
    assert code == 0 and arrays["context"] == 6 and arrays["generated"].shape[1] == 7
    # Where no recorded actions are needed there are as many frames as asked for.
    code, arrays = sample(run, tmp_path / "out", "--data", folder, "--actions=random", "--frames=9")
    assert code == 0 and arrays["generated"].shape[1] == 13 and "recorded" not in arrays
    short = tmp_path / "short"
    write_clips(short, [1], heldout=True)
    assert sample(run, tmp_path / "out", "--data", short)[0] == 2
    assert "must have at least 2 frames, got 1 in the longest" in capsys.readouterr().err


def test_split_names_the_episodes_that_are_continued(run, train_data, tmp_path, capsys):
    folder = tmp_path / "data"
    heldout = write_clips(folder, [8, 8], heldout=True, seed=1)
    train = write_clips(folder, [8], heldout=False, seed=2)
    for split, wanted in (("heldout", heldout), ("train", train), ("all", heldout + train), ("None", heldout)):
        code, arrays = sample(run, tmp_path / "out", "--data", folder, "--split", split, "--frames=4")
        assert code == 0
        assert {film.tobytes() for film in arrays["recorded"]} == {film.tobytes() for film in wanted}
    # Nothing is held out: all of it is taken, unless held-out episodes were asked for.
    capsys.readouterr()
    code, arrays = sample(run, tmp_path / "out", "--data", train_data, "--frames=4")
    assert code == 0 and len(arrays["recorded"]) == 3
    assert "none of 3 episodes is held out" in capsys.readouterr().err
    assert sample(run, tmp_path / "out", "--data", train_data, "--split=heldout")[0] == 2
    assert "split: 'heldout' must have episodes, got none of the 3" in capsys.readouterr().err


def test_any_file_is_context(run, train_data, tmp_path, capsys):
    film = np.random.default_rng(3).integers(0, 256, (10, 2 * SIZE, 2 * SIZE, 3), dtype=np.uint8)
    video = tmp_path / "clip.mp4"
    write_mp4(video, film)
    code, arrays = sample(run, tmp_path / "out", "--data", video, "--frames=2", "--samples=1")
    assert code == 0 and arrays["generated"].shape == (1, 6, SIZE, SIZE, 3)
    # Its actions are unknown; random ones for the new frames follow the unknown ones.
    assert sample(run, tmp_path / "out", "--data", video, "--actions=random", "--frames=9", "--samples=1")[0] == 0
    one = sorted(train_data.glob("*.npz"))[0]
    capsys.readouterr()
    code, arrays = sample(run, tmp_path / "out", "--data", one, "--frames=3")
    assert code == 0 and np.array_equal(arrays["recorded"][0], np.load(one)["frames"][:7])
    assert "held out" not in capsys.readouterr().err
    np.savez(tmp_path / "vectors.npz", frames=film[:, :SIZE, :SIZE], actions=np.zeros((10, 2), np.float32))
    assert sample(run, tmp_path / "out", "--data", tmp_path / "vectors.npz")[0] == 2
    assert "actions: must be 3 discrete actions" in capsys.readouterr().err


def test_actions_come_from_a_file(run, train_data, tmp_path, capsys):
    rows = [0, 2, 1, 1, 2]
    np.save(tmp_path / "a.npy", rows)
    (tmp_path / "a.csv").write_text("action\n" + "\n".join(map(str, rows)))
    (tmp_path / "a.json").write_text(json.dumps({"actions": rows}))
    given = [
        sample(run, tmp_path / "out", "--data", train_data, "--actions", tmp_path / f"a.{kind}", "--ema=None")
        for kind in ("npy", "csv", "json")
    ]
    assert [code for code, _ in given] == [0, 0, 0]
    first = given[0][1]["generated"]
    assert first.shape[1] == 4 + len(rows), "a frame for each row"
    assert all(np.array_equal(arrays["generated"], first) for _, arrays in given)
    # From nothing, and fewer frames than rows.
    code, arrays = sample(run, tmp_path / "out", "--actions", tmp_path / "a.npy", "--frames=2", "--samples=2")
    assert code == 0 and arrays["generated"].shape[:2] == (2, 2)
    np.save(tmp_path / "many.npy", [0, 3])
    np.save(tmp_path / "floats.npy", [[0.0], [1.0]])
    capsys.readouterr()
    for options, message in (
        (("--actions=wandering",), "actions: must be recorded, random or a file, got 'wandering'"),
        (("--actions", tmp_path / "a.npy", "--frames=6"), "must have a row for each of 6 frames, got 5"),
        (("--actions", tmp_path / "many.npy"), "actions: must be 3 discrete actions"),
        (("--actions", tmp_path / "floats.npy"), "actions: must be 3 discrete actions"),
        (("--guide", run), "--guide CHECKPOINT and --guidance-kind auto go together"),
        (("--guidance-kind=auto", "--guidance=2"), "--guide CHECKPOINT and --guidance-kind auto go together"),
    ):
        assert sample(run, tmp_path / "out", *options)[0] == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_many_videos_share_a_screen(run, tmp_path):
    assert cli.main(
        ["sample", f"--run-dir={run}", f"--out={tmp_path}", "--frames=1", "--samples=100", "--scale=16", "--device=cpu"]
    ) == 0  # fmt: skip
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert gif.size[0] <= SCREEN[1] and gif.size[1] <= SCREEN[0]
    with av.open(str(tmp_path / "rollout.mp4")) as container:
        assert container.streams.video[0].height <= SCREEN[0] + 1


def test_videos_stand_in_a_grid_that_fits():
    assert fit_grid(4, (64, 64), ["recorded", "generated"], 4) == (4, 4), "a few videos are one line, as large as asked"
    for videos in (1, 5, 37, 100, 400):
        columns, scale = fit_grid(videos, (64, 64), ["recorded", "generated"], 4)
        assert 1 <= scale <= 4 and columns * (64 * scale + 8) <= SCREEN[1]
        assert -(-videos // columns) * 2 * (64 * scale + 8) <= SCREEN[0]
    with pytest.raises(ValueError, match=r"videos: must fit into a picture of .* pixels, got 100000 of 64x64"):
        fit_grid(100_000, (64, 64), ["generated"], 4)
    with pytest.raises(ValueError, match="frames: must be at most 8190 pixels"):
        write_mp4("never.mp4", np.zeros((1, 2, 9000, 3), np.uint8))


def test_training_says_what_it_skips_and_that_nothing_is_held_out(tmp_path, capsys):
    folder = tmp_path / "data"
    write_clips(folder, [8, 8, 2], heldout=False)
    (folder / "broken.npz").write_bytes(b"no archive")
    arguments = ["train", f"--data={folder}", f"--run-dir={tmp_path / 'run'}", *MODEL, "--sample-every=1"]
    assert cli.main(arguments) == 0
    err = capsys.readouterr().err
    assert err.count("warning: none of 2 episodes is held out") == 1
    assert err.count(f"skipped {folder / 'broken.npz'}: unreadable npz") == 1
    assert err.count("must have at least 4 frames, got 2") == 1
    # Strips show what there is.
    assert (tmp_path / "run" / "samples" / "step-0000001.png").exists()
    write_clips(folder, [8], heldout=True)
    assert cli.main([*arguments[:-1], f"--run-dir={tmp_path / 'again'}"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_the_screen_shows_the_denoising_loss_and_its_held_out_value(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_diffusion.progress.EVERY", math.inf)  # no lines between, however slow the machine
    folder = tmp_path / "data"
    write_clips(folder, [8, 8, 8], heldout=False)
    weights = {}
    for name, heldout in (("without", False), ("with", True)):
        if heldout:
            write_clips(folder, [8, 8, 3], heldout=True)
        out = tmp_path / name
        options = ["--steps=4", "--log-every=1", "--heldout-every=2", "--no-tensorboard"]
        assert cli.main(["train", f"--data={folder}", f"--run-dir={out}", *MODEL, *options]) == 0
        err = capsys.readouterr().err
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        shown = [line for line in err.splitlines() if line.startswith("train ")]
        assert len(shown) == len(records) == 4
        # The first fit of the normaliser comes later: until then both are the same number.
        for line, record in zip(shown, records, strict=True):
            assert f"loss {record['loss']:.4f}" in line and " left" in line
            assert record["normalised_loss"] == pytest.approx(record["loss"], rel=1e-5)
        assert [("heldout_loss" in record) for record in records] == [heldout and i % 2 == 1 for i in range(4)]
        assert ("held out" in shown[1]) == heldout
        if heldout:
            first, last = records[1]["heldout_loss"], records[3]["heldout_loss"]
            assert first != last and f"held out {last:.4f}" in shown[3]
        weights[name] = (out / "step-0000004" / "model.safetensors").read_bytes()
    assert weights["with"] == weights["without"], "measuring changes no bit of training"
