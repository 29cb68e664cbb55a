"""Denoising errors of held-out clips: the plain formula, frame by frame."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sae_diffusion.data import Clip, FrameStats
from sae_diffusion.diffusion.noise import derive_seed
from sae_diffusion.evaluation.intervals import Bootstrap
from sae_diffusion.evaluation.losses import denoising_errors, summarise_errors
from sae_diffusion.model import Denoiser, ModelConfig
from torch import nn

STATS = FrameStats((0.0, 0.1), (0.6, 0.5))


def clips(count: int, frames: int) -> list[Clip]:
    generator = np.random.default_rng(0)
    return [
        Clip(
            generator.integers(256, size=(frames, 4, 4, 2), dtype=np.uint8),
            np.array([-1, *generator.integers(3, size=frames - 1)]),
            f"clip {i}, frame 0",
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class Config:
    frames_per_block: int
    num_actions: int = 3
    action_dim: int = 0


class Averager(nn.Module):
    """D of a noisy frame = half of itself + the mean of the clean blocks before it (0 without) + its action / 10."""

    def __init__(self, block: int) -> None:
        super().__init__()
        self.config = Config(block)
        self.unused = nn.Parameter(torch.zeros(1))
        self.calls: list[torch.Tensor] = []

    def forward(self, x, sigma, actions=None, *, noisy_copies=1):
        assert not self.training and not torch.is_grad_enabled() and noisy_copies == 1
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
def test_errors_are_the_plain_formula(block, frames):
    """Six of seven clips, frame by frame; noise is drawn by level and place."""
    net, data, sigmas = Averager(block).train(), clips(7, frames), (0.3, 2.0)
    got = denoising_errors(net, data, STATS, sigmas, clips=6, batch_size=4, context_sigma=0.07, seed=5)
    assert net.training
    for place in range(6):
        x0 = STATS.normalize(data[place].frames).double()
        for level, sigma in enumerate(sigmas):
            generator = torch.Generator().manual_seed(derive_seed(5, level, place))
            noise = torch.randn(x0.shape, generator=generator).double()
            for i in range(frames):
                start = i // block * block
                base = (x0[i] + sigma * noise[i]) / 2 + data[place].actions[i] / 10 - x0[i]
                pasts = {
                    "full_context": x0[:start].mean(0) if start else 0,
                    "last_frame": x0[start - block : start].mean(0) if start else None,
                    "no_context": 0 if start else None,
                }
                for name, past in pasts.items():
                    value = got[name][place, level, i]
                    if past is None:
                        assert np.isnan(value), name
                    else:
                        assert value == pytest.approx((base + past).square().mean().item(), rel=1e-5), name
        for i in range(block, frames):
            expected = (x0[i // block * block - 1] - x0[i]).square().mean().item()
            assert got["copy"][place, i] == pytest.approx(expected, rel=1e-5)
    labels = {s for sigma in net.calls for s in sigma.unique().tolist()}
    assert sorted(labels) == pytest.approx([0.07, 0.3, 2.0])
    again = denoising_errors(net, data, STATS, sigmas, clips=6, batch_size=2, context_sigma=0.07, seed=5)
    for name, table in got.items():
        np.testing.assert_allclose(again[name], table, rtol=1e-6)


def test_the_summary_is_over_frames_with_a_past_but_by_frame_over_all():
    net = Averager(1).eval()
    errors = denoising_errors(net, clips(4, 3), STATS, (0.3, 2.0), clips=4)
    result = summarise_errors(errors, (0.3, 2.0), 1, Bootstrap(4))
    assert result["sigma"] == [0.3, 2.0] and result["clips"] == 4
    for name in ("full_context", "last_frame", "no_context"):
        assert result[name]["value"] == pytest.approx(errors[name][:, :, 1:].mean((0, 2)))
        assert all(low < value < high for low, value, high in zip(*(result[name][k] for k in ("low", "value", "high"))))
    assert result["copy"]["value"] == pytest.approx(errors["copy"][:, 1:].mean())
    by_frame = result["by_frame"]
    np.testing.assert_allclose(by_frame["full_context"]["value"], errors["full_context"].mean(0))
    assert by_frame["copy"]["value"][0] is None and len(by_frame["copy"]["value"]) == 3


def test_clips_without_a_past_are_refused():
    with pytest.raises(ValueError, match=r"^dataset: clips must have two blocks = 4 frames, got 3"):
        denoising_errors(Averager(2).eval(), clips(3, 3), STATS, (1.0,))
    with pytest.raises(ValueError, match=r"^clips, dataset: "):
        denoising_errors(Averager(2).eval(), clips(3, 4), STATS, (1.0,), clips=0)


def test_with_the_real_network():
    config = ModelConfig(
        height=4, width=4, channels=2, model_channels=8, channel_mult=(1,), blocks_per_level=1, video_attention=(4,),
        head_dim=8, num_actions=3,
    )  # fmt: skip
    torch.manual_seed(0)
    errors = denoising_errors(Denoiser(config), clips(4, 3), STATS, (0.5, 4.0), clips=4)
    # untrained: D = c_skip x, whatever the context
    full, last, none = (errors[name][..., 1:] for name in ("full_context", "last_frame", "no_context"))
    np.testing.assert_array_equal(full, last)
    np.testing.assert_array_equal(full, none)
