"""Diffusion forcing: the loss on one sequence with independent levels, its training, and its way through the CLI."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_diffusion.cli import main
from sae_diffusion.data import FrameStats
from sae_diffusion.diffusion.forcing import forcing_loss, forcing_sigmas
from sae_diffusion.diffusion.loss import loss_weight
from sae_diffusion.diffusion.noise import NoiseConfig
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.settings import read_run_settings
from sae_diffusion.train import Trainer, load_denoiser
from sae_diffusion.train.checkpoint import _digest, read_state
from safetensors.torch import load_file
from train_stubs import StubClips, StubConfig, config, trainer

from sae_kernels import FrameLayout, token_noise

TINY = ModelConfig(
    height=4, width=4, channels=2, model_channels=8, channel_mult=(1,), blocks_per_level=1, video_attention=(4,),
    head_dim=8, kernel_frames=2, num_actions=3,
)  # fmt: skip


def tiny(**changes) -> Denoiser:
    torch.manual_seed(1)
    net = Denoiser(ModelConfig(**(vars(TINY) | changes)))
    with torch.no_grad():
        net.unet.out_gain.fill_(0.7)
    return net


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {f"{f.name}:{name}": t for f in sorted(path.glob("*.safetensors")) for name, t in load_file(f).items()}


def assert_same(a: Path, b: Path) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def clips(batch: int = 2, frames: int = 3):
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(batch, frames, 2, 4, 4, generator=g)
    return x0, torch.randint(-1, 3, (batch, frames), generator=g), torch.rand(batch, frames, generator=g) * 3 + 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_the_weighted_error_of_the_plain_causal_pass(dtype):
    net = tiny().to(dtype)
    x0, actions, sigmas = clips()
    x0, sigmas = x0.to(dtype), sigmas.to(dtype)
    got = forcing_loss(net, x0, actions, sigmas, seed=5)
    layout = FrameLayout(frames=3, tokens_per_frame=16, noisy_copies=1)
    both = token_noise(x0, torch.ones(2, 6, dtype=dtype), torch.cat([sigmas, sigmas], dim=1), layout, seed=5)
    denoised = net(both[:, 3:], sigmas, actions, noisy_copies=0)
    want = loss_weight(sigmas) * (denoised - x0).square().mean(dim=(2, 3, 4))
    assert got.shape == (2, 3)
    torch.testing.assert_close(got, want.to(got.dtype), rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=0)
    plain = forcing_loss(lambda *a, noisy_copies: net(*a, noisy_copies=noisy_copies), x0, actions, sigmas, seed=5)
    torch.testing.assert_close(got, plain, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=0)
    assert not torch.equal(got, forcing_loss(net, x0, actions, sigmas, seed=6))


def test_every_frame_is_told_its_own_level_and_sees_the_noisy_past():
    seen = []

    def denoiser(x, sigma, actions, *, noisy_copies):
        assert noisy_copies == 0
        seen.append((x, sigma, actions))
        return x

    x0, actions, sigmas = clips()
    losses = forcing_loss(denoiser, x0, actions, sigmas, seed=1)
    x, told, same = seen[0]
    assert torch.equal(told, sigmas)
    assert torch.equal(same, actions)
    noise = (x - x0) / sigmas[:, :, None, None, None]
    assert noise.std().item() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(losses, loss_weight(sigmas) * (x - x0).square().mean(dim=(2, 3, 4)))


def test_gradients_reach_earlier_frames_noise_through_the_past():
    """The past of frame i is noisy: its loss changes with the level of frame i - 1, that of frame 0 with none."""
    net = tiny()
    x0, actions, sigmas = clips(1)
    before = forcing_loss(net, x0, actions, sigmas, seed=2)
    sigmas[:, 1] *= 3
    after = forcing_loss(net, x0, actions, sigmas, seed=2)
    assert (before != after)[0].tolist() == [False, True, True]


@pytest.mark.parametrize("shape", [(2, 6), (1, 3), (2,)])
def test_levels_of_another_shape_are_refused(shape):
    x0, actions, _ = clips()
    with pytest.raises(ValueError, match=r"sigmas: must have shape \(B, T\)"):
        forcing_loss(tiny(), x0, actions, torch.ones(shape), seed=0)


def test_levels_are_log_normal_or_those_of_finished_frames():
    config, generator = NoiseConfig(mean=1.0, std=0.3, context_sigma_max=0.1), torch.Generator().manual_seed(0)
    levels = forcing_sigmas(config, 2000, 6, generator, clean_frames=0.3)
    finished = levels <= 0.1
    assert levels.shape == (2000, 6)
    assert finished.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert levels[finished].min() >= config.context_sigma_min
    assert levels[finished].mean().item() == pytest.approx(0.05, abs=0.003)
    noisy = levels[~finished].log()
    assert noisy.mean().item() == pytest.approx(1.0, abs=0.02)
    assert noisy.std().item() == pytest.approx(0.3, abs=0.01)
    assert torch.corrcoef(levels.T).sub(torch.eye(6)).abs().max() < 0.1
    assert not (forcing_sigmas(config, 100, 6, clean_frames=0.0) < 0.5).any()
    blocks = forcing_sigmas(config, 50, 5, generator, frames_per_block=2)
    assert torch.equal(blocks[:, ::2][:, :2], blocks[:, 1::2])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return trainer(tmp_path_factory.mktemp("forcing"), objective="forcing").train().checkpoint


def test_stopped_and_resumed_run_is_bit_exact(uninterrupted, tmp_path):
    trainer(tmp_path, objective="forcing", steps=3).train()
    assert_same(trainer(tmp_path, objective="forcing").train().checkpoint, uninterrupted)
    assert read_state(uninterrupted)["train_config"]["objective"] == "forcing"


def test_noisy_copies_do_not_matter_and_the_objective_does(uninterrupted, tmp_path):
    assert_same(trainer(tmp_path / "a", objective="forcing", noisy_copies=1).train().checkpoint, uninterrupted)
    teacher = trainer(tmp_path / "b", noisy_copies=1).train().checkpoint
    assert not torch.equal(
        tensors(teacher)["model.safetensors:past.weight"], tensors(uninterrupted)["model.safetensors:past.weight"]
    )


def test_spatial_steps_and_blocks_train_too(tmp_path):
    t = trainer(tmp_path, objective="forcing", spatial_every=2, model_config=StubConfig(frames_per_block=3))
    seen = []
    original = t.module
    t.module = lambda x, sigma, actions, **options: (
        seen.append((sigma, options.get("spatial_only", False))) or original(x, sigma, actions, **options)
    )
    assert t.train().step == 6
    assert [spatial for _, spatial in seen] == [False, False, True, True] * 3
    for sigma, _ in seen:  # a block shares its level
        assert torch.equal(sigma, sigma[:, :1].expand(-1, 3))


def test_levels_of_a_sequence_are_independent(tmp_path):
    t = trainer(tmp_path, objective="forcing", steps=4)
    seen = []
    original = t.module
    t.module = lambda x, sigma, *a, **k: seen.append(sigma) or original(x, sigma, *a, **k)
    t.train()
    every = torch.cat(seen)
    assert every.shape == (16, 3)
    assert len(every.unique()) == 48


def test_objective_is_fixed_for_a_run_and_old_checkpoints_are_of_teacher_forcing(tmp_path, capsys):
    path = trainer(tmp_path, steps=1).train().checkpoint / "state.json"
    state = json.loads(path.read_text())
    del state["digest"], state["train_config"]["objective"], state["train_config"]["clean_frames"]
    path.write_text(json.dumps({**state, "digest": _digest(state)}))
    capsys.readouterr()
    trainer(tmp_path, steps=2)
    assert "changed since" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"objective: .* trained with 'teacher_forcing', this run has 'forcing'"):
        trainer(tmp_path, objective="forcing", steps=2)
    with pytest.raises(ValueError, match=r"clean_frames: must be in \[0, 1\], got 2"):
        config(tmp_path, clean_frames=2)
    with pytest.raises(ValueError, match="objective: must be one of teacher_forcing, forcing, got 'student'"):
        config(tmp_path, objective="student")


def test_real_network_trains_and_its_loss_falls(tmp_path):
    data, stats = StubClips(), FrameStats((0.0, 0.0), (0.6, 0.6))
    x0 = stats.normalize(np.stack([data[i].frames for i in range(13)]))
    actions = torch.from_numpy(np.stack([data[i].actions for i in range(13)]))

    def loss(net) -> float:
        with torch.no_grad():
            return forcing_loss(net.eval(), x0, actions, torch.full((13, 3), 1.0), seed=9).mean().item()

    net = tiny()
    before = loss(net)
    options = {"objective": "forcing", "steps": 20, "lr_ramp_steps": 5, "lr_ref_steps": 20, "log_every": 20}
    Trainer(config(tmp_path, **options), net, data, stats).train()
    assert loss(net) < 0.8 * before
    model, _, state = load_denoiser(tmp_path)
    assert state["train_config"]["objective"] == "forcing"
    assert loss(model) == loss(net)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for i in range(12):
        frames = rng.integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
        np.savez(folder / f"film{i}.npz", frames=frames, actions=rng.integers(0, 3, 9))
    return folder


MICRO = [
    "--model.height=16",
    "--model.width=16",
    "--model.model-channels=4",
    "--model.channel-mult",
    "1",
    "2",
    "--model.video-attention=4",
    "--clip-length=4",
    "--batch-size=2",
    "--num-workers=0",
    "--no-tensorboard",
    "--clips.heldout-fraction=0.5",
    "--device=cpu",
    "--steps=1",
    "--sampler.sampling-steps=3",
]


def test_command_line_trains_and_samples_with_a_window(recorded, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", f"--data={recorded}", f"--run-dir={run}", "--objective=forcing", *MICRO]) == 0
    sample = ["sample", f"--run-dir={run}", f"--data={recorded}", "--frames=4", "--context=2", "--device=cpu"]
    videos = {}
    for window in ("None", "1", "3"):
        out = tmp_path / window
        assert main([*sample, f"--in-flight={window}", f"--out={out}"]) == 0
        videos[window] = (out / "strip.png").read_bytes()
    assert videos["None"] == videos["1"] != videos["3"]
    nothing = ["sample", f"--run-dir={run}", "--frames=3", "--samples=1", "--device=cpu", f"--out={tmp_path / 'n'}"]
    assert main([*nothing, "--in-flight=2"]) == 0
    capsys.readouterr()
    assert main([*nothing, "--in-flight=4"]) == 2
    assert "in_flight: must be at most sampling_steps = 3 blocks" in capsys.readouterr().err


def test_command_line_refuses_a_window_for_teacher_forcing(recorded, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", f"--data={recorded}", f"--run-dir={run}", *MICRO]) == 0
    capsys.readouterr()
    assert main(["sample", f"--run-dir={run}", "--frames=2", "--in-flight=2", "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "sae: in_flight: must be None unless the network was trained with an independent noise level"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize("settings", ["config.yaml", "run.json"])
def test_a_run_from_when_the_objective_was_called_teacher_resumes_and_samples(recorded, tmp_path, capsys, settings):
    run = tmp_path / "run"
    train = ["train", f"--data={recorded}", f"--run-dir={run}", *MICRO, "--checkpoint-every=1"]
    assert main(train) == 0
    state_file = run / "step-0000001" / "state.json"
    state = json.loads(state_file.read_text())
    assert state["train_config"]["objective"] == "teacher_forcing" and state.pop("digest")
    state["train_config"]["objective"] = "teacher"
    state_file.write_text(json.dumps({**state, "digest": _digest(state)}))
    written = run / "config.yaml"
    text = written.read_text()
    assert "objective: teacher_forcing\n" in text
    written.write_text(text.replace("objective: teacher_forcing\n", "objective: teacher\n"))
    sample = ["sample", f"--run-dir={run}", "--frames=2", "--samples=1", "--device=cpu"]
    if settings == "run.json":
        clips, sampler = read_run_settings(run)
        values = {"objective": "teacher", "clips": dataclasses.asdict(clips), "sampler": dataclasses.asdict(sampler)}
        (run / "run.json").write_text(json.dumps(values))
        written.unlink()
        assert main(sample) == 0
    else:
        with pytest.warns(DeprecationWarning, match="objective teacher: is now called teacher_forcing"):
            assert main(sample) == 0
    capsys.readouterr()
    assert main([*train, "--steps=2"]) == 0
    out = capsys.readouterr().out
    assert "resuming" in out and "step 2" in out
    assert "objective: teacher_forcing\n" in written.read_text()
