"""Every implementation of every op gives the numbers of contiguous tensors, whatever the strides of what it is given."""

from __future__ import annotations

import pytest
import torch
from attention_cases import compare

from sae_kernels import FrameLayout, frame_attention
from sae_kernels.testing import STRIDES, strided

# Several groups of blocks, so that composed has parts with and without a mask; the interpreter gets fewer tokens.
LAYOUTS = {"reference": FrameLayout(3, 70), "composed": FrameLayout(3, 70), "triton": FrameLayout(3, 4)}


def attention_inputs(layout, strides, name):
    """q, k, v and grad_out, the named one (or all) with these strides."""
    shapes = {"q": (1, 4), "k": (1, 2), "v": (1, 2), "grad_out": (1, 4)}
    return [
        strided(
            (*shape, layout.sequence_length, 8), strides if name in (x, "all") else "contiguous", torch.float32, seed
        )
        for seed, (x, shape) in enumerate(shapes.items())
    ]


CASES = [(name, strides) for name in ("q", "k", "v", "grad_out", "all") for strides in STRIDES[1:]]
CASES.remove(("all", "expanded everywhere"))  # every gradient of q and k is a sum that cancels


@pytest.mark.parametrize("impl", LAYOUTS)
@pytest.mark.parametrize(("name", "strides"), CASES)
def test_frame_attention(impl, name, strides):
    layout = LAYOUTS[impl]
    tensors = attention_inputs(layout, strides, name)
    inputs = [x.detach().requires_grad_() for x in tensors[:3]]
    out, lse = frame_attention(*inputs, layout, return_lse=True, impl=impl)
    results = [out, *torch.autograd.grad(out, inputs, tensors[3])]
    compare([x.detach() for x in results], lse, [x.contiguous() for x in tensors], layout, 8**-0.5, False)
