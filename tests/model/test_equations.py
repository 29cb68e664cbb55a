"""The whole network once more, naively, from the published equations and a state dict: same numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import clip, small
from sae_diffusion.model.frame_pass import FramePass
from sae_diffusion.model.layers import Fourier


def unit(w):
    """Rows of unit RMS, then 1 / sqrt(fan_in)."""
    rms = w.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (w.ndim - 1))
    return w / (1e-4 + rms) / math.sqrt(w[0].numel())


def silu(x):
    return x * torch.sigmoid(x) / 0.596


def mix(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


class Naive:
    """Frame by frame: `past[i]` lists the input frames behind frame i, None for time before the video."""

    def __init__(self, net, T: int, copies: int) -> None:
        self.p, self.c, self.T = net.state_dict(), net.config, T
        self.F = (1 + copies) * T
        f = net.config.frames_per_block
        self.past, self.sees = [], []
        for frame in range(self.F):
            stream, i = divmod(frame, T)
            own_block = [stream * T + j for j in range(T) if j // f == i // f]
            clean = [j for j in range(T) if j // f < i // f and self.in_window(i // f, j // f)]
            self.sees.append(clean + own_block)
            behind = [(stream * T + j if j // f == i // f else j) for j in range(i - self.c.kernel_frames + 1, i)]
            self.past.append([None if j < 0 else k for j, k in zip(range(i - self.c.kernel_frames + 1, i), behind)])

    def in_window(self, block, other):
        return self.c.window is None or other >= block - self.c.window or other < self.c.sink

    def conv(self, name, x, c_noise):
        """x: list of F frames (B, C, Y, X)."""
        last = unit(self.p[f"{name}.weight"])
        gated = self.c.temporal_mixing == "gated"
        past = unit(self.p[f"{name}.past_weight"]) if gated else last[:, :, :-1]
        last = last if gated else last[:, :, -1]
        out = []
        for i in range(self.F):
            y = F.conv2d(x[i], last, padding=1)
            P = 0
            for tap, j in enumerate(self.past[i]):
                P = P + F.conv2d(torch.ones_like(x[0]) if j is None else x[j], past[:, :, tap], padding=1)
            if gated:
                slopes, offset, limits = (self.p[f"{name}.gate.{n}"] for n in ("slopes", "offset", "limits"))
                s = slopes[0] * c_noise[:, i] + slopes[1] * math.log(1 + i % self.T) + offset
                low, high = limits.sigmoid()
                g = (low + (1 - low) * high * s.sigmoid())[:, None, None, None]
                out.append(((1 - g) * y + g * P) / ((1 - g) ** 2 + g**2).sqrt())
            else:
                out.append(y + P)
        return out

    def pointwise(self, name, x):
        return [torch.einsum("oc,bcyx->boyx", unit(self.p[f"{name}.weight"]), frame) for frame in x]

    def attention(self, name, x, video):
        B, C, Y, X = x[0].shape
        H = max(1, C // self.c.head_dim)
        D = C // H
        qkv = [t.flatten(2).reshape(B, 3, H, D, Y * X).transpose(3, 4) for t in self.pointwise(f"{name}.qkv", x)]
        qkv = [t / (1e-4 + t.square().mean(-1, keepdim=True).sqrt()) for t in qkv]
        if video:
            for i in range(self.F):
                angle = (i % self.T) * 10000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
                a, b = qkv[i][:, :2, ..., : D // 2], qkv[i][:, :2, ..., D // 2 :]
                turned = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
                qkv[i] = torch.cat((turned, qkv[i][:, 2:]), dim=1)
        out = []
        for i in range(self.F):
            seen = self.sees[i] if video else [i]
            k, v = (torch.cat([qkv[j][:, n] for j in seen], dim=2) for n in (1, 2))
            weights = (qkv[i][:, 0] @ k.transpose(2, 3) / math.sqrt(D)).softmax(-1)
            out.append((weights @ v).transpose(2, 3).reshape(B, C, Y, X))
        return self.pointwise(f"{name}.proj", out)

    def block(self, name, x, emb, c_noise, encoder, attention):
        if name.endswith("_down"):
            x = [F.avg_pool2d(t, 2) for t in x]
        if name.endswith("_up"):
            x = [t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in x]
        skip = f"{name}.skip.weight" in self.p
        if encoder:
            x = self.pointwise(f"{name}.skip", x) if skip else x
            x = [t / (1e-4 + t.square().mean(1, keepdim=True).sqrt()) for t in x]
        y = self.conv(f"{name}.conv0", [silu(t) for t in x], c_noise)
        scale = emb @ unit(self.p[f"{name}.emb.weight"]).T * self.p[f"{name}.emb_gain"] + 1
        y = [silu(t * scale[:, i, :, None, None]) for i, t in enumerate(y)]
        y = self.conv(f"{name}.conv1", y, c_noise)
        if not encoder and skip:
            x = self.pointwise(f"{name}.skip", x)
        x = [mix(a, b, 0.3) for a, b in zip(x, y)]
        if attention:
            x = [mix(a, b, 0.3) for a, b in zip(x, self.attention(f"{name}.attention", x, attention == "video"))]
        return [t.clip(-256, 256) for t in x]

    def __call__(self, x, sigma, actions):
        c, p = self.c, self.p
        d = c.sigma_data
        c_noise = sigma.log() / 4
        features = math.sqrt(2) * (c_noise[..., None] * p["unet.embedding.fourier.frequencies"]
                                   + p["unet.embedding.fourier.phases"]).cos()  # fmt: skip
        emb = features @ unit(p["unet.embedding.noise.weight"]).T
        label = torch.zeros(*actions.shape, c.num_actions, dtype=torch.float64)
        for b in range(actions.shape[0]):
            for i in range(self.T):
                if actions[b, i] >= 0:
                    label[b, i, actions[b, i]] = math.sqrt(c.num_actions)
        label = label @ unit(p["unet.embedding.action.weight"]).T
        for frame in range(self.F):
            for b in range(actions.shape[0]):
                if actions[b, frame % self.T] >= 0:
                    emb[b, frame] = mix(emb[b, frame], label[b, frame % self.T], 1 / 3)
        emb = silu(emb)

        frames = []
        for i in range(self.F):
            inputs = F.pixel_unshuffle(x[:, i] / (sigma[:, i, None, None, None] ** 2 + d**2).sqrt(), c.patch_size)
            frames.append(torch.cat((inputs, torch.ones_like(inputs[:, :1])), dim=1))
        h = self.conv("unet.conv_in", frames, c_noise)
        heights = [c.height // c.patch_size // 2**i for i in range(len(c.channel_mult))]

        def kind(height):
            return "video" if height in c.video_attention else "frame" if height in c.frame_attention else None

        skips = [h]
        for level, height in enumerate(heights):
            names = ([f"{height}_down"] if level else []) + [f"{height}_{i}" for i in range(c.blocks_per_level)]
            for name in names:
                attention = None if name.endswith("down") else kind(height)
                h = self.block(f"unet.encoder.{name}", h, emb, c_noise, True, attention)
                skips.append(h)
        h = self.block(f"unet.decoder.{heights[-1]}_in0", h, emb, c_noise, False, "video")
        h = self.block(f"unet.decoder.{heights[-1]}_in1", h, emb, c_noise, False, None)
        for height in reversed(heights):
            if height != heights[-1]:
                h = self.block(f"unet.decoder.{height}_up", h, emb, c_noise, False, None)
            for i in range(c.blocks_per_level + 1):
                skip = skips.pop()
                na, nb = h[0].shape[1], skip[0].shape[1]
                both = math.sqrt((na + nb) / 2)  # t = 1/2
                h = [torch.cat((a * both / math.sqrt(na), b * both / math.sqrt(nb)), 1) for a, b in zip(h, skip)]
                h = self.block(f"unet.decoder.{height}_{i}", h, emb, c_noise, False, kind(height))
        h = self.conv("unet.conv_out", h, c_noise)
        out = []
        for i in range(self.F):
            s = sigma[:, i, None, None, None]
            network = F.pixel_shuffle(h[i] * p["unet.out_gain"], c.patch_size)
            out.append(d**2 / (s**2 + d**2) * x[:, i] + s * d / (s**2 + d**2).sqrt() * network)
        return torch.stack(out, 1)


@pytest.mark.parametrize(
    ("changes", "T", "copies"),
    [
        ({}, 4, 1),
        ({"temporal_mixing": "gated"}, 4, 2),
        ({"temporal_mixing": "gated", "window": 1, "sink": 1, "sigma_data": 0.7, "blocks_per_level": 2}, 5, 1),
        ({"frames_per_block": 2, "kernel_frames": 4, "head_dim": 4}, 5, 1),
        (
            {
                "patch_size": 2,
                "height": 16,
                "width": 24,
                "channel_mult": (1, 2, 2),
                "video_attention": (2,),
                "frame_attention": (4,),
            },
            3,
            1,
        ),
    ],
    ids=["joint", "gated", "window", "blocks", "patches"],
)
def test_network_equals_its_equations(changes, T, copies):
    net = small(**changes)
    x, sigma, actions = clip(net, 2, T, 1 + copies)
    with torch.no_grad():
        got = net(x, sigma, actions, noisy_copies=copies)
        want = Naive(net, T, copies)(x, sigma, actions)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_activations_are_clipped():
    net = small()
    block = net.unet.decoder["8_1"]
    frame_pass = FramePass(net.config, "spatial", 1, torch.zeros(1, 1, dtype=torch.float64))
    x = torch.full((1, 16, 1, 8, 8), 1e6, dtype=torch.float64)
    with torch.no_grad():
        out = block(x, torch.zeros(1, 1, 16, dtype=torch.float64), frame_pass)
    assert out.abs().max() == 256


def test_fourier_features_are_drawn_from_the_whole_circle():
    """phi = 2 pi U(0, 1), f = 2 pi N(0, 1): a fourth of the phases in each quarter, unit variance of f / 2 pi."""
    features = Fourier(4096)
    share = torch.histc(features.phases, 4, 0, 2 * math.pi) / 4096
    # five standard errors of a share of 1/4, and of a variance of normals
    assert (share - 0.25).abs().max() < 5 * math.sqrt(0.25 * 0.75 / 4096)
    assert abs((features.frequencies / (2 * math.pi)).var().item() - 1) < 5 * math.sqrt(2 / 4096)
