"""The C++ kernels of frame_attention on the CPU, against the reference in fp64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import STRIDES, compare, make, restride
from attention_layouts import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout, _extension, frame_attention
from sae_kernels.frame_attention import ops

if _extension.library("cpu") is not None:
    pytest.skip(str(_extension.library("cpu")), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Blocks of less than, as much as and more than a tile of 64 rows or 128 keys; streams that tiles do not divide; short
# last blocks; every kind of window; more keys than a task holds scores of.
LAYOUTS = [
    FrameLayout(1, 1),
    FrameLayout(9, 1, noisy_first=True),
    FrameLayout(40, 1, frames_per_block=4, noisy_first=True),
    FrameLayout(17, 3, noisy_copies=2, noisy_first=True),
    FrameLayout(16, 16),
    FrameLayout(5, 16, noisy_copies=0),
    FrameLayout(3, 49, noisy_copies=3),
    FrameLayout(5, 64, noisy_first=True),
    FrameLayout(4, 100, noisy_copies=2),
    FrameLayout(3, 130),
    FrameLayout(2, 300, noisy_first=True),
    FrameLayout(7, 6, frames_per_block=3, noisy_copies=2, noisy_first=True),
    FrameLayout(8, 4, frames_per_block=5),
    FrameLayout(13, 3, window=0),
    FrameLayout(9, 9, window=0, sink=1),
    FrameLayout(9, 40, noisy_copies=2, window=2, sink=1),
    FrameLayout(30, 16, noisy_first=True, window=3, sink=2),
    FrameLayout(12, 30, window=100),
    FrameLayout(13, 3, frames_per_block=2, window=1, sink=5),
]


def attend(tensors, layout, scale=0.25, noisy_queries_only=False):
    """([out, dq, dk, dv], lse)"""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    options = {"scale": scale, "noisy_queries_only": noisy_queries_only, "return_lse": True, "impl": "cpp"}
    out, lse = frame_attention(*inputs, layout, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)], lse


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda i: str(LAYOUTS[i]))
def test_forward_and_gradients(index, dtype):
    layout, turn = LAYOUTS[index], index + DTYPES.index(dtype)
    heads, D = ((1, 1), (2, 1), (4, 2), (3, 3))[turn % 4], (16, 64, 40, 8, 72)[turn % 5]
    noisy = turn % 3 == 0 and layout.noisy_copies > 0
    tensors = make(layout, heads=heads, D=D, B=1 + turn % 2, dtype=dtype, noisy_queries_only=noisy)
    tensors = restride(tensors, STRIDES[turn % len(STRIDES)])
    compare(*attend(tensors, layout, 0.125, noisy), tensors, layout, 0.125, noisy)


@given(
    layout=layouts(12, tokens=40, blocks=5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    D=st.sampled_from([1, 5, 8, 16, 24, 33]),
    B=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(STRIDES),
    noisy_queries_only=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_layout(layout, heads, D, B, dtype, strides, noisy_queries_only, seed):
    noisy = noisy_queries_only and layout.noisy_copies > 0
    tensors = make(layout, heads=heads, D=D, B=B, dtype=dtype, noisy_queries_only=noisy, seed=seed)
    tensors = restride(tensors, strides)
    compare(*attend(tensors, layout, 0.25, noisy), tensors, layout, 0.25, noisy)


def test_it_is_what_auto_takes_on_the_cpu():
    device = torch.device("cpu")
    assert ops.implementations(device)[0][:2] == ["cpp", "composed"]
    available, why_not = ops.implementations(device, torch.float64)
    assert available[0] == "composed" and "float64 is for composed" in why_not["cpp"]
    q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot run 'cpp' on cpu: it computes in float32; float64 is for composed"):
        frame_attention(q, q, q, FrameLayout(1, 1), impl="cpp")


@pytest.mark.parametrize("scale", [0.0, -0.25, 3.0])
def test_any_scale(scale):
    layout = FrameLayout(5, 13, noisy_copies=2)
    tensors = make(layout, heads=(2, 2))
    compare(*attend(tensors, layout, scale), tensors, layout, scale, False)


@pytest.mark.parametrize(
    "layout",
    [FrameLayout(16, 16), FrameLayout(9, 49, noisy_copies=2, window=2, sink=1), FrameLayout(70, 3, noisy_first=True)],
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_threads(layout):
    tensors = make(layout, heads=(4, 2), B=2, D=24)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(attend(tensors, layout))
    finally:
        torch.set_num_threads(threads)
    (want, want_lse), *others = results
    for got, lse in others:
        assert torch.equal(lse, want_lse)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_bits_do_not_depend_on_the_batch():
    layout = FrameLayout(4, 33, noisy_copies=2)
    tensors = make(layout, heads=(4, 2), B=3)
    whole, _ = attend(tensors, layout)
    for got, want in zip(attend([x[1:2] for x in tensors], layout)[0], whole, strict=True):
        assert torch.equal(got, want[1:2])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("tokens", [6, 40])
def test_what_a_row_does_not_see_cannot_reach_it(tokens, stream, value):
    """q, k, v and grad of one block hold what spoils sums: what does not see it keeps its bits."""
    layout = FrameLayout(12, tokens, frames_per_block=2, noisy_copies=2, window=2, sink=1, noisy_first=True)
    tensors = make(layout, heads=(4, 2))
    want, want_lse = attend(tensors, layout)
    start = ((layout.noisy_start if stream else layout.clean_start) + 6) * tokens
    block = slice(start, start + 2 * tokens)
    for tensor in tensors:
        tensor[:, :, block] = value
    got, lse = attend(tensors, layout)
    mask = layout.dense_mask()
    spoiled_rows = mask[:, block].any(1)
    spoiled_keys = mask[spoiled_rows].any(0)
    assert torch.equal(lse[:, :, ~spoiled_rows], want_lse[:, :, ~spoiled_rows])
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        kept = ~(spoiled_rows if name in ("out", "dq") else spoiled_keys)
        assert kept.any() and torch.equal(a[:, :, kept], b[:, :, kept]), name
    assert value == 3e38 or not got[0][:, :, spoiled_rows].isfinite().any()


def test_scores_of_minus_infinity_weigh_nothing():
    """Also where a row's first keys, more than a task holds scores of, have no other."""
    layout = FrameLayout(2, 300, noisy_copies=0)
    q, k, v, _ = make(layout)
    q = q.abs()
    k[:, :, :300] = float("-inf")
    out, lse = frame_attention(q, k, v, layout, return_lse=True, impl="cpp")
    assert not out[:, :, :300].isfinite().any()
    want = torch.nn.functional.scaled_dot_product_attention(*(x[:, :, 300:] for x in (q, k, v)))
    torch.testing.assert_close(out[:, :, 300:], want)
    assert lse[:, :, 300:].isfinite().all()


def test_empty_batch():
    layout = FrameLayout(3, 5)
    tensors = make(layout, B=0)
    got, lse = attend(tensors, layout)
    assert lse.shape == (0, 1, 30) and [x.shape for x in got] == [x.shape for x in (tensors[0], *tensors[:3])]
    clean = FrameLayout(3, 5, noisy_copies=0)
    got, _ = attend(make(clean, noisy_queries_only=True), clean, noisy_queries_only=True)
    assert got[0].shape == (1, 1, 0, 16) and not got[2].any()


def test_native_op_refuses_what_it_cannot_read():
    layout = FrameLayout(3, 5)
    q, k, v, _ = make(layout)
    out, lse = torch.empty_like(q), q.new_empty(1, 1, 30)
    geometry = (15, 5, 1, False, -1, 0, 0.25, False)
    native = torch.ops.sae_kernels_native.frame_attention_fwd
    for arguments, message in (
        ((q[:, :, 1:], k, v, out, lse), r"q: must have shape \(1, 1, 30, 16\)"),
        ((q, k.repeat(1, 2, 1, 1), v, out, lse), "Hkv a divisor of Hq"),
        ((q, k, v.mT.contiguous().mT, out, lse), "v: must have a contiguous last dimension, got stride 30"),
        ((q, k.bfloat16(), v, out, lse), "k: must have the dtype of q"),
        ((q, k, v, out, lse[:, :, ::2]), "lse: must be"),
        ((q.double(), k, v, out, lse), "q: dtype must be float32, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native(*arguments, *geometry)


LESSER = """
import torch, sys
sys.path.insert(0, "tests/kernels")
import test_frame_attention_cpp as t
for index in range(3, len(t.LAYOUTS), 5):
    t.test_forward_and_gradients(index, torch.float32)
print("same")
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets_keep_the_budget(capability):
    root = Path(__file__).parents[2]
    environment = os.environ | {"SAE_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", LESSER], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-3000:]
