"""Sampling with a noise level per token: one loop over the step functions of `steps`, any schedule and scaling.

A network is `denoise(x, log_snr) -> x0_hat` with x (B, *shape, ...) and log_snr (B, *schedule.shape), fp64 for fp64 x
and fp32 otherwise. A token whose log-SNR does not change in a step keeps its bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sae_kernels import token_noise_eps

from ..checks import Finite, Fraction, check_choice, check_value
from .noise import derive_seed
from .schedules import Given, Rolling, Schedule, expand_to
from .steps import CORRECTED, STEPS, At, Churn, Level, ddim, trapezoid

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SOLVERS = tuple(STEPS)
KINDS = ("x0", "eps", "v", "flow")
_START, _STEPS, _HIDDEN, _ROLL = 101, 102, 103, 104  # purposes of random numbers


def to_x0(
    prediction: torch.Tensor, x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor, kind: str
) -> torch.Tensor:
    """x0_hat from what a network predicts; signal and noise broadcast to x (use `expand_to`).

    kind: "x0"; "eps"; "v" = signal eps - noise x0 (Salimans and Ho 2022, here with any scaling); "flow" = eps - x0.
    """
    check_choice("kind", kind, KINDS)
    if kind == "x0":
        return prediction
    if kind == "eps":
        return (x - noise * prediction) / signal
    if kind == "v":
        return (signal * x - noise * prediction) / (signal.square() + noise.square())
    return (x - noise * prediction) / (signal + noise)


def from_x0(x0: torch.Tensor, x: torch.Tensor, signal: torch.Tensor, noise: torch.Tensor, kind: str) -> torch.Tensor:
    """The inverse of `to_x0`: what a network of this kind would have to predict for x0_hat = x0."""
    check_choice("kind", kind, KINDS)
    eps = (x - signal * x0) / noise
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    return signal * eps - noise * x0 if kind == "v" else eps - x0


def guided(strong: Denoise, weak: Denoise, weight: float) -> Denoise:
    """weak + weight (strong - weak): classifier-free guidance if `weak` ignores the label, autoguidance if it is worse.

    Guiding x0 is the same as guiding eps or the score.
    At weight 1 only `strong` is evaluated, at weight 0 only `weak`.
    """
    check_value("weight", weight, Finite)
    if weight in (0, 1):
        return strong if weight == 1 else weak

    def denoise(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        low = weak(x, log_snr)
        return low + weight * (strong(x, log_snr) - low)

    return denoise


def context_guided(
    denoise: Denoise, schedule: Schedule, weight: float, *, threshold: float | None = None, seed: int = 0
) -> Denoise:
    """`guided` by the same network without its context: clean tokens are replaced by noise.

    The context is the tokens whose lambda is at least `threshold`, by default that of t = 0. In their place the weak
    network is shown a draw of x_1 at the level of t = 1. The context itself is not guided.
    """
    check_value("weight", weight, Finite)
    if isinstance(schedule, Given):  # its known tokens never have the level of t = 1
        schedule = schedule.schedule
    clean, noisy = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64)).split(1)
    # log_snr may be in fp32
    bound = clean - 1e-5 * clean.abs().clamp(min=1) if threshold is None else torch.full_like(clean, threshold)

    def guide(x: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        strong = denoise(x, log_snr)
        context = log_snr >= bound.to(log_snr)
        if weight == 1 or not bool(context.any()):
            return strong
        hidden = expand_to(context, x)
        noise = start(tuple(x.shape), schedule, seed=derive_seed(seed, _HIDDEN), like=x)
        weak = denoise(torch.where(hidden, noise, x), torch.where(context, noisy.to(log_snr), log_snr))
        return torch.where(hidden, strong, weak + weight * (strong - weak))

    return guide


def start(
    shape: tuple[int, ...],
    schedule: Schedule,
    *,
    seed: int = 0,
    like: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """x at t = 1: normals of variance signal^2 + noise^2, the marginal of data with mean 0 and variance 1.

    `like` gives dtype and device.
    """
    if like is not None:
        dtype, device = like.dtype, like.device
    eps = token_noise_eps(tuple(shape), seed=derive_seed(seed, _START), device=device, dtype=dtype)
    signal, noise = schedule.scales(torch.ones(1, dtype=torch.float64))
    return eps * expand_to((signal.square() + noise.square()).sqrt(), eps).to(eps)


def step_normals(x: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """The normals of a step of `sample`, like x: a function of (seed, step, element), the same on every device."""
    return token_noise_eps(tuple(x.shape), seed=derive_seed(seed, _STEPS), offset=step, device=x.device, dtype=x.dtype)


@torch.no_grad()
def sample(
    denoise: Denoise,
    x_start: torch.Tensor,
    schedule: Schedule,
    times: torch.Tensor,
    *,
    solver: str = "ancestral",
    eta: float = 0.0,
    churn: Churn | None = None,
    seed: int = 0,
    offset: int = 0,
    final: str = "auto",
    callback: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Carry x from times[0] to times[-1].

    Solvers, see `steps` for what each does:

    * "euler", "ddim" with eta = 0: first-order steps of the probability-flow ODE.
    * "heun": second order, two evaluations a step; EDM's for "ve", flow matching's for "flow".
    * "dpm++2m": DPM-Solver++(2M), second order with one evaluation; a history per token.
    * "ancestral", "ddim" with eta > 0: with noise of the posterior's variance, or eta^2 times it; "ddpm": with more.
    * "stochastic-heun": "heun" after `churn`. EDM also churns before its last step to sigma = 0; here that step is the
      evaluation for final="data", without noise.

    Args:
        x_start: (B, *shape, ...), x at times[0]; `start` draws it. fp64 is solved in fp64.
        times: (steps + 1,) non-increasing, or (steps + 1, *schedule.shape) for every token's own times.
        eta: for "ddim".
        churn: for "stochastic-heun"; `Churn()` by default.
        seed, offset: the normals of step i are step_normals(x, seed, offset + i).
        final: "state" returns x at times[-1], which at t = 0 still has the schedule's least noise; "data" returns
            x0_hat of that state, with one more evaluation; "auto" is "data" if times end at 0, else "state". Tokens
            that never moved keep their bits in both.
        callback: called after step i with (i, x, x0_hat).

    Raises:
        ValueError: shapes that do not agree, times that increase, or an unknown solver.
    """
    check_choice("solver", solver, SOLVERS)
    check_choice("final", final, ("auto", "state", "data"))
    check_value("eta", eta, Fraction)
    if not x_start.is_floating_point():
        raise TypeError(f"x_start: must be a float tensor, got {x_start.dtype}")
    levels = _levels(schedule, times)
    expand_to(levels[:1], x_start)
    if final == "auto":
        final = "data" if bool((times[-1] == 0).all()) else "state"

    moving_steps = (levels[1:] != levels[:-1]).sum(dim=0, keepdim=True)
    step = partial(ddim, eta=eta) if solver == "ddim" else STEPS[solver]
    x, then, last = x_start, Level(levels[:1], schedule.scaling), None
    for i in range(len(levels) - 1):
        now, then = then, Level(levels[i + 1 : i + 2], schedule.scaling)
        moving = now.log_snr != then.log_snr
        moves = expand_to(moving, x).to(x.device)
        normals = partial(step_normals, x, seed, offset + i)
        state = x
        if solver == "stochastic-heun":
            noisier, now = (churn or Churn()).add(x, now, moving_steps, normals, moving)
            state = torch.where(moves, noisier, x)
        begin = At(state, now, _denoise(denoise, state, now.log_snr))
        new = torch.where(moves, step(begin, then, last, normals), x)
        if solver in CORRECTED:
            new = torch.where(moves, trapezoid(begin, At(new, then, _denoise(denoise, new, then.log_snr))), x)
        x, last = new, begin
        if callback is not None:
            callback(i, x, begin.x0)
    if final == "state":
        return x
    return torch.where(expand_to(moving_steps > 0, x).to(x.device), _denoise(denoise, x, levels[-1:]), x)


@torch.no_grad()
def roll(
    denoise: Denoise,
    schedule: Rolling,
    shape: tuple[int, ...],
    steps_per_token: int,
    *,
    solver: str = "ancestral",
    eta: float = 0.0,
    churn: Churn | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Iterator[torch.Tensor]:
    """Yield tokens (B, ...) for ever, with W tokens in flight; shape is (B, W, ...).

    The run-in (`Rolling(first=True)`) takes W * steps_per_token steps, every further token steps_per_token. A token
    leaves as the network's x0_hat of its last state. Options as in `sample`.
    """
    if not isinstance(schedule, Rolling) or schedule.first:
        raise ValueError(f"schedule: must be a Rolling with first=False, got {type(schedule).__name__}")
    if len(shape) < 2 or shape[1] != schedule.window:
        raise ValueError(f"shape: must be (B, W = {schedule.window}, ...), got {tuple(shape)}")
    options: dict[str, Any] = {"solver": solver, "eta": eta, "churn": churn, "final": "state"}
    run_in = Rolling(schedule.window, schedule.curve, first=True, scaling=schedule.scaling)
    entry = Rolling(1, schedule.curve, scaling=schedule.scaling)
    first = derive_seed(seed, _ROLL, 1)
    x = start(shape, run_in, seed=first, dtype=dtype, device=device)
    x = sample(denoise, x, run_in, run_in.times(schedule.window * steps_per_token), seed=first, **options)
    times = schedule.times(steps_per_token)
    level = schedule.log_snr(times[-1:])
    for token in itertools.count(2):
        yield _denoise(denoise, x, level)[:, 0]
        own = derive_seed(seed, _ROLL, token)
        entering = start((shape[0], 1, *shape[2:]), entry, seed=own, like=x)
        x = sample(denoise, torch.cat([x[:, 1:], entering], dim=1), schedule, times, seed=own, **options)


def _denoise(denoise: Denoise, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """x0_hat at the levels (1, *shape)."""
    level = level.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
    x0 = denoise(x, level.expand(x.shape[0], *level.shape[1:]))
    if x0.shape != x.shape:
        raise ValueError(f"denoise: must return the shape of x = {tuple(x.shape)}, got {tuple(x0.shape)}")
    return x0.to(x.dtype)


def _levels(schedule: Schedule, times: torch.Tensor) -> torch.Tensor:
    """lambda on the grid, fp64 (steps + 1, *shape), on the CPU."""
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim == 0 or len(times) == 0 or tuple(times.shape[1:]) not in ((), schedule.shape):
        raise ValueError(
            f"times: must have shape (steps + 1,) or (steps + 1, *{schedule.shape}), got {tuple(times.shape)}"
        )
    if bool((times[1:] > times[:-1]).any()):
        raise ValueError("times: must not increase (sampling goes from t = 1 to t = 0)")
    levels = schedule.log_snr(times)
    if not bool(levels.isfinite().all()):
        raise ValueError(f"schedule: log_snr of {type(schedule).__name__} must be finite at all times")
    if bool((levels[:-1] - levels[1:] > 1e-9).any()):
        raise ValueError(f"schedule: log_snr of {type(schedule).__name__} must not increase with t")
    return levels.cummax(dim=0).values  # a decrease by rounding would give a negative variance
