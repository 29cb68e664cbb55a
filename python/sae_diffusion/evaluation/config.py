"""Settings of the evaluation of a video model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import check_integers, check_number


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured, and on how many films.

    Args:
        samples: films, clips that are continued.
        frames: new frames of each; fewer if the clips of the data are shorter.
        context: number of given frames.
        object_colour: r,g,b or a name such as "lunar-lander" or "red": follow the object of that colour; "None" follows
            the lander in data recorded from LunarLander, and nothing elsewhere.
        object_side: side in pixels of the square in which the object is looked for, a little larger than the object.
        object_within: distance in pixels to the recorded object up to which it is a hit.
        loss_clips: number of the films' clips that the denoising error is measured on; 0 leaves it out.
        loss_frames: number of their first frames that are used.
        drift_frames: length of the long films that drift is measured on; 0 leaves it out.
        drift_samples: number of long films.
        drift_actions: told to the model in long films: "random" ones, or "recorded" ones as long as they last.
        hold: number of frames for which a random action is kept.
        seed: of the noise, of random actions, and of the resampling for the intervals.

    Raises:
        ValueError: a field breaks its rule.
    """

    samples: int = 32
    frames: int = 14
    context: int = 4
    object_colour: str | None = None
    object_side: int = 13
    object_within: float = 3.0
    loss_clips: int = 16
    loss_frames: int = 8
    drift_frames: int = 256
    drift_samples: int = 8
    drift_actions: Literal["random", "recorded"] = "random"
    hold: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, 1, "samples", "frames", "context", "object_side", "drift_samples", "hold")
        check_integers(self, 2, "loss_frames")
        check_integers(self, 0, "loss_clips", "drift_frames", "seed")
        if self.drift_actions not in ("random", "recorded"):
            raise ValueError(f"drift_actions: must be random or recorded, got {self.drift_actions!r}")
        check_number("object_within", self.object_within, "positive")
