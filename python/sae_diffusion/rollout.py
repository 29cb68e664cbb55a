"""Continues recorded clips or generates videos from nothing, and writes files that show the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_kernels._deprecated import warn_renamed

from .data import Clip, FrameStats
from .diffusion.sampler import SamplerConfig, generate
from .disk import atomic_path
from .media import fit_grid, side_by_side, strip, write_gif, write_mp4, write_png


@dataclass(frozen=True)
class Rollout:
    """B videos of n given and N generated frames, as on disk: uint8 images or float latents.

    Attributes:
        frames: (B, n + N, Y, X, C), the given frames first.
        truth: the recorded frames, of the same shape; None if there are none.
        context: n.
    """

    frames: np.ndarray
    truth: np.ndarray | None
    context: int

    def strip(self, scale: int = 1, videos: int = 4, max_frames: int | None = None) -> np.ndarray:
        """A picture (Y, X, 3): recorded above generated, time to the right, with a line where generation begins."""
        rows = []
        for i in range(min(videos, len(self.frames))):
            if self.truth is not None:
                rows.append(("recorded", self.truth[i]))
            rows.append(("generated", self.frames[i]))
        return strip(rows, scale, max_frames=max_frames, context=self.context)

    def video(self, scale: int = 1) -> np.ndarray:
        """Frames (T, Y, X, 3) that show all videos at once: recorded above generated, in as many lines as needed.

        They are enlarged less if they would not fit otherwise.

        Raises:
            ValueError: more videos than fit on a screen.
        """
        rows = [("generated", self.frames)]
        if self.truth is not None:
            rows.insert(0, ("recorded", self.truth))
        columns, scale = fit_grid(len(self.frames), self.frames.shape[2:4], [label for label, _ in rows], scale)
        lines = [
            side_by_side([(label, video) for video in videos[first : first + columns]], scale, context=self.context)
            for first in range(0, len(self.frames), columns)
            for label, videos in rows
        ]
        # A label may be wider than a small video, and the last line may hold fewer videos.
        width = max(line.shape[2] for line in lines)
        lines = [np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]), (0, 0)), mode="edge") for x in lines]
        return np.concatenate(lines, axis=1)

    def save(self, path: Path | str) -> None:
        """Write an npz with `generated` and, if there is a truth, `recorded`, both (N, T, Y, X, C) as on disk.

        `context` in it is the number of given frames at their start.
        """
        recorded = {} if self.truth is None else {"recorded": self.truth}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, generated=self.frames, context=self.context, **recorded)  # type: ignore[arg-type]

    def film(self, scale: int = 1) -> np.ndarray:
        """Deprecated: `video`."""
        warn_renamed("film", "video")
        return self.video(scale)

    def write(self, folder: Path | str, *, fps: float = 10.0, scale: int = 4) -> list[Path]:
        """Write rollout.gif, rollout.mp4 and strip.png into `folder`; returns their paths."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        video, paths = self.video(scale), [folder / name for name in ("rollout.gif", "rollout.mp4", "strip.png")]
        write_gif(paths[0], video, fps)
        write_mp4(paths[1], video, fps)
        write_png(paths[2], self.strip(max(1, scale // 2), max_frames=20))
        return paths


def stack_actions(clips: Sequence[Clip]) -> torch.Tensor | None:
    """(B, T) int64 or (B, T, A) float32; None if the clips have no actions."""
    if any(clip.actions is None for clip in clips):
        return None
    return torch.from_numpy(np.stack([clip.actions for clip in clips]))


def random_actions(denoiser: Any, batch: int, frames: int, hold: int, seed: int) -> torch.Tensor | None:
    """Random actions, each kept for `hold` frames: uniform if discrete, standard normal if continuous, else None."""
    config, generator = denoiser.config, torch.Generator().manual_seed(seed)
    choices = -(-frames // hold)
    if config.num_actions:
        drawn = torch.randint(config.num_actions, (batch, choices), generator=generator)
    elif config.action_dim:
        drawn = torch.randn(batch, choices, config.action_dim, generator=generator)
    else:
        return None
    return drawn.repeat_interleave(hold, dim=1)[:, :frames]


def continue_clips(
    denoiser: Any,
    stats: FrameStats,
    clips: Sequence[Clip],
    frames: int,
    config: SamplerConfig,
    *,
    context: int,
    recorded: bool = True,
    actions: torch.Tensor | None = None,
    **options: Any,
) -> Rollout:
    """Generate `frames` frames after the first `context` frames of each clip.

    Args:
        clips: of one size; context frames long, or context + frames long where `recorded`.
        recorded: give the network the clips' own actions, and keep the clips as the truth.
        actions: if not `recorded`, (B, frames, ...), the actions that cause the new frames.
        options: of `generate`: seed, guide, in_flight, callback.

    Raises:
        ValueError: a clip is too short.
    """
    wanted = context + frames if recorded else context
    for clip in clips:
        if len(clip.frames) < wanted:
            raise ValueError(f"clips: {clip.source} must have at least {wanted} frames, got {len(clip.frames)}")
    told = stack_actions(clips) if denoiser.config.num_actions or denoiser.config.action_dim else None
    if not recorded and actions is not None:
        unknown = math.nan if actions.is_floating_point() else -1
        known = (
            actions.new_full((len(clips), context, *actions.shape[2:]), unknown) if told is None else told[:, :context]
        )
        told = torch.cat([known, actions], dim=1)
    elif told is not None:
        told = told[:, :wanted]
    given = np.stack([clip.frames[:context] for clip in clips])
    new = generate(denoiser, stats.normalize(given), told, frames, config, **options)
    frames_of_all = np.concatenate([given, stats.denormalize(new).cpu().numpy()], axis=1)
    truth = np.stack([clip.frames[:wanted] for clip in clips]) if recorded else None
    return Rollout(frames_of_all, truth, context)


def videos_from_nothing(
    denoiser: Any,
    stats: FrameStats,
    videos: int,
    frames: int,
    config: SamplerConfig,
    *,
    actions: torch.Tensor | None = None,
    **options: Any,
) -> Rollout:
    """Generate `videos` videos of `frames` frames without any context; actions (videos, frames, ...) or None.

    options as in `continue_clips`.
    """
    new = generate(denoiser, None, actions, frames, config, batch=videos, **options)
    return Rollout(stats.denormalize(new).cpu().numpy(), None, 0)


def films_from_nothing(*arguments: Any, **options: Any) -> Rollout:
    """Deprecated: `videos_from_nothing`."""
    warn_renamed("films_from_nothing", "videos_from_nothing")
    return videos_from_nothing(*arguments, **options)
