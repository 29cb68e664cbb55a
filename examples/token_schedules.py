"""One network, any order of generation: per-token schedules on series that obey a law.

A series is a sin(w t) + b cos(w t) with normal a and b, so x[t+1] + x[t-1] = 2 cos(w) x[t]. In training every point
has its own noise level (`Independent`). The same network then generates from left to right (window 1), all points
at once (an infinite window), or anything between (`Staggered`), and continues a given beginning (`Given`).
"""

from __future__ import annotations

import argparse
import math

import torch
from sae_diffusion.diffusion.schedules import Given, Independent, Staggered, scales_of
from sae_diffusion.diffusion.solvers import sample, start
from torch import nn

N, W = 16, 0.7


def series(batch: int) -> torch.Tensor:
    """(B, N, 1), unit variance."""
    a, b = torch.randn(2, batch, 1)
    return (a * torch.sin(W * torch.arange(N)) + b * torch.cos(W * torch.arange(N)))[..., None]


def broken_law(x: torch.Tensor) -> float:
    """Root mean square of x[t+1] + x[t-1] - 2 cos(w) x[t]."""
    return (x[:, 2:] + x[:, :-2] - 2 * math.cos(W) * x[:, 1:-1]).square().mean().sqrt().item()


class Network(nn.Module):
    """x (B, N, 1) and log-SNR (B, N) -> the velocity v = signal eps - noise x0."""

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(4, width)
        self.place = nn.Parameter(0.5 * torch.randn(N, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        signal, noise = scales_of(log_snr, "vp")
        told = torch.stack([x[..., 0], signal, noise, log_snr / 8], dim=-1)
        return self.out(self.layers(self.inp(told) + self.place))

    def denoise(self, x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """The estimate of x0, as solvers take it."""
        signal, noise = (s[..., None] for s in scales_of(log_snr, "vp"))
        return signal * x - noise * self(x, log_snr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--solver-steps", type=int, default=64)
    options = parser.parse_args()
    torch.manual_seed(0)
    network, levels = Network(), Independent((N,))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for step in range(options.steps):
        x0 = series(options.batch)
        log_snr = levels.log_snr(levels.draw(options.batch)).float()
        signal, noise = (s[..., None] for s in scales_of(log_snr, "vp"))
        eps = torch.randn_like(x0)
        loss = (network(signal * x0 + noise * eps, log_snr) - (signal * eps - noise * x0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    network.eval()
    print(f"law broken by: data {broken_law(series(options.samples)):.3f}, ", end="")
    print(f"noise {broken_law(torch.randn(options.samples, N, 1)):.3f}")
    for window in (1, 4, math.inf):
        schedule = Staggered(N, window=window)
        x = start((options.samples, N, 1), schedule, seed=0)
        x = sample(network.denoise, x, schedule, schedule.times(options.solver_steps), solver="dpm++2m")
        print(f"window {window}: {broken_law(x):.3f}")
    truth = series(options.samples)
    schedule = Given(Staggered(N, window=4), torch.arange(N) < N // 2)  # the first half is known
    x = torch.where((torch.arange(N) < N // 2)[:, None], truth, start(truth.shape, schedule, seed=1))
    x = sample(network.denoise, x, schedule, schedule.times(options.solver_steps), solver="dpm++2m")
    error = (x - truth)[:, N // 2 :].square().mean().sqrt().item()
    print(f"second half from the first: error {error:.3f} of deviation 1")


if __name__ == "__main__":
    main()
