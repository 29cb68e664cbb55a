"""Training options that change what a clip's frames count: own frames as context, frames without past, cosine decay."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from sae_diffusion.diffusion.config import OwnContextConfig
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.train import TrainConfig, Trainer
from sae_diffusion.train.lr import cosine_lr
from train_stubs import STATS, StubClips

MODEL = ModelConfig(
    height=4, width=4, channels=2, model_channels=4, channel_mult=(1,), blocks_per_level=1, video_attention=(),
    head_dim=4, num_actions=3, prior="previous-frame", change_std=0.5,
)  # fmt: skip


def config(run_dir, **changes) -> TrainConfig:
    base = TrainConfig(
        run_dir=str(run_dir), clip_length=3, batch_size=4, micro_batch=2, noisy_copies=2, steps=6, lr=1e-2,
        lr_ref_steps=3, lr_ramp_steps=2, checkpoint_every=0, snapshot_every=0, log_every=1, num_workers=0,
        normalizer_every=2, tensorboard=False, device="cpu",
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def trainer(run_dir, model=MODEL, **changes) -> Trainer:
    torch.manual_seed(0)
    return Trainer(config(run_dir, **changes), Denoiser(model), StubClips(), STATS)


def weights(run: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


OWN = OwnContextConfig(start=4, ramp=2, given=1)
EVERYTHING = {"own_context": OWN, "first_weight": 0.25, "first_fit": True, "lr_decay": "cosine"}


def test_own_frames_begin_at_their_step(tmp_path):
    plain, own = trainer(tmp_path / "a"), trainer(tmp_path / "b", own_context=OWN)
    for run in (plain, own):
        run.train(until=3)
    assert torch.equal(weights(plain), weights(own))
    for run in (plain, own):
        run.train(until=6)
    assert not torch.equal(weights(plain), weights(own))


def test_resume_is_bit_exact_with_everything_on(tmp_path):
    whole = trainer(tmp_path / "whole", **EVERYTHING)
    whole.train()
    trainer(tmp_path / "parts", **EVERYTHING).train(until=4)
    rest = trainer(tmp_path / "parts", **EVERYTHING)
    assert rest.step == 4
    rest.train()
    assert torch.equal(weights(whole), weights(rest))
    for name, fit in whole.task.normalizers.items():
        for key, value in fit.state_dict().items():
            assert torch.equal(value, rest.task.normalizers[name].state_dict()[key]), (name, key)


def test_own_frames_with_spatial_steps(tmp_path):
    """A spatial-only step has no context; its frames all count alike."""
    run = trainer(tmp_path, **EVERYTHING, spatial_every=2)
    run.train()
    task, losses = run.task, torch.rand(4, 6)
    assert (
        task.minimised("spatial", torch.ones(4, 6), losses)
        == task.normalizers["spatial"](torch.ones(4, 6), losses).mean()
    )


def test_forcing_has_no_clean_copy_to_put_them_into(tmp_path):
    runs = [
        trainer(tmp_path / n, objective="forcing", own_context=own)
        for n, own in (("a", OwnContextConfig()), ("b", OWN))
    ]
    for run in runs:
        run.train()
    assert torch.equal(weights(runs[0]), weights(runs[1]))


def test_own_frames_are_made_without_gradient_and_change_the_context_alone(tmp_path, monkeypatch):
    run = trainer(tmp_path, own_context=OwnContextConfig(start=1, given=1))
    calls = []
    forward = run.model.forward

    def watched(x, sigma, *args, **options):
        calls.append((torch.is_grad_enabled(), options.get("noisy_copies"), x.clone(), sigma))
        return forward(x, sigma, *args, **options)

    monkeypatch.setattr(run.model, "forward", watched)
    run.train_step()
    assert [(grad, copies) for grad, copies, *_ in calls] == [(False, 1), (True, 2)] * 2
    first, second = calls[0], calls[1]
    # the level that the clip is labelled with is that of its noise, and the same in both
    assert torch.equal(first[3][:, :3], second[3][:, :3])


def test_first_frames_count_by_their_weight_and_have_their_own_fit(tmp_path):
    task = trainer(tmp_path, first_weight=0.25, first_fit=True).task
    levels, losses = torch.full((2, 6), 2.0), torch.rand(2, 6)
    losses[:, ::3] *= 100  # copies of 3 frames
    for _ in range(4):
        task.record("video", levels, losses)
    first, rest = losses.view(-1, 3)[:, :1], losses.view(-1, 3)[:, 1:]

    def fitted(values):
        return 10 ** values.log10().mean().item()

    for fit, values in (("first", first), ("video", rest)):
        assert task.normalizers[fit].expected_loss(torch.tensor(2.0)).item() == pytest.approx(fitted(values), rel=0.02)
    divided = torch.cat(
        [task.normalizers[fit](torch.full_like(v, 2.0), v) for fit, v in (("first", first), ("video", rest))], dim=1
    )
    want = (divided * torch.tensor([0.25, 1, 1])).sum() / (4 * 2.25)
    torch.testing.assert_close(task.minimised("video", levels, losses), want)
    _, loss = task.record("video", levels, losses)
    torch.testing.assert_close(loss, (0.25 * first.sum() + rest.sum()) / (4 * 2.25))


def test_weight_zero_leaves_the_first_frame_out(tmp_path):
    """Whatever the first frame is, the gradient is that of the others; the loss on record as well."""
    task = trainer(tmp_path, first_weight=0.0).task
    levels, losses = torch.full((2, 6), 2.0), torch.rand(2, 6)
    other = losses.clone()
    other[:, ::3] = 1e6
    assert task.minimised("video", levels, losses) == task.minimised("video", levels, other)
    assert task.record("video", levels, losses)[1] == task.record("video", levels, other)[1]
    with pytest.raises(ValueError, match=r"^first_weight: must be positive for clips of one block"):
        trainer(tmp_path / "b", dataclasses.replace(MODEL, frames_per_block=3), first_weight=0.0)


def test_heldout_loss_counts_frames_as_training_does(tmp_path):
    from sae_diffusion.train.evaluate import heldout_loss

    run, clips = trainer(tmp_path), StubClips(5)
    values = [
        heldout_loss(run.model, clips, STATS, config(tmp_path, first_weight=weight)) for weight in (1.0, 0.0, 1e6)
    ]
    # three frames: all alike, the last two, the first
    assert values[0] == pytest.approx((values[2] + 2 * values[1]) / 3, rel=1e-4)


def test_change_is_measured_on_the_data():
    from sae_diffusion.data import Clip

    class Walk:
        frame_shape, is_latent = (4, 4, 2), True

        def __len__(self):
            return 3

        def __getitem__(self, i):
            steps = torch.randn(50, 4, 4, 2, generator=torch.Generator().manual_seed(i)).numpy()
            return Clip(frames=0.2 * steps.cumsum(0), actions=None, source=str(i))

    stats = dataclasses.replace(STATS, mean=(1.0, 0.0), std=(2.0, 0.5), latent=True)
    expected = 0.2 * math.sqrt((1 / 2.0**2 + 1 / 0.5**2) / 2)
    assert stats.change_std(Walk()) == pytest.approx(expected, rel=0.05)  # 4,704 draws, 1 % each sd


def test_cosine_decay():
    lr = [cosine_lr(i, 2.0, steps=8, ramp_steps=2) for i in range(1, 10)]
    assert lr[0] == 1 and lr[1] == pytest.approx(1 + math.cos(math.pi / 8)) and lr[4] == pytest.approx(1)
    assert lr[8] == pytest.approx(0, abs=1e-12) and all(a > b for a, b in itertools.pairwise(lr[1:]))
    with pytest.raises(ValueError, match=r"^step: "):
        cosine_lr(0, 1.0, steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_weight": -1.0}, "^first_weight: must be at least 0"),
        ({"lr_decay": "linear"}, "^lr_decay: must be one of power, cosine, got 'linear'"),
    ],
)
def test_config_names_the_field(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
