"""The configuration of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import AtLeastTwo, BelowOne, Checked, Count, Natural, Positive


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The shape of a `Denoiser`. Lists are converted to tuples, so `ModelConfig(**json.load(f))` works.

    Args:
        height: of a frame in the data (pixels or latents); `sae train` takes that of latents from the data.
        width: as height.
        channels: of a frame in the data; `sae train` takes them from the data.
        patch_size: space-to-depth factor before and after the network; 64x64x3 with 2 runs as 32x32x12.
        model_channels: channels of the finest level.
        channel_mult: channels of each level over model_channels, finest first; each level halves height and width.
        blocks_per_level: encoder blocks of a level; its decoder has one more.
        video_attention: heights of the feature maps (after patching) whose blocks attend over all visible frames. The
            bottleneck always does.
        frame_attention: heights of the feature maps whose blocks attend within their own frame.
        head_dim: channels of a head; a level of C channels has max(1, C // head_dim) heads.
        temporal_mixing: "joint", one normalised kt x 3 x 3 kernel; "gated", separate past and spatial kernels, mixed by
            a learned gate that depends on noise level and position.
        kernel_frames: kt, taps in time of every convolution, at least 2.
        num_actions: number of discrete actions, 0 for none; `sae train` takes it from the data.
        action_dim: length of a continuous action, 0 for none; `sae train` takes it from the data.
        sigma_data: standard deviation of the data.
        prior: what a frame is expected to be before it is denoised, which its preconditioning is built on: "data",
            N(0, sigma_data^2), or "previous-frame", near the frame before it, see `model.prior.FramePrior`; then the
            network is shown each frame twice, as it is and as its difference from that one.
        change_std: standard deviation of the change from one frame to the next, for prior "previous-frame";
            `sae train` takes it from the data.
        window: number of blocks before its own that a block attends to, None = all. Convolutions always reach back
            kt - 1 frames.
        sink: number of first blocks that every block attends to, however far back.
        frames_per_block: frames that are denoised together.
        dropout: probability, between the two convolutions of a block.
        impl: implementation of `frame_attention`, `qkv_prepare` and `causal_conv3d`.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    height: Count = 32
    width: Count = 32
    channels: Count = 3
    patch_size: Count = 1
    model_channels: AtLeastTwo = 64
    channel_mult: tuple[Count, ...] = (1, 2, 2, 4)
    blocks_per_level: Count = 3
    video_attention: tuple[int, ...] = (8, 4)
    frame_attention: tuple[int, ...] = ()
    head_dim: AtLeastTwo = 64
    temporal_mixing: Literal["joint", "gated"] = "joint"
    kernel_frames: AtLeastTwo = 3
    num_actions: Natural = 0
    action_dim: Natural = 0
    sigma_data: Positive = 1.0
    prior: Literal["data", "previous-frame"] = "data"
    change_std: Positive = 0.1
    window: Natural | None = None
    sink: Natural = 0
    frames_per_block: Count = 1
    dropout: BelowOne = 0.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        for name in ("channel_mult", "video_attention", "frame_attention"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        super().__post_init__()
        if not self.channel_mult:
            raise ValueError(f"channel_mult: must be one number for each level, got {self.channel_mult}")
        if self.num_actions and self.action_dim:
            raise ValueError(f"action_dim: must be 0 where num_actions = {self.num_actions}, got {self.action_dim}")
        step = self.patch_size * 2 ** (len(self.channel_mult) - 1)
        for name in ("height", "width"):
            if getattr(self, name) % step:
                raise ValueError(
                    f"{name}: must be a multiple of patch_size * 2^(levels - 1) = {step}, got {getattr(self, name)}"
                )
        heights = self.heights
        for name in ("video_attention", "frame_attention"):
            for height in getattr(self, name):
                if height not in heights:
                    raise ValueError(f"{name}: must be among the feature map heights {heights}, got {height}")
        both = set(self.video_attention) & set(self.frame_attention)
        if both:
            raise ValueError(f"frame_attention: heights must not be in video_attention, got {sorted(both)}")
        for height, channels in zip(heights, self.level_channels, strict=True):
            attends = height in self.video_attention + self.frame_attention or height == heights[-1]
            if attends and channels % (2 * self.heads(channels)):
                raise ValueError(
                    f"head_dim: {self.heads(channels)} heads must split {channels} channels into equal even parts, "
                    f"got {self.head_dim}"
                )

    @property
    def heights(self) -> tuple[int, ...]:
        """Feature map height of each level."""
        return tuple(self.height // self.patch_size >> level for level in range(len(self.channel_mult)))

    @property
    def level_channels(self) -> tuple[int, ...]:
        return tuple(self.model_channels * m for m in self.channel_mult)

    @property
    def patch_channels(self) -> int:
        """Channels of a frame after space-to-depth."""
        return self.channels * self.patch_size**2

    @property
    def input_channels(self) -> int:
        """Channels of the network's input for a frame, after space-to-depth."""
        return self.patch_channels * (2 if self.prior == "previous-frame" else 1)

    def heads(self, channels: int) -> int:
        return max(1, channels // self.head_dim)
