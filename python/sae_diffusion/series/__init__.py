"""Time series by per-token diffusion: data, network, training, sampling and the window study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import lazy_names
from .config import SeriesModelConfig, Source

if TYPE_CHECKING:
    from .data import SeriesStats, read_series, split_series
    from .model import SeriesDenoiser

__all__ = ["SeriesDenoiser", "SeriesModelConfig", "SeriesStats", "Source", "read_series", "split_series"]
__getattr__ = lazy_names(
    __name__,
    {"SeriesDenoiser": "model", "SeriesStats": "data", "read_series": "data", "split_series": "data"},
)
