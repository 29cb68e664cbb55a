"""Trained networks that come with the package."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_diffusion import cli, continue_clips, load_denoiser, load_pretrained, open_dataset
from sae_diffusion.pretrained import CARD, export_run, pretrained_folder, pretrained_names
from sae_diffusion.settings import read_run_settings
from sae_diffusion.train.checkpoint import read_state, verify_checkpoint

NAMES = pretrained_names()


def test_there_is_one():
    assert "lunar-lander" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_is_small_whole_and_knows_no_machine(name):
    folder = pretrained_folder(name)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    (checkpoint,) = folder.glob("step-*")
    assert verify_checkpoint(checkpoint) is None
    for path in files:
        if path.suffix in (".json", ".yaml"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"[\"' :]/\w", text), path
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    assert {"command", "data", "seconds", "threads", "measured"} <= card.keys()
    assert read_state(checkpoint)["step"] == card["steps"]


@pytest.mark.parametrize("name", NAMES)
def test_continues_its_own_clips_and_others(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--frames 2 --samples 2 --sampling-steps 2 --device cpu"
    assert cli.main(f"sample --pretrained {name} {options} --npz films.npz".split()) == 0
    films = np.load("films.npz")
    assert films["generated"].shape == films["recorded"].shape == (2, 6, 64, 64, 3)
    assert Path("runs", name, "samples", "strip.png").is_file()
    own = pretrained_folder(name) / "data"
    assert cli.main(f"sample --pretrained {name} --data {own} --split all {options} --npz again.npz".split()) == 0
    assert np.array_equal(np.load("again.npz")["generated"], films["generated"])


@pytest.mark.parametrize("name", NAMES)
def test_predicts_the_next_frame_better_than_copying(name):
    """The weights are trained ones, in the precision that they come in."""
    model, stats, _ = load_pretrained(name)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    folder = pretrained_folder(name)
    settings = read_run_settings(folder)
    assert settings is not None
    clips = open_dataset(folder / "data", 5, clip_stride=8)
    chosen = [clips[i] for i in range(0, len(clips), len(clips) // 8)][:8]
    films = continue_clips(model, stats, chosen, 1, settings[1], context=4)
    recorded = films.truth[:, 4].astype(float)
    errors = [np.square(guess.astype(float) - recorded).mean() for guess in (films.frames[:, 4], films.frames[:, 3])]
    assert errors[0] < errors[1] / 2


def test_names_what_there_is(capsys):
    assert cli.main(["sample", "--pretrained", "pong"]) == 2
    assert "pretrained: must be one of" in capsys.readouterr().err
    assert cli.main(["evaluate", "--pretrained", "lunar-lander", "--run-dir", "x"]) == 2
    assert "pretrained: must not be given with --run-dir" in capsys.readouterr().err


def test_export_keeps_the_average_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    micro = (
        "--model.height=16 --model.width=16 --model.model-channels=4 --model.channel-mult 1 2 --model.video-attention=4 "
        "--clip-length=4 --num-workers=0 --no-tensorboard --steps=2 --clips.heldout-fraction=0.5 --device=cpu"
    )
    assert (
        cli.main(
            [
                "collect",
                "--out",
                "data",
                "--episodes",
                "6",
                "--size",
                "16",
                "16",
                "--max-frames",
                "8",
                "--frame-skip",
                "4",
            ]
        )
        == 0
    )
    assert cli.main(["train", "--data=data", "--run-dir=run", *micro.split()]) == 0
    out = export_run("run", "lander", ema=0.05, data="data", card={"made": "here"})
    average, _, _ = load_denoiser("run", 0.05)
    loaded, _, state = load_denoiser(out)
    for name, value in loaded.named_parameters():
        assert torch.equal(value, average.get_parameter(name).half().float()), name
    for name, value in loaded.named_buffers():
        assert torch.equal(value, average.get_buffer(name)), name
    assert state["train_config"]["data"] == "" and state["train_config"]["run_dir"] == "runs/lander"
    text = (out / "config.yaml").read_text(encoding="utf-8")
    assert "heldout_fraction: 1.0" in text
    with pytest.raises(FileExistsError):
        export_run("run", "lander", ema=0.05, data="data", card={})
