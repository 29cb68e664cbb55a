"""Training of a series network: one process, one file of settings, resumable to the bit.

Every random number is a function of (seed, purpose, step), so a resumed run draws what the whole run would have drawn.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_kernels import FrameLayout, token_noise

from ..devices import pick_device
from ..diffusion.noise import derive_seed
from ..diffusion.schedules import Schedule, scales_of
from ..lock import RunLock
from ..train.checkpoint import (
    STATE,
    find_checkpoint,
    latest_checkpoint,
    read_state,
    save_checkpoint,
)
from ..train.files import check_header, flatten_optimizer, load_into, restore_optimizer
from ..train.metrics import Reporter
from .config import ScheduleConfig, SeriesModelConfig, SeriesTrainConfig, Source
from .data import SeriesStats, read_series, split_series
from .model import SeriesDenoiser

# One stream of random numbers per purpose.
_BATCH, _TIME, _NOISE, _STATS, _HELDOUT = 10, 11, 12, 13, 14
STATE_FIELDS = {"config": dict, "length": int, "channels": int, "scaling": str, "stats": dict}  # of state.json
STATS_SERIES = 16384  # generated series that means and deviations are estimated from


class Mixed(Schedule):
    """For training: series b of a batch follows parts[b % len(parts)]. With stratified times each part's are too."""

    def __init__(self, parts: list[Schedule]) -> None:
        self.parts, self.shape, self.scaling = parts, parts[0].shape, parts[0].scaling

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return self._by_row(t, "log_snr")

    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        return self._by_row(t, "log_snr_slope")

    def _by_row(self, t: torch.Tensor, name: str) -> torch.Tensor:
        out = t.new_empty(len(t), *self.shape)
        for k, part in enumerate(self.parts):
            out[k :: len(self.parts)] = getattr(part, name)(t[k :: len(self.parts)])
        return out


def learning_rate(config: SeriesTrainConfig, step: int) -> float:
    """Of optimizer step `step`, counted from 1: a linear ramp, then half a cosine down to lr * final_lr."""
    if step <= config.warmup:
        return config.lr * step / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_times(batch: int, tokens: int | None, seed: int, step: int) -> torch.Tensor:
    """Stratified times in [0, 1): series b's lies in [b / batch, (b + 1) / batch). (batch,) float64.

    With `tokens`, every token's own time, (batch, tokens), each column stratified in an order of its own.
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


class SeriesTrainer:
    """Trains one network. `average` holds the EMA of the parameters; `step` counts optimizer steps done."""

    def __init__(self, config: SeriesTrainConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
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
            self.model = SeriesDenoiser(config.model, length, channels, self.schedule.scaling).to(self.device)
        self.parameters: list[torch.Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=(0.9, config.beta2), weight_decay=config.weight_decay, fused=True
        )
        self.average = [p.detach().clone() for p in self.parameters]
        self.step = 0
        self._noise_seed = derive_seed(config.seed, _NOISE)
        self._stop: str | None = None

    def batch(self, step: int) -> torch.Tensor:
        """The series of optimizer step `step`, normalised, (batch, length, channels)."""
        seed = derive_seed(self.config.seed, _BATCH, step)
        if self.data is None:
            x = self.config.source.sample(self.config.batch, seed)
        else:
            x = self.data[np.random.default_rng(seed).integers(len(self.data), size=self.config.batch)]
        return self.stats.normalize(x).to(self.device)

    def train_step(self) -> torch.Tensor:
        """One optimizer step; its loss, a scalar tensor."""
        config, step = self.config, self.step + 1
        x = self.batch(step)
        tokens = x.shape[1] if config.schedule.kind == "independent" else None
        t = draw_times(config.batch, tokens, config.seed, step).to(self.device)
        loss = series_loss(
            self.model, x, self.schedule, t,
            loss=config.loss, space=config.loss_space, seed=self._noise_seed, offset=step,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        # an average that starts from noise forgets it at first as fast as a plain mean would
        torch._foreach_lerp_(self.average, self.parameters, 1 - min(config.ema, step / (step + 9)))
        self.step = step
        return loss.detach()

    def train(self) -> str:
        """Go on from the latest checkpoint until `steps`, SIGTERM or Ctrl-C; "done" or the signal's name.

        Raises:
            FloatingPointError: the loss or the state is no longer finite; the last checkpoint stands.
            OSError: the run folder cannot be written; the last checkpoint stands.
            RuntimeError: another process trains in the run folder.
        """
        with RunLock(self.config.run_dir, "training in"):
            return self._train()

    def _train(self) -> str:
        config = self.config
        self.resume()
        reporter = Reporter(
            Path(config.run_dir), start_step=self.step, total_steps=config.steps, tensorboard=config.tensorboard
        )
        total, counted, since, seconds = torch.zeros((), device=self.device), 0, time.perf_counter(), 0.0
        try:
            with self._signals():
                while self.step < config.steps and self._stop is None:
                    total += self.train_step()
                    counted += 1
                    reporter.advance(self.step)
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        loss = total.item() / counted
                        if not math.isfinite(loss):
                            raise FloatingPointError(f"loss: must be finite, got {loss} at step {self.step}")
                        lap = time.perf_counter() - since
                        seconds += lap
                        record = {
                            "step": self.step, "loss": loss, "lr": learning_rate(config, self.step),
                            "seconds": round(seconds, 3), "clips_per_second": counted * config.batch / lap,
                        }  # fmt: skip
                        reporter.log(record, (config.steps - self.step) * lap / counted)
                        total, counted, since = torch.zeros_like(total), 0, time.perf_counter()
                    if self.step % config.checkpoint_every == 0 and self.step < config.steps:
                        reporter.flush()
                        self.save()
            reporter.flush()
            self.save()
        finally:
            reporter.close()
        return self._stop or "done"

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end training after the current step; a second Ctrl-C ends it at once."""

        def handler(number: int, _frame: Any) -> None:
            if self._stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        try:
            previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread
            previous = {}
        try:
            yield
        finally:
            for s, old in previous.items():
                signal.signal(s, old)

    def save(self) -> Path:
        """A checkpoint of the current step, complete or absent."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        files = {
            "model": dict(self.model.state_dict()),
            "ema": dict(zip(names, self.average, strict=True)),
            "optimizer": flatten_optimizer(self.model, self.optimizer),
        }
        state = {
            "config": self.config.to_json(),
            "length": self.model.length,
            "channels": self.model.channels,
            "scaling": self.model.scaling,
            "stats": self.stats.to_json(),
        }
        return save_checkpoint(self.config.run_dir, self.step, files, state, keep=self.config.keep)

    def resume(self) -> bool:
        """Take up the latest checkpoint of run_dir that verifies; False if there is none.

        Raises:
            ValueError: it was trained with other settings, which the message names, or on other series.
        """
        path = latest_checkpoint(self.config.run_dir)
        if path is None:
            return False
        state = read_state(path, **STATE_FIELDS)
        changed = _differences(state["config"], self.config.to_json())
        if changed:
            raise ValueError(f"run_dir: {path} was trained with other settings: {'; '.join(changed)}")
        if state["stats"] != self.stats.to_json():
            raise ValueError(f"data: {path} was trained on other series: their means or deviations differ")
        load_into(path / "model.safetensors", self.model.state_dict())
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        load_into(path / "ema.safetensors", dict(zip(names, self.average, strict=True)))
        restore_optimizer(path / "optimizer.safetensors", self.model, self.optimizer)
        self.step = state["step"]
        return True

    def averaged(self) -> SeriesDenoiser:
        """A copy of the network with the averaged weights, in eval mode."""
        like = self.model
        model = SeriesDenoiser(like.config, like.length, like.channels, like.scaling).to(self.device)
        with torch.no_grad():
            for p, mean in zip((p for p in model.parameters() if p.requires_grad), self.average, strict=True):
                p.copy_(mean)
        return model.eval()


# How a run reports and where it stands may change between two starts of it.
_FREE = ("run_dir", "checkpoint_every", "log_every", "keep", "tensorboard", "device")


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{name} was {old.get(name)}, now {new[name]}"
        for name in new
        if name not in _FREE and old.get(name) != new[name]
    ]


def source_stats(source: Source, seed: int) -> SeriesStats:
    return SeriesStats.estimate(source.sample(STATS_SERIES, derive_seed(seed, _STATS)))


def heldout_series(source: Source, count: int, seed: int) -> np.ndarray:
    """Generated series that no training step of that seed draws, (count, length, 1)."""
    return source.sample(count, derive_seed(seed, _HELDOUT))


def config_from_json(values: dict[str, Any]) -> SeriesTrainConfig:
    values = dict(values)
    values["run_dir"] = Path(values["run_dir"])
    values["data"] = None if values["data"] is None else Path(values["data"])
    values["source"] = Source(**values["source"])
    values["schedule"] = ScheduleConfig(**{**values["schedule"], "windows": tuple(values["schedule"]["windows"])})
    values["model"] = SeriesModelConfig(**values["model"])
    return SeriesTrainConfig(**values)


def load_series_model(
    path: str | Path, *, average: bool = True, device: torch.device | str = "cpu"
) -> tuple[SeriesDenoiser, SeriesStats, SeriesTrainConfig]:
    """(network in eval mode, statistics, settings) of a checkpoint, or of a run folder's latest one that verifies.

    Args:
        average: take the averaged weights, not those as trained.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a checkpoint that is damaged or not finite, or tensors that differ from the network that its
            settings describe.
    """
    path = find_checkpoint(path)
    state = read_state(path, **STATE_FIELDS)
    try:
        config = config_from_json(state["config"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path / STATE}: does not describe a run on series ({error!r})") from error
    model = SeriesDenoiser(config.model, state["length"], state["channels"], state["scaling"])
    file = path / ("ema.safetensors" if average else "model.safetensors")
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad}
    check_header(file, targets)
    load_into(file, targets)
    return model.to(device).eval(), SeriesStats.from_json(state["stats"]), config
