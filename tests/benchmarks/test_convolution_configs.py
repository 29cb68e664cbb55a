"""The benchmark's contenders that change the kernels' configurations change them while they run, and only then."""

from __future__ import annotations

import pytest
import torch

from benchmarks import convolution
from sae_kernels.causal_conv3d import configs


def test_configurations_are_changed_during_the_call():
    shape = (90, torch.bfloat16, 256, 256, 16)
    before = {d: configs.conv_config(*shape, d) for d in configs.CONV_DIRECTIONS}

    def call(failing):
        during = {d: configs.conv_config(*shape, d) for d in configs.CONV_DIRECTIONS}
        if failing:
            raise RuntimeError
        return during

    changed = convolution._with_configs(call, boxes=False, parts=0)
    during = changed(False)
    for direction in ("fwd", "dgrad", "dgrad_dot"):
        assert before[direction].boxes and before[direction].parts
        assert not during[direction].boxes and not during[direction].parts
    assert during["wgrad"] == before["wgrad"]
    with pytest.raises(RuntimeError):
        changed(True)
    assert before == {d: configs.conv_config(*shape, d) for d in configs.CONV_DIRECTIONS}
