"""The tuner's choice, its file, and what it says where there is no GPU."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from sae_kernels import tune
from sae_kernels.causal_conv3d import configs as convolution
from sae_kernels.causal_conv3d.configs import ConvConfig
from sae_kernels.frame_attention import configs as attention
from sae_kernels.frame_attention.configs import AttentionConfig


def test_picks_the_fastest_that_works():
    times = {
        AttentionConfig(64, 64, 4, 2): 2.0,
        AttentionConfig(128, 64, 8, 2): 1.0,
        AttentionConfig(128, 128, 8, 3): math.inf,
    }
    assert tune.fastest(times, times.__getitem__) == (AttentionConfig(128, 64, 8, 2), 1.0)
    assert tune.fastest(times, lambda config: math.inf) == (None, math.inf)


def test_every_default_is_a_candidate():
    for direction, architecture in itertools.product(attention.ATTENTION_DIRECTIONS, (80, 90, 120)):
        tried = set(tune.candidates(direction, architecture))
        for D, layout in itertools.product(tune.HEAD_DIMS, tune.LAYOUTS):
            block = layout.tokens_per_frame
            assert attention.attention_config(architecture, torch.bfloat16, D, block, direction) in tried
        both = architecture >= 90 and direction != "delta"
        assert {config.descriptors for config in tried} == ({False, True} if both else {False})


def test_layouts_fill_both_classes_of_blocks():
    keys = {attention.attention_key(90, torch.float16, 64, x.tokens_per_frame, "fwd") for x in tune.LAYOUTS}
    assert len(keys) == 2


def test_a_measured_file_is_used(tmp_path, monkeypatch):
    chosen = AttentionConfig(32, 128, 4, 4)
    key = attention.attention_key(90, torch.bfloat16, 128, 1560, "fwd")
    path = tmp_path / "configs.json"
    path.write_text(
        json.dumps(
            {"frame_attention": [dict(zip(attention.ATTENTION_KEY, key, strict=True)) | {"config": asdict(chosen)}]}
        )
    )
    default = attention.attention_config(90, torch.bfloat16, 128, 1560, "fwd")
    monkeypatch.setenv("SAE_KERNELS_CONFIGS", str(path))
    attention._measured.cache_clear()
    try:
        assert attention.attention_config(90, torch.bfloat16, 128, 1560, "fwd") == chosen != default
        assert attention.attention_config(90, torch.bfloat16, 100, 1560, "fwd") == chosen
        for other in (
            (90, torch.bfloat16, 128, 16, "fwd"),
            (80, torch.bfloat16, 128, 1560, "fwd"),
            (90, torch.float16, 128, 1560, "fwd"),
        ):
            assert attention.attention_config(*other) != chosen
    finally:
        attention._measured.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "configs.json")]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def measured_file(tmp_path, monkeypatch):
    """write(tables): makes a file of them the measured one."""
    caches = (convolution._measured, convolution.conv_config, convolution.conv_slower)

    def write(**tables):
        path = tmp_path / "configs.json"
        path.write_text(json.dumps(tables))
        monkeypatch.setenv("SAE_KERNELS_CONFIGS", str(path))
        for cache in caches:
            cache.cache_clear()

    yield write
    for cache in caches:
        cache.cache_clear()


def test_every_default_of_the_convolution_is_a_candidate_and_others_fit():
    for architecture in (80, 90, 120):
        for (_, size, C), direction in itertools.product(tune.CONVOLUTIONS, convolution.CONV_DIRECTIONS):
            default = convolution.conv_config(architecture, torch.bfloat16, C, C, size * size, direction)
            tried = tune.conv_candidates(default, direction, architecture)
            assert tried[0] == default and 8 < len(set(tried)) < 150
            if direction != "streams":
                assert {c.boxes for c in tried} == ({False, True} if architecture >= 90 else {False})


def test_convolutions_fill_classes_of_maps_and_widths():
    keys = {convolution.conv_key(90, torch.float16, C, C, size * size) for _, size, C in tune.CONVOLUTIONS}
    assert len(keys) == len(tune.CONVOLUTIONS)
    assert {key[-1] for key in keys} == {0, 1, 3}


def test_a_measured_convolution_is_used(measured_file):
    chosen = ConvConfig(64, 128, 32, 4, 3, True, 2)
    entry = dict(zip(convolution.CONV_KEY, convolution.conv_key(90, torch.bfloat16, 256, 384, 64), strict=True))
    measured_file(causal_conv3d=[entry | {"direction": "fwd", "config": asdict(chosen)}])
    assert convolution.conv_config(90, torch.bfloat16, 256, 384, 64, "fwd") == chosen
    assert convolution.conv_config(90, torch.bfloat16, 512, 128, 36, "fwd") == chosen
    for other in (
        (80, torch.bfloat16, 256, 384, 64, "fwd"),
        (90, torch.float16, 256, 384, 64, "fwd"),
        (90, torch.bfloat16, 64, 384, 64, "fwd"),
        (90, torch.bfloat16, 256, 384, 65, "fwd"),
        (90, torch.bfloat16, 256, 384, 64, "dgrad"),
    ):
        assert convolution.conv_config(*other) != chosen


def test_auto_leaves_a_convolution_that_was_measured_slower_to_the_library(measured_file, monkeypatch):
    from sae_kernels.causal_conv3d import ops

    entry = dict(zip(convolution.CONV_KEY, convolution.conv_key(90, torch.bfloat16, 64, 128, 64), strict=True))
    measured_file(causal_conv3d_slower=[entry | {"composed_over_triton": 0.8}])
    monkeypatch.setattr(ops._launch, "architecture", lambda device: 90)
    monkeypatch.setattr(ops._launch, "why_not", lambda device: None)
    weight = torch.empty(128, 64, 3, 3, 3, device="meta")
    for pixels, dtype, name in (
        (8, torch.bfloat16, "composed"),
        (9, torch.bfloat16, "triton"),
        (8, torch.half, "triton"),
    ):
        x = torch.empty(1, 64, 2, 8, pixels, dtype=dtype, device="meta")
        assert ops._backend("auto", x, weight).__name__.endswith(name)
        assert ops._backend("triton", x, weight).__name__.endswith("triton")
    _, why_not = ops.implementations(torch.device("cuda"), torch.bfloat16)
    reason = "slower than composed, which auto uses, for: bfloat16 64 to 128 channels, 8 x 8 pixels (0.80x)"
    assert reason in why_not["triton by itself"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the command measures the compiled kernels")
def test_the_convolution_is_tuned_and_its_table_read_again(measured_file, monkeypatch):
    """The whole run in the interpreter, with ever shorter times; a configuration that gives other numbers never wins."""
    from sae_kernels.causal_conv3d.triton import plan

    other, wrong = ConvConfig(64, 16, 16, 4, 1), ConvConfig(32, 16, 16, 4, 1)
    monkeypatch.setattr(tune, "conv_candidates", lambda default, direction, architecture: [default, other, wrong])
    make = plan._convolution

    def faulty(job, architecture, config=None):
        if config == wrong:
            job = replace(job, first_frame=job.first_frame + 1)
        return make(job, architecture, config)

    monkeypatch.setattr(plan, "_convolution", faulty)
    times = itertools.count(100, -1)
    entries, slower = tune.tune_convolution(
        [(1, 2, 8)], [torch.float32], lambda line: None, architecture=0, device="cpu",
        median=lambda launch: float(next(times)), frames=2,
    )  # fmt: skip
    chosen = {entry["direction"]: ConvConfig(**entry["config"]) for entry in entries}
    assert set(chosen) == set(convolution.CONV_DIRECTIONS)
    assert chosen == {d: wrong if d in ("wgrad", "streams") else other for d in convolution.CONV_DIRECTIONS}
    assert all(entry["milliseconds"] < entry["default_milliseconds"] for entry in entries)
    assert slower == []
    measured_file(causal_conv3d=[entry | {"architecture": 90} for entry in entries])
    assert convolution.conv_config(90, torch.float32, 8, 8, 4, "dgrad") == other
