"""Settings that no run can want are refused where they are written, by the field's name."""

from __future__ import annotations

import dataclasses
import math

import pytest
from sae_diffusion import cli
from sae_diffusion.diffusion.config import NoiseConfig, SamplerConfig
from sae_diffusion.images.config import EvaluateConfig, ImageTrainConfig
from sae_diffusion.images.config import NetConfig as ImageNetConfig
from sae_diffusion.model import ModelConfig
from sae_diffusion.presets import PRESETS, ClipConfig
from sae_diffusion.series.config import SeriesModelConfig, SeriesTrainConfig
from sae_diffusion.series.config import StudyConfig as SeriesStudyConfig
from sae_diffusion.train import TrainConfig

HUGE = 10**400  # no float, and no number of anything
TRAIN_COUNTS = (
    "clip_length", "batch_size", "noisy_copies", "steps", "seed", "lr_ref_steps", "lr_ramp_steps", "spatial_every",
    "normalizer_size", "normalizer_every", "checkpoint_every", "keep_checkpoints", "snapshot_every", "log_every",
    "sample_every", "num_workers", "micro_batch",
)  # fmt: skip
COUNTS = {
    TrainConfig: TRAIN_COUNTS,
    SamplerConfig: ("sampling_steps",),
    ClipConfig: ("frame_stride", "clip_stride"),
    SeriesTrainConfig: ("steps", "batch", "warmup", "checkpoint_every", "log_every", "keep", "seed"),
    SeriesModelConfig: ("width", "layers", "heads", "expansion"),
    SeriesStudyConfig: ("length", "base_steps", "steps", "batch", "samples", "sampling_steps"),
    ImageTrainConfig: ("steps", "batch_size", "warmup", "seed"),
    ImageNetConfig: ("channels", "blocks", "groups", "token_channels", "heads", "fourier"),
    EvaluateConfig: ("images", "batch_size", "probes", "seed"),
}
NUMBERS = {
    TrainConfig: (
        "lr", "eps", "weight_decay", "grad_clip", "action_dropout", "clean_frames", "max_seconds", "betas", "ema_stds",
    ),
    NoiseConfig: ("mean", "std", "context_sigma_max", "context_sigma_min"),
    SamplerConfig: (
        "sigma_min", "sigma_max", "rho", "churn", "churn_min", "churn_noise", "context_sigma", "context_noise", "guidance",
    ),
    ModelConfig: ("sigma_data", "dropout"),
    ClipConfig: ("heldout_fraction",),
    SeriesTrainConfig: ("lr", "final_lr", "weight_decay", "beta2", "clip", "ema", "heldout_fraction"),
    SeriesStudyConfig: ("base_lr", "lr"),
    ImageTrainConfig: ("lr", "clip", "ema"),
    EvaluateConfig: ("tolerance",),
}  # fmt: skip


def refuses(kind, field, value, message=""):
    if field == "betas":
        value = (0.9, value)
    elif field == "ema_stds":
        value = (0.05, value)
    with pytest.raises(ValueError, match=rf"^{field}: must .*{message}") as caught:
        kind(**{field: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in COUNTS.items() for f in fields])
def test_counts_are_integers_in_range(kind, field):
    for value in (-1, -HUGE, HUGE, 2.5, math.nan, math.inf, True, "3"):
        refuses(kind, field, value, "got ")
    refuses(kind, field, HUGE, "got an integer of 401 digits")


@pytest.mark.parametrize(("kind", "field"), [(k, f) for k, fields in NUMBERS.items() for f in fields])
def test_numbers_are_finite(kind, field):
    for value in (
        math.nan,
        math.inf,
        -math.inf,
        HUGE,
        -HUGE,
        1e300,
        "0.1",
        "x" if field in ("max_seconds", "churn") else None,
    ):
        refuses(kind, field, value, "got ")


@pytest.mark.parametrize(
    ("kind", "field", "values"),
    [
        (TrainConfig, "batch_size", (0,)),
        (TrainConfig, "micro_batch", (0, 3)),
        (TrainConfig, "lr", (0.0, -1e-3)),
        (TrainConfig, "eps", (0.0, -1e-8)),
        (TrainConfig, "weight_decay", (-0.1,)),
        (TrainConfig, "grad_clip", (-1.0,)),
        (TrainConfig, "betas", (1.0, -0.1)),
        (TrainConfig, "ema_stds", (0.0, -0.1, 0.3, 0.05)),
        (TrainConfig, "action_dropout", (-0.1, 1.1)),
        (TrainConfig, "max_seconds", (-1.0,)),
        (TrainConfig, "precision", ("fp8",)),
        (NoiseConfig, "std", (-1.0,)),
        (NoiseConfig, "context_sigma_min", (0.0,)),
        (SamplerConfig, "sigma_min", (0.0, -1.0, 81.0)),
        (SamplerConfig, "sigma_max", (-1.0,)),
        (SamplerConfig, "sampling_steps", (2**16 - 1,)),
        (SamplerConfig, "solver", ("rk4",)),
        (SamplerConfig, "rho", (0.0,)),
        (SamplerConfig, "churn_max", (-1.0, math.nan)),
        (ModelConfig, "sigma_data", (0.0, -1.0)),
        (ModelConfig, "dropout", (1.0,)),
        (ClipConfig, "heldout_fraction", (-0.1, 1.1)),
        (ClipConfig, "on_error", ("ignore", None)),
        (ModelConfig, "temporal_mixing", ("none",)),
        (ImageTrainConfig, "basis", ("wavelet",)),
        (SeriesTrainConfig, "beta2", (1.0,)),
        (SeriesTrainConfig, "heldout_fraction", (0.0, 1.0)),
        (SeriesTrainConfig, "final_lr", (1.5,)),
        (ImageTrainConfig, "lr", (0.0,)),
        (ImageTrainConfig, "ema", (0.3,)),
        (EvaluateConfig, "tolerance", (0.0, 1.0)),
    ],
)
def test_numbers_keep_their_rule(kind, field, values):
    for value in values:
        if (kind, field) == (SamplerConfig, "sigma_max"):
            with pytest.raises(ValueError, match=r"^sigma_min: must be in \(0, sigma_max = -1\.0\]"):
                kind(sigma_max=value)
        else:
            refuses(kind, field, value, "got ")


@pytest.mark.parametrize("betas", [(), (0.9,), (0.9, 0.99, 0.999)])
def test_betas_are_two(betas):
    with pytest.raises(ValueError, match=r"^betas: must be 2 numbers"):
        TrainConfig(betas=betas)


def test_noise_levels_stay_in_range():
    """sigma = exp(mean + std n), |n| < 6, and its square are fp32 numbers."""
    NoiseConfig(mean=-20.0, std=3.0)
    for mean, std in ((50.0, 1.0), (-50.0, 1.0), (0.0, 7.0)):
        with pytest.raises(ValueError, match=r"^mean, std: must satisfy \|mean\| \+ 6 std <= 40, got "):
            NoiseConfig(mean=mean, std=std)


def test_the_ends_of_the_ranges_are_taken():
    TrainConfig(
        steps=0, batch_size=1, micro_batch=1, num_workers=0, seed=2**63 - 1, betas=(0.0, 0.0), ema_stds=(), grad_clip=0.0,
        max_seconds=0.0, action_dropout=1.0, lr=1e-30, weight_decay=0.0,
    )  # fmt: skip
    SamplerConfig(sigma_min=1.0, sigma_max=1.0, sampling_steps=1, churn_max=math.inf, guidance=-1.0)
    ClipConfig(heldout_fraction=0.0)
    ClipConfig(heldout_fraction=1.0)
    for preset in PRESETS.values():
        assert dataclasses.replace(preset.train) == preset.train


@pytest.mark.parametrize(
    "option",
    ["--lr=inf", "--lr=nan", "--batch-size=0", "--steps=-1", "--num-workers=-1", f"--seed={HUGE}", "--noise.std=nan"],
)
def test_the_command_line_refuses_them_with_code_2(option, tmp_path, capsys):
    try:
        code = cli.main(["train", "--data=x", f"--run-dir={tmp_path / 'run'}", option])
    except SystemExit as end:
        code = end.code
    assert code == 2
    field = option.lstrip("-").partition("=")[0].rpartition(".")[2].replace("-", "_")
    assert f"{field}: must be" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
