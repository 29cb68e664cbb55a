"""Settings of the evaluation of a video model."""

from __future__ import annotations

from dataclasses import dataclass

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
        seed: of the noise, and of the resampling for the intervals.

    Raises:
        ValueError: a field breaks its rule.
    """

    samples: int = 32
    frames: int = 14
    context: int = 4
    object_colour: str | None = None
    object_side: int = 13
    object_within: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, 1, "samples", "frames", "context", "object_side")
        check_integers(self, 0, "seed")
        check_number("object_within", self.object_within, "positive")
