"""Per-token noise schedules: every token (or component) of an example has its own log-SNR at the common time t.

t runs from 0 (data) to 1 (noise); sampling goes from 1 to 0. The log-SNR is lambda = ln(signal^2 / noise^2), which does
not increase with t; papers that write gamma mean -lambda. A scaling turns it into x_t = signal x_0 + noise eps:

    "vp"    signal^2 = sigmoid(lambda), noise^2 = sigmoid(-lambda)     (variance preserving)
    "ve"    signal = 1, noise = exp(-lambda / 2)                       (EDM's sigma)
    "flow"  signal = 1 - noise, noise = sigmoid(-lambda / 2)           (flow matching)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from sae_kernels._deprecated import warn_renamed

from ..checks import BelowOne, NotNegative, check_choice, check_value
from .curves import EDM, Cosine, Curve, Flow, LogLinear, VPLinear

__all__ = [
    "EDM", "SCALINGS", "Columns", "ComponentLinear", "Cosine", "Curve", "Flow", "Given", "Independent", "LogLinear",
    "Mixed", "PerPixel", "Rolling", "Rows", "Schedule", "Staggered", "Together", "Triangular", "VPLinear",
    "check_schedule", "expand_to", "fraction_to_window", "sampling_times", "scales_of", "window_to_fraction",
]  # fmt: skip

SCALINGS = ("vp", "ve", "flow")


def scales_of(log_snr: torch.Tensor, scaling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(signal, noise) of a log-SNR, both of its shape and dtype.

    Raises:
        ValueError: `scaling` is not one of "vp", "ve", "flow".
    """
    check_choice("scaling", scaling, SCALINGS)
    if scaling == "vp":
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
    if scaling == "ve":
        return torch.ones_like(log_snr), (-0.5 * log_snr).exp()
    return torch.sigmoid(0.5 * log_snr), torch.sigmoid(-0.5 * log_snr)


def expand_to(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Values (B or 1, *shape) with ones appended, so that they broadcast to x (B, *shape, ...).

    Raises:
        ValueError: the sizes do not agree.
    """
    fits = values.ndim <= x.ndim and all(n in (1, m) for n, m in zip(values.shape, x.shape))
    if not fits:
        raise ValueError(
            f"x: must have shape (B, *schedule.shape, ...) to take values of shape {tuple(values.shape)}, "
            f"got {tuple(x.shape)}"
        )
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


class Schedule(ABC):
    """Log-SNR of each token as a function of time.

    Attributes:
        shape: of the tokens, () when all of x shares one level. x has shape (B, *shape, ...), where a size 1 in `shape`
            broadcasts.
        scaling: "vp", "ve" or "flow".
    """

    shape: tuple[int, ...]
    scaling: str

    @abstractmethod
    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        """lambda (B, *shape) in the dtype of t; t is (B,), or (B, *shape) to give every token its own time."""

    @abstractmethod
    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        """d lambda / dt <= 0, arguments and shape as `log_snr`.

        Where the slope jumps (`breakpoints`), it is the limit of greater magnitude.
        """

    def scales(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(signal, noise) at t, each (B, *shape)."""
        return scales_of(self.log_snr(t), self.scaling)

    def breakpoints(self) -> torch.Tensor:
        """Sorted fp64 times from 0 to 1 between which lambda of every token is smooth."""
        return torch.tensor([0.0, 1.0], dtype=torch.float64)

    def times(self, steps: int) -> torch.Tensor:
        """The grid of a solver: fp64 (steps + 1,), equidistant from 1 to 0."""
        _check_count("steps", steps)
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def _time(self, t: torch.Tensor) -> torch.Tensor:
        """t with the token dimensions, for broadcasting against (1, *shape)."""
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            raise TypeError(f"t: must be a float tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.ndim == 1:
            return t.reshape(-1, *(1,) * len(self.shape))
        if t.ndim != 1 + len(self.shape) or tuple(t.shape[1:]) != self.shape:
            raise ValueError(f"t: must have shape (B,) or (B, *{self.shape}), got {tuple(t.shape)}")
        return t


class _Delayed(Schedule):
    """Token i follows the curve while t goes from delay_i to delay_i + width, and rests before and after.

    delay: (*shape) fp64; width: a number.
    """

    def __init__(
        self, shape: tuple[int, ...], delay: torch.Tensor, width: float, curve: Curve | None, scaling: str | None
    ) -> None:
        self.curve = LogLinear() if curve is None else curve
        if not isinstance(self.curve, Curve):
            raise TypeError(f"curve: must be a Curve such as LogLinear(), got {type(curve).__name__}")
        self.scaling = self.curve.scaling if scaling is None else scaling
        check_choice("scaling", self.scaling, SCALINGS)
        self.shape, self.delay, self.width = shape, delay, width

    def progress(self, t: torch.Tensor) -> torch.Tensor:
        """How far each token is noised: 0 clean, 1 noise, (B, *shape)."""
        return self._progress(t)[0]

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return self.curve(self.progress(t))

    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        progress, inside = self._progress(t)
        return torch.where(inside, self.curve.slope(progress) / self.width, 0.0)

    def breakpoints(self) -> torch.Tensor:
        corners = torch.tensor([0.0, 1.0, *self.curve.corners], dtype=torch.float64)
        inner = self.delay.reshape(-1, 1) + self.width * corners
        return torch.cat([inner.flatten(), inner.new_tensor([0.0, 1.0])]).clamp(0, 1).unique()

    def _progress(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Progress, and whether t lies in the closed interval in which the token moves.

        A time within rounding of an end counts as that end: on a grid that meets the ends, a token then rests exactly
        instead of moving by 1e-16.
        """
        t = self._time(t)
        progress = (t - self.delay.to(t)) / self.width
        rounding = 8 * torch.finfo(t.dtype).eps / min(self.width, 1.0)
        inside = (progress >= -rounding) & (progress <= 1 + rounding)
        low, high = torch.zeros_like(progress), torch.ones_like(progress)
        snapped = torch.where(progress < rounding, low, torch.where(progress > 1 - rounding, high, progress))
        return snapped, inside


class Together(_Delayed):
    """All tokens at one level: ordinary diffusion with any curve.

    Args:
        shape: of the tokens, () for a level per example.
        curve: lambda(t); `LogLinear()` by default.
        scaling: that of the curve by default.
    """

    def __init__(self, shape: Sequence[int] = (), curve: Curve | None = None, *, scaling: str | None = None) -> None:
        shape = _check_shape(shape)
        super().__init__(shape, torch.zeros(shape, dtype=torch.float64), 1.0, curve, scaling)


class Independent(Together):
    """Every token at its own random level: the training noise of diffusion forcing (Chen et al. 2024).

    `draw` gives times (B, *shape) for `log_snr`; with times (B,) all tokens move together, as `Together`.
    """

    def draw(self, batch: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Independent times U(0, 1), (batch, *shape) fp64, stratified over the batch for each token.

        For each token, one time of the batch falls into each of `batch` equal intervals, in random order.
        """
        _check_count("batch", batch)
        device = generator.device if generator is not None else torch.device("cpu")
        uniform = torch.rand(2, batch, *self.shape, generator=generator, device=device, dtype=torch.float64)
        return (uniform[0].argsort(dim=0) + uniform[1]) / batch


class Staggered(_Delayed):
    """Tokens are generated one after another, overlapping in time (Unified Diffusion).

    In generation time 1 - t the k-th token in the order moves from l_k = k / v to r_k = (k + w) / v with v = N - 1 + w:
    token 0 is generated first. w = 1 is autoregressive (disjoint intervals), w = inf is joint diffusion; for w < 1
    nothing moves between two tokens.

    Args:
        tokens: N.
        window: w > 0, tokens in flight; `math.inf` for joint diffusion.
        order: order[k] is the token generated k-th, a permutation of 0..N-1; 0, 1, 2, ... by default.
    """

    def __init__(
        self,
        tokens: int,
        window: float,
        curve: Curve | None = None,
        *,
        order: Sequence[int] | torch.Tensor | None = None,
        scaling: str | None = None,
    ) -> None:
        _check_count("tokens", tokens)
        if isinstance(window, bool) or not isinstance(window, (int, float)):
            raise TypeError(f"window: must be a number, got {type(window).__name__}")
        if not window > 0:
            raise ValueError(f"window: must be positive, got {window}")
        self.tokens, self.window = tokens, float(window)
        self.order = _check_order(order, tokens)
        left, right = self.intervals()
        # 1 - r_k, written so that rounding cannot separate it from the l of another token
        delay = left.flip(0) if math.isfinite(window) else left
        super().__init__((tokens,), delay[torch.argsort(self.order)], float(right[0]), curve, scaling)

    @property
    def speed(self) -> float:
        """v = N - 1 + w: tokens that start per unit of time."""
        return self.tokens - 1 + self.window

    def intervals(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(l, r), each (N,) fp64: generation times at which the k-th token in the order starts and is finished."""
        k = torch.arange(self.tokens, dtype=torch.float64)
        if math.isinf(self.window):
            return torch.zeros_like(k), torch.ones_like(k)
        return k / self.speed, (k + self.window) / self.speed

    def windows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Deprecated: `intervals`."""
        warn_renamed("windows", "intervals")
        return self.intervals()


class Triangular(Staggered):
    """A pipeline: token k may take its first of `steps_per_token` steps `lag` macro steps after token k - 1.

    The levels form a lower-triangular ("pyramid") matrix. It equals `Staggered` with window steps_per_token / lag on
    the grid of its `macro_steps` = steps_per_token + (N - 1) lag steps; lag 0 is joint, lag = steps_per_token is
    autoregressive.
    """

    def __init__(
        self,
        tokens: int,
        steps_per_token: int,
        lag: int = 1,
        curve: Curve | None = None,
        *,
        order: Sequence[int] | torch.Tensor | None = None,
        scaling: str | None = None,
    ) -> None:
        _check_count("tokens", tokens)
        _check_count("steps_per_token", steps_per_token)
        _check_count("lag", lag, least=0)
        self.steps_per_token, self.lag = steps_per_token, lag
        window = steps_per_token / lag if lag else math.inf
        super().__init__(tokens, window, curve, order=order, scaling=scaling)

    @property
    def macro_steps(self) -> int:
        return self.steps_per_token + (self.tokens - 1) * self.lag

    def levels(self) -> torch.Tensor:
        """Steps still to go, (macro_steps + 1, N) int64: row m, column i; row 0 all noise, the last row all zero."""
        macro = torch.arange(self.macro_steps + 1)[:, None]
        start = self.lag * torch.argsort(self.order)
        return (self.steps_per_token - (macro - start)).clamp(0, self.steps_per_token)

    def times(self, steps: int | None = None) -> torch.Tensor:
        """The grid of the pipeline: `macro_steps` steps unless `steps` is given."""
        return super().times(self.macro_steps if steps is None else steps)


class Rolling(_Delayed):
    """An endless sequence with W tokens in flight (rolling diffusion, Ruhe et al. 2024).

    In global time g, counted in tokens, token k enters as noise at g = k and leaves clean at g = k + W. As a schedule
    it is one shift by a token: slot j has progress (j + t) / W, so from t = 1 to t = 0 every slot takes the level of
    the one before it, slot 0 becomes clean and leaves, and noise enters at the end. `first=True` is the run-in that
    leads from pure noise to the state at t = 0, progress min(1, j / W + t). `roll` in solvers.py samples with both.

    Args:
        window: W >= 1, tokens in flight.
    """

    def __init__(
        self, window: int, curve: Curve | None = None, *, first: bool = False, scaling: str | None = None
    ) -> None:
        _check_count("window", window)
        self.window, self.first = window, first
        slots = torch.arange(window, dtype=torch.float64)
        width = 1.0 if first else float(window)
        super().__init__((window,), -slots * (width / window), width, curve, scaling)

    def progress_at(self, global_time: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """1 - (g - k) / W within [0, 1] for token k at global time g; arguments broadcast, any size of either."""
        return (1 - (global_time - token) / self.window).clamp(0, 1)


class PerPixel(_Delayed):
    """Any generation order over positions: a map from 0 (generated first) to 1 (last).

    A position with value m is noised while t goes from b (1 - m) to b (1 - m) + 1 - b.

    Args:
        order: (*shape) values in [0, 1].
        b: in [0, 1): 0 is joint; near 1 positions come one after another. N equally spaced positions move as the
            tokens of `Staggered` with b = (N - 1) / (N - 1 + w).
    """

    def __init__(
        self, order: torch.Tensor, b: float, curve: Curve | None = None, *, scaling: str | None = None
    ) -> None:
        if not isinstance(order, torch.Tensor) or not order.is_floating_point():
            raise TypeError(f"order: must be a float tensor, got {getattr(order, 'dtype', type(order).__name__)}")
        order = order.detach().to("cpu", torch.float64)
        if not bool(((order >= 0) & (order <= 1)).all()):
            raise ValueError(f"order: values must lie in [0, 1], got [{order.min()}, {order.max()}]")
        check_value("b", b, BelowOne)
        self.order, self.b = order, float(b)
        super().__init__(tuple(order.shape), self.b * (1 - order), 1 - self.b, curve, scaling)


class Columns(PerPixel):
    """Columns of (C, Y, X) from left to right: column 0 is generated first. `b` as in `PerPixel` (GUD's b).

    This follows the docstring of GUD's released code; its formula noises column 0 first and so generates it last.
    """

    _axis = -1

    def __init__(
        self, shape: Sequence[int], b: float, curve: Curve | None = None, *, scaling: str | None = None
    ) -> None:
        shape = _check_shape(shape)
        if len(shape) < 2:
            raise ValueError(f"shape: must end in (Y, X), got {shape}")
        size = shape[self._axis]
        view = [1] * len(shape)
        view[self._axis] = size
        ramp = torch.arange(size, dtype=torch.float64) / max(size - 1, 1)
        super().__init__(ramp.reshape(view).expand(shape).contiguous(), b, curve, scaling=scaling)


class Rows(Columns):
    """Rows of (C, Y, X) from top to bottom: row 0 is generated first. `b` as in `PerPixel`."""

    _axis = -2


class ComponentLinear(Schedule):
    """GUD's component-wise schedule, linear in t with one slope for all components (Gerdes et al., eqs. 13 and 20).

    With log SNR_i = log Sigma_i + lambda_i, the signal-to-noise ratio that counts the data's variance Sigma_i,

        log SNR_i(t) = start - a (l_i - l_max) - t (start - end + a (l_max - l_min)).

    The component with the greatest l is at `start` at t = 0, the one with the least l at `end` at t = 1: components
    with small l are generated first. For l = -log Sigma (the default), a = 1 is standard diffusion (one lambda for all)
    and a = 0 gives all components the same SNR at all times; with large a they are generated one after another.

    Args:
        variances: Sigma, (*shape), positive, of the components that are diffused (ones if they are whitened).
        a: hardness (a in the paper), the inverse of its softness.
        ordering: l, (*shape), finite.
        start, end: log SNR at the clean and the noisy end; -gamma_denoise and -gamma_noise of the paper.
        clip: (least, greatest) lambda, at which the schedule rests; None does not clip.
    """

    def __init__(
        self,
        variances: torch.Tensor,
        a: float = 1.0,
        ordering: torch.Tensor | None = None,
        *,
        start: float = 7.0,
        end: float = -3.0,
        clip: tuple[float, float] | None = None,
        scaling: str = "vp",
    ) -> None:
        check_choice("scaling", scaling, SCALINGS)
        variances = torch.as_tensor(variances).detach().to("cpu", torch.float64)
        if not bool((variances.isfinite() & (variances > 0)).all()):
            raise ValueError(f"variances: must be positive and finite, got a minimum of {variances.min()}")
        log_variances = variances.log()
        ordering = -log_variances if ordering is None else torch.as_tensor(ordering).detach().to("cpu", torch.float64)
        if ordering.shape != variances.shape:
            raise ValueError(f"ordering: must have shape {tuple(variances.shape)}, got {tuple(ordering.shape)}")
        if not bool(ordering.isfinite().all()):
            raise ValueError("ordering: must be finite, got NaN or infinity")
        check_value("a", a, NotNegative)
        if not (math.isfinite(start) and math.isfinite(end) and start > end):
            raise ValueError(f"start: must be finite and greater than end = {end}, got {start}")
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"clip: must be (least, greatest) with least < greatest, got {clip}")
        self.shape, self.scaling, self.clip, self.a = tuple(variances.shape), scaling, clip, float(a)
        self.variances, self.ordering = variances, ordering
        spread = (ordering.max() - ordering.min()).item()
        self.clean = start - log_variances - a * (ordering - ordering.max())  # lambda at t = 0, before clipping
        self.fall = start - end + a * spread

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        value = self._unclipped(t)
        return value if self.clip is None else value.clamp(*self.clip)

    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        value = self._unclipped(t)
        slope = torch.full_like(value, -self.fall)
        if self.clip is not None:
            slope = torch.where((value < self.clip[0]) | (value > self.clip[1]), 0.0, slope)
        return slope

    def breakpoints(self) -> torch.Tensor:
        ends = super().breakpoints()
        if self.clip is None:
            return ends
        inner = torch.cat([(self.clean.flatten() - bound) / self.fall for bound in self.clip])
        return torch.cat([inner, ends]).clamp(0, 1).unique()

    def _unclipped(self, t: torch.Tensor) -> torch.Tensor:
        t = self._time(t)
        return self.clean.to(t) - t * self.fall


class Given(Schedule):
    """Another schedule in which the tokens marked in `known` rest at the level of t = 0: data to continue or complete.

    Put the known tokens into x at that level (`scales` at any t) before sampling; they are not changed.

    Args:
        known: (*schedule.shape) bool.
    """

    def __init__(self, schedule: Schedule, known: torch.Tensor) -> None:
        known = torch.as_tensor(known).detach().cpu()
        if known.dtype != torch.bool:
            raise TypeError(f"known: must be a bool tensor, got {known.dtype}")
        if tuple(known.shape) != schedule.shape:
            raise ValueError(f"known: must have shape {schedule.shape}, got {tuple(known.shape)}")
        self.schedule, self.known = schedule, known
        self.shape, self.scaling = schedule.shape, schedule.scaling

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return torch.where(self.known.to(t.device), self.schedule.log_snr(t.new_zeros(1)), self.schedule.log_snr(t))

    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        return torch.where(self.known.to(t.device), 0.0, self.schedule.log_snr_slope(t))

    def breakpoints(self) -> torch.Tensor:
        return self.schedule.breakpoints()

    def times(self, steps: int) -> torch.Tensor:
        return self.schedule.times(steps)


class Mixed(Schedule):
    """For training: row b of a batch follows parts[b % len(parts)]. Stratified times are so for each part too."""

    def __init__(self, parts: Sequence[Schedule]) -> None:
        self.parts, self.shape, self.scaling = parts, parts[0].shape, parts[0].scaling

    def log_snr(self, t: torch.Tensor) -> torch.Tensor:
        return self._by_row(t, "log_snr")

    def log_snr_slope(self, t: torch.Tensor) -> torch.Tensor:
        return self._by_row(t, "log_snr_slope")

    def _by_row(self, t: torch.Tensor, name: str) -> torch.Tensor:
        out = t.new_empty(len(t), *self.shape)
        for k, part in enumerate(self.parts):
            out[k :: len(self.parts)] = getattr(part, name)(t[k :: len(self.parts)])
        return out


def window_to_fraction(window: float, tokens: int) -> float:
    """w / (N - 1 + w): the part of the time in which a token of `Staggered` moves; 1 - b of `PerPixel`."""
    return 1.0 if math.isinf(window) else window / (tokens - 1 + window)


def fraction_to_window(fraction: float, tokens: int) -> float:
    """w = fraction / (1 - fraction) (N - 1), the inverse of `window_to_fraction` for N > 1."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: must lie in (0, 1], got {fraction}")
    return math.inf if fraction == 1 else fraction / (1 - fraction) * (tokens - 1)


def sampling_times(schedule: Schedule, steps: int) -> torch.Tensor:
    """The grid that `schedule` is sampled on: fp64 (steps + 1,), decreasing from 1 to 0."""
    return schedule.times(steps)


def check_schedule(schedule: Schedule, points: int = 257) -> None:
    """Refuse a schedule with which a solver or a loss would silently be wrong; cheap enough for every start of a run.

    Checks `points` equidistant times and at as many of the schedule's own breakpoints.

    Raises:
        ValueError: log_snr is not finite, has the wrong shape or increases with t; the slope is not finite,
            positive, or not the derivative of log_snr. The message names the schedule, t and the token.
    """
    name = type(schedule).__name__
    check_choice("scaling", schedule.scaling, SCALINGS)
    corners = schedule.breakpoints()
    corners = corners[torch.linspace(0, len(corners) - 1, min(len(corners), points)).long()]
    grid = torch.cat([torch.linspace(0, 1, points, dtype=torch.float64), corners]).unique()
    values, slopes = schedule.log_snr(grid), schedule.log_snr_slope(grid)
    for what, value in (("log_snr", values), ("log_snr_slope", slopes)):
        wanted = (len(grid), *schedule.shape)
        if tuple(value.shape) != wanted:
            raise ValueError(f"{name}.{what}: must have shape (B, *shape) = {wanted}, got {tuple(value.shape)}")
        _refuse_where(~value.isfinite(), grid, f"{name}.{what}: must be finite", value)
    rise = values[1:] - values[:-1]
    rounding = 16 * torch.finfo(torch.float64).eps * values.abs().amax().clamp(min=1.0)
    _refuse_where(rise > rounding, grid[1:], f"{name}.log_snr: must not increase with t", rise, "rise")
    _refuse_where(slopes > 0, grid, f"{name}.log_snr_slope: must be <= 0", slopes)

    # Differences to both sides: one of them is right even if a corner that was left out lies between.
    gap = grid[1:] - grid[:-1]
    wide = gap > 1e-9
    middle, step = 0.5 * (grid[1:] + grid[:-1])[wide], 1e-5 * gap[wide]
    value, slope = schedule.log_snr(middle), schedule.log_snr_slope(middle)
    step_of_token = step.reshape(-1, *(1,) * len(schedule.shape))
    after = (schedule.log_snr(middle + step) - value) / step_of_token - slope
    before = (value - schedule.log_snr(middle - step)) / step_of_token - slope
    off = torch.minimum(after.abs(), before.abs())
    bound = 0.01 * slope.abs() + 0.01 * (values[0] - values[-1]).abs()
    _refuse_where(off > bound, middle, f"{name}.log_snr_slope: must be the derivative of log_snr", off, "error")


def _refuse_where(bad: torch.Tensor, grid: torch.Tensor, rule: str, values: torch.Tensor, what: str = "value") -> None:
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        token = f", token {tuple(place[1:])}" if len(place) > 1 else ""
        raise ValueError(f"{rule}; at t = {grid[place[0]]:.6g}{token} the {what} is {values[tuple(place)]:.6g}")


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: must be at least {least}, got {value}")


def _check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(shape)
    for size in shape:
        _check_count("shape", size)
    return shape


def _check_order(order: Sequence[int] | torch.Tensor | None, tokens: int) -> torch.Tensor:
    if order is None:
        return torch.arange(tokens)
    order = torch.as_tensor(order, device="cpu")
    if order.is_floating_point() or order.dtype == torch.bool:
        raise TypeError(f"order: must hold integers, got {order.dtype}")
    if order.shape != (tokens,) or not torch.equal(order.sort().values, torch.arange(tokens).to(order)):
        raise ValueError(f"order: must be a permutation of 0..{tokens - 1}, got {order.tolist()}")
    return order.long()
