"""Memory and time of a training run, measured on its network and data without writing anything."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .data import ClipDataset, collate
from .model import Denoiser
from .progress import clock
from .train.config import TrainConfig
from .train.loop import Loop, LoopConfig
from .train.trainer import VideoTask


@dataclass(frozen=True)
class Needs:
    """Bytes on the device, and seconds, of each process.

    Attributes:
        state: weights, gradients, optimizer and averages.
        backward: what a micro-batch keeps for its backward pass; None if `peak` was measured.
        peak: the most that was allocated in a step, on CUDA; else None.
        step: seconds of an optimizer step, without reading its clips.
        read: seconds for reading the clips of a micro-batch in one process.
    """

    config: TrainConfig
    device: torch.device
    precision: str
    processes: int
    state: int
    backward: int | None
    peak: int | None
    step: float
    read: float

    def lines(self) -> list[str]:
        """The report as text."""
        config = self.config
        clips = f"{config.micro_size} clip{'s' * (config.micro_size > 1)}"
        memory = f"{_gib(self.state)} for weights, gradients, optimizer and {len(config.ema_stds)} averages, "
        if self.peak is not None:
            memory += f"{_gib(self.peak)} at most in a step of micro-batches of {clips}"
        else:
            memory += f"{_gib(self.backward or 0)} for the backward pass of a micro-batch of {clips}"
        reading = self.read * config.micro_batches / self.processes
        beside = f"in parallel (--num-workers {config.num_workers})" if config.num_workers else "before each step"
        return [
            f"memory on {self.device}: {memory}",
            f"time: {self.step:.3g} s a step, {config.steps} steps take about {clock(self.step * config.steps)}; "
            f"reading the clips of a step takes {reading:.3g} s, {beside}",
        ]


class _Probe(VideoTask):
    """The same micro-batch again and again; `saved` is what the last one kept for its backward pass."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.saved: dict[int, int] = {}
        self.read = 0.0

    def batches(self, loop: Loop) -> Iterator[Any]:
        start = time.monotonic()
        batch = collate([self.dataset[i % len(self.dataset)] for i in range(self.config.micro_size)])
        self.read = time.monotonic() - start
        return itertools.repeat(batch)

    def losses(
        self, module: Callable[..., torch.Tensor], batch: Any, kind: str, step: int, index: int
    ) -> tuple[torch.Tensor, ...]:
        self.saved.clear()
        return super().losses(module, batch, kind, step, index)


def measure(config: TrainConfig, model: Denoiser, dataset: ClipDataset, stats: Any) -> Needs:
    """Take two steps, the first to warm up. Changes the network's weights; writes nothing.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError, RuntimeError: the run could not begin, see `Trainer`.
    """
    task = _Probe(config, model, dataset, stats)
    loop = Loop(task, dataclasses.replace(LoopConfig.of(config), run_dir=None))
    on_gpu = loop.device.type == "cuda"
    try:
        loop.network.train()
        weights = {p.untyped_storage().data_ptr() for p in loop.network.parameters()}

        def count(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                task.saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(loop.device)
            _check(loop.train_step())
        else:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                _check(loop.train_step())
        backward = None if on_gpu else sum(task.saved.values())
        start = time.monotonic()
        _check(loop.train_step())
        seconds = time.monotonic() - start
        size = sum(p.numel() * p.element_size() for p in loop.network.parameters())
        peak = torch.cuda.max_memory_allocated(loop.device) if on_gpu else None
        state = size * (4 + len(config.ema_stds))  # weights, gradients and two moments of AdamW
        return Needs(config, loop.device, loop.precision, loop.world_size, state, backward, peak, seconds, task.read)
    finally:
        loop.close()


def _check(loss: torch.Tensor) -> None:
    if not torch.isfinite(loss):  # waits for the device
        raise FloatingPointError(f"loss: must be finite in the first steps, got {loss.item()}")


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 2**30 else f"{size / 2**20:.3g} MiB"
