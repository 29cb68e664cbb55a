"""Time series by per-token diffusion."""
