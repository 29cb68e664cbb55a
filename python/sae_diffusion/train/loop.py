"""The training loop for any `Task`: one process or several, resumable bit for bit."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..devices import pick_device, pick_precision
from ..lock import RunLock
from .checkpoint import RUNNING, check_finite, latest_checkpoint, naming_write_errors, read_state, save_checkpoint
from .files import flatten_optimizer, load_into, restore_optimizer
from .metrics import Reporter
from .task import Task, json_fields, saved_fields

# buffers are constants and need no sync; torch 2.13 renamed the option
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """Where training stopped and why: "done", "time" or the name of a signal. checkpoint is None without a folder."""

    step: int
    reason: str
    checkpoint: Path | None


@dataclass(frozen=True)
class LoopConfig:
    """The settings of the loop, as in `TrainConfig`. Without `run_dir` nothing is read or written."""

    run_dir: str | Path | None
    steps: int
    batch_size: int
    micro_batches: int = 1
    max_seconds: float | None = None
    grad_clip: float = 0.0
    precision: str = "fp32"
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    snapshot_every: int = 0
    log_every: int = 0
    heldout_every: int = 0
    sample_every: int = 0
    compile: bool = False
    device: str = "auto"
    tensorboard: bool = True

    @classmethod
    def of(cls, config: Any) -> LoopConfig:
        """From a configuration that has fields of these names."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)})


class Loop:
    """Trains the network of a task.

    Each step is split into micro-batches whose number does not depend on the number of processes; the task's random
    numbers are a function of the step or the micro-batch. So a resumed run repeats an uninterrupted one exactly, and W
    processes compute what one computes, up to the order of gradient sums. Under torchrun (WORLD_SIZE > 1) it uses
    DistributedDataParallel; all ranks must see the same run folder. The folder is locked (`RunLock`) until `train` ends
    or `close` is called.

    Args:
        task: what to train.
        settings: how to train it.
        on_sample: called on rank 0 as on_sample(loop, step) every `sample_every` steps, network in eval mode, no grad.
        resume: load the folder's latest checkpoint now; otherwise when `train` begins.

    Raises:
        ValueError: the batch cannot be split over the processes, or the folder holds another run; the message names the
            field.
        RuntimeError: another process is training in the folder.
    """

    def __init__(
        self,
        task: Task,
        settings: LoopConfig,
        *,
        on_sample: Callable[[Any, int], None] | None = None,
        resume: bool = True,
    ) -> None:
        self.task, self.settings, self.on_sample = task, settings, on_sample
        self._owns_group = _init_distributed(settings.device)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if settings.micro_batches % self.world_size:
            raise ValueError(
                f"micro_batch: batch_size / micro_batch = {settings.micro_batches} must be a multiple of the number of "
                f"processes = {self.world_size}"
            )
        # a second group, on the CPU, so that agreeing on when to stop does not synchronise the accelerator
        self._control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.device = _device(settings.device)
        self.run_dir = None if settings.run_dir is None else Path(settings.run_dir)
        self._lock = None if self.run_dir is None or self.rank else RunLock(self.run_dir, "training in")
        if resume:
            self._acquire()
        try:
            self._build()
            if resume:
                self.resume()
        except BaseException:  # its traceback may keep this object alive
            self._release()
            raise

    def _build(self) -> None:
        task, settings = self.task, self.settings
        task.to(self.device)
        self.network: Any = task.network
        self.optimizer = task.make_optimizer()
        self.precision = pick_precision(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.ema = task.make_average()
        self.step = self.clips_seen = self.micro_batches_seen = 0
        self.seconds = 0.0
        # sums since the last record, for each kind of step: steps, the task's metrics, gradient norm
        self._running = {kind: torch.zeros(task.metrics + 2, device=self.device) for kind in task.kinds}
        self._batches: Iterator[Any] | None = None
        self._saved_step: int | None = None
        self._resumed = False
        self._stop: str | None = None
        self.reporter: Reporter | None = None
        self._ddp: DistributedDataParallel | None = None
        if self.world_size > 1:
            # else no gradient could be sent before backward ends
            self.network.weights_at_once = False
            self._ddp = DistributedDataParallel(
                self.network, gradient_as_bucket_view=True, find_unused_parameters=task.leaves_parameters_out,
                **_WITHOUT_BUFFER_SYNC,
            )  # fmt: skip
        module: Any = self.network if self._ddp is None else self._ddp
        self.module: Callable[..., torch.Tensor] = torch.compile(module) if settings.compile else module

    # ---- one step

    def train_step(self) -> torch.Tensor:
        """One optimizer step; its loss, a scalar tensor."""
        settings, task = self.settings, self.task
        if self._batches is None:
            self._batches = task.batches(self)
        kind = task.kind(self.step + 1)
        task.before_step()
        for group in self.optimizer.param_groups:
            group["lr"] = task.lr(self.step + 1)
        mine = range(self.rank, settings.micro_batches, self.world_size)
        parts = []
        for micro in mine:
            batch = next(self._batches)
            last = micro == mine[-1]
            with contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                parts.append(self._micro_step(batch, self.micro_batches_seen + micro, kind))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if settings.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), settings.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.clips_seen += settings.batch_size
        self.micro_batches_seen += settings.micro_batches
        self.ema.update(self.network, task.age(self))
        metrics = task.record(kind, *self._gather(torch.stack(parts, dim=1).flatten(2)))
        self._running[kind] += torch.stack([torch.ones_like(metrics[0]), *metrics, norm.to(metrics[0])])
        return metrics[0]

    def _micro_step(self, batch: Any, index: int, kind: str) -> torch.Tensor:
        """Gradient of one micro-batch, scaled so that the step's gradient is that of the mean over the whole batch."""
        dtype = AUTOCAST[self.precision]
        with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            parts = self.task.losses(self.module, batch, kind, self.step + 1, index)
        loss = self.task.minimised(kind, *parts)
        self.scaler.scale(loss * (self.world_size / self.settings.micro_batches)).backward()
        return torch.stack([part.detach() for part in parts])

    def _gather(self, parts: torch.Tensor) -> torch.Tensor:
        """(k, micro-batches of this rank, n) -> (k, n of all), in the order of the micro-batches, on every rank."""
        if self.world_size > 1:
            all_parts = [torch.empty_like(parts) for _ in range(self.world_size)]
            dist.all_gather(all_parts, parts.contiguous())
            parts = torch.stack(all_parts, dim=2)
        return parts.flatten(1)

    # ---- the loop

    def train(self, until: int | None = None) -> TrainResult:
        """Train until `steps` (or step `until`), `max_seconds`, SIGTERM or Ctrl-C, save, and say which it was.

        Raises:
            FloatingPointError: the loss or the state is no longer finite; nothing is saved.
            DataError: a file of the data cannot be read or has changed.
            OSError: the run folder cannot be written; the last checkpoint is intact.
            RuntimeError: another process trains in the run folder.
        """
        try:
            self._acquire()
            if not self._resumed:
                self.resume()
            return self._train(self.settings.steps if until is None else min(until, self.settings.steps))
        finally:
            self._release()

    def _train(self, last_step: int) -> TrainResult:
        settings = self.settings
        start, start_step, seconds_before = time.monotonic(), self.step, self.seconds
        reason = "done"
        if self.rank == 0 and self.run_dir is not None:
            self.reporter = Reporter(
                self.run_dir, start_step=self.step, total_steps=last_step, tensorboard=settings.tensorboard
            )
        self.network.train()
        with self._signals():
            try:
                while self.step < last_step:
                    self.train_step()
                    elapsed = time.monotonic() - start
                    self.seconds = seconds_before + elapsed
                    left = elapsed / (self.step - start_step) * (last_step - self.step)
                    if settings.max_seconds is not None:
                        left = min(left, max(settings.max_seconds - elapsed, 0.0))
                    self._after_step(elapsed / (self.step - start_step), left, self.step == last_step)
                    stop = self._agree_to_stop(elapsed)
                    if stop is not None:
                        reason = stop
                        break
                checkpoint = self.save()
            finally:
                self._batches = None  # ends the loader's workers
                if self.reporter is not None:
                    self.reporter.close()
                    self.reporter = None
        return TrainResult(self.step, reason, checkpoint)

    def _after_step(self, seconds_per_step: float, seconds_left: float, last: bool) -> None:
        settings = self.settings

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        if self.reporter is not None:
            self.reporter.advance(self.step, seconds_left)
        if due(settings.log_every) or last:
            self._log(seconds_per_step, seconds_left)
        if due(settings.snapshot_every) and self.run_dir is not None:
            self.check_finite()
            if self.rank == 0:
                with naming_write_errors(self.run_dir, f"the snapshot of step {self.step}"):
                    self.ema.save_snapshot(self.run_dir / "ema")
        if due(settings.sample_every) and self.on_sample is not None and self.rank == 0:
            self.network.eval()
            with torch.no_grad():
                self.on_sample(self, self.step)
            self.network.train()
        if due(settings.checkpoint_every):
            self.save()

    def _log(self, seconds_per_step: float, seconds_left: float) -> None:
        sums = {kind: running.tolist() for kind, running in self._running.items()}
        for running in self._running.values():
            running.zero_()
        count = sum(s[0] for s in sums.values())
        if count == 0:
            return
        record: dict[str, Any] = {"step": self.step, "clips": self.clips_seen} | self.task.summary(sums)
        if not all(math.isfinite(value) for value in record.values()):
            raise FloatingPointError(
                f"the loss is no longer finite at step {self.step}: {record}; lower lr or use grad_clip"
            )
        norm = sum(s[-1] for s in sums.values()) / count
        if not (math.isfinite(norm) or self.scaler.is_enabled()):
            check_finite(self._files(), self.step)
            raise FloatingPointError(f"the gradient is no longer finite at step {self.step}: its norm is {norm}")
        record |= {
            "grad_norm": norm if math.isfinite(norm) else None,  # a step that the fp16 loss scaler skipped
            "lr": self.task.lr(self.step),
            "clips_per_second": self.settings.batch_size / seconds_per_step,
            "seconds": self.seconds,
        }
        if self.reporter is not None:
            if self.settings.heldout_every > 0 and self.step % self.settings.heldout_every == 0:
                record |= self.task.measure_heldout()
            self.reporter.log(record, seconds_left)

    @contextlib.contextmanager
    def ema_weights(self, std: float) -> Iterator[nn.Module]:
        """The network with its weights replaced by their average of relative width `std`, to sample while training."""
        kept = {name: p.detach().clone() for name, p in self.network.named_parameters()}
        try:
            self.ema.copy_to(self.network, std)
            yield self.network
        finally:
            with torch.no_grad():
                for name, p in self.network.named_parameters():
                    p.copy_(kept[name])

    # ---- stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM or a first Ctrl-C ends training after the current step; a second Ctrl-C ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handler(number: int, frame: Any) -> None:
            if self._stop is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._stop = signal.Signals(number).name

        previous = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, old in previous.items():
                signal.signal(s, old)

    def _agree_to_stop(self, elapsed: float) -> str | None:
        """Why all ranks stop after this step, if any rank was told to or the time is up on rank 0; else None."""
        reasons = (None, "time", "SIGINT", "SIGTERM")
        limit = self.settings.max_seconds
        code = reasons.index(self._stop)
        if not code and limit is not None and elapsed >= limit and self.rank == 0:
            code = 1
        if self._control is not None:
            shared = torch.tensor(code)
            dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._control)
            code = int(shared)
        return reasons[code]

    # ---- saving and resuming

    def check_finite(self) -> None:
        """Check the state, which is the same on all ranks: all raise or none.

        Raises:
            FloatingPointError: a loss or gradient norm since the last record, or a tensor of the state, is not finite.
        """
        # the state first, because its error names the tensor
        check_finite(self._files(), self.step)
        # the fp16 loss scaler skips a step with an infinite gradient
        checked = -1 if self.scaler.is_enabled() else None
        if not all(torch.isfinite(running[:checked]).all() for running in self._running.values()):
            raise FloatingPointError(f"the loss is no longer finite at step {self.step}; nothing was saved")

    def _running_files(self) -> dict[str, torch.Tensor]:
        return {f"{RUNNING}{kind}": running for kind, running in self._running.items()}

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        """The files of a checkpoint beside state.json."""
        return {
            "model": self.network.state_dict(),
            "optimizer": flatten_optimizer(self.network, self.optimizer),
            "loss": self._running_files() | self.task.loss_state(),
            **{self.task.average_name(width): average for width, average in self.ema.averages.items()},
            **self.task.constants(),
        }

    def save(self) -> Path | None:
        """Write a checkpoint of the current step, complete or not at all; all ranks call it, rank 0 writes.

        Raises:
            FloatingPointError: see `check_finite`.
            OSError: it cannot be written; the last checkpoint is intact.
        """
        self.check_finite()
        if self.run_dir is None:
            return None
        path = self.run_dir / f"step-{self.step:07d}"
        if self.rank == 0 and self._saved_step != self.step:
            if self.reporter is not None:
                self.reporter.flush()
            path = save_checkpoint(
                self.run_dir, self.step, self._files(), self.task.state(self), keep=self.settings.keep_checkpoints,
                metadata={self.task.average_name(w): self.ema.metadata(w) for w in self.ema.averages},
            )  # fmt: skip
        self._saved_step = self.step
        if self._control is not None:
            dist.barrier(group=self._control)
        return path

    def resume(self) -> bool:
        """Load the latest undamaged checkpoint of the run folder, which rank 0 chooses; False if there is none.

        Raises:
            ValueError: the checkpoint is of another run; the message names the field.
        """
        self._resumed = True
        path = latest_checkpoint(self.run_dir) if self.rank == 0 and self.run_dir is not None else None
        if self._control is not None and self.run_dir is not None:
            chosen = torch.tensor(-1 if path is None else int(path.name.removeprefix("step-")))
            dist.broadcast(chosen, 0, group=self._control)
            path = None if int(chosen) < 0 else self.run_dir / f"step-{int(chosen):07d}"
        if path is None:
            return False
        state = read_state(path, **self.task.state_fields)
        self._check_same_run(path, state)
        load_into(path / "model.safetensors", self.network.state_dict())
        restore_optimizer(path / "optimizer.safetensors", self.network, self.optimizer)
        for width, average in self.ema.averages.items():
            load_into(path / f"{self.task.average_name(width)}.safetensors", average)
        losses = self.task.loss_state()
        if losses or "loss.safetensors" in state["sha256"]:  # older runs on series and images have none
            load_into(path / "loss.safetensors", self._running_files() | losses)
            self.task.load_loss_state(losses)
        if self.scaler.is_enabled() and state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        self.step = self._saved_step = state["step"]
        self.clips_seen = state.get("clips_seen", self.step * self.settings.batch_size)
        self.micro_batches_seen = state.get("micro_batches_seen", self.step * self.settings.micro_batches)
        self.seconds = state.get("seconds", 0.0)
        self.ema.clips_seen = self.task.age(self)
        self._batches = None
        if self.rank == 0:
            print(f"resuming {path}")
        return True

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        task = self.task
        saved, current = saved_fields(task.config, state[task.config_field]), json_fields(task.config)
        fields = task.identity(saved, state)
        fields += [(name, saved.get(name), current.get(name)) for name in {**saved, **current} if task.is_fixed(name)]
        for name, was, now in fields:
            if was != now:
                raise ValueError(
                    f"{name}: {path} was trained with {was!r}, this run has {now!r}; choose another run_dir"
                )
        task.check_data(path, state)
        changed = [k for k in current if k not in task.free_on_resume and saved.get(k) != current[k]]
        if changed and self.rank == 0:
            print(
                "changed since the checkpoint: " + ", ".join(f"{k} {saved.get(k)!r} -> {current[k]!r}" for k in changed)
            )

    def _acquire(self) -> None:
        if self._lock is not None:
            self._lock.acquire()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def close(self) -> None:
        """Let go of the run folder, and leave the process group, if this loop made it."""
        self._release()
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False


def _device(name: str) -> torch.device:
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _init_distributed(device: str) -> bool:
    """Join torchrun's process group if there is one to join; whether this call made it."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return False
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return True
