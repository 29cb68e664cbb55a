"""Parameter counts of the presets, from lists of their layers that were not made by the network's code."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from sae_diffusion.diffusion.config import SamplerConfig
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.presets import MODELS, PRESETS
from sae_diffusion.settings import read_run_settings, write_config

# (in, out): count of 3x3 causal convolutions, from the published shape list of the LunarLander network (finest level
# first: first and last convolution, down, encoder, bottleneck, up, decoder).
LUNAR_CONVS = {
    (5, 64): 1, (64, 4): 1,
    # 32x32: 6 encoder, 4 second decoder convolutions; up; first decoder convolutions
    (64, 64): 6 + 4 + 2, (192, 64): 1, (128, 64): 3,
    # 16x16, 8x8 and the ups and downs of 128 channels
    (128, 128): 2 + (6 + 4 + 2) + (2 + 6 + 4) + 2, (256, 128): 3 + 3, (192, 128): 1, (384, 128): 1,
    # 4x4: up to 8x8, encoder, two bottleneck blocks, decoder
    (256, 256): 2 + 6 + 4 + 4, (512, 256): 3, (384, 256): 1,
}  # fmt: skip
LUNAR_SKIPS = [(64, 128), (128, 256), (192, 64), *[(128, 64)] * 3, (192, 128), *[(256, 128)] * 3, (384, 128),
               *[(256, 128)] * 3, (384, 256), *[(512, 256)] * 3]  # fmt: skip
LUNAR_BLOCKS = [64] * 3 + [64] + [128] * 3 + [128] + [128] * 3 + [128] + [256] * 3  # encoder, with the downs
LUNAR_BLOCKS += [256] * 2 + [256] * 4 + [256] + [128] * 4 + [128] + [128] * 4 + [128] + [64] * 4

CS_CONVS = {
    (9, 128): 1, (128, 8): 1,
    (128, 128): 4 + 3 + 2, (384, 128): 1, (256, 128): 2,
    (256, 256): 2 + (4 + 3) + 2, (768, 256): 1, (512, 256): 1, (384, 256): 1,
    (512, 512): 2 + (4 + 3) + 2 + 2 + (4 + 4 + 3), (1024, 512): 2 + 3, (768, 512): 1,
}  # fmt: skip
CS_SKIPS = [(128, 256), (256, 512), (384, 128), *[(256, 128)] * 2, (768, 256), (512, 256), (384, 256),
            *[(1024, 512)] * 2, (768, 512), *[(1024, 512)] * 3]  # fmt: skip
CS_BLOCKS = [128] * 2 + [128] + [256] * 2 + [256] + [512] * 2 + [512] + [512] * 2
CS_BLOCKS += [512] * 2 + [512] * 3 + [512] + [512] * 3 + [512] + [256] * 3 + [256] + [128] * 3


def expected(convs, skips, blocks, attention_channels, fourier, emb, actions, gate):
    count = sum(n * (27 * i * o + gate) for (i, o), n in convs.items())
    count += sum(i * o for i, o in skips)
    count += sum(4 * c * c for c in attention_channels)  # qkv and proj
    count += emb * (fourier + actions)
    count += sum(emb * c + 1 for c in blocks)  # each with its gain
    return count + 1  # output gain


def parameters(name: str) -> int:
    with torch.device("meta"):
        return Denoiser(MODELS[name]).num_parameters()


def test_lunar_lander_has_the_published_count():
    assert sum(LUNAR_CONVS.values()) == 74
    # 7 attentions at 8x8, 8 at 4x4, one of them in the bottleneck
    want = expected(LUNAR_CONVS, LUNAR_SKIPS, LUNAR_BLOCKS, [128] * 7 + [256] * 8, 64, 256, 4, gate=0)
    assert parameters("lunar-lander") == want
    assert math.isclose(want, 68.4e6, rel_tol=1e-3)


def test_counter_strike_has_the_published_count():
    assert sum(CS_CONVS.values()) == 58
    # 6 video attentions at 4x4, 5 frame attentions at 8x8; five numbers for each gate
    want = expected(CS_CONVS, CS_SKIPS, CS_BLOCKS, [512] * 11, 128, 512, 0, gate=5)
    assert parameters("counter-strike") == want
    assert math.isclose(want, 310e6, rel_tol=1e-3)


def test_tiny_is_small():
    assert 0.5e6 < parameters("tiny") < 4e6


@pytest.mark.parametrize("name", MODELS)
def test_presets_can_be_rebuilt_from_json(name):
    assert ModelConfig(**json.loads(json.dumps(dataclasses.asdict(MODELS[name])))) == MODELS[name]


def test_run_files_of_earlier_versions_are_read(tmp_path):
    """Written when the steps had another name, churn was a number and there were two solvers."""
    old = (
        '{"clips": {"frame_stride": 2, "clip_stride": null, "heldout_fraction": 0.1, "on_error": "skip"}, "sampler": '
        '{"steps": 7, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "churn": 0.0, "churn_min": 0.0, '
        '"churn_max": Infinity, "churn_noise": 1.0, "solver": "euler", "context_sigma": 0.05, "context_noise": 0.0, '
        '"guidance": 1.5, "guidance_kind": "context"}}'
    )
    (tmp_path / "run.json").write_text(old, encoding="utf-8")
    clips, sampler = read_run_settings(tmp_path)
    assert clips.frame_stride == 2
    assert sampler == SamplerConfig(sampling_steps=7, solver="euler", guidance=1.5, churn=0.0)
    preset = dataclasses.replace(PRESETS["tiny"], sampler=SamplerConfig(solver="stochastic-heun"))
    write_config(tmp_path / "config.yaml", "tiny", preset)
    assert read_run_settings(tmp_path) == (preset.clips, preset.sampler)
