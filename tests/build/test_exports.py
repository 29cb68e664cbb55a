"""What `sae_diffusion` gives a Python user: all of it there, and none of it imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sae_diffusion

ROOT = Path(__file__).parents[2]


def test_every_name_is_there_documented_and_listed():
    for name in sae_diffusion.__all__:
        value = getattr(sae_diffusion, name)
        assert isinstance(value, dict) or value.__doc__, f"{name} has no docstring"
        assert name in dir(sae_diffusion)
    assert set(sae_diffusion.__all__) >= {
        "Denoiser", "ModelConfig", "Trainer", "TrainConfig", "load_denoiser", "generate", "open_dataset", "FrameStats",
    }  # fmt: skip


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="denoiser"):
        sae_diffusion.denoiser  # noqa: B018


def test_import_does_not_import_torch():
    code = "import sys, sae_diffusion; print(sorted({'torch', 'numpy', 'tyro'} & set(sys.modules)))"
    path = f"{ROOT}:{ROOT / 'python'}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    assert done.stdout.strip() == "[]"
