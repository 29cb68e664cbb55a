"""What a `Loop` trains: a network, its batches, its loss, and what must not change when a run resumes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from ..renamed import current_value

if TYPE_CHECKING:
    from .ema import WeightAverage
    from .loop import Loop

# fields that older checkpoints hold but that nothing used
REMOVED = ("context_sigma_label",)


class Task(ABC):
    """Attributes that a task sets, and methods that it may override.

    Attributes:
        network: the network that is trained.
        config: its settings, a dataclass.
        config_field: their name in state.json.
        state_fields: what state.json must hold, with types.
        fixed_on_resume: settings that must not change when a run resumes; None = all but `free_on_resume`.
        free_on_resume: settings that do not enter the arithmetic.
        kinds: names of the kinds of steps; sums for the metrics are kept for each.
        metrics: how many numbers `record` returns.
        leaves_parameters_out: in some steps some parameters have no gradient.
    """

    network: Any
    config: Any
    config_field = "config"
    state_fields: ClassVar[dict[str, Any]]
    fixed_on_resume: tuple[str, ...] | None = None
    free_on_resume: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("all",)
    metrics = 1
    leaves_parameters_out = False

    # ---- the network

    def to(self, device: torch.device) -> None:
        """Move to the device."""
        self.device = device
        self.network = self.network.to(device)

    @abstractmethod
    def make_optimizer(self) -> torch.optim.Optimizer: ...

    @abstractmethod
    def make_average(self) -> WeightAverage: ...

    @abstractmethod
    def average_name(self, width: float) -> str:
        """Stem of the file in a checkpoint that holds the average of this width."""

    def age(self, loop: Loop) -> int:
        """The time in which averages are measured."""
        return loop.step

    @abstractmethod
    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 1."""

    # ---- one step

    def kind(self, step: int) -> str:
        return self.kinds[0]

    def before_step(self) -> None:  # noqa: B027 - nothing, unless overridden
        """Called before the network is used."""

    def batches(self, loop: Loop) -> Iterator[Any]:
        """Endless micro-batches of this rank, from the loop's step on."""
        while True:
            yield self.batch(loop.step + 1)

    def batch(self, step: int) -> Any:
        """The data of optimizer step `step`."""
        raise NotImplementedError

    @abstractmethod
    def losses(
        self, module: Callable[..., torch.Tensor], batch: Any, kind: str, step: int, index: int
    ) -> tuple[torch.Tensor, ...]:
        """The arguments of `minimised` and `record`, tensors of one shape; `index` counts micro-batches of the run.

        `module` is the network as called: perhaps compiled, or wrapped for several processes.
        """

    def minimised(self, kind: str, *parts: torch.Tensor) -> torch.Tensor:
        """The scalar that is minimised."""
        return parts[0].mean()

    def record(self, kind: str, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scalar metrics of a step, from the `losses` of all its micro-batches and ranks; the first is minimised."""
        return (self.minimised(kind, *parts),)

    def summary(self, sums: dict[str, list[float]]) -> dict[str, float]:
        """A record of metrics.jsonl from each kind's [steps, sum of each metric, sum of gradient norms]."""
        count, total, _ = sums[self.kinds[0]]
        return {"loss": total / count}

    def measure_heldout(self) -> dict[str, float]:
        """Metrics of data that is not trained on."""
        return {}

    # ---- saving and resuming

    def loss_state(self) -> dict[str, torch.Tensor]:
        """Tensors of the loss that change in training, to be restored by `load_loss_state`."""
        return {}

    def load_loss_state(self, tensors: dict[str, torch.Tensor]) -> None:  # noqa: B027
        """Restore what `loss_state` returned."""

    def constants(self) -> dict[str, dict[str, torch.Tensor]]:
        """Further files of a checkpoint, not read on resume."""
        return {}

    @abstractmethod
    def state(self, loop: Loop) -> dict[str, Any]:
        """The content of state.json."""

    def check_data(self, path: Path, state: dict[str, Any]) -> None:  # noqa: B027
        """Raise a ValueError if a checkpoint was trained on other data."""

    def identity(self, saved: dict[str, Any], state: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """(name, value in the checkpoint, value now) of what else must be equal."""
        return []

    def is_fixed(self, name: str) -> bool:
        fixed = self.fixed_on_resume
        return name not in self.free_on_resume if fixed is None else name in fixed


def json_fields(value: Any) -> Any:
    """A dataclass as JSON would give it back: tuples become lists, paths strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {k: json_fields(v) for k, v in value.items()}
    if isinstance(value, Path):
        return str(value)
    return [json_fields(v) for v in value] if isinstance(value, (list, tuple)) else value


def saved_fields(config: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with today's fields.

    A field that it lacks was added later, and the run was trained with its default; `REMOVED` ones are left out.
    """
    fields = {}
    for f in dataclasses.fields(config):
        factory = f.default_factory
        default = factory() if factory is not dataclasses.MISSING else f.default
        fields[f.name] = None if default is dataclasses.MISSING else json_fields(default)
    kept = {name: value for name, value in saved.items() if name not in REMOVED}
    fields |= {name: current_value(name, value, warn=False) for name, value in kept.items()}
    for name, value in fields.items():
        now = getattr(config, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(now):
            fields[name] = saved_fields(now, value)
    return fields
