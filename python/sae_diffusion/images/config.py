"""Settings of a run on images, of its measurement and of the study."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checks import check_integers, check_numbers
from ..train.config import MAX_STD


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise levels of whitened components over time.

    Args:
        kind: "components" orders them by decreasing variance (GUD's linear schedule); "columns" go from left to right
            and "rows" from top to bottom, of the image in the identity basis, of the grid of components in others.
        softness: of "components", the inverse of GUD's a. inf gives all components the same log-SNR, 1 is standard
            diffusion with equal noise in the data; near 0 components are generated one after another.
        b: of "columns" and "rows": 0 is all together; near 1 they come one after another.
        start: log-SNR of the last component at t = 0.
        end: log-SNR of the first component at t = 1.
        least: smallest log-SNR, below which there is nothing to learn; not used with softness 1 (standard diffusion).
        most: largest log-SNR, above which the loss is only noise; not used with softness 1.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    kind: Literal["components", "columns", "rows"] = "components"
    softness: float = 1.0
    b: float = 0.5
    start: float = 7.0
    end: float = -5.0
    least: float = -8.0
    most: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in ("components", "columns", "rows"):
            raise ValueError(f"kind: must be components, columns or rows, got {self.kind!r}")
        if not self.softness > 0:
            raise ValueError(f"softness: must be positive (inf for equal log-SNR), got {self.softness}")
        if not 0 <= self.b < 1:
            raise ValueError(f"b: must lie in [0, 1), got {self.b}")
        for name in ("start", "end", "least", "most"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}: must be finite, got {getattr(self, name)}")
        if not self.least <= self.end < self.start <= self.most:
            raise ValueError(
                "start, end: must satisfy least <= end < start <= most, "
                f"got {self.least}, {self.end}, {self.start}, {self.most}"
            )


@dataclass(frozen=True)
class NetConfig:
    """The size of the network.

    Args:
        channels: at full resolution.
        channel_mult: channels of each level over `channels`; each further level has half the height and width.
        blocks: residual blocks per level, on the way down and again on the way up.
        groups: tokens of the noise state; neighbours in the order of generation share a token.
        token_channels: channels of a token.
        heads: of cross-attention.
        fourier: number of sines and of cosines of the image estimate, with periods of 2, 1, 1/2 ... levels (Kingma et
            al. 2021, VDM, appendix C): they show where in a level a pixel lies.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    channels: int = 16
    channel_mult: tuple[int, ...] = (1, 2)
    blocks: int = 1
    groups: int = 16
    token_channels: int = 32
    heads: int = 2
    fourier: int = 1

    def __post_init__(self) -> None:
        check_integers(self, 8, "channels")
        check_integers(self, 1, "blocks", "groups", "token_channels", "heads")
        check_integers(self, 0, "fourier")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult: must be positive integers, at least one, got {self.channel_mult}")
        if self.channels % 8 or self.channels % self.heads:
            raise ValueError(f"channels: must be a multiple of 8 and of heads = {self.heads}, got {self.channels}")


@dataclass(frozen=True)
class ImageTrainConfig:
    """A training run.

    Args:
        data: digits, or cifar10 with `data_path`.
        data_path: cifar-10-binary.tar.gz or its unpacked folder.
        basis: the basis whose components have different noise levels.
        schedule: noise levels of the components.
        net: the network.
        steps: optimizer steps; the learning rate falls along a cosine to zero at the last one.
        batch_size: images per step.
        lr: largest learning rate of Adam.
        warmup: steps of the linear ramp before it.
        clip: largest norm of the gradient.
        weighting: "elbo" weighs every component by - d log-SNR / dt, so that the loss is the variational bound up to a
            constant; "eps" is the plain mean over components.
        times: "uniform" in t, stratified over the batch; "snr" spreads the SNR of components over its range,
            logarithmically where it is large and linearly where it is small, with exact weights (`SNRSampler`).
        ema: relative width of the average of weights, over the whole of training.
        seed: of weights, order of images, dequantisation, times and noise.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    data: Literal["digits", "cifar10"] = "digits"
    data_path: str | None = None
    basis: Literal["identity", "pca", "dct", "fourier", "haar"] = "pca"
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    net: NetConfig = field(default_factory=NetConfig)
    steps: int = 4000
    batch_size: int = 32
    lr: float = 4e-3
    warmup: int = 100
    clip: float = 1.0
    weighting: Literal["elbo", "eps"] = "elbo"
    times: Literal["uniform", "snr"] = "uniform"
    ema: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, 1, "steps", "batch_size")
        check_integers(self, 0, "warmup", "seed")
        check_numbers(self, "positive", "lr", "clip")
        check_numbers(self, "finite", "ema")
        if not 0 < self.ema <= MAX_STD:
            raise ValueError(f"ema: must be in (0, {MAX_STD:.4f}], got {self.ema}")
        for name, choices in (
            ("data", ("digits", "cifar10")),
            ("weighting", ("elbo", "eps")),
            ("times", ("uniform", "snr")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: must be one of {choices}, got {getattr(self, name)!r}")

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ImageTrainConfig:
        net: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["net"].items()}
        return cls(**{**fields, "net": NetConfig(**net), "schedule": ScheduleConfig(**fields["schedule"])})


@dataclass(frozen=True)
class EvaluateConfig:
    """How bits per dimension are measured.

    Args:
        images: held-out images, the same ones for every model and seed of training; 0 takes all.
        batch_size: images that share the solver's steps.
        divergence: "rademacher" is unbiased and costs one backward pass per step and probe, "exact" one per component.
        probes: random sign vectors per image.
        tolerance: of the adaptive solver, relative and absolute.
        seed: of the choice of images, dequantisation and probes.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    images: int = 128
    batch_size: int = 128
    divergence: Literal["rademacher", "exact"] = "rademacher"
    probes: int = 1
    tolerance: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        check_integers(self, 0, "images", "seed")
        check_integers(self, 1, "batch_size", "probes")
        check_numbers(self, "in (0, 1)", "tolerance")


@dataclass(frozen=True)
class StudyConfig:
    """The grid that is compared.

    Args:
        bases: see `ImageTrainConfig.basis`.
        softness: see `ScheduleConfig.softness`; 1 is standard diffusion, near 0 is autoregressive.
        seeds: of training.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    bases: tuple[str, ...] = ("identity", "pca", "dct", "haar")
    softness: tuple[float, ...] = (1.0, 1 / 4, 1 / 32)
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("bases", "softness", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: must be one or more values, each once, got {values}")
        for softness in self.softness:
            ScheduleConfig(softness=softness)

    def cells(self) -> list[tuple[str, float, int]]:
        """(basis, softness, seed), seeds outermost, so that an interrupted study has complete tables of fewer seeds."""
        return [(basis, s, seed) for seed in self.seeds for basis in self.bases for s in self.softness]
