"""A picture or a table of any schedule: the command `sae schedule`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..figures import new_figure, save_figure
from .schedules import (
    EDM,
    Cosine,
    Curve,
    Flow,
    LogLinear,
    Schedule,
    VPLinear,
)

CURVES: dict[str, Callable[[], Curve]] = {
    "log-linear": LogLinear, "vp-linear": VPLinear, "cosine": Cosine, "edm": EDM, "flow": Flow,
}  # fmt: skip


def plot_schedule(schedule: Schedule, path: str | Path, *, points: int = 401, max_lines: int = 24) -> Path:
    """Draw log-SNR against t, and the share of signal of every token while it is generated, into one picture.

    Tokens of several dimensions are counted in row-major order; at most `max_lines` of them are drawn as lines. The
    format follows the suffix of `path`, whose folder is created.
    """
    from matplotlib.cm import viridis
    from matplotlib.ticker import MaxNLocator

    t = torch.linspace(0, 1, points, dtype=torch.float64)
    log_snr = schedule.log_snr(t).reshape(points, -1)
    tokens = log_snr.shape[1]
    figure, (lines, image) = new_figure(10, 3.6, 2)
    for token in torch.linspace(0, tokens - 1, min(tokens, max_lines)).round().long().tolist():
        lines.plot(t, log_snr[:, token], color=viridis(token / max(tokens - 1, 1)), linewidth=1.2)
    lines.set(
        xlabel="t  (0 data, 1 noise)",
        ylabel="log-SNR",
        title=f"{type(schedule).__name__}, {tokens} tokens, token 0 dark",
    )
    shown = image.imshow(
        torch.sigmoid(log_snr.flip(0)).T.numpy(), aspect="auto", vmin=0, vmax=1, extent=(0, 1, tokens - 0.5, -0.5),
        interpolation="nearest",
    )  # fmt: skip
    image.set(xlabel="generation time 1 - t", ylabel="token", title="signal² / (signal² + noise²)")
    image.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(shown, ax=image)
    return save_figure(figure, path)


def schedule_table(schedule: Schedule, rows: int = 10, columns: int = 8) -> str:
    """t against log-SNR as text, tokens in row-major order; at most `columns` of them are shown."""
    t = torch.linspace(0, 1, rows + 1, dtype=torch.float64)
    log_snr = schedule.log_snr(t).reshape(rows + 1, -1)
    tokens = torch.linspace(0, log_snr.shape[1] - 1, min(log_snr.shape[1], columns)).round().long().tolist()
    lines = ["    t " + "".join(f"{f'token {token}':>11}" for token in tokens)]
    for time, values in zip(t.tolist(), log_snr):
        lines.append(f"{time:6.3f}" + "".join(f"{values[token].item():11.3f}" for token in tokens))
    return "\n".join(lines)
