"""Settings of a run on images, of its measurement and of the study."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..checks import BelowOne, Checked, Count, Finite, InnerFraction, Natural, Positive
from ..train.config import RelativeWidth


@dataclass(frozen=True)
class ScheduleConfig(Checked):
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
    b: BelowOne = 0.5
    start: Finite = 7.0
    end: Finite = -5.0
    least: Finite = -8.0
    most: Finite = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.softness > 0:
            raise ValueError(f"softness: must be positive (inf for equal log-SNR), got {self.softness}")
        if not self.least <= self.end < self.start <= self.most:
            raise ValueError(
                "start, end: must satisfy least <= end < start <= most, "
                f"got {self.least}, {self.end}, {self.start}, {self.most}"
            )


@dataclass(frozen=True)
class NetConfig(Checked):
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

    channels: Count = 16
    channel_mult: tuple[Count, ...] = (1, 2)
    blocks: Count = 1
    groups: Count = 16
    token_channels: Count = 32
    heads: Count = 2
    fourier: Natural = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.channel_mult:
            raise ValueError(f"channel_mult: must be one number for each level, got {self.channel_mult}")
        if self.channels % 8 or self.channels % self.heads:
            raise ValueError(f"channels: must be a multiple of 8 and of heads = {self.heads}, got {self.channels}")


@dataclass(frozen=True)
class ImageTrainConfig(Checked):
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
    steps: Count = 4000
    batch_size: Count = 32
    lr: Positive = 4e-3
    warmup: Natural = 100
    clip: Positive = 1.0
    weighting: Literal["elbo", "eps"] = "elbo"
    times: Literal["uniform", "snr"] = "uniform"
    ema: RelativeWidth = 0.1
    seed: Natural = 0


@dataclass(frozen=True)
class EvaluateConfig(Checked):
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

    images: Natural = 128
    batch_size: Count = 128
    divergence: Literal["rademacher", "exact"] = "rademacher"
    probes: Count = 1
    tolerance: InnerFraction = 1e-3
    seed: Natural = 0


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
