from __future__ import annotations

import math

import pytest
import torch
from sae_diffusion.data import FrameStats
from sae_diffusion.diffusion.noise import derive_seed
from sae_diffusion.diffusion.sampler import SamplerConfig
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.train import evaluate
from sae_diffusion.train.evaluate import one_step_psnr, psnr, validate
from torch import nn
from train_stubs import STATS, StubClips, StubConfig


class Averager(nn.Module):
    """D of a noisy frame = half of itself + the mean of the clean blocks before it (0 without) + its action / 10."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.config = StubConfig(frames_per_block=block)
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x, sigma, actions=None, *, noisy_copies=1, spatial_only=False):
        assert not self.training and not torch.is_grad_enabled()
        assert not spatial_only
        self.calls.append(sigma)
        frames, block = x.shape[1] // 2, self.config.frames_per_block
        clean, noisy = x[:, :frames], x[:, frames:].clone() / 2
        for i in range(frames):
            start = i // block * block
            if start:
                noisy[:, i] += clean[:, :start].mean(dim=1)
            noisy[:, i] += actions[:, i, None, None, None] / 10
        return torch.cat([clean, noisy], dim=1)


@pytest.mark.parametrize(("block", "frames"), [(1, 4), (2, 4), (2, 5)])
def test_validate_is_the_plain_formula(block, frames):
    """Six of seven clips, frame by frame; noise is drawn by level and place, the first block is left out."""
    net, data, sigmas = Averager(block).train(), StubClips(7, frames), (0.3, 2.0)
    got = validate(net, data, STATS, sigmas, clips=6, batch_size=4, context_sigma=0.07, seed=5)
    assert net.training
    expected = {"full_context": [], "last_frame": [], "no_context": []}
    for level, sigma in enumerate(sigmas):
        sums = dict.fromkeys(expected, 0.0)
        for place, index in enumerate([0, 1, 2, 3, 4, 5]):
            clip = data[index]
            x0 = STATS.normalize(clip.frames).double()
            noise = torch.randn(
                x0.shape, generator=torch.Generator().manual_seed(derive_seed(5, level, place))
            ).double()
            for i in range(block, frames):
                start = i // block * block
                base = (x0[i] + sigma * noise[i]) / 2 + clip.actions[i] / 10
                pasts = {
                    "full_context": x0[:start].mean(0),
                    "last_frame": x0[start - block : start].mean(0),
                    "no_context": 0,
                }
                for name, past in pasts.items():
                    sums[name] += (base + past - x0[i]).square().mean().item() / (frames - block)
        for name, value in sums.items():
            expected[name].append((sigma**2 + 1) / sigma**2 * value / 6)
    assert got["sigma"] == [0.3, 2.0]
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-5), name
    labels = {s for sigma in net.calls for s in sigma.unique().tolist()}
    assert sorted(labels) == pytest.approx([0.07, 0.3, 2.0])
    assert validate(net, data, STATS, sigmas, clips=6, batch_size=2, context_sigma=0.07, seed=5) == {
        name: pytest.approx(values, rel=1e-6) for name, values in got.items()
    }


def test_validate_and_psnr_refuse_clips_without_a_past():
    net = Averager(2).eval()
    with pytest.raises(ValueError, match=r"^dataset: clips must have at least two blocks = 4 frames, got 3"):
        validate(net, StubClips(3, 3), STATS, (1.0,))
    with pytest.raises(ValueError, match=r"^dataset: clips must have at least two blocks = 4 frames, got 3"):
        one_step_psnr(net, StubClips(3, 3), STATS)
    with pytest.raises(ValueError, match=r"^clips, dataset: "):
        validate(net, StubClips(3, 4), STATS, (1.0,), clips=0)


def test_psnr_values():
    a = torch.zeros(4, 4, dtype=torch.uint8)
    assert psnr(a, a) == math.inf
    assert psnr(a, a + 255) == pytest.approx(0.0)
    assert psnr(a, a + 5) == pytest.approx(20 * math.log10(255 / 5))


@pytest.mark.parametrize(("block", "frames", "given"), [(1, 3, 2), (2, 5, 2)])
def test_one_step_psnr_compares_the_block_after_the_context(monkeypatch, block, frames, given):
    """`generate` replaced by the truth off by 8 grey levels."""
    data, seeds = StubClips(5, frames), []

    def generate(denoiser, context, actions, num_frames, config, *, seed):
        seeds.append(seed)
        first = sum(context.shape[0] for context in contexts)
        contexts.append(context)
        clips = [data[first + i] for i in range(context.shape[0])]
        assert torch.equal(context, torch.stack([STATS.normalize(c.frames[:given]) for c in clips]))
        assert actions.tolist() == [c.actions[: given + block].tolist() for c in clips]
        assert num_frames == block and config.sampling_steps == 7
        assert not denoiser.training
        return torch.stack([STATS.normalize(c.frames[given : given + block] - 8) for c in clips])

    contexts: list[torch.Tensor] = []
    monkeypatch.setattr(evaluate, "generate", generate)
    monkeypatch.setattr(StubClips, "__getitem__", lambda self, i, real=StubClips.__getitem__: brighter(real(self, i)))
    got = one_step_psnr(Averager(block).train(), data, STATS, SamplerConfig(sampling_steps=7), clips=5, batch_size=2)
    assert got["generated"] == pytest.approx(20 * math.log10(255 / 8))
    errors = [
        (c.frames[given : given + block].astype(float) - c.frames[given - 1]) ** 2 for c in (data[i] for i in range(5))
    ]
    assert got["copy_last_frame"] == pytest.approx(10 * math.log10(255**2 / (sum(e.mean() for e in errors) / 5)))
    assert got["clips"] == 5 and len(set(seeds)) == 3


def brighter(clip):
    return type(clip)(clip.frames // 2 + 100, clip.actions, clip.source)


def test_with_the_real_network():
    config = ModelConfig(
        height=4, width=4, channels=2, model_channels=8, channel_mult=(1,), blocks_per_level=1, video_attention=(4,),
        head_dim=8, num_actions=3,
    )  # fmt: skip
    torch.manual_seed(0)
    net = Denoiser(config)
    losses = validate(net, StubClips(4, 3), STATS, (0.5, 4.0), clips=4)
    # untrained: D = c_skip x, whatever the context
    assert losses["full_context"] == losses["last_frame"] == losses["no_context"]
    assert all(0.2 < value < 5 for value in losses["no_context"])
    got = one_step_psnr(net, StubClips(4, 3), STATS, SamplerConfig(sampling_steps=3), clips=4)
    assert 0 < got["generated"] < 30 and 0 < got["copy_last_frame"] < 30
    assert got == one_step_psnr(net, StubClips(4, 3), STATS, SamplerConfig(sampling_steps=3), clips=4)
    latents = FrameStats(STATS.mean, STATS.std, latent=True)
    with pytest.raises(TypeError, match="frames: must be floats"):
        one_step_psnr(net, StubClips(4, 3), latents)
