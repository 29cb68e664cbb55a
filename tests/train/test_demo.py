"""The demonstration on a micro model: every file is there, metrics.json has its fields, and running again reuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from sae_diffusion.demo import DemoConfig, run
from sae_diffusion.diffusion.sampler import SamplerConfig
from sae_diffusion.presets import PRESETS, ClipConfig

TINY = PRESETS["tiny"]
MICRO = dataclasses.replace(
    TINY,
    model=dataclasses.replace(
        TINY.model, height=16, width=16, model_channels=4, channel_mult=(1, 2), video_attention=(4,)
    ),
    train=dataclasses.replace(
        TINY.train, clip_length=4, batch_size=2, steps=4, log_every=1, num_workers=0, tensorboard=False
    ),
    sampler=SamplerConfig(sampling_steps=2),
    clips=ClipConfig(heldout_fraction=0.5),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = DemoConfig(
        out=tmp_path_factory.mktemp("demo"),
        episodes=8,
        seconds=2000.0,
        context=2,
        frames=3,
        videos=2,
        eval_clips=2,
        drift_frames=6,
        workers=1,
    )
    return config, run(config, MICRO)


def test_every_file_is_there(finished):
    out = finished[0].out
    for name in (
        "lunar-lander/rollout.gif",
        "lunar-lander/strip.png",
        "rollout.gif",
        "rollout.mp4",
        "strip.png",
        "loss.png",
        "metrics.json",
        "metrics.jsonl",
        "evaluation/evaluation.json",
    ):
        assert (out / name).stat().st_size > 0, name
    assert (out / "step-0000004" / "model.safetensors").exists()
    with Image.open(out / "rollout.gif") as gif:
        assert gif.n_frames == 5


def test_metrics_have_their_fields(finished):
    config, returned = finished
    metrics = json.loads((config.out / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(returned))
    measured = metrics["evaluation"]
    assert measured["films"]["films"] == 2 and measured["films"]["frames"] == 3 and measured["drift"]["at"] == [6]
    assert measured["films"]["psnr"]["generated"]["by_horizon"]["value"][0] > 0
    assert np.isfinite(measured["errors"]["full_context"]["value"]).all()
    assert metrics["steps"] == 4 and metrics["clips_seen"] == 8 and metrics["episodes"] == 8
    assert 0 < metrics["train_seconds"] < config.seconds
    assert set(metrics["seconds"]) == {"pretrained", "record", "train", "sample", "evaluate"}


def test_running_again_reuses_what_is_there(finished, tmp_path, capsys):
    config, first = finished
    copy = shutil.copytree(config.out, tmp_path / "demo")  # others read what the first time left
    again = run(dataclasses.replace(config, out=copy), MICRO)
    assert "already trained" in capsys.readouterr().out
    assert again["steps"] == first["steps"] and again["train_seconds"] == first["train_seconds"]
    # The same weights, seed and clips: the same numbers to the last bit.
    assert json.dumps(again["evaluation"]) == json.dumps(first["evaluation"])
