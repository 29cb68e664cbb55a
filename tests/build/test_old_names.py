"""Every old name still works, warns at the line that uses it, and does the same as the new one."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest
import sae_diffusion.model.attention as attention
import torch
import tyro
from sae_diffusion import cli, rollout
from sae_diffusion.demo import DemoConfig
from sae_diffusion.diffusion import sampler
from sae_diffusion.diffusion.config import SamplerConfig
from sae_diffusion.diffusion.forcing import forcing_loss
from sae_diffusion.diffusion.loss import denoising_loss
from sae_diffusion.diffusion.schedules import Staggered
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.settings import read_config
from sae_diffusion.train import TrainConfig

import sae_kernels
from sae_kernels._deprecated import renamed_arguments, renamed_fields


def warns(old: str, new: str):
    return pytest.warns(DeprecationWarning, match=f"^{old}: is now called {new}$")


@functools.lru_cache
def network() -> Denoiser:
    torch.manual_seed(0)
    config = ModelConfig(
        height=8,
        width=8,
        channels=2,
        model_channels=8,
        channel_mult=(1,),
        blocks_per_level=1,
        video_attention=(8,),
        head_dim=8,
    )
    net = Denoiser(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim < 2:
                p.fill_(0.7)  # gains that begin at zero
    return net


def sampled(**options) -> torch.Tensor:
    return sampler.generate(network(), None, None, 2, SamplerConfig(sampling_steps=2), **options)


def test_an_old_argument_is_the_new_one_and_the_warning_names_the_line_that_uses_it():
    @renamed_arguments(before="now")
    def double(now):
        return 2 * now

    with warns("before", "now") as caught:
        assert double(before=3) == double(now=3) == double(3) == 6
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match="before: is the old name of now, got both"):
        double(before=3, now=4)


def test_an_old_field_can_be_given_and_read():
    @renamed_fields(before="now")
    @dataclasses.dataclass(frozen=True)
    class Settings:
        now: int = 1

    with warns("before", "now"):
        settings = Settings(before=3)
    assert settings == Settings(3) and dataclasses.asdict(settings) == {"now": 3}
    with warns("before", "now") as caught:
        assert settings.before == 3
    assert caught[0].filename == __file__


def test_an_old_argument_is_compiled_without_a_break():
    x, layout = torch.ones(1, 2, 3), sae_kernels.FrameLayout(2, 1)
    loss = functools.partial(sae_kernels.edm_loss, x0=x, sigma=torch.ones(1, 2), layout=layout, seed=1)
    compiled = torch.compile(lambda x: loss(raw=x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), loss(x))


def test_attention():
    with warns("FrameAttention", "SpatialAttention"):
        assert attention.FrameAttention is attention.SpatialAttention
    with warns("VideoAttention", "TemporalAttention"):
        assert attention.VideoAttention is attention.TemporalAttention
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        attention.Other  # noqa: B018


def test_raw():
    x, layout = torch.randn(1, 2, 3), sae_kernels.FrameLayout(2, 1)
    loss = functools.partial(
        sae_kernels.edm_loss, x0=torch.randn(1, 2, 3), sigma=torch.ones(1, 2), layout=layout, seed=1
    )
    with warns("raw", "model_output"):
        assert torch.equal(loss(raw=x), loss(x))

    net, x, levels = network(), torch.randn(1, 4, 2, 8, 8), torch.ones(1, 4)
    with warns("raw", "model_output"):
        old = net(x, levels, raw=True)
    assert torch.equal(old, net(x, levels, model_output=True)) and not torch.equal(old, net(x, levels))
    with warns("gives_raw_output", "gives_model_output"):
        assert net.gives_raw_output is net.gives_model_output is True

    for of, arguments, options in (
        (denoising_loss, (net, x[:, :2], None, levels), {"noisy_copies": 1, "seed": 3}),
        (forcing_loss, (net, x, None, levels), {"seed": 3}),
    ):
        with warns("raw", "model_output"):
            old = of(*arguments, raw=False, **options)
        assert torch.equal(old, of(*arguments, model_output=False, **options))


def test_window_frames():
    with warns("window_frames", "in_flight"):
        old = sampled(window_frames=2)
    assert torch.equal(old, sampled(in_flight=2)) and not torch.equal(old, sampled())
    with warns("window_frames", "in_flight"):
        request = sampler.Request(num_frames=2, window_frames=2)
    with warns("window_frames", "in_flight"):
        assert request.window_frames == request.in_flight == 2
    with warns("window_frames", "in_flight"):
        blocks = sampler.iter_frames(network(), None, None, 2, SamplerConfig(sampling_steps=2), window_frames=2)
    assert torch.equal(torch.cat(list(blocks), dim=1), old)
    with warns("generate_window", r"generate\(..., in_flight=...\)"):
        assert torch.equal(sampler.generate_window(network(), None, None, 2, 2, SamplerConfig(sampling_steps=2)), old)
    with warns("check_trained_for_window", "check_independent_levels"):
        sampler.check_trained_for_window({"train_config": {"objective": "forcing"}})
    for arguments in (["--window-frames=4"], ["--window_frames", "4"]):
        with warns(arguments[0].partition("=")[0], "--in-flight"):
            assert cli.parse(["sample", "--run-dir=x", *arguments]).in_flight == 4


def test_windows_of_a_schedule():
    schedule = Staggered(4, window=2)
    with warns("windows", "intervals"):
        old = schedule.windows()
    assert all(torch.equal(a, b) for a, b in zip(old, schedule.intervals(), strict=True))


def test_teacher(tmp_path):
    with warns("objective teacher", "teacher_forcing"):
        assert TrainConfig(objective="teacher") == TrainConfig(objective="teacher_forcing") == TrainConfig()
    for arguments in (["--objective=teacher"], ["--objective", "teacher"]):
        with warns("objective teacher", "teacher_forcing"):
            assert cli.parse(["train", *arguments]).train.objective == "teacher_forcing"
    file = tmp_path / "run.yaml"
    file.write_text("objective: teacher\n")
    with warns("objective teacher", "teacher_forcing"):
        assert read_config(file)[1].train.objective == "teacher_forcing"
    state = json.loads('{"train_config": {"objective": "teacher"}}')
    with pytest.raises(ValueError, match="got a checkpoint with objective 'teacher_forcing'"):
        sampler.check_independent_levels(state)


def test_films(monkeypatch):
    shown = rollout.Rollout(np.zeros((1, 2, 8, 8, 3), np.uint8), None, 0)
    with warns("film", "video"):
        assert np.array_equal(shown.film(), shown.video())
    monkeypatch.setattr(rollout, "videos_from_nothing", lambda *arguments, **options: (arguments, options))
    with warns("films_from_nothing", "videos_from_nothing"):
        assert rollout.films_from_nothing(1, 2, seed=3) == ((1, 2), {"seed": 3})
    assert tyro.cli(DemoConfig, args=["--films", "3"]).videos == 3
