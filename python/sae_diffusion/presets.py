"""Named configurations: one entry for each model."""

from __future__ import annotations

from .model import ModelConfig

MODELS = {
    # 64x64 pixels as 32x32x12: a step of 4 clips of 8 to 12 frames takes about a second on two CPU cores.
    "tiny": ModelConfig(
        height=64,
        width=64,
        channels=3,
        patch_size=2,
        model_channels=16,
        channel_mult=(1, 2, 4),
        blocks_per_level=1,
        video_attention=(8,),
        head_dim=32,
        num_actions=4,
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
