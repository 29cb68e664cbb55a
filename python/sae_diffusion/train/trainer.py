"""The training loop: one process or several, resumable bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..diffusion.forcing import forcing_loss, forcing_sigmas
from ..diffusion.loss import LossNormalizer, denoising_loss
from ..diffusion.noise import derive_seed, sample_sigmas
from ..lock import RunLock
from .checkpoint import (
    RUNNING,
    check_finite,
    flatten_optimizer,
    latest_checkpoint,
    load_into,
    naming_write_errors,
    read_state,
    restore_optimizer,
    save_checkpoint,
)
from .config import FIXED_ON_RESUME, FREE_ON_RESUME, TrainConfig
from .ema import PowerEMA, average_metadata
from .evaluate import heldout_loss
from .loader import MicroBatchSampler, make_loader, read_batches
from .lr import power_law_lr
from .metrics import Reporter

# purposes of derive_seed(seed, purpose, global micro-batch index); the data order is purpose 0
SIGMAS, NOISE, DROPOUT = 1, 2, 3
# buffers are constants; torch 2.13 renamed the option
_HAS_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFER_SYNC: dict[str, Any] = {"forward_sync_buffers" if _HAS_NEW_NAME else "broadcast_buffers": False}
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """Where training stopped and why: "done", "time" or the name of a signal."""

    step: int
    reason: str
    checkpoint: Path


def _json_fields(value: Any) -> Any:
    """A dataclass as JSON would give it back: tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: _json_fields(v) for k, v in value.items()}
    return [_json_fields(v) for v in value] if isinstance(value, (list, tuple)) else value


class Trainer:
    """Trains a denoiser on clips.

    Each step sees `batch_size` clips, split into micro-batches whose number does not depend on how many processes share
    them. Data order is a function of (seed, clips seen), randomness of (seed, global micro-batch index): a resumed run
    repeats an uninterrupted one exactly, and W processes compute what one computes, up to the order of gradient sums.
    Under torchrun (WORLD_SIZE > 1) it uses DistributedDataParallel; all ranks must see the same run directory.
    It has the run directory to itself (`RunLock`) until `train` ends, or `close`.

    Args:
        config: the run.
        model: the denoiser, with `config` (a dataclass), `normalize_weights_()` and the forward of `Denoiser`.
        dataset: `len`, `[i] -> Clip`, `fingerprint()`, and `num_actions`, `action_dim` as in `ClipDataset`.
        stats: `FrameStats` of the training data.
        on_sample: called on rank 0 as on_sample(trainer, step) every `sample_every` steps, model in eval mode, no grad.
        heldout: clips that are not trained on, whose loss is recorded every `heldout_every` steps.

    Raises:
        ValueError: the batch cannot be split over the processes, or the run directory holds a run with another model,
            data set or seed; the message names the field.
        RuntimeError: another process trains in the run directory.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        dataset: Any,
        stats: Any,
        *,
        on_sample: Callable[[Trainer, int], None] | None = None,
        heldout: Any = None,
    ) -> None:
        self.config, self.dataset, self.stats, self.on_sample = config, dataset, stats, on_sample
        self.heldout = heldout
        if len(dataset) == 0:
            raise ValueError("dataset: must have at least one clip, got none")
        self._owns_group = _init_distributed(config.device)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        if config.micro_batches % self.world_size:
            raise ValueError(
                f"micro_batch: batch_size / micro_batch = {config.micro_batches} must be a multiple of the number of "
                f"processes = {self.world_size}"
            )
        # a second group on the CPU agrees on stopping without making the accelerator wait
        self._control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        self.device = _device(config.device)
        self.run_dir = Path(config.run_dir)
        self._lock = RunLock(self.run_dir, "training in")
        if self.rank == 0:
            self._lock.acquire()
        self.model: Any = model.to(self.device)
        self.model_config = _json_fields(model.config)
        self.sigma_data = float(self.model_config.get("sigma_data", 1.0))
        self.frames_per_block = int(self.model_config.get("frames_per_block", 1))
        self._gives_raw_output = bool(getattr(model, "gives_raw_output", False))
        self._takes_actions = bool(self.model_config.get("num_actions") or self.model_config.get("action_dim"))
        has_actions = bool(dataset.num_actions or dataset.action_dim)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",  # takes the loss scaler's inf flag on the device: fp16 does not wait
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.normalizers = {
            kind: LossNormalizer(config.normalizer_size, config.normalizer_every, device=self.device)
            for kind in (("video", "spatial") if config.spatial_every else ("video",))
        }
        self.step = self.clips_seen = self.micro_batches_seen = 0
        self.seconds = 0.0
        # per kind: steps, normalised loss, weighted loss; then the gradient norm. Since the last record.
        self._running = {kind: torch.zeros(4, device=self.device) for kind in self.normalizers}
        self._saved_step: int | None = None
        self._stop: str | None = None
        self.reporter: Reporter | None = None

        self._ddp: DistributedDataParallel | None = None
        if self.world_size > 1:
            # or no gradient could be sent before backward ends
            self.model.weights_at_once = False  # type: ignore[assignment]
            self._ddp = DistributedDataParallel(
                self.model, gradient_as_bucket_view=True, **_WITHOUT_BUFFER_SYNC,
                # a spatial-only step leaves the temporal mixing out, clips without actions the action embedding
                find_unused_parameters=config.spatial_every > 0 or (self._takes_actions and not has_actions),
            )  # fmt: skip
        module: Any = self.model if self._ddp is None else self._ddp
        self.module: Callable[..., torch.Tensor] = torch.compile(module) if config.compile else module
        self.ema = PowerEMA(self.model, config.ema_stds)
        try:
            self._resume()
        except BaseException:  # whose traceback may keep this object alive
            self._lock.release()
            raise

    # ---- one step

    def _micro_step(self, frames: Any, actions: Any, index: int, spatial: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient of one micro-batch, scaled so that the step's gradient is that of the mean over the global batch."""
        config = self.config
        generator = torch.Generator().manual_seed(derive_seed(config.seed, SIGMAS, index))
        batch, length = frames.shape[:2]
        forcing = config.objective == "forcing"
        copies = 1 if forcing else config.noisy_copies
        levels: dict[str, Any] = {"generator": generator, "frames_per_block": self.frames_per_block}
        if forcing:  # all levels are those of the noisy frames; there is no clean half
            noisy = forcing_sigmas(config.noise, batch, length, clean_frames=config.clean_frames, **levels)
            sigmas = noisy.repeat(1, 2)
        else:
            sigmas = sample_sigmas(config.noise, batch, length, copies, **levels)
        dropped = torch.rand(batch, generator=generator) < config.action_dropout
        sigmas = self._to_device(sigmas)
        x0 = self.stats.normalize(self._to_device(frames))
        actions = self._actions(actions, dropped)
        torch.manual_seed(derive_seed(config.seed, DROPOUT, index))
        dtype = AUTOCAST[config.precision]
        with torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext():
            options: dict[str, Any] = {
                "seed": derive_seed(config.seed, NOISE, index),
                "sigma_data": self.sigma_data,
                "raw": self._gives_raw_output,
            }
            if forcing and not spatial:
                losses = forcing_loss(self.module, x0, actions, sigmas[:, length:], **options)
            else:
                losses = denoising_loss(
                    self.module, x0, actions, sigmas, noisy_copies=copies, spatial_only=spatial, **options
                )
        noisy = sigmas[:, length:]
        normalised = self.normalizers["spatial" if spatial else "video"](noisy, losses)
        self.scaler.scale(normalised.mean() * (self.world_size / config.micro_batches)).backward()
        return noisy, losses.detach()

    def _actions(self, actions: torch.Tensor | None, dropped: torch.Tensor) -> torch.Tensor | None:
        """Actions as the model takes them: unknown ones are -1, or NaN where they are continuous."""
        if actions is None or not self._takes_actions:
            return None
        if actions.is_floating_point():
            actions = actions.masked_fill(dropped[:, None, None], math.nan)
        else:
            actions = actions.masked_fill(dropped[:, None], -1)
        return self._to_device(actions)

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        """From pinned memory, so that the copy makes nobody wait."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def _train_step(self, batches: Iterator[Any]) -> None:
        config = self.config
        spatial = config.spatial_every > 0 and (self.step + 1) % config.spatial_every == 0
        kind = "spatial" if spatial else "video"
        self.model.normalize_weights_()
        lr = self.lr(self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        mine = range(self.rank, config.micro_batches, self.world_size)
        pairs = []
        for micro in mine:
            frames, actions = next(batches)
            last = micro == mine[-1]
            with contextlib.nullcontext() if last or self._ddp is None else self._ddp.no_sync():
                pairs.append(torch.stack(self._micro_step(frames, actions, self.micro_batches_seen + micro, spatial)))
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if config.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), config.grad_clip, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

        self.step += 1
        self.clips_seen += config.batch_size
        self.micro_batches_seen += config.micro_batches
        self.ema.update(self.model, self.clips_seen)
        sigma, loss = self._gather(torch.stack(pairs, dim=1).flatten(2))
        normalised = self.normalizers[kind](sigma, loss).mean()
        self._running[kind] += torch.stack([torch.ones_like(normalised), normalised, loss.mean(), norm.to(normalised)])
        self.normalizers[kind].record(sigma, loss)

    def _gather(self, pairs: torch.Tensor) -> torch.Tensor:
        """(2, micro-batches of this rank, n) -> (2, n of all), in the order of the micro-batches, on every rank."""
        if self.world_size > 1:
            parts = [torch.empty_like(pairs) for _ in range(self.world_size)]
            dist.all_gather(parts, pairs.contiguous())
            pairs = torch.stack(parts, dim=2)
        return pairs.flatten(1)

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""
        return power_law_lr(
            step, self.config.lr, ref_steps=self.config.lr_ref_steps, ramp_steps=self.config.lr_ramp_steps
        )

    # ---- the loop

    def train(self) -> TrainResult:
        """Train until `steps`, `max_seconds`, SIGTERM or Ctrl-C, save, and say which it was.

        Raises:
            FloatingPointError: the loss or the state is no longer finite; nothing is saved, the last checkpoint stands.
            DataError: a file of the data cannot be read or has changed.
            OSError: the run directory cannot be written; the last checkpoint stands.
            RuntimeError: another process trains in the run directory.
        """
        try:
            if self.rank == 0:
                self._lock.acquire()
            return self._train()
        finally:
            self._lock.release()

    def _train(self) -> TrainResult:
        config = self.config
        sampler = MicroBatchSampler(
            len(self.dataset), config.seed, clips_seen=self.clips_seen, batch_size=config.batch_size,
            micro_size=config.micro_size, rank=self.rank, world_size=self.world_size,
        )  # fmt: skip
        loader = make_loader(
            self.dataset, sampler, num_workers=config.num_workers, pin_memory=self.device.type == "cuda"
        )
        start, start_step, seconds_before = time.monotonic(), self.step, self.seconds
        reason = "done"
        if self.rank == 0:
            self.reporter = Reporter(
                self.run_dir, start_step=self.step, total_steps=config.steps, tensorboard=config.tensorboard
            )
        self.model.train()
        with self._signals():
            try:
                batches: Any = read_batches(loader) if self.step < config.steps else None
                while self.step < config.steps:
                    self._train_step(batches)
                    elapsed = time.monotonic() - start
                    self.seconds = seconds_before + elapsed
                    self._after_step(elapsed, elapsed / (self.step - start_step))
                    stop = self._agree_to_stop(elapsed)
                    if stop is not None:
                        reason = stop
                        break
                checkpoint = self.save()
            finally:
                batches = None  # ends the loader's workers
                if self.reporter is not None:
                    self.reporter.close()
                    self.reporter = None
        return TrainResult(self.step, reason, checkpoint)

    def _after_step(self, elapsed: float, seconds_per_step: float) -> None:
        config = self.config

        def due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        if self.reporter is not None:
            self.reporter.advance(self.step)
        if due(config.log_every) or self.step == config.steps:
            self._log(elapsed, seconds_per_step)
        if due(config.snapshot_every):
            self.check_finite()
            if self.rank == 0:
                with naming_write_errors(self.run_dir, f"the snapshot of step {self.step}"):
                    self.ema.save_snapshot(self.run_dir / "ema")
        if due(config.sample_every) and self.on_sample is not None and self.rank == 0:
            self.model.eval()
            with torch.no_grad():
                self.on_sample(self, self.step)
            self.model.train()
        if due(config.checkpoint_every):
            self.save()

    def _log(self, elapsed: float, seconds_per_step: float) -> None:
        config = self.config
        sums = {kind: running.tolist() for kind, running in self._running.items()}
        for running in self._running.values():
            running.zero_()
        count = sum(s[0] for s in sums.values())
        if count == 0:
            return
        record: dict[str, Any] = {
            "step": self.step,
            "clips": self.clips_seen,
            "normalised_loss": sum(s[1] for s in sums.values()) / count,
        }
        for kind, (n, _, weighted, _) in sums.items():
            if n:
                record["loss" if kind == "video" else f"loss_{kind}"] = weighted / n
        if not all(math.isfinite(value) for value in record.values()):
            raise FloatingPointError(
                f"the loss is not finite any more at step {self.step}: {record}; lower lr or use grad_clip"
            )
        norm = sum(s[3] for s in sums.values()) / count
        if not (math.isfinite(norm) or self.scaler.is_enabled()):
            check_finite(self._files(), self.step)
            raise FloatingPointError(f"the gradient is not finite any more at step {self.step}: its norm is {norm}")
        record |= {
            "grad_norm": norm if math.isfinite(norm) else None,  # a step that the fp16 loss scaler skipped
            "lr": self.lr(self.step),
            "clips_per_second": self.config.batch_size / seconds_per_step,
            "seconds": self.seconds,
        }
        if self.reporter is not None:
            if self.heldout is not None and config.heldout_every > 0 and self.step % config.heldout_every == 0:
                record["heldout_loss"] = heldout_loss(self.model, self.heldout, self.stats, config)
            left = seconds_per_step * (self.config.steps - self.step)
            if self.config.max_seconds is not None:
                left = min(left, max(self.config.max_seconds - elapsed, 0.0))
            self.reporter.log(record, left)

    @contextlib.contextmanager
    def ema_weights(self, std: float) -> Iterator[nn.Module]:
        """The model with the average of relative width `std` in place of its weights, for sampling during training."""
        kept = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self.ema.copy_to(self.model, std)
            yield self.model
        finally:
            with torch.no_grad():
                for name, p in self.model.named_parameters():
                    p.copy_(kept[name])

    # ---- stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C end training after the current step; a second Ctrl-C ends it at once."""
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
        """All ranks stop after the same step: if any was told to, or the time is up on rank 0."""
        reasons = (None, "time", "SIGINT", "SIGTERM")
        limit = self.config.max_seconds
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
        """All ranks hold the same state, so all raise or none.

        Raises:
            FloatingPointError: a loss or gradient norm since the last record, or a tensor of the state, is not finite.
        """
        # the state first: it can say where
        check_finite(self._files(), self.step)
        # the fp16 loss scaler skips a step with an infinite gradient
        checked = 3 if self.scaler.is_enabled() else 4
        if not all(torch.isfinite(running[:checked]).all() for running in self._running.values()):
            raise FloatingPointError(f"the loss is not finite any more at step {self.step}; nothing was saved")

    def _files(self) -> dict[str, dict[str, torch.Tensor]]:
        """What a checkpoint holds beside state.json."""
        loss = {f"{RUNNING}{kind}": running for kind, running in self._running.items()}
        for kind, normalizer in self.normalizers.items():
            loss |= {f"{kind}.{name}": value for name, value in normalizer.state_dict().items()}
        return {
            "model": self.model.state_dict(),
            "optimizer": flatten_optimizer(self.model, self.optimizer),
            "loss": loss,
            **{f"ema-{std:.6g}": average for std, average in self.ema.averages.items()},
        }

    def save(self) -> Path:
        """Checkpoint of the current step; all ranks call it, rank 0 writes.

        Raises:
            FloatingPointError: see `check_finite`.
            OSError: it cannot be written; the last checkpoint stands.
        """
        self.check_finite()
        path = self.run_dir / f"step-{self.step:07d}"
        if self.rank == 0 and self._saved_step != self.step:
            if self.reporter is not None:
                self.reporter.flush()
            path = save_checkpoint(
                self.run_dir,
                self.step,
                self._files(),
                {
                    "clips_seen": self.clips_seen,
                    "micro_batches_seen": self.micro_batches_seen,
                    "seconds": self.seconds,
                    "model_config": self.model_config,
                    "train_config": _json_fields(self.config),
                    "data": {"fingerprint": self.dataset.fingerprint()},
                    "frame_stats": self.stats.to_json(),
                    "scaler": self.scaler.state_dict(),
                },
                keep=self.config.keep_checkpoints,
                metadata={f"ema-{std:.6g}": average_metadata(std, self.clips_seen) for std in self.ema.stds},
            )
        self._saved_step = self.step
        if self._control is not None:
            dist.barrier(group=self._control)
        return path

    def _resume(self) -> None:
        """Take up the latest checkpoint of the run directory, if there is one. Rank 0 chooses it for all."""
        path = latest_checkpoint(self.run_dir) if self.rank == 0 else None
        if self._control is not None:
            chosen = torch.tensor(-1 if path is None else int(path.name.removeprefix("step-")))
            dist.broadcast(chosen, 0, group=self._control)
            path = None if int(chosen) < 0 else self.run_dir / f"step-{int(chosen):07d}"
        if path is None:
            return
        state = read_state(
            path, clips_seen=int, micro_batches_seen=int, seconds=(int, float), model_config=dict, train_config=dict,
            data=dict, scaler=dict,
        )  # fmt: skip
        self._check_same_run(path, state)
        load_into(path / "model.safetensors", self.model.state_dict())
        restore_optimizer(path / "optimizer.safetensors", self.model, self.optimizer)
        for std, average in self.ema.averages.items():
            load_into(path / f"ema-{std:.6g}.safetensors", average)
        targets = {f"{RUNNING}{kind}": running for kind, running in self._running.items()}
        loaded = {kind: normalizer.state_dict() for kind, normalizer in self.normalizers.items()}
        targets |= {f"{kind}.{name}": value for kind, s in loaded.items() for name, value in s.items()}
        load_into(path / "loss.safetensors", targets)
        for kind, normalizer in self.normalizers.items():
            normalizer.load_state_dict(loaded[kind])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.clips_seen = state["step"], state["clips_seen"]
        self.micro_batches_seen, self.seconds = state["micro_batches_seen"], state["seconds"]
        self.ema.clips_seen = self.clips_seen
        self._saved_step = self.step
        if self.rank == 0:
            print(f"resuming {path}")

    def _check_same_run(self, path: Path, state: dict[str, Any]) -> None:
        saved, current = state["train_config"], _json_fields(self.config)
        old, new = state["model_config"], self.model_config
        # a field that the checkpoint does not know is one that was added since: its default is what was trained
        defaults = {f.name: _json_fields(f.default) for f in dataclasses.fields(self.model.config)}
        fields = [(f"model_config.{k}", old.get(k, defaults.get(k)), new.get(k)) for k in {**new, **old}]
        fields += [("data.fingerprint", state["data"].get("fingerprint"), self.dataset.fingerprint())]
        # as for the model: what was added since had its default
        saved = {**{f.name: _json_fields(f.default) for f in dataclasses.fields(self.config)}, **saved}
        fields += [(k, saved.get(k), current[k]) for k in FIXED_ON_RESUME]
        # without spatial steps there is one normaliser, with them there are two
        fields += [("spatial_every > 0", bool(saved.get("spatial_every")), bool(current["spatial_every"]))]
        for name, was, now in fields:
            if was != now:
                raise ValueError(
                    f"{name}: {path} was trained with {was!r}, this run has {now!r}; choose another run_dir"
                )
        changed = [k for k in current if k not in FREE_ON_RESUME and saved.get(k) != current[k]]
        if changed and self.rank == 0:
            print(
                "changed since the checkpoint: " + ", ".join(f"{k} {saved.get(k)!r} -> {current[k]!r}" for k in changed)
            )

    def close(self) -> None:
        """Let go of the run directory, and leave the process group, if this trainer made it."""
        self._lock.release()
        if self._owns_group:
            dist.destroy_process_group()
            self._owns_group = False


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


def _init_distributed(device: str) -> bool:
    """Join torchrun's process group if there is one to join; whether this call made it."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return False
    chosen = _device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return True
