"""Settings of the evaluation of a video model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..checks import AtLeastTwo, Checked, Count, Natural, Positive


@dataclass(frozen=True)
class EvaluationConfig(Checked):
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

    samples: Count = 32
    frames: Count = 14
    context: Count = 4
    object_colour: str | None = None
    object_side: Count = 13
    object_within: Positive = 3.0
    loss_clips: Natural = 16
    loss_frames: AtLeastTwo = 8
    drift_frames: Natural = 256
    drift_samples: Count = 8
    drift_actions: Literal["random", "recorded"] = "random"
    hold: Count = 2
    seed: Natural = 0
