"""Power-function averages of the weights, and averages of any width made afterwards from saved snapshots.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3. Time t is counted in
clips seen. Its unit does not matter, because the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) is scale-free.
Weights are constant between two updates, so the stored average is exactly the integral of p over that staircase.
"""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..disk import atomic_path
from .config import MAX_STD
from .files import check_header


def gamma_from_std(std: float) -> float:
    """The exponent of the profile of relative width `std` = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)).

    Raises:
        ValueError: std outside (0, 0.2887], the widths of profiles with gamma >= 0.
    """
    if not 0 < std <= MAX_STD + 1e-12:
        raise ValueError(f"std: must be in (0, {MAX_STD:.4f}], got {std}")
    # squared and multiplied out: gamma^3 + 7 gamma^2 + (16 - s) gamma + (12 - s) = 0 with s = std^-2
    s = std**-2
    return max(float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max()), 0.0)


def std_from_gamma(gamma: float) -> float:
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def decay(std: float, clips_before: int, clips_seen: int) -> float:
    """beta = (clips_before / clips_seen)^(gamma + 1): (1 - 1/t)^(gamma + 1) for one clip per update, 0 at the first."""
    if not 0 <= clips_before < clips_seen:
        raise ValueError(f"clips_seen: must exceed the {clips_before} clips of the previous update, got {clips_seen}")
    return (clips_before / clips_seen) ** (gamma_from_std(std) + 1)


class WeightAverage(ABC):
    """Averages of a network's parameters, one for each width.

    Attributes:
        averages: width -> parameter name -> tensor.
        clips_seen: when they were last updated, in the unit of `update`.
    """

    def __init__(self, model: nn.Module, widths: Sequence[float]) -> None:
        self.clips_seen = 0
        trained = {name: p for name, p in model.named_parameters() if self.takes(p)}
        self.averages = {float(w): {name: p.detach().clone() for name, p in trained.items()} for w in widths}

    def takes(self, parameter: torch.Tensor) -> bool:
        return True

    @abstractmethod
    def keep(self, width: float, clips_seen: int) -> float:
        """The factor of the average so far, beta."""

    @torch.no_grad()
    def update(self, model: nn.Module, clips_seen: int) -> None:
        """Add the weights reached after `clips_seen` clips in total."""
        weights = {name: p.detach() for name, p in model.named_parameters()}
        for width, average in self.averages.items():
            beta = self.keep(width, clips_seen)
            torch._foreach_lerp_(list(average.values()), [weights[name] for name in average], 1.0 - beta)
        self.clips_seen = clips_seen

    @torch.no_grad()
    def copy_to(self, model: nn.Module, width: float) -> None:
        """Overwrite the model's parameters with the average of this width."""
        parameters = dict(model.named_parameters())
        for name, average in self.averages[width].items():
            parameters[name].copy_(average)

    def save_snapshot(self, directory: str | os.PathLike[str]) -> list[Path]:
        """One safetensors file per width, named by clips and width, each put in place by a rename."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        paths = []
        for width, average in self.averages.items():
            path = directory / f"{self.clips_seen:012d}-{width:.6g}.safetensors"
            with atomic_path(path) as temporary:
                save_file(
                    {name: t.detach().cpu().contiguous() for name, t in average.items()},
                    temporary,
                    self.metadata(width),
                )
            paths.append(path)
        return paths

    @abstractmethod
    def metadata(self, width: float) -> dict[str, str]:
        """Header of a saved average."""


class DecayEMA(WeightAverage):
    """An average of the trained parameters with a constant decay per update; at first, nearly a plain mean."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, (decay,))

    def takes(self, parameter: torch.Tensor) -> bool:
        return parameter.requires_grad

    def keep(self, width: float, clips_seen: int) -> float:
        # so that the random weights at the start are forgotten about as fast as by a plain mean
        return min(width, clips_seen / (clips_seen + 9))

    def metadata(self, width: float) -> dict[str, str]:
        return {"average": json.dumps({"decay": width, "steps": self.clips_seen})}


class PowerEMA(WeightAverage):
    """Averages of a model's parameters, one for each relative width in `stds`."""

    def __init__(self, model: nn.Module, stds: Sequence[float] = (0.05, 0.10)) -> None:
        self.gammas = {float(std): gamma_from_std(std) for std in stds}
        if len(self.gammas) != len(stds):
            raise ValueError(f"stds: must be distinct, got {tuple(stds)}")
        super().__init__(model, stds)

    @property
    def stds(self) -> tuple[float, ...]:
        return tuple(self.gammas)

    def keep(self, width: float, clips_seen: int) -> float:
        return decay(width, self.clips_seen, clips_seen)

    def metadata(self, width: float) -> dict[str, str]:
        return average_metadata(width, self.clips_seen)


def average_metadata(std: float, clips_seen: int) -> dict[str, str]:
    """Header of a saved average. Only one key, because safetensors writes several in random order."""
    return {"average": json.dumps({"std": float(std), "clips_seen": clips_seen})}


@dataclass(frozen=True)
class Snapshot:
    """A saved average: where, when (clips seen) and how wide."""

    path: Path
    clips_seen: int
    std: float

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Snapshot:
        """From the header.

        Raises:
            ValueError: the file is truncated or not an average; the message names it.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if "average" not in metadata:
                raise ValueError("must be an average of weights, got a header without its width and time")
            content = json.loads(metadata["average"])
            snapshot = cls(Path(path), int(content["clips_seen"]), float(content["std"]))
            gamma_from_std(snapshot.std)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error
        return snapshot


def list_snapshots(directory: str | os.PathLike[str]) -> list[Snapshot]:
    """All snapshots in a folder, oldest first; none if the folder does not exist.

    Each one that cannot be read is skipped with a RuntimeWarning that names it.
    """
    found = []
    for path in sorted(Path(directory).glob("[!.]*.safetensors")):
        try:
            found.append(Snapshot.read(path))
        except ValueError as error:
            warnings.warn(f"snapshot {path.name} is damaged and is skipped: {error}", RuntimeWarning, stacklevel=2)
    return sorted(found, key=lambda s: (s.clips_seen, s.std))


def _inner(time_a: np.ndarray, gamma_a: np.ndarray, time_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Inner products of profiles, sqrt(time)-scaled to be dimensionless: integral of p_a p_b over [0, min(t_a, t_b)].

    With t_a <= t_b it is (ga+1)(gb+1)/(ga+gb+1) (t_a/t_b)^gb / t_b; times sqrt(t_a t_b) here.
    """
    a_first = time_a <= time_b
    ratio = np.where(a_first, time_a / time_b, time_b / time_a)
    later_gamma = np.where(a_first, gamma_b, gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio ** (later_gamma + 0.5)


def posthoc_coefficients(
    clips_seen: Sequence[int], stds: Sequence[float], target_clips: int, target_std: float
) -> np.ndarray:
    """Coefficients with which the saved averages come closest, in least squares, to the profile wanted.

    Source: Karras et al. 2024, section 3.2 and appendix C. Solved in fp64.
    """
    times = np.asarray(clips_seen, dtype=np.float64)
    gammas = np.array([gamma_from_std(std) for std in stds])
    # columns have unit norm, because neighbouring snapshots make the system ill-conditioned
    norms = np.sqrt(_inner(times, gammas, times, gammas))
    gram = _inner(times[:, None], gammas[:, None], times[None, :], gammas[None, :]) / np.outer(norms, norms)
    wanted = _inner(times, gammas, np.float64(target_clips), np.float64(gamma_from_std(target_std))) / norms
    solution = np.linalg.lstsq(gram, wanted, rcond=1e-14)[0]
    return solution / norms * np.sqrt(times / target_clips)


@torch.no_grad()
def reconstruct(snapshots: Sequence[Snapshot], std: float, clips_seen: int | None = None) -> dict[str, torch.Tensor]:
    """The average of relative width `std` at `clips_seen` (default: the latest snapshot), from saved ones.

    If that average was saved, it is returned as it is. Otherwise tensors are combined in fp64 one at a time, so that
    memory holds one model. Returns parameter name -> tensor of the snapshots' dtype, on the CPU.

    Raises:
        ValueError: no snapshot at or before `clips_seen`, or one whose tensors differ from the others' or are not
            finite.
    """
    if not snapshots:
        raise ValueError("snapshots: must hold at least one, got none")
    target = max(s.clips_seen for s in snapshots) if clips_seen is None else clips_seen
    usable = {(s.clips_seen, s.std): s for s in snapshots if 0 < s.clips_seen <= target}
    if not usable:
        first = min(s.clips_seen for s in snapshots)
        raise ValueError(f"clips_seen: must be at least {first}, that of the first snapshot, got {target}")
    exact = usable.get((target, float(std)))
    chosen = [exact] if exact is not None else list(usable.values())
    weights = (
        [1.0]
        if exact is not None
        else posthoc_coefficients([s.clips_seen for s in chosen], [s.std for s in chosen], target, std).tolist()
    )
    with safe_open(chosen[0].path, "pt") as file:
        names = list(file.keys())
        like = {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    for s in chosen[1:]:
        check_header(s.path, like, check_dtype=False)
    result = {}
    files = [safe_open(s.path, "pt") for s in chosen]
    for name, shape in like.items():
        total = torch.zeros(shape.shape, dtype=torch.float64)
        for s, file, weight in zip(chosen, files, weights, strict=True):
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{s.path}: tensor {name} is not finite")
            total.add_(tensor.double(), alpha=weight)
        result[name] = total.to(tensor.dtype)
    return result
