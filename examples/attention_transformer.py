"""`frame_attention` in a transformer of your own, trained with teacher forcing; needs only sae_kernels.

Clips are blobs that move over a torus, a constant step per frame. The network sees each clip twice: clean, and noised
by flow matching (x = (1 - s) x0 + s eps) with a separate level s for each frame. Noisy frame i sees the clean frames
before it and itself, so one pass trains all frames. Then the clips' next frames are generated one by one.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from sae_kernels import FrameLayout, frame_attention, qkv_prepare, token_noise

SIDE, PATCH = 8, 4  # frames of 8 x 8 pixels, one token for each 4 x 4 of them
P, C = (SIDE // PATCH) ** 2, PATCH**2


def clips(batch: int, frames: int) -> torch.Tensor:
    """(B, T, P, C): a blob at `place + t * step`, wrapping around."""
    place, step = torch.rand(batch, 1, 2) * SIDE, torch.randint(-1, 2, (batch, 1, 2))
    centre = place + step * torch.arange(frames)[:, None]
    away = (torch.arange(SIDE) - centre[..., None] + SIDE / 2) % SIDE - SIDE / 2  # (B, T, 2, SIDE)
    y, x = (-(away**2) / 2).exp().unbind(2)
    pictures = 2 * y[..., :, None] * x[..., None, :] - 1
    return F.pixel_unshuffle(pictures[:, :, None], PATCH).flatten(3).transpose(2, 3)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1))
        # unit norm for each head; rotary embedding of frame, row and column
        q, k, v = qkv_prepare(qkv, layout, grid=(SIDE // PATCH, SIDE // PATCH))
        mixed = frame_attention(q, k, v, layout)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """x (B, F, P, C) and levels s (B, F) -> the velocity eps - x0, like x."""

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.inp, self.level, self.last = nn.Linear(C, width), nn.Linear(2, width), nn.Linear(width, C)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, s: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
        level = self.level(torch.stack([s, (s == 0).to(s)], dim=-1))
        h = (self.inp(x) + level[:, :, None]).flatten(1, 2)
        for block in self.blocks:
            h = block(h, layout)
        return self.last(h).view_as(x)


def loss_of(model: Transformer, x0: torch.Tensor, step: int) -> torch.Tensor:
    B, T = x0.shape[:2]
    layout = FrameLayout(frames=T, tokens_per_frame=P)
    s = torch.cat([torch.zeros(B, T), torch.rand(B, T)], dim=1).to(x0)  # the clean copy, then the noisy one
    x, eps = token_noise(x0, 1 - s, s, layout, seed=0, offset=step, return_noise=True)
    return F.mse_loss(model(x, s, layout)[:, T:], eps[:, T:] - x0)


@torch.no_grad()
def continued(model: Transformer, given: torch.Tensor, frames: int, steps: int = 20) -> torch.Tensor:
    """(B, T + frames, P, C), a frame at a time. Without a cache, to stay short: each pass sees the whole past again."""
    for _ in range(frames):
        B, n = given.shape[:2]
        layout = FrameLayout(frames=n + 1, tokens_per_frame=P)
        clean = torch.cat([given, torch.zeros_like(given[:, :1])], dim=1)  # what noisy frame n never sees ends it
        x = torch.randn_like(given[:, :1])
        for i in range(steps):
            s = clean.new_zeros(B, 2 * (n + 1))
            s[:, -1] = 1 - i / steps
            x = x - model(torch.cat([clean, clean[:, :n], x], dim=1), s, layout)[:, -1:] / steps
        given = torch.cat([given, x], dim=1)
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Transformer().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        loss = loss_of(model, clips(options.batch, options.frames).to(options.device), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    truth = clips(16, options.frames).to(options.device)
    made = continued(model, truth[:, :-2], 2)
    copied = truth[:, -3:-2].expand(-1, 2, -1, -1)
    print(f"error of the next two frames: {F.mse_loss(made[:, -2:], truth[:, -2:]):.4f} generated, ", end="")
    print(f"{F.mse_loss(copied, truth[:, -2:]):.4f} copied from the last one")


if __name__ == "__main__":
    main()
