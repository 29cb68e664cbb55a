"""Learning-rate schedule."""

from __future__ import annotations

import math


def power_law_lr(step: int, ref: float, *, ref_steps: int, ramp_steps: int = 0) -> float:
    """ref / sqrt(max(i / ref_steps, 1)) * min(i / ramp_steps, 1): a linear ramp, a plateau, then 1/sqrt(i).

    Args:
        step: i, the number of this optimizer step, counted from 1.
        ref: learning rate of the plateau.
        ref_steps: step at which the decay begins; 0 = never.
        ramp_steps: length of the linear ramp; 0 = none.

    Source: Karras et al. 2024 (EDM2), eq. 67.
    """
    if step < 1:
        raise ValueError(f"step: must be at least 1, got {step}")
    lr = ref
    if ref_steps > 0:
        lr /= math.sqrt(max(step / ref_steps, 1.0))
    if ramp_steps > 0:
        lr *= min(step / ramp_steps, 1.0)
    return lr


def cosine_lr(step: int, ref: float, *, steps: int, ramp_steps: int = 0) -> float:
    """ref (1 + cos(pi (i - 1) / N)) / 2 * min(i / ramp_steps, 1): a linear ramp, then half a cosine towards 0.

    Args:
        step: i, the number of this optimizer step, counted from 1.
        ref: learning rate at the start.
        steps: N, optimizer steps of the run.
        ramp_steps: length of the linear ramp; 0 = none.

    Source: Loshchilov and Hutter 2017 (SGDR), eq. 5, without restarts.
    """
    if step < 1:
        raise ValueError(f"step: must be at least 1, got {step}")
    lr = ref * (1 + math.cos(math.pi * min((step - 1) / steps, 1.0))) / 2
    return lr * min(step / ramp_steps, 1.0) if ramp_steps > 0 else lr
