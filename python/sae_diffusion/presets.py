"""Named configurations: each a model, and how it is trained and sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .checks import Checked, Count, Fraction
from .diffusion.config import NoiseConfig, OwnContextConfig, SamplerConfig
from .model import ModelConfig
from .train.config import TrainConfig

PresetName = Literal["tiny", "lunar-lander", "counter-strike"]


@dataclass(frozen=True)
class ClipConfig(Checked):
    """How clips are cut from the data.

    Args:
        frame_stride: keep every n-th frame.
        clip_stride: frames from the start of one clip of an episode to the next; None = no overlap.
        heldout_fraction: share of the episodes held out of training, for evaluation and context; 0 = train on all.
        on_error: "raise" an error for a source that cannot be read or is too short, or "skip" and count it.
    """

    frame_stride: Count = 1
    clip_stride: Count | None = None
    heldout_fraction: Fraction = 0.1
    on_error: Literal["raise", "skip"] = "skip"


@dataclass(frozen=True)
class Preset:
    """The defaults of `sae train` and `sae sample`."""

    model: ModelConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)


MODELS = {
    # 64x64 pixels as 32x32x12, made for a few hundred training steps on two CPU cores. Given the past, little of a
    # frame is unknown, so it is preconditioned around the frame before. The window is the clip length of training
    # less one.
    "tiny": ModelConfig(
        height=64,
        width=64,
        channels=3,
        patch_size=2,
        model_channels=16,
        channel_mult=(1, 2, 2),
        blocks_per_level=1,
        video_attention=(8,),
        head_dim=32,
        kernel_frames=2,
        num_actions=4,
        prior="previous-frame",
        window=7,
    ),
    "lunar-lander": ModelConfig(
        height=32,
        width=32,
        channels=4,
        model_channels=64,
        channel_mult=(1, 2, 2, 4),
        blocks_per_level=3,
        video_attention=(8, 4),
        num_actions=4,
    ),
    "counter-strike": ModelConfig(
        height=32,
        width=32,
        channels=8,
        model_channels=128,
        channel_mult=(1, 2, 4, 4),
        blocks_per_level=2,
        video_attention=(4,),
        frame_attention=(8,),
        temporal_mixing="gated",
    ),
}

# Noise and schedules of "lunar-lander" and "counter-strike" are those that the reference was trained with.
PRESETS = {
    "tiny": Preset(
        MODELS["tiny"],
        TrainConfig(
            clip_length=8, batch_size=1, noisy_copies=4, steps=4000,
            noise=NoiseConfig(mean=1.5, std=1.2, context_sigma_max=0.05),
            own_context=OwnContextConfig(start=300, ramp=300), first_weight=0.0, first_fit=True,
            lr=2e-2, lr_ref_steps=100, lr_ramp_steps=20, precision="auto", checkpoint_every=200, snapshot_every=200,
            log_every=20, heldout_every=100, num_workers=1,
        ),
        SamplerConfig(sampling_steps=8, sigma_min=1.5, sigma_max=60.0, solver="euler", context_sigma=0.005),
        ClipConfig(clip_stride=2),
    ),
    "lunar-lander": Preset(
        MODELS["lunar-lander"],
        TrainConfig(
            clip_length=16, batch_size=8, noise=NoiseConfig(mean=0.3, std=2.0, context_sigma_max=0.5),
            steps=40_000, lr=1e-2, lr_ref_steps=800, lr_ramp_steps=800, precision="bf16", spatial_every=4,
        ),
        SamplerConfig(),
        ClipConfig(clip_stride=4),
    ),
    "counter-strike": Preset(
        MODELS["counter-strike"],
        TrainConfig(
            clip_length=16, batch_size=8, micro_batch=2, noise=NoiseConfig(mean=0.9, std=1.0, context_sigma_max=0.1),
            steps=100_000, lr=1e-4, lr_ref_steps=200, lr_ramp_steps=200, precision="bf16", spatial_every=4,
        ),
        SamplerConfig(sampling_steps=64, sigma_min=0.4, rho=2.0),
    ),
}  # fmt: skip
