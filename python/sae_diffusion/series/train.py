"""Training of a series network. Every random number is a function of (seed, purpose, step)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sae_kernels import FrameLayout, token_noise

from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule, scales_of
from ..settings import overlay
from ..train.checkpoint import STATE, find_checkpoint, read_state
from ..train.ema import DecayEMA
from ..train.files import check_header, load_into
from ..train.loop import Loop, LoopConfig
from ..train.task import Task, json_fields
from .config import SeriesTrainConfig, Source
from .data import SeriesStats, read_series, split_series
from .model import SeriesDenoiser

# One stream of random numbers per purpose.
_BATCH, _TIME, _NOISE, _STATS, _HELDOUT = 10, 11, 12, 13, 14
STATE_FIELDS = {"config": dict, "length": int, "channels": int, "scaling": str, "stats": dict}  # of state.json
STATS_SERIES = 16384  # generated series that means and deviations are estimated from


def learning_rate(config: SeriesTrainConfig, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 1: a linear ramp, then half a cosine to lr * final_lr."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_times(batch: int, tokens: int | None, seed: int, step: int) -> torch.Tensor:
    """Stratified times in [0, 1): series b's lies in [b / batch, (b + 1) / batch). (batch,) float64.

    With `tokens`, a time for every token, (batch, tokens), each column stratified in its own order.
    """
    rng = np.random.default_rng(derive_seed(seed, _TIME, step))
    strata = np.arange(batch)
    if tokens is None:
        return torch.from_numpy((strata + rng.random(batch)) / batch)
    order = rng.permuted(np.broadcast_to(strata[:, None], (batch, tokens)), axis=0)
    return torch.from_numpy((order + rng.random((batch, tokens))) / batch)


def series_loss(
    model: SeriesDenoiser,
    x: torch.Tensor,
    schedule: Schedule,
    t: torch.Tensor,
    *,
    loss: str = "masked",
    space: str = "v",
    seed: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    """Mean squared error over the tokens that count, see `SeriesTrainConfig.loss`; for "vlb" the ELBO's integrand.

    Args:
        x: (B, N, C) normalised series.
        t: (B,) or (B, N) times.
        seed, offset: of `sae_kernels.token_noise`.

    Source: seeds' ELBO, 1/2 ∫ E|eps - eps_hat|² (-dλ/dt) dt, summed over tokens and channels (nats per series).
    """
    log_snr = schedule.log_snr(t)
    signal_scale, noise_scale = scales_of(log_snr, schedule.scaling)
    layout = FrameLayout(frames=x.shape[1], tokens_per_frame=1, noisy_copies=0)
    noisy, eps = token_noise(
        x, signal_scale.float(), noise_scale.float(), layout, seed=seed, offset=offset, return_noise=True
    )
    a, b = signal_scale.float().unsqueeze(-1), noise_scale.float().unsqueeze(-1)
    kind = model.config.prediction
    target = x if kind == "x0" else eps if kind == "eps" else a * eps - b * x
    error = (model.predict(noisy, log_snr.float()) - target).square()
    # d eps = -(a / b) d x0 and, for a² + b² = 1, d v = -d x0 / b
    squared = {"x0": torch.ones_like(b), "eps": (a / b) ** 2, "v": b**-2}
    slope = schedule.log_snr_slope(t).float().unsqueeze(-1)
    if loss == "vlb":
        return (error * squared["eps"] / squared[kind] * (-0.5 * slope)).sum() / len(x)
    if space != kind:
        error = error * (squared[space] / squared[kind])
    if loss == "simple":
        return error.mean()
    changing = (slope < 0).to(error.dtype).expand_as(error)
    return (error * changing).sum() / changing.sum().clamp(min=1)


class SeriesTask(Task):
    """Series of a file or a generator, with the loss of the configuration."""

    state_fields: ClassVar = STATE_FIELDS
    # they decide how a run reports and where it is
    free_on_resume = ("run_dir", "checkpoint_every", "log_every", "keep", "tensorboard", "device")

    def __init__(self, config: SeriesTrainConfig) -> None:
        self.config = config
        self.data: np.ndarray | None = None
        self.heldout: np.ndarray | None = None
        if config.data is not None:
            self.data, self.heldout = split_series(read_series(config.data), config.heldout_fraction, config.seed)
            length, channels = self.data.shape[1:]
            self.stats = SeriesStats.estimate(self.data)
        else:
            length, channels = config.source.length, 1
            self.stats = source_stats(config.source, config.seed)
        self.schedule = config.schedule.build_training(length)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, 0))
            self.network = SeriesDenoiser(config.model, length, channels, self.schedule.scaling)
        self._noise_seed = derive_seed(config.seed, _NOISE)

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [p for p in self.network.parameters() if p.requires_grad]

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )

    def make_average(self) -> DecayEMA:
        return DecayEMA(self.network, self.config.ema)

    def average_name(self, width: float) -> str:
        return "ema"

    def lr(self, step: int) -> float:
        return learning_rate(self.config, step)

    def batch(self, step: int) -> torch.Tensor:
        """The series of optimizer step `step`, normalised, (batch, length, channels)."""
        seed = derive_seed(self.config.seed, _BATCH, step)
        if self.data is None:
            x = self.config.source.sample(self.config.batch, seed)
        else:
            x = self.data[np.random.default_rng(seed).integers(len(self.data), size=self.config.batch)]
        return self.stats.normalize(x).to(self.device)

    def losses(
        self, module: Callable[..., torch.Tensor], batch: Any, kind: str, step: int, index: int
    ) -> tuple[torch.Tensor, ...]:
        config = self.config
        tokens = batch.shape[1] if config.schedule.kind == "independent" else None
        t = draw_times(config.batch, tokens, config.seed, step).to(self.device)
        loss = series_loss(
            self.network, batch, self.schedule, t,
            loss=config.loss, space=config.loss_space, seed=self._noise_seed, offset=step,
        )  # fmt: skip
        return (loss[None],)

    def state(self, loop: Loop) -> dict[str, Any]:
        network = self.network
        return {
            "config": json_fields(self.config),
            "length": network.length,
            "channels": network.channels,
            "scaling": network.scaling,
            "stats": self.stats.to_json(),
        }

    def check_data(self, path: Path, state: dict[str, Any]) -> None:
        if state["stats"] != self.stats.to_json():
            raise ValueError(f"data: {path} was trained on other series: their means or deviations differ")


class SeriesTrainer(Loop):
    """Trains one network: the `Loop` with `SeriesTask`. It does not touch its folder before `train` or `resume`."""

    def __init__(self, config: SeriesTrainConfig) -> None:
        settings = LoopConfig(
            run_dir=config.run_dir, steps=config.steps, batch_size=config.batch, grad_clip=config.clip,
            checkpoint_every=config.checkpoint_every, keep_checkpoints=config.keep, log_every=config.log_every,
            device=config.device, tensorboard=config.tensorboard,
        )  # fmt: skip
        self.task: SeriesTask
        self.config = config
        super().__init__(SeriesTask(config), settings, resume=False)

    @property
    def model(self) -> SeriesDenoiser:
        return self.network

    @property
    def stats(self) -> SeriesStats:
        return self.task.stats

    def averaged(self) -> SeriesDenoiser:
        """A copy of the network with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model, self.config.ema)
        return model.eval()


def source_stats(source: Source, seed: int) -> SeriesStats:
    return SeriesStats.estimate(source.sample(STATS_SERIES, derive_seed(seed, _STATS)))


def heldout_series(source: Source, count: int, seed: int) -> np.ndarray:
    """Generated series that no training step of that seed draws, (count, length, 1)."""
    return source.sample(count, derive_seed(seed, _HELDOUT))


def load_series_model(
    path: str | Path, *, average: bool = True, device: torch.device | str = "cpu"
) -> tuple[SeriesDenoiser, SeriesStats, SeriesTrainConfig]:
    """(network in eval mode, statistics, settings) of a checkpoint, or of a run folder's latest undamaged one.

    Args:
        average: load the averaged weights, not those as trained.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a checkpoint that is damaged or not finite, or tensors that differ from the network that its
            settings describe.
    """
    path = find_checkpoint(path)
    state = read_state(path, **STATE_FIELDS)
    config = overlay(SeriesTrainConfig(), state["config"], path / STATE, ("config",))
    model = SeriesDenoiser(config.model, state["length"], state["channels"], state["scaling"])
    file = path / ("ema.safetensors" if average else "model.safetensors")
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_header(file, targets)
    load_into(file, targets)
    return model.to(device).eval(), SeriesStats.from_json(state["stats"]), config
