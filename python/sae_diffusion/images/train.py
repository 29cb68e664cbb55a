"""Training of a `ComponentUNet`. All randomness is a function of (seed, step)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_kernels import FrameLayout, token_noise

from ..diffusion.likelihood import dequantise
from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule
from ..diffusion.snr import SNRSampler
from ..settings import overlay
from ..train.checkpoint import STATE, find_checkpoint, read_state
from ..train.ema import PowerEMA
from ..train.files import load_into
from ..train.loop import Loop, LoopConfig
from ..train.task import Task, json_fields
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
    """What sampling and likelihood need: a network, its basis, its schedule, and the levels of its images."""

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
    difference of numbers of order 1 at every log-SNR.

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


class ImageTask(Task):
    """Trains on components of images, which are drawn with replacement."""

    state_fields: ClassVar = STATE_FIELDS
    free_on_resume = ("data_path",)  # the files may move, but their content must not change

    def __init__(self, config: ImageTrainConfig, images: ImageSet) -> None:
        self.config, self.images = config, images
        self.model = new_model(config, images)
        self.network = self.model.net
        self._sampler = SNRSampler(self.model.schedule) if config.times == "snr" else None
        self._pixels = torch.from_numpy(images.train)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.network.parameters(), lr=self.config.lr, betas=(0.9, 0.99), foreach=True)

    def make_average(self) -> PowerEMA:
        return PowerEMA(self.network, (self.config.ema,))

    def average_name(self, width: float) -> str:
        return "average"

    def lr(self, step: int) -> float:
        return learning_rate(self.config, step - 1)

    def draw_times(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, weight), each (count,), with E[weight f(t)] the integral of f over [0, 1]."""
        if self._sampler is not None:
            return self._sampler.draw(count, generator)
        t = stratified_times(count, generator)
        return t, torch.ones_like(t)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Dequantised images of optimizer step `step`, their times and the times' weights."""
        config, done = self.config, step - 1
        generator = torch.Generator().manual_seed(derive_seed(config.seed, _BATCH, done))
        chosen = torch.randint(len(self._pixels), (config.batch_size,), generator=generator)
        x = dequantise(self._pixels[chosen], self.images.levels, seed=derive_seed(config.seed, _PIXELS, done))
        return x, *self.draw_times(config.batch_size, generator)

    def losses(self, module: Callable[..., Tensor], batch: Any, kind: str, step: int, index: int) -> tuple[Tensor, ...]:
        x, t, weight = batch
        z = self.model.basis.forward(x.to(self.device))
        loss = component_loss(
            self.network, z, self.model.schedule, t,
            seed=derive_seed(self.config.seed, _NOISE), offset=step - 1, weighting=self.config.weighting,
        )  # fmt: skip
        return (loss * weight.to(loss),)

    def constants(self) -> dict[str, dict[str, Tensor]]:
        return {"components": self.model.basis.tensors()}

    def state(self, loop: Loop) -> dict[str, Any]:
        return {
            "kind": "images",
            "config": json_fields(self.config),
            "basis": self.model.basis.description(),
            "levels": self.images.levels,
            "images": self.images.fingerprint(),
            "ema_seen": loop.ema.clips_seen,
            "seconds": loop.seconds,
        }

    def check_data(self, path: Path, state: dict[str, Any]) -> None:
        if state["images"] != self.images.fingerprint():
            raise ValueError(f"data: {path} was trained on other images")


class ImageTrainer(Loop):
    """One run: the `Loop` with `ImageTask`, in a folder or without one; the same call resumes it.

    Raises:
        RuntimeError: another process is training in the folder.
        ValueError: the folder holds a run with another configuration or other images.
    """

    def __init__(
        self,
        config: ImageTrainConfig,
        images: ImageSet,
        run_dir: Path | None = None,
        *,
        checkpoint_every: int = 0,
        log_every: int = 100,
        tensorboard: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        task = ImageTask(config, images)
        self.model = task.model
        settings = LoopConfig(
            run_dir=run_dir, steps=config.steps, batch_size=config.batch_size, grad_clip=config.clip,
            checkpoint_every=checkpoint_every, log_every=log_every, device=str(device), tensorboard=tensorboard,
        )  # fmt: skip
        super().__init__(task, settings)

    def averaged(self) -> ImageModel:
        """The model with its averaged weights, set in place: training can then only continue from a checkpoint."""
        if self.step:
            self.ema.copy_to(self.model.net, self.config.ema)
        self.model.step = self.step
        self.model.net.eval().requires_grad_(False)
        return self.model


def learning_rate(config: ImageTrainConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: a linear ramp, then half a cosine to zero."""
    ramp = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    return config.lr * ramp * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def load_model(path: Path, *, average: bool = True, device: torch.device | str = "cpu") -> ImageModel:
    """A trained model from a checkpoint, or from the latest undamaged one of a run folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, not finite, or of another kind of run.
    """
    path = find_checkpoint(path)
    state = read_state(path, **STATE_FIELDS)
    config = overlay(ImageTrainConfig(), state["config"], path / STATE, ("config",))
    basis = Whitened.load(state["basis"], load_file(path / "components.safetensors"))
    net = ComponentUNet(config.net, basis, state["levels"])
    load_into(path / "model.safetensors", net.state_dict())
    if average and state["step"]:
        load_into(path / "average.safetensors", dict(net.named_parameters()))
    schedule = make_schedule(config.schedule, basis)
    net = net.to(device).eval().requires_grad_(False)
    return ImageModel(net, basis, schedule, config, state["levels"], state["step"])
