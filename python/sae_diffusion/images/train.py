"""Training of a `ComponentUNet`. All randomness is a function of (seed, step): a resumed run repeats a whole one."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_kernels import FrameLayout, token_noise

from ..diffusion.likelihood import dequantise
from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule
from ..diffusion.snr import SNRSampler
from ..lock import RunLock
from ..train.checkpoint import (
    STATE,
    find_checkpoint,
    latest_checkpoint,
    read_state,
    save_checkpoint,
)
from ..train.ema import PowerEMA
from ..train.files import flatten_optimizer, load_into, restore_optimizer
from .components import Whitened, check_basis
from .config import ImageTrainConfig
from .data import ImageSet, middle
from .model import ComponentUNet
from .schedule import make_schedule

# purposes of derived seeds
_WEIGHTS, _BATCH, _PIXELS, _NOISE = range(4)
STATE_FIELDS = {
    "kind": str, "config": dict, "basis": dict, "levels": int, "images": str, "ema_seen": int, "seconds": float,
}  # of state.json  # fmt: skip


@dataclass
class ImageModel:
    """All that sampling and likelihood need: a network with its basis, its schedule and its images' levels."""

    net: ComponentUNet
    basis: Whitened
    schedule: Schedule
    config: ImageTrainConfig
    levels: int
    step: int = 0

    @property
    def device(self) -> torch.device:
        return self.net.place.device

    @property
    def level_width(self) -> float:
        return 2.0 / self.levels

    def denoise(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """The interface of solvers, likelihood and guidance: x0_hat of components."""
        return self.net(z, log_snr)


def new_model(config: ImageTrainConfig, images: ImageSet) -> ImageModel:
    """An untrained model: the Gaussian optimum for the training images' component variances."""
    check_basis(config.basis, images.shape)
    basis = Whitened.fit(config.basis, middle(torch.from_numpy(images.train), images.levels), images.step)
    schedule = make_schedule(config.schedule, basis)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, _WEIGHTS))
        net = ComponentUNet(config.net, basis, images.levels)
    return ImageModel(net, basis, schedule, config, images.levels)


def component_loss(
    net: ComponentUNet, z: Tensor, schedule: Schedule, t: Tensor, *, seed: int, offset: int, weighting: str = "elbo"
) -> Tensor:
    """Weighted mean over components of (eps_hat - eps)^2, one value per image (B,).

    eps - eps_hat = signal (f* - f) with the residual f of the network and its target f* = noise z - signal eps: a
    difference of numbers of size one at every log-SNR.

    Args:
        z: clean components (B, C, Y, X).
        t: (B,), in [0, 1].
        seed, offset: of the noise, as for `sae_kernels.token_noise`.
        weighting: see `ImageTrainConfig`; weights have mean 1 over components and over t in [0, 1].
    """
    log_snr = schedule.log_snr(t).to(z).expand_as(z)
    signal, noise = (s.to(z).expand_as(z) for s in schedule.scales(t))
    size = z[0].numel()
    noisy, eps = token_noise(
        z.flatten(1), signal.flatten(1), noise.flatten(1),
        FrameLayout(frames=size, tokens_per_frame=1, noisy_copies=0), seed=seed, offset=offset, return_noise=True,
    )  # fmt: skip
    target = noise * z - signal * eps.view_as(z)
    error = (signal * (target - net.residual(noisy.view_as(z), log_snr))).square()
    if weighting == "eps":
        return error.flatten(1).mean(1)
    slope = -schedule.log_snr_slope(t).to(z).expand_as(z)
    return (error * slope).flatten(1).mean(1) / _span(schedule)


def _span(schedule: Schedule) -> float:
    """Mean over components of log-SNR at t = 0 less that at t = 1: the integral of the slope."""
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    return float((ends[0] - ends[1]).mean())


def stratified_times(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times, one in each of `count` equal parts of [0, 1], with a common uniform offset."""
    return (torch.arange(count) + torch.rand((), generator=generator)) / count


class ImageTrainer:
    """One run in a folder, which it has to itself until `train` ends; the same call resumes it.

    Raises:
        RuntimeError: another process trains in the folder.
        ValueError: the folder holds a run with another configuration or other images.
    """

    def __init__(
        self,
        config: ImageTrainConfig,
        images: ImageSet,
        run_dir: Path | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.images, self.run_dir, self.device = config, images, run_dir, torch.device(device)
        self.model = new_model(config, images)
        net = self.model.net.to(self.device)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.9, 0.99), foreach=True)
        self.ema = PowerEMA(net, (config.ema,))
        self.step = 0
        self.seconds = 0.0
        self._sampler = SNRSampler(self.model.schedule) if config.times == "snr" else None
        self._pixels = torch.from_numpy(images.train)
        self._lock = None if run_dir is None else RunLock(run_dir, "training in")
        if self._lock is not None:
            self._lock.acquire()
            try:
                if (path := latest_checkpoint(self._lock.folder)) is not None:
                    self._load(path)
            except BaseException:  # whose traceback may keep this object alive
                self._lock.release()
                raise

    def train(
        self,
        until: int | None = None,
        *,
        checkpoint_every: int = 0,
        callback: Callable[[int, float], None] | None = None,
    ) -> None:
        """Go on to step `until`, by default the last one; a checkpoint there and every `checkpoint_every` steps.

        callback(step, loss) is called after each step.

        Raises:
            FloatingPointError: the loss or the state is no longer finite; the last checkpoint stays.
            OSError: the run folder cannot be written; the last checkpoint stays.
            RuntimeError: another process trains in the run folder.
        """
        with contextlib.nullcontext() if self._lock is None else self._lock:
            self._train(
                self.config.steps if until is None else min(until, self.config.steps), checkpoint_every, callback
            )

    def _train(self, until: int, checkpoint_every: int, callback: Callable[[int, float], None] | None) -> None:
        self.model.net.train()
        while self.step < until:
            start = time.perf_counter()
            loss = self._one_step()
            self.seconds += time.perf_counter() - start
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss: became {loss} at step {self.step}; lower lr = {self.config.lr}")
            if callback is not None:
                callback(self.step, loss)
            if checkpoint_every and self.step % checkpoint_every == 0:
                self.save()
        self.model.step = self.step
        self.save()

    def averaged(self) -> ImageModel:
        """The model with its averaged weights, in place; training can go on only from a checkpoint then."""
        if self.step:
            self.ema.copy_to(self.model.net, self.config.ema)
        self.model.net.eval().requires_grad_(False)
        return self.model

    def draw_times(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, weight), each (count,), with E[weight f(t)] the integral of f over [0, 1]."""
        if self._sampler is not None:
            return self._sampler.draw(count, generator)
        t = stratified_times(count, generator)
        return t, torch.ones_like(t)

    def _one_step(self) -> float:
        config = self.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, _BATCH, self.step))
        chosen = torch.randint(len(self._pixels), (config.batch_size,), generator=generator)
        x = dequantise(self._pixels[chosen], self.images.levels, seed=derive_seed(config.seed, _PIXELS, self.step))
        t, weight = self.draw_times(config.batch_size, generator)
        z = self.model.basis.forward(x.to(self.device))
        loss = component_loss(
            self.model.net, z, self.model.schedule, t,
            seed=derive_seed(config.seed, _NOISE), offset=self.step, weighting=config.weighting,
        )  # fmt: skip
        loss = (loss * weight.to(loss)).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.net.parameters(), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.step += 1
        self.ema.update(self.model.net, self.step)
        return float(loss.detach())

    def save(self) -> Path | None:
        """A checkpoint in the run folder, whole or not at all."""
        if self.run_dir is None:
            return None
        net = self.model.net
        files = {
            "model": net.state_dict(),
            "average": self.ema.averages[self.config.ema],
            "optimizer": flatten_optimizer(net, self.optimizer),
            "components": self.model.basis.tensors(),
        }
        state = {
            "kind": "images",
            "config": self.config.to_json(),
            "basis": self.model.basis.description(),
            "levels": self.images.levels,
            "images": self.images.fingerprint(),
            "ema_seen": self.ema.clips_seen,
            "seconds": self.seconds,
        }
        return save_checkpoint(self.run_dir, self.step, files, state)

    def _load(self, path: Path) -> None:
        state = read_state(path, **STATE_FIELDS)
        check_kind(path, state)
        mine, theirs = self.config.to_json(), state["config"]
        for name in sorted(mine.keys() | theirs.keys()):
            # the place of the files may change, their content may not
            if name != "data_path" and mine.get(name) != theirs.get(name):
                raise ValueError(f"{name}: the run in {path.parent} has {theirs.get(name)!r}, got {mine.get(name)!r}")
        if state["images"] != self.images.fingerprint():
            raise ValueError(f"data: the run in {path.parent} was trained on other images")
        load_into(path / "model.safetensors", self.model.net.state_dict())
        load_into(path / "average.safetensors", self.ema.averages[self.config.ema])
        restore_optimizer(path / "optimizer.safetensors", self.model.net, self.optimizer)
        self.ema.clips_seen = state["ema_seen"]
        self.step, self.seconds = state["step"], state["seconds"]


def learning_rate(config: ImageTrainConfig, step: int) -> float:
    """Of the step numbered from 0: a linear ramp, then half a cosine to zero."""
    ramp = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    return config.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def check_kind(path: Path, state: dict[str, Any]) -> None:
    if state.get("kind") != "images":
        raise ValueError(f"{path}: is no checkpoint of `sae images`")


def load_model(path: Path, *, average: bool = True, device: torch.device | str = "cpu") -> ImageModel:
    """A trained model from a checkpoint, or from the latest good one of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, not finite, or of something else.
    """
    path = find_checkpoint(path)
    state = read_state(path, **STATE_FIELDS)
    check_kind(path, state)
    try:
        config = ImageTrainConfig.from_json(state["config"])
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path / STATE}: does not describe a run on images ({error!r})") from error
    basis = Whitened.load(state["basis"], load_file(path / "components.safetensors"))
    net = ComponentUNet(config.net, basis, state["levels"])
    load_into(path / "model.safetensors", net.state_dict())
    if average and state["step"]:
        load_into(path / "average.safetensors", dict(net.named_parameters()))
    schedule = make_schedule(config.schedule, basis)
    net = net.to(device).eval().requires_grad_(False)
    return ImageModel(net, basis, schedule, config, state["levels"], state["step"])
