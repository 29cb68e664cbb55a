"""A denoiser and a data set small enough for the training tests. Run as a script, it trains them in its own process."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sae_diffusion.data import Clip, FrameStats
from sae_diffusion.train import TrainConfig, Trainer
from torch import nn

STATS = FrameStats((0.0, 0.1), (0.6, 0.5))


@dataclass(frozen=True)
class StubConfig:
    width: int = 8
    num_actions: int = 3
    action_dim: int = 0
    sigma_data: float = 1.0
    frames_per_block: int = 1
    dropout: float = 0.1


class Stub(nn.Module):
    """The previous clean frame and the frame itself through one hidden layer, preconditioned as in EDM."""

    def __init__(self, config: StubConfig | None = None) -> None:
        super().__init__()
        self.config = config or StubConfig()
        width = self.config.width
        self.own = nn.Conv2d(2, width, 3, padding=1)
        self.past = nn.Conv2d(2, width, 3, padding=1)
        self.noise = nn.Linear(1, width)
        self.action = nn.Embedding(self.config.num_actions + 1, width)
        self.out = nn.Conv2d(width, 2, 1)
        self.register_buffer("scale", torch.tensor(0.5))

    @torch.no_grad()
    def normalize_weights_(self) -> None:
        self.own.weight /= self.own.weight.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() * 18**0.5

    def forward(self, x, sigma, actions=None, *, noisy_copies=1, spatial_only=False):
        batch, total = x.shape[:2]
        frames = total if spatial_only else total // (1 + noisy_copies)
        streams = total // frames
        s = sigma[:, :, None, None, None]
        h = x / (s**2 + 1).sqrt()
        hidden = self.own(h.flatten(0, 1)).unflatten(0, (batch, total))
        if not spatial_only:
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, : frames - 1]], dim=1)
            past = self.past(before.flatten(0, 1)).unflatten(0, (batch, frames))
            hidden = hidden + past.repeat(1, streams, 1, 1, 1)
        hidden = hidden + self.noise(sigma.log()[..., None] / 4)[..., None, None]
        if actions is not None:
            hidden = hidden + self.action(actions + 1).repeat(1, streams, 1)[..., None, None]
        hidden = nn.functional.dropout(nn.functional.silu(hidden), self.config.dropout, self.training)
        out = self.scale * self.out(hidden.flatten(0, 1)).unflatten(0, (batch, total)).float()
        return x / (s**2 + 1) + s / (s**2 + 1).sqrt() * out


class StubClips(torch.utils.data.Dataset):
    """Clips of a drifting stripe, each a function of its index."""

    num_actions, action_dim, frame_shape = 3, 0, (4, 4, 2)

    def __init__(self, count: int = 13, frames: int = 3, name: str = "stripes") -> None:
        self.count, self.frames, self.name = count, frames, name

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 80, (self.frames, 4, 4, 2), dtype=np.uint8)
        frames[np.arange(self.frames), :, (index + np.arange(self.frames)) % 4] += 170
        actions = rng.integers(0, 3, self.frames)
        actions[0] = -1
        return Clip(frames, actions, f"clip {index}")

    def fingerprint(self) -> str:
        return f"{self.name}-{self.count}"


def config(run_dir, **changes) -> TrainConfig:
    base = TrainConfig(
        run_dir=str(run_dir), clip_length=3, batch_size=4, micro_batch=2, noisy_copies=2, steps=6, lr_ramp_steps=2,
        lr_ref_steps=3, log_every=1, checkpoint_every=0, snapshot_every=0, normalizer_every=2, normalizer_size=100,
        action_dropout=0.3, grad_clip=1.0, num_workers=0, tensorboard=False, device="cpu", seed=7,
    )  # fmt: skip
    return replace(base, **changes)


def trainer(
    run_dir, *, model_config: StubConfig | None = None, dataset: StubClips | None = None, on_sample=None, **changes
) -> Trainer:
    torch.manual_seed(0)
    return Trainer(config(run_dir, **changes), Stub(model_config), dataset or StubClips(), STATS, on_sample=on_sample)


class KilledAt(StubClips):
    """Sends a signal to its process when clip number `reads` is read."""

    def __init__(self, reads: int, number: int) -> None:
        super().__init__()
        self.left, self.number = reads, number

    def __getitem__(self, index: int) -> Clip:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def main(arguments: str) -> None:
    """[{"run_dir": ..., "kill": [reads, signal] or absent, config changes...}, ...], one run after the other."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    for run in json.loads(arguments):
        kill = run.pop("kill", None)
        t = trainer(run.pop("run_dir"), dataset=KilledAt(*kill) if kill else None, **run)
        result = t.train()
        if t.rank == 0:
            print(json.dumps({"step": result.step, "reason": result.reason, "checkpoint": str(result.checkpoint)}))
        t._owns_group = False  # the next run uses the group too


def environment(**extra: str) -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": f"{root}:{root / 'python'}", "OMP_NUM_THREADS": "1", **extra}


if __name__ == "__main__":
    main(sys.argv[1])
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


SIGKILL, SIGTERM, SIGINT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
