"""The Gaussian algebra of one token: transition, posterior, and the KL of a step, in closed form (Unified Diffusion).

p is the earlier (cleaner) time and t the later one, lambda the log-SNR of a token at that time, a and s its signal and
noise (`scales_of`). In the source's letters, for the scaling "vp": alpha = a^2, beta = s^2 = 1 - alpha, and the SNR
s(t) = alpha / beta = exp(lambda). Arguments broadcast: levels per token need as many dimensions as x (`expand_to`).

How to read the source: alpha(t, p) in its posterior is 1 / alpha(p, t); two parallel bars are the harmonic sum
u v / (u + v), and beta(0, p) between them is beta(p); Delta x0 = -Delta eps / sqrt(s), where the minus vanishes when
squared; and its ELBO lacks a minus, because s falls with t.
"""

from __future__ import annotations

import torch

from .schedules import scales_of


def fresh_fraction(log_snr_p: torch.Tensor, log_snr_t: torch.Tensor) -> torch.Tensor:
    """c = 1 - exp(lambda_t - lambda_p) = 1 - s(t) / s(p), the share of the noise at t that was added after p.

    In every scaling beta(p, t) = s_t^2 c, and beta(p, t) / beta(t) = c.
    """
    return -torch.expm1(log_snr_t - log_snr_p)


def transition(
    log_snr_p: torch.Tensor, log_snr_t: torch.Tensor, scaling: str = "vp"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, variance) of q(x_t | x_p) = N(factor x_p, variance): sqrt(alpha(p, t)) and beta(p, t).

    With "vp", alpha(p, t) = alpha(t) / alpha(p) and beta(p, t) = 1 - alpha(p, t).
    """
    (signal_p, _), (signal_t, noise_t) = scales_of(log_snr_p, scaling), scales_of(log_snr_t, scaling)
    return signal_t / signal_p, noise_t.square() * fresh_fraction(log_snr_p, log_snr_t)


def posterior_coefficients(
    log_snr_p: torch.Tensor, log_snr_t: torch.Tensor, scaling: str = "vp"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(u, v, variance) of q(x_p | x_t, x_0) = N(u x_t + v x_0, variance).

    u = a_p / a_t (1 - c), v = a_p c, variance = s_p^2 c. With "vp" these are beta(p) sqrt(alpha(p, t)) / beta(t),
    beta(p, t) sqrt(alpha(p)) / beta(t) and beta(p) beta(p, t) / beta(t).
    """
    (signal_p, noise_p), (signal_t, _) = scales_of(log_snr_p, scaling), scales_of(log_snr_t, scaling)
    fresh = fresh_fraction(log_snr_p, log_snr_t)
    return signal_p / signal_t * (1 - fresh), signal_p * fresh, noise_p.square() * fresh


def posterior(
    x_t: torch.Tensor, x_0: torch.Tensor, log_snr_p: torch.Tensor, log_snr_t: torch.Tensor, scaling: str = "vp"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, variance) of q(x_p | x_t, x_0); the model's p(x_p | x_t) is the same with x0_hat for x_0."""
    of_x_t, of_x_0, variance = posterior_coefficients(log_snr_p, log_snr_t, scaling)
    return of_x_t * x_t + of_x_0 * x_0, variance


def mean_difference(
    x0_difference: torch.Tensor, log_snr_p: torch.Tensor, log_snr_t: torch.Tensor, scaling: str = "vp"
) -> torch.Tensor:
    """Delta mu = beta(p, t) / beta(t) sqrt(alpha(p)) Delta x0: the effect of an error of x0_hat on the mean."""
    return posterior_coefficients(log_snr_p, log_snr_t, scaling)[1] * x0_difference


def x0_difference(eps_difference: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
    """Delta x0 = -Delta eps / sqrt(s): errors of x0_hat and eps_hat at the same x_t, in any scaling."""
    return -(-0.5 * log_snr).exp() * eps_difference


def step_kl(x0_difference: torch.Tensor, log_snr_p: torch.Tensor, log_snr_t: torch.Tensor) -> torch.Tensor:
    """KL(q(x_p | x_t, x_0) || p(x_p | x_t)) = (s(p) - s(t)) / 2 Delta x0^2, nats per component, in any scaling."""
    return 0.5 * log_snr_p.exp() * fresh_fraction(log_snr_p, log_snr_t) * x0_difference.square()


def step_kl_eps(eps_difference: torch.Tensor, log_snr_p: torch.Tensor, log_snr_t: torch.Tensor) -> torch.Tensor:
    """The same KL from the error of eps_hat: (s(p) - s(t)) / (2 s(t)) Delta eps^2."""
    return 0.5 * torch.expm1(log_snr_p - log_snr_t) * eps_difference.square()


def step_kl_eps_small(eps_difference: torch.Tensor, log_snr_p: torch.Tensor, log_snr_t: torch.Tensor) -> torch.Tensor:
    """`step_kl_eps` to first order in the step: (log s(p) - log s(t)) / 2 Delta eps^2."""
    return 0.5 * (log_snr_p - log_snr_t) * eps_difference.square()
