"""Each known defect of the original system that concerns the network, pinned."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import changed_frames, clip, small
from sae_diffusion.model import ModelConfig
from sae_diffusion.model.attention import TemporalAttention
from sae_diffusion.model.frame_pass import ROTARY_BASE, FramePass

from sae_kernels import FrameLayout, qk_prepare


def attention_and_pass(height: int, frames: int, copies: int = 1) -> tuple[TemporalAttention, FramePass]:
    config = ModelConfig(height=height, width=height, channels=2, model_channels=16, channel_mult=(1,),
                         video_attention=(height,), head_dim=8)  # fmt: skip
    c_noise = torch.zeros(1, (1 + copies) * frames, dtype=torch.float64)
    return TemporalAttention(16, config).double(), FramePass(config, "sequence", frames, c_noise, noisy_copies=copies)


def dense_attention(module: TemporalAttention, x: torch.Tensor, T: int) -> torch.Tensor:
    """The same attention with the mask written out frame by frame and the rotation as a complex product."""
    B, C, frames, Y, X = x.shape
    P, H, D = Y * X, module.heads, C // module.heads
    qkv = module.qkv(x.permute(0, 2, 3, 4, 1)).reshape(B, frames * P, 3, H, D)
    qkv = qkv / (1e-4 + qkv.square().mean(-1, keepdim=True).sqrt())
    position = torch.tensor([f % T for f in range(frames)]).repeat_interleave(P)
    frequency = torch.tensor([10000.0 ** (-2 * j / D) for j in range(D // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), position[:, None] * frequency)[:, None]

    def turned(t):
        z = torch.complex(t[..., : D // 2].contiguous(), t[..., D // 2 :].contiguous()) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    q, k, v = (t.transpose(1, 2) for t in (turned(qkv[:, :, 0]), turned(qkv[:, :, 1]), qkv[:, :, 2]))
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for a in range(frames):
        for b in range(frames):
            clean_past = b < T and (b <= a if a < T else b < a % T)
            sees[a, b] = clean_past or a == b
    mask = sees.repeat_interleave(P, 0).repeat_interleave(P, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return module.proj(out.transpose(1, 2).reshape(B, frames, Y, X, C)).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("frames", [3, 8, 16])
@pytest.mark.parametrize("height", [4, 8])  # 16 and 64 tokens: less than a 128-token tile, which lost clean context
def test_mask_is_exact_at_small_frames(height, frames):
    if height == 8 and frames == 16:
        frames = 9
    module, frame_pass = attention_and_pass(height, frames)
    x = torch.randn(1, 16, 2 * frames, height, height, dtype=torch.float64)
    with torch.no_grad():
        got, want = module(x, frame_pass), dense_attention(module, x, frames)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_every_noisy_frame_sees_the_frame_just_before_it():
    T = 16
    module, frame_pass = attention_and_pass(4, T)
    x = torch.randn(1, 16, 2 * T, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        before = module(x, frame_pass)
        for i in range(1, T):
            x2 = x.clone()
            x2[:, :, i - 1] += 1
            assert not torch.equal(module(x2, frame_pass)[:, :, T + i], before[:, :, T + i]), i


def test_any_sequence_length_has_a_result():
    for frames in (1, 3, 5):  # 3 x 16 tokens is no multiple of 128
        net = small()
        x, sigma, actions = clip(net, 1, frames, 2)
        with torch.no_grad():
            assert torch.isfinite(net(x, sigma, actions)).all()


@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_both_copies_of_a_frame_have_one_position(mixing, f):
    """A noisy copy that equals its clean frame, sigma included, sees the same and must give the same."""
    net = small(temporal_mixing=mixing, frames_per_block=f)
    x, sigma, actions = clip(net, 1, 6)
    with torch.no_grad():
        out = net(x.repeat(1, 3, 1, 1, 1), sigma.repeat(1, 3), actions, noisy_copies=2)
    for copy in (out[:, 6:12], out[:, 12:]):
        torch.testing.assert_close(copy, out[:, :6], rtol=0, atol=1e-12)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """One head x (D,), as the network turns it at this frame."""
    q, *_ = qk_prepare(*[x.expand(1, 1, 1, -1)] * 2, positions=FrameLayout(1, 1, noisy_copies=0), start=position,
                       base=ROTARY_BASE, normalize=False)  # fmt: skip
    return q[0, 0, 0]


@pytest.mark.parametrize("position", [0, 63, 1024, 100_000, 10_000_000])
def test_rotary_phases_stay_exact_in_long_videos(position):
    """fp16 phases were wrong by 0.16 rad at frame 1024; the decay's inverse overflowed near frame 1000."""
    cos, sin = rotated(torch.tensor([1.0] * 32 + [0.0] * 32), position).chunk(2)
    for j in range(32):
        phase = position * 10000.0 ** (-2 * j / 64)
        assert math.hypot(cos[j].item() - math.cos(phase), sin[j].item() - math.sin(phase)) < 1e-6


def test_attention_depends_on_distances_only():
    q, k = torch.randn(2, 64)
    products = torch.stack([(rotated(q, s + 7) * rotated(k, s)).sum() for s in (0, 1000, 100_000)])
    assert torch.isfinite(products).all()
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(products[2], products[0], rtol=0, atol=1e-4)
    assert abs((rotated(q, 8) * rotated(k, 0)).sum() - products[0]) > 1e-2


def test_chunk_of_several_frames_after_a_cache():
    """The original raised NotImplementedError here."""
    net = small(temporal_mixing="gated")
    x, sigma, actions = clip(net, 1, 5)
    with torch.no_grad():
        want = net(x, sigma, actions, noisy_copies=0)
    cache = net.new_cache(1)
    net.prefill(x[:, :2], sigma[:, :2], actions[:, :2], cache)
    got = net.prefill(x[:, 2:], sigma[:, 2:], actions[:, 2:], cache)
    torch.testing.assert_close(got, want[:, 2:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_time_before_the_video_is_ones(mixing):
    """Two frames of constant ones, as in training, also in front of an empty cache; space around them is zero."""
    net = small(temporal_mixing=mixing)
    conv = net.unet.conv_in
    x = torch.randn(1, 3, 1, 8, 8, dtype=torch.float64)
    c_noise = torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        weight = conv._all_taps()
        last_scale, past_scale = (1.0, 1.0) if conv.gate is None else conv.gate(c_noise, torch.zeros(1))
        past = F.conv2d(torch.ones(1, 3, 8, 8, dtype=torch.float64), weight[:, :, 0] + weight[:, :, 1], padding=1)
        want = last_scale * F.conv2d(x[:, :, 0], weight[:, :, 2], padding=1) + past_scale * past
        got = conv(x, FramePass(net.config, "sequence", 1, c_noise))
        cached = conv(x, FramePass(net.config, "denoise", 1, c_noise, cache=net.new_cache(1)))
    torch.testing.assert_close(got[:, :, 0], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(cached[:, :, 0], want, rtol=0, atol=1e-12)


def test_tests_are_not_vacuous():
    """The original's network tests compared zeros: output and embedding gains start at zero."""
    net = small()
    x, sigma, actions = clip(net, 1, 4, 2)
    with torch.no_grad():
        out = net(x, sigma, actions)
        assert (out - x / (sigma**2 + 1)[:, :, None, None, None]).std() > 0.1
    assert changed_frames(net, x, sigma, actions, 0).sum() == 7
    for name, p in net.named_parameters():
        if p.ndim < 2:
            assert (p != 0).all(), name
