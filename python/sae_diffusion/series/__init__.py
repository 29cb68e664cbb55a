"""Time series by per-token diffusion: data, network, training, sampling and the window study."""

from .data import SeriesStats, Source, read_series, split_series
from .model import SeriesDenoiser, SeriesModelConfig

__all__ = ["SeriesDenoiser", "SeriesModelConfig", "SeriesStats", "Source", "read_series", "split_series"]
