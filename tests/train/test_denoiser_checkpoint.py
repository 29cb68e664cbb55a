"""Training, resuming and loading the real network."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from sae_diffusion.disk import file_digest
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.train import Trainer, load_denoiser
from sae_diffusion.train.checkpoint import _digest
from safetensors.torch import load_file, save_file
from train_stubs import STATS, StubClips, config

MODEL = ModelConfig(
    height=4, width=4, channels=2, model_channels=8, channel_mult=(1, 2), blocks_per_level=1, video_attention=(2,),
    frame_attention=(4,), head_dim=8, num_actions=3, dropout=0.1,
)  # fmt: skip


def train(run_dir, model_config=MODEL, **changes):
    torch.manual_seed(0)
    t = Trainer(config(run_dir, noisy_copies=1, spatial_every=2, **changes), Denoiser(model_config), StubClips(), STATS)
    return t, t.train()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), steps=4, snapshot_every=1)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_resume_is_bit_exact(tmp_path, mixing):
    model = dataclasses.replace(MODEL, temporal_mixing=mixing)
    whole = train(tmp_path / "a", model, steps=4)[1].checkpoint
    train(tmp_path / "b", model, steps=2)
    parts = train(tmp_path / "b", model, steps=4)[1].checkpoint
    for file in whole.glob("*.safetensors"):
        one, other = load_file(file), load_file(parts / file.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), file.name


def outputs(model):
    x = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.full((2, 6), 0.7), torch.ones(2, 3, dtype=torch.long))


def test_load_denoiser_gives_the_trained_network(trained):
    t, result = trained
    model, stats, meta = load_denoiser(result.checkpoint)
    assert not model.training and model.config == MODEL and stats == STATS
    assert meta["step"] == 4 and meta["clips_seen"] == 16
    t.model.eval()
    expected = outputs(t.model)
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(load_denoiser(result.checkpoint.parent)[0]), expected)
    for std in t.ema.stds:
        with t.ema_weights(std) as averaged:
            assert torch.equal(outputs(load_denoiser(result.checkpoint, ema=std)[0]), outputs(averaged))
    between = outputs(load_denoiser(result.checkpoint, ema=0.07)[0])
    assert not torch.equal(between, outputs(load_denoiser(result.checkpoint, ema=0.05)[0]))
    with pytest.raises(ValueError, match=r"^std: "):
        load_denoiser(result.checkpoint, ema=0.5)
    with pytest.raises(FileNotFoundError, match="must be a checkpoint or a run folder"):
        load_denoiser(result.checkpoint.parent / "ema")


def rewrite(path, **changes):
    """A checkpoint with another state.json that is consistent in itself."""
    state = json.loads((path / "state.json").read_text())
    state.pop("digest")
    state["model_config"] |= changes
    state["sha256"] = {name: file_digest(path / name) for name in state["sha256"]}
    (path / "state.json").write_text(json.dumps({**state, "digest": _digest(state)}))


def test_load_denoiser_names_what_does_not_fit(trained, tmp_path):
    _, result = trained
    for i, (change, message) in enumerate(
        [
            ({"model_channels": 16}, r"tensor unet\.\S+ must have shape \(.*\), got \("),
            (
                {"channel_mult": [1, 2, 2], "height": 8, "width": 8, "video_attention": [4], "frame_attention": []},
                r"tensor \S+ is (missing|unknown)",
            ),
            ({"model_channels": 0}, "^model_channels: "),
        ]
    ):
        path = tmp_path / str(i)
        shutil.copytree(result.checkpoint, path)
        rewrite(path, **change)
        with pytest.raises(ValueError, match=message):
            load_denoiser(path)
    path = tmp_path / "damaged"
    shutil.copytree(result.checkpoint, path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.safetensors: sha256 differs"):
        load_denoiser(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model_config"), "must have model_config"),
        (lambda state: state.update(frame_stats={}), "frame_stats has the wrong type, dict"),
        (lambda state: state["model_config"].update(colour=1), "must describe a denoiser .*colour"),
    ],
)
def test_a_state_that_describes_no_denoiser_is_named(trained, tmp_path, change, message):
    path = tmp_path / "x"
    shutil.copytree(trained[1].checkpoint, path)
    state = json.loads((path / "state.json").read_text())
    state.pop("digest")
    change(state)
    (path / "state.json").write_text(json.dumps({**state, "digest": _digest(state)}))
    with pytest.raises(ValueError, match=rf"x/state\.json: {message}"):
        load_denoiser(path)


def test_weights_that_are_not_finite_are_refused_or_passed_over(trained, tmp_path):
    run = tmp_path / "run"
    path = run / "step-0000009"
    shutil.copytree(trained[1].checkpoint, path)
    shutil.copytree(trained[1].checkpoint, run / trained[1].checkpoint.name)
    weights = load_file(path / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, path / "model.safetensors")
    rewrite(path)
    with pytest.raises(ValueError, match=rf"step-0000009/model\.safetensors: tensor {re.escape(name)} is not finite"):
        load_denoiser(path)
    with pytest.warns(RuntimeWarning, match="step-0000009 .*is not finite"):
        assert load_denoiser(run)[2]["step"] == 4


def test_a_large_configuration_is_refused_before_anything_is_allocated(trained, tmp_path):
    """A million channels would be terabytes: only shapes are made."""
    path = tmp_path / "huge"
    shutil.copytree(trained[1].checkpoint, path)
    rewrite(path, model_channels=2**17)
    with pytest.raises(ValueError, match="must have shape"):
        load_denoiser(path)


def test_resume_with_a_field_the_checkpoint_does_not_know_takes_its_default(trained, tmp_path):
    path = tmp_path / "run" / trained[1].checkpoint.name
    shutil.copytree(trained[1].checkpoint, path)
    state = json.loads((path / "state.json").read_text())
    state.pop("digest")
    del state["model_config"]["sink"]
    (path / "state.json").write_text(json.dumps({**state, "digest": _digest(state)}))
    assert train(path.parent, steps=4)[0].step == 4
    with pytest.raises(ValueError, match=r"^model_config\.sink: .* was trained with 0, this run has 2"):
        train(path.parent, dataclasses.replace(MODEL, sink=2), steps=4)
