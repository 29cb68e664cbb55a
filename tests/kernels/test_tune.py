"""The tuner's choice, its file, and what it says where there is no GPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from sae_kernels import _configs, tune
from sae_kernels._configs import AttentionConfig


def test_picks_the_fastest_that_works():
    times = {
        AttentionConfig(64, 64, 4, 2): 2.0,
        AttentionConfig(128, 64, 8, 2): 1.0,
        AttentionConfig(128, 128, 8, 3): math.inf,
    }
    assert tune.fastest(times, times.__getitem__) == (AttentionConfig(128, 64, 8, 2), 1.0)
    assert tune.fastest(times, lambda config: math.inf) == (None, math.inf)


def test_every_default_is_a_candidate():
    for direction in _configs.ATTENTION_DIRECTIONS:
        tried = set(tune.candidates(direction))
        for architecture in (80, 90, 120):
            for D in tune.HEAD_DIMS:
                for layout in tune.LAYOUTS:
                    assert (
                        _configs.attention_config(architecture, torch.bfloat16, D, layout.tokens_per_frame, direction)
                        in tried
                    )


def test_layouts_fill_both_classes_of_blocks():
    keys = {_configs.attention_key(90, torch.float16, 64, x.tokens_per_frame, "fwd") for x in tune.LAYOUTS}
    assert len(keys) == 2


def test_a_measured_file_is_used(tmp_path, monkeypatch):
    chosen = AttentionConfig(32, 128, 4, 4)
    names = ("architecture", "dtype", "width", "small_blocks", "direction")
    key = _configs.attention_key(90, torch.bfloat16, 128, 1560, "fwd")
    path = tmp_path / "configs.json"
    path.write_text(json.dumps({"frame_attention": [dict(zip(names, key, strict=True)) | {"config": asdict(chosen)}]}))
    default = _configs.attention_config(90, torch.bfloat16, 128, 1560, "fwd")
    monkeypatch.setenv("SAE_KERNELS_CONFIGS", str(path))
    _configs._measured.cache_clear()
    try:
        assert _configs.attention_config(90, torch.bfloat16, 128, 1560, "fwd") == chosen != default
        assert _configs.attention_config(90, torch.bfloat16, 100, 1560, "fwd") == chosen
        for other in (
            (90, torch.bfloat16, 128, 16, "fwd"),
            (80, torch.bfloat16, 128, 1560, "fwd"),
            (90, torch.float16, 128, 1560, "fwd"),
        ):
            assert _configs.attention_config(*other) != chosen
    finally:
        _configs._measured.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert tune.main(["--output", str(tmp_path / "configs.json")]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
