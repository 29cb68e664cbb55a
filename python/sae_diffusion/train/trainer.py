"""Training of a video network on clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..diffusion.loss import LossNormalizer
from ..diffusion.noise import derive_seed
from ..diffusion.own_context import share_of_own_frames, with_own_frames
from .config import FIXED_ON_RESUME, FREE_ON_RESUME, TrainConfig
from .ema import PowerEMA
from .evaluate import heldout_loss
from .loader import MicroBatchSampler, make_loader, read_batches
from .loop import Loop, LoopConfig
from .lr import cosine_lr, power_law_lr
from .objectives import draw_levels, frame_losses, mean_loss
from .task import Task, json_fields, saved_fields

# purposes of derive_seed(seed, purpose, global micro-batch index); the data order is purpose 0
SIGMAS, NOISE, DROPOUT, OWN_FRAMES = 1, 2, 3, 4
FIRST = "first"  # the loss normaliser of frames without past


class VideoTask(Task):
    """Trains a denoiser on clips with the objective of the configuration; arguments as for `Trainer`.

    Data order is a function of (seed, clips seen), all random numbers of (seed, global micro-batch index).
    """

    config_field = "train_config"
    state_fields: ClassVar = {
        "clips_seen": int, "micro_batches_seen": int, "seconds": (int, float), "model_config": dict,
        "train_config": dict, "data": dict, "scaler": dict,
    }  # fmt: skip
    fixed_on_resume = FIXED_ON_RESUME
    free_on_resume = FREE_ON_RESUME
    metrics = 2  # what is minimised: the loss over its fit by noise level; the loss

    def __init__(self, config: TrainConfig, network: nn.Module, dataset: Any, stats: Any, heldout: Any = None) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset: must have at least one clip, got none")
        if config.first_weight == 0 and config.clip_length <= getattr(network.config, "frames_per_block", 1):
            raise ValueError("first_weight: must be positive for clips of one block, which has no past, got 0")
        self.config, self.network, self.dataset, self.stats, self.heldout = config, network, dataset, stats, heldout
        self.model_config = json_fields(network.config)
        self.takes_actions = bool(self.model_config.get("num_actions") or self.model_config.get("action_dim"))
        self.kinds = ("video", "spatial") if config.spatial_every else ("video",)
        self.fits = (*self.kinds, FIRST) if config.first_fit else self.kinds
        # a spatial-only step does not use the temporal mixing, nor clips without actions the action embedding
        has_actions = bool(dataset.num_actions or dataset.action_dim)
        self.leaves_parameters_out = config.spatial_every > 0 or (self.takes_actions and not has_actions)

    def to(self, device: torch.device) -> None:
        super().to(device)
        size, every = self.config.normalizer_size, self.config.normalizer_every
        self.normalizers = {kind: LossNormalizer(size, every, device=device) for kind in self.fits}

    def make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        return torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",  # takes the loss scaler's inf flag on the device: fp16 does not wait
        )  # fmt: skip

    def make_average(self) -> PowerEMA:
        return PowerEMA(self.network, self.config.ema_stds)

    def average_name(self, width: float) -> str:
        return f"ema-{width:.6g}"

    def age(self, loop: Loop) -> int:
        return loop.clips_seen

    def lr(self, step: int) -> float:
        config = self.config
        if config.lr_decay == "cosine":
            return cosine_lr(step, config.lr, steps=config.steps, ramp_steps=config.lr_ramp_steps)
        return power_law_lr(step, config.lr, ref_steps=config.lr_ref_steps, ramp_steps=config.lr_ramp_steps)

    # ---- one step

    def kind(self, step: int) -> str:
        every = self.config.spatial_every
        return "spatial" if every > 0 and step % every == 0 else "video"

    def before_step(self) -> None:
        self.network.normalize_weights_()

    def batches(self, loop: Loop) -> Iterator[Any]:
        config = self.config
        sampler = MicroBatchSampler(
            len(self.dataset), config.seed, clips_seen=loop.clips_seen, batch_size=config.batch_size,
            micro_size=config.micro_size, rank=loop.rank, world_size=loop.world_size,
        )  # fmt: skip
        on_gpu = self.device.type == "cuda"
        return read_batches(make_loader(self.dataset, sampler, num_workers=config.num_workers, pin_memory=on_gpu))

    def losses(
        self, module: Callable[..., torch.Tensor], batch: Any, kind: str, step: int, index: int
    ) -> tuple[torch.Tensor, ...]:
        config, (frames, actions) = self.config, batch
        generator = torch.Generator().manual_seed(derive_seed(config.seed, SIGMAS, index))
        levels = draw_levels(config, self.network, len(frames), frames.shape[1], generator)
        dropped = torch.rand(len(frames), generator=generator) < config.action_dropout
        levels = self._to_device(levels)
        x0 = self.stats.normalize(self._to_device(frames))
        actions = self.actions(actions, dropped)
        torch.manual_seed(derive_seed(config.seed, DROPOUT, index))
        share, context = share_of_own_frames(config.own_context, step), None
        if share and kind == "video" and config.objective != "forcing":
            own = torch.Generator().manual_seed(derive_seed(config.seed, OWN_FRAMES, index))
            context = with_own_frames(
                self.network, x0, actions, levels[:, : x0.shape[1]], config.own_context, share, own
            )
        return frame_losses(
            config, self.network, x0, actions, levels, seed=derive_seed(config.seed, NOISE, index),
            spatial_only=kind == "spatial", module=module, context=context,
        )  # fmt: skip

    def actions(self, actions: torch.Tensor | None, dropped: torch.Tensor) -> torch.Tensor | None:
        """Actions as the network takes them: unknown ones are -1, or NaN where they are continuous."""
        if actions is None or not self.takes_actions:
            return None
        if actions.is_floating_point():
            actions = actions.masked_fill(dropped[:, None, None], math.nan)
        else:
            actions = actions.masked_fill(dropped[:, None], -1)
        return self._to_device(actions)

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        """Through pinned memory, so that nothing waits for the copy."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x

    def minimised(self, kind: str, *parts: torch.Tensor) -> torch.Tensor:
        normalised = [self.normalizers[name](*values) for name, *values in self._by_fit(kind, *parts)]
        return self._mean(kind, normalised[0] if len(normalised) == 1 else torch.cat(normalised, dim=1))

    def record(self, kind: str, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        metrics = (self.minimised(kind, *parts), self._mean(kind, parts[1]))
        for name, *values in self._by_fit(kind, *parts):
            self.normalizers[name].record(*values)
        return metrics

    def _by_fit(self, kind: str, *parts: torch.Tensor) -> list[tuple[Any, ...]]:
        """(normaliser, levels, losses): of all frames, or of (clips and copies, frames) without and with a past."""
        if FIRST not in self.normalizers or kind == "spatial":
            return [(kind, *parts)]
        block = self.network.config.frames_per_block
        levels, losses = (part.reshape(-1, self.config.clip_length) for part in parts)
        return [(FIRST, levels[:, :block], losses[:, :block]), (kind, levels[:, block:], losses[:, block:])]

    def _mean(self, kind: str, losses: torch.Tensor) -> torch.Tensor:
        return losses.mean() if kind == "spatial" else mean_loss(self.config, self.network, losses)

    def summary(self, sums: dict[str, list[float]]) -> dict[str, float]:
        steps = sum(s[0] for s in sums.values())
        found = {"normalised_loss": sum(s[1] for s in sums.values()) / steps}
        for kind, (count, _, total, _) in sums.items():
            if count:
                found["loss" if kind == "video" else f"loss_{kind}"] = total / count
        return found

    def measure_heldout(self) -> dict[str, float]:
        if self.heldout is None:
            return {}
        return {"heldout_loss": heldout_loss(self.network, self.heldout, self.stats, self.config)}

    # ---- saving and resuming

    def loss_state(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}.{name}": value
            for kind, normalizer in self.normalizers.items()
            for name, value in normalizer.state_dict().items()
        }

    def load_loss_state(self, tensors: dict[str, torch.Tensor]) -> None:
        for kind, normalizer in self.normalizers.items():
            normalizer.load_state_dict({name: tensors[f"{kind}.{name}"] for name in normalizer.state_dict()})

    def state(self, loop: Loop) -> dict[str, Any]:
        return {
            "clips_seen": loop.clips_seen,
            "micro_batches_seen": loop.micro_batches_seen,
            "seconds": loop.seconds,
            "model_config": self.model_config,
            "train_config": json_fields(self.config),
            "data": {"fingerprint": self.dataset.fingerprint()},
            "frame_stats": self.stats.to_json(),
            "scaler": loop.scaler.state_dict(),
        }

    def identity(self, saved: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        old, new = saved_fields(self.network.config, state["model_config"]), self.model_config
        fields = [(f"model_config.{k}", old.get(k), new.get(k)) for k in {**new, **old}]
        # without spatial steps there is one normaliser, with them there are two
        spatial = ("spatial_every > 0", bool(saved["spatial_every"]), bool(self.config.spatial_every))
        return [*fields, ("data.fingerprint", state["data"].get("fingerprint"), self.dataset.fingerprint()), spatial]


class Trainer(Loop):
    """Trains a denoiser on clips: the `Loop` with `VideoTask`.

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
        self.config, self.dataset, self.stats = config, dataset, stats
        self.run_dir: Path
        super().__init__(VideoTask(config, model, dataset, stats, heldout), LoopConfig.of(config), on_sample=on_sample)

    @property
    def model(self) -> Any:
        return self.network
