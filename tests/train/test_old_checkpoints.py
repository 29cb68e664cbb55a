"""Checkpoints as the three trainers wrote them before they shared a loop: today's code takes them up to the bit.

old_checkpoints/ holds step 3 of each kind of run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_diffusion.images.config import ImageTrainConfig, NetConfig
from sae_diffusion.images.data import ImageSet
from sae_diffusion.images.train import ImageTrainer
from sae_diffusion.series import SeriesModelConfig, Source
from sae_diffusion.series.config import ScheduleConfig, SeriesTrainConfig
from sae_diffusion.series.train import SeriesTrainer
from sae_diffusion.train import Trainer
from safetensors.torch import load_file
from train_stubs import STATS, Stub, StubClips, StubConfig, config

OLD = Path(__file__).with_name("old_checkpoints")


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}:{name}": t for f in sorted(path.glob("*.safetensors")) for name, t in load_file(f).items()}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def resume_and_go_on(make, tmp_path: Path, kind: str, added: tuple[str, ...] = ()) -> list[str]:
    """Take up the old checkpoint, write it again, and go on from both; metrics' lines of the first."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(OLD / kind, old)
    first = make(old)
    first.resume()
    assert first.step == 3
    first.run_dir, first._saved_step = new, None
    first.save()
    first.run_dir = old
    written = tensors(new / "step-0000003")
    assert_same(
        {k: v for k, v in written.items() if k.partition(":")[0] not in added}, tensors(OLD / kind / "step-0000003")
    )
    first.train()
    first.close()
    second = make(new)
    second.train()
    second.close()
    assert first.step == second.step == 6
    assert_same(tensors(old / "step-0000006"), tensors(new / "step-0000006"))
    return (old / "metrics.jsonl").read_text().splitlines()


def video(run_dir: Path, objective: str) -> Trainer:
    settings = config(
        run_dir, log_every=4, checkpoint_every=3, normalizer_size=40, objective=objective, keep_checkpoints=0,
        spatial_every=2 if objective == "teacher" else 0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Trainer(settings, Stub(StubConfig(width=4)), StubClips(), STATS)


@pytest.mark.parametrize("objective", ["teacher", "forcing"])
def test_video(tmp_path, capsys, objective):
    lines = resume_and_go_on(lambda folder: video(folder, objective), tmp_path, objective)
    # settings that were dropped since are no change
    assert "resuming" in (out := capsys.readouterr().out) and "changed since" not in out
    assert [json.loads(line)["step"] for line in lines] == [3, 4, 6]


def series(run_dir: Path) -> SeriesTrainer:
    settings = SeriesTrainConfig(
        run_dir=run_dir, source=Source(length=5), schedule=ScheduleConfig(kind="independent"),
        model=SeriesModelConfig(width=8, layers=1, heads=2, expansion=2), steps=6, batch=8, warmup=2, log_every=2,
        checkpoint_every=3, keep=0, tensorboard=False, device="cpu",
    )  # fmt: skip
    return SeriesTrainer(settings)


def test_series(tmp_path, capsys):
    lines = resume_and_go_on(series, tmp_path, "series", added=("loss.safetensors",))
    assert "changed since" not in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]


def images(run_dir: Path) -> ImageTrainer:
    pixels = np.random.default_rng(0).integers(0, 16, (24, 1, 4, 4), dtype=np.uint8)
    net = NetConfig(channels=8, channel_mult=(1,), groups=4, token_channels=4, heads=1, fourier=0)
    settings = ImageTrainConfig(net=net, basis="dct", steps=6, batch_size=4, warmup=2)
    return ImageTrainer(
        settings, ImageSet("noise", 16, pixels[:20], pixels[20:]), run_dir, checkpoint_every=3, log_every=2
    )


def test_images(tmp_path, capsys):
    lines = resume_and_go_on(images, tmp_path, "images", added=("loss.safetensors",))
    assert "changed since" not in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in lines] == [4, 6]  # there were none before
    assert list((tmp_path / "old" / "tensorboard").iterdir())
