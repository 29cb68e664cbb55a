"""What is held to recorded numbers: every trainer, sampler and solver on something small, seeded, in fp32 and fp64.

A case returns its tensors by name. Trainers report the losses of every step and their weights at the end.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_diffusion.data import Clip, FrameStats
from sae_diffusion.diffusion import schedules
from sae_diffusion.diffusion.sampler import SamplerConfig, generate
from sae_diffusion.diffusion.schedules import expand_to
from sae_diffusion.diffusion.solvers import SOLVERS, Churn, context_guided, guided, roll, sample, start
from sae_diffusion.images.data import ImageSet
from sae_diffusion.images.model import NetConfig
from sae_diffusion.images.train import ImageTrainConfig, ImageTrainer
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.rollout import continue_clips, videos_from_nothing
from sae_diffusion.series import Source
from sae_diffusion.series.config import ScheduleConfig, SeriesTrainConfig
from sae_diffusion.series.model import SeriesModelConfig
from sae_diffusion.series.sampling import generate as generate_series
from sae_diffusion.series.train import SeriesTrainer
from sae_diffusion.train import TrainConfig, Trainer

Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """run(dtype) makes the tensors; `inputs` is the least exact dtype on the way, that of its noise or its data."""

    run: Callable[[torch.dtype], Tensors]
    dtypes: tuple[torch.dtype, ...]
    inputs: torch.dtype


CASES: dict[str, Case] = {}
BOTH = (torch.float32, torch.float64)


def case(name: str, run: Callable[[torch.dtype], Tensors], dtypes=BOTH, inputs: torch.dtype = torch.float32) -> None:
    CASES[name] = Case(run, dtypes, inputs)


# ---- video: training

NET = ModelConfig(
    height=4, width=4, channels=2, model_channels=8, channel_mult=(1,), blocks_per_level=1, video_attention=(4,),
    head_dim=8, kernel_frames=2, num_actions=3,
)  # fmt: skip


class Stripes(torch.utils.data.Dataset):
    """Clips of a drifting stripe with actions of either kind, or none; float latents for the network's own size."""

    frame_shape = (4, 4, 2)

    def __init__(self, num_actions: int = 3, action_dim: int = 0) -> None:
        self.num_actions, self.action_dim = num_actions, action_dim

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Clip:
        rng = np.random.default_rng(index)
        frames = rng.integers(0, 80, (4, 4, 4, 2), dtype=np.uint8)
        frames[np.arange(4), :, (index + np.arange(4)) % 4] += 170
        actions = None
        if self.num_actions:
            actions = rng.integers(0, self.num_actions, 4)
        elif self.action_dim:
            actions = rng.standard_normal((4, self.action_dim)).astype(np.float32)
        return Clip(frames, actions, f"clip {index}")

    def fingerprint(self) -> str:
        return "stripes"


def network(dtype: torch.dtype, seed: int = 1, **changes: Any) -> Denoiser:
    """Gains, gates and slopes are moved off the zeros they start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Denoiser(dataclasses.replace(NET, **changes)).eval()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if p.ndim < 2 and not name.endswith("limits"):
                    p += torch.empty_like(p).uniform_(0.5, 1.0)
    return net.to(dtype)


def train_video(
    dtype: torch.dtype, model: dict[str, Any] | None = None, data: dict[str, int] | None = None, **changes
) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "clip_length": 4, "batch_size": 2, "steps": 3, "lr_ramp_steps": 2, "lr_ref_steps": 3, "log_every": 1,
            "checkpoint_every": 0, "snapshot_every": 0, "normalizer_every": 2, "normalizer_size": 100,
            "action_dropout": 0.3, "num_workers": 0, "tensorboard": False, "device": "cpu", "seed": 7,
        }  # fmt: skip
        config = TrainConfig(run_dir=folder, **(settings | changes))
        stats = FrameStats((0.0, 0.1), (0.6, 0.5))
        trainer = Trainer(config, network(dtype, **(model or {})), Stripes(**(data or {})), stats)
        trainer.train()
        # recorded when the metrics still had these names
        then = {"normalised_loss": "loss", "loss": "weighted_loss", "loss_spatial": "weighted_loss_spatial"}
        curves = logged(Path(folder), *then, "grad_norm")
        out = {then.get(name, name): curve for name, curve in curves.items()}
        out["weights"] = flat(trainer.model)
        with trainer.ema_weights(config.ema_stds[0]):
            out["average"] = flat(trainer.model)
        return out


def logged(folder: Path, *names: str) -> Tensors:
    """Curves of metrics.jsonl."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curves = {name: [line[name] for line in lines if name in line] for name in names}
    return {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items() if curve}


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(module.named_parameters())])


for name, changes in {
    "teacher": {},
    "forcing": {"objective": "forcing"},
    "two-copies": {"noisy_copies": 2},
    "spatial-every": {"spatial_every": 2, "grad_clip": 1.0},
    "forcing-spatial-every": {"objective": "forcing", "spatial_every": 2},
    "micro-batches": {"micro_batch": 1},
    "blocks": {"model": {"frames_per_block": 2}},
    "gated": {"model": {"temporal_mixing": "gated"}},
    "continuous-actions": {"model": {"num_actions": 0, "action_dim": 2}, "data": {"num_actions": 0, "action_dim": 2}},
    "no-actions": {"model": {"num_actions": 0}, "data": {"num_actions": 0}},
}.items():
    case(f"train/video/{name}", lambda dtype, changes=changes: train_video(dtype, **changes))


# ---- video: sampling


def given(dtype: torch.dtype, frames: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Context of two videos, actions for it and four more frames."""
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(2, frames, 2, 4, 4, generator=generator, dtype=torch.float64)
    return context.to(dtype), torch.randint(3, (2, frames + 4), generator=generator)


def sample_video(
    dtype: torch.dtype, window: int | None = None, model: dict[str, Any] | None = None, nothing: bool = False, **changes
) -> Tensors:
    net, (context, actions) = network(dtype, **(model or {})), given(dtype)
    config = SamplerConfig(**({"sampling_steps": 4, "sigma_min": 0.1, "sigma_max": 10.0} | changes))
    guide = network(dtype, seed=2) if config.guidance_kind == "auto" else None
    start = (None, actions[:, 2:]) if nothing else (context, actions)
    return {"x": generate(net, *start, 4, config, seed=5, guide=guide, in_flight=window)}


VARIANTS: dict[str, dict[str, Any]] = {
    "heun": {},
    "euler": {"solver": "euler"},
    "dpm++2m": {"solver": "dpm++2m"},
    "ancestral": {"solver": "ancestral"},
    "stochastic-heun": {"solver": "stochastic-heun"},
    "one-step": {"sampling_steps": 1},
    "churn": {"churn": 2.0},
    "churn-limits": {"churn": 2.0, "churn_min": 0.5, "churn_max": 5.0, "churn_noise": 1.1},
    "euler-churn": {"solver": "euler", "churn": 2.0},
    "context-noise": {"context_noise": 0.2, "context_sigma": 0.1},
    "guidance-context": {"guidance": 1.5},
    "guidance-auto": {"guidance": 2.0, "guidance_kind": "auto", "churn": 1.0},
    "nothing": {"nothing": True},
    "blocks": {"model": {"frames_per_block": 2}, "churn": 2.0},
    "gated": {"model": {"temporal_mixing": "gated"}},
    "attention-window": {"model": {"window": 1, "sink": 1}},
}
MOST = ("heun", "euler-churn", "guidance-auto")  # in both dtypes and in every window
for name, options in VARIANTS.items():
    for window in (None, 1, 2, 4) if name in MOST else (None, 2):
        blocks = options.get("model", {}).get("frames_per_block", 1)
        if window is None or (window % blocks == 0 and window // blocks <= options.get("sampling_steps", 4)):
            place = "block-by-block" if window is None else f"window-{window}"
            case(
                f"sample/video/{place}/{name}",
                lambda dtype, w=window, options=options: sample_video(dtype, w, **options),
                BOTH if name in MOST else (torch.float64,),
            )


def roll_out(dtype: torch.dtype, window: int | None, nothing: bool, recorded: bool = True) -> Tensors:
    """Through the files' units, as float latents."""
    net, stats = network(dtype), FrameStats((0.0, 0.1), (0.6, 0.5), latent=True)
    config = SamplerConfig(sampling_steps=3, sigma_min=0.1, sigma_max=10.0)
    actions = torch.randint(3, (2, 2), generator=torch.Generator().manual_seed(1))
    if nothing:
        rollout = videos_from_nothing(net, stats, 2, 2, config, actions=actions, seed=4, in_flight=window)
    else:
        rng = np.random.default_rng(0)
        clips = [
            Clip(rng.standard_normal((4, 4, 4, 2)).astype(np.float32), rng.integers(0, 3, 4), str(i)) for i in (0, 1)
        ]
        rollout = continue_clips(
            net, stats, clips, 2, config, context=2, recorded=recorded, actions=None if recorded else actions, seed=4,
            in_flight=window,
        )  # fmt: skip
    return {"frames": torch.from_numpy(rollout.frames)}


for window in (None, 2):
    name = "block-by-block" if window is None else f"window-{window}"
    case(f"rollout/nothing/{name}", lambda dtype, w=window: roll_out(dtype, w, True))
    case(f"rollout/recorded/{name}", lambda dtype, w=window: roll_out(dtype, w, False))
    case(f"rollout/random/{name}", lambda dtype, w=window: roll_out(dtype, w, False, recorded=False))


# ---- solvers on tensors


def mixing(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """A nonlinear network of closed form: tokens (B, N, ...) see each other and their levels."""
    level = expand_to(log_snr, x)
    return torch.tanh(x + 0.5 * x.roll(1, dims=1) + 0.3 * x.mean(dim=1, keepdim=True)) * torch.sigmoid(0.3 * level + 1)


def forgetful(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    return 0.7 * mixing(x, log_snr)


CURVE = schedules.LogLinear(5.0, -3.0)
SCHEDULES: dict[str, schedules.Schedule] = {
    "together": schedules.Together((5,), CURVE),
    "ve": schedules.Together((5,), schedules.EDM(0.05, 10.0)),
    "staggered": schedules.Staggered(5, 2.0, CURVE),
    "flow": schedules.Staggered(5, 2.5, schedules.Flow(margin=0.02)),
    "triangular": schedules.Triangular(5, 4, 2, CURVE),
    "given": schedules.Given(schedules.Staggered(5, 2.0, CURVE), torch.arange(5) < 2),
}


def solve(dtype: torch.dtype, solver: str, schedule: str, denoise=mixing, **options: Any) -> Tensors:
    what = SCHEDULES[schedule]
    times = what.times() if schedule == "triangular" else schedules.sampling_times(what, 10)
    x = start((2, 5, 3), what, seed=1, dtype=dtype)
    path: list[torch.Tensor] = []
    end = sample(
        denoise, x, what, times, solver=solver, seed=2, callback=lambda i, x, x0: path.append(x0), **options
    )  # fmt: skip
    return {"x": end, "path": torch.stack(path)}


for solver in SOLVERS:
    for name in SCHEDULES:
        case(f"solver/{solver}/{name}", lambda dtype, s=solver, n=name: solve(dtype, s, n), inputs=torch.float64)
    case(
        f"roll/{solver}",
        lambda dtype, s=solver: {
            "tokens": torch.stack([
                token for token, _ in zip(
                    roll(mixing, schedules.Rolling(3, CURVE), (2, 3, 2), 4, solver=s, seed=3, dtype=dtype), range(4)
                )
            ])
        },
        inputs=torch.float64,
    )  # fmt: skip
for name, arguments in {
    "ddim-half": {"solver": "ddim", "eta": 0.5},
    "churn": {"solver": "stochastic-heun", "churn": Churn(3.0, 0.2, 4.0, 1.05)},
    "state": {"solver": "heun", "final": "state"},
    "guided": {"solver": "heun", "denoise": guided(mixing, forgetful, 1.7)},
}.items():
    case(
        f"solver/options/{name}",
        lambda dtype, a=arguments: solve(dtype, schedule="staggered", **a),
        inputs=torch.float64,
    )
case(
    "solver/options/context-guided",
    lambda dtype: solve(dtype, "euler", "given", context_guided(mixing, SCHEDULES["given"], 1.5, seed=9)),
    inputs=torch.float64,
)


# ---- series and images: as they run, networks in fp32


def train_series(kind: str, **changes: Any) -> Tensors:
    with tempfile.TemporaryDirectory() as folder:
        config = SeriesTrainConfig(
            run_dir=Path(folder), source=Source(length=5), schedule=ScheduleConfig(kind=kind, window=2.0, windows=(1, 3)),
            model=SeriesModelConfig(width=16, layers=1, heads=2, expansion=2), steps=5, batch=8, warmup=2, log_every=1,
            tensorboard=False, device="cpu", **changes,
        )  # fmt: skip
        trainer = SeriesTrainer(config)
        trainer.train()
        model = trainer.averaged()
        out = logged(Path(folder), "loss") | {"weights": flat(trainer.model), "average": flat(model)}
        schedule = config.schedule.build(5)
        points = config.source.sample(3, 1)[:, :2]
        with torch.no_grad():  # what it draws at first is nearly the same for any weights
            model.head.weight += 0.3
        for solver in SOLVERS:
            options: dict[str, Any] = {"solver": solver, "steps": 8, "seed": 6, "batch": 2}
            drawn = generate_series(model, trainer.stats, schedule, 3, **options)
            out[f"drawn-{solver}"] = torch.from_numpy(drawn)
        continued = generate_series(model, trainer.stats, schedule, 3, given=points, **options)
        return out | {"continued": torch.from_numpy(continued)}


def train_images(**changes: Any) -> Tensors:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 16, (24, 1, 8, 8), dtype=np.uint8)
    pictures[:, :, 2:5] //= 3
    with tempfile.TemporaryDirectory() as folder:
        config = ImageTrainConfig(
            net=NetConfig(channels=8, groups=4, token_channels=8), basis="dct", steps=5, batch_size=4, warmup=2,
            **changes,
        )  # fmt: skip
        trainer = ImageTrainer(config, ImageSet("noise", 16, pictures[:20], pictures[20:]), Path(folder), log_every=1)
        trainer.train()
        out = logged(Path(folder), "loss") | {"weights": flat(trainer.model.net)}
        model = trainer.averaged()
        out["average"] = flat(model.net)
        with torch.no_grad():
            model.net.last.weight += 0.05
        x = start((2, 1, 8, 8), model.schedule, seed=3)
        times = schedules.sampling_times(model.schedule, 6)
        for solver in SOLVERS:
            out[f"drawn-{solver}"] = sample(model.denoise, x, model.schedule, times, solver=solver, seed=4)
        return out


SINGLE = (torch.float32,)
for kind in ("staggered", "together", "independent", "mixed"):
    case(f"train/series/{kind}", lambda dtype, kind=kind: train_series(kind), SINGLE)
case("train/series/vlb", lambda dtype: train_series("independent", loss="vlb"), SINGLE)
for name, changes in {
    "elbo": {},
    "eps": {"weighting": "eps"},
    "spread-snr": {"times": "snr"},
}.items():
    case(f"train/images/{name}", lambda dtype, changes=changes: train_images(**changes), SINGLE)


SHORT = {torch.float32: "fp32", torch.float64: "fp64"}
RUNS = {f"{name} {SHORT[dtype]}": (case, dtype) for name, case in CASES.items() for dtype in case.dtypes}
