"""The descriptor path of frame_attention's kernels, interpreted: the pointer path's bits, and nothing unseen."""

from __future__ import annotations

import pytest
import torch
from attention_cases import NAMES, compare, launch, make, restride

from sae_kernels import FrameLayout
from sae_kernels.frame_attention import configs
from sae_kernels.frame_attention.configs import AttentionConfig

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the gpu tests run the compiled kernels", allow_module_level=True)

from sae_kernels.frame_attention import triton as kernels

POINTERS, DESCRIPTORS = AttentionConfig(32, 16, 4, 1), AttentionConfig(32, 16, 4, 1, descriptors=True)

# layout, heads, B, D, dtype, strides, noisy_queries_only
CASES = {
    "plain": (FrameLayout(3, 20), (1, 1), 1, 16, torch.float32, "bhsd", False),
    "many heads": (FrameLayout(2, 9), (4, 2), 2, 16, torch.bfloat16, "bshd", False),
    "packed": (FrameLayout(4, 9, noisy_copies=2, noisy_first=True), (2, 1), 1, 16, torch.float16, "packed", False),
    "head dim cut": (FrameLayout(5, 7, window=1, sink=1), (2, 1), 1, 24, torch.bfloat16, "poisoned", False),
    "row slice": (FrameLayout(3, 18, frames_per_block=2), (1, 1), 2, 40, torch.float32, "poisoned", False),
    "noisy queries": (FrameLayout(3, 17, noisy_first=True), (2, 2), 1, 8, torch.float32, "bshd", True),
    "one token": (FrameLayout(1, 1, noisy_copies=0), (1, 1), 1, 20, torch.float32, "bhsd", False),
}


def uses_descriptors(tensors, layout, config=DESCRIPTORS, architecture=0):
    q, k, v, grad = tensors
    plan = kernels.plan_forward(q, k, v, q, q, layout, 1.0, False, architecture, config)
    given = kernels.Gradients(grad, q, k, v, q, q, q, q, k, v)
    plan += kernels.plan_backward(given, layout, 1.0, False, architecture, (None, config, config))
    return [launch.args.get("TMA") for launch in plan if "TMA" in launch.args]


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_through_pointers(case):
    layout, heads, B, D, dtype, strides, noisy = CASES[case]
    tensors = restride(make(layout, heads=heads, B=B, D=D, dtype=dtype, noisy_queries_only=noisy), strides)
    assert uses_descriptors(make(layout, heads=heads, B=B, D=D, dtype=dtype), layout) == [True] * 3
    want, want_lse = launch(kernels, tensors, layout, 0.25, noisy, POINTERS)
    got, lse = launch(kernels, tensors, layout, 0.25, noisy, DESCRIPTORS)
    assert torch.equal(lse, want_lse)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b), name
    compare(got, lse, tensors, layout, 0.25, noisy)


def test_what_no_descriptor_addresses_goes_through_pointers():
    layout = FrameLayout(3, 9)
    q, k, v, grad = make(layout, heads=(2, 2))
    assert uses_descriptors([q, k, v, grad], layout) == [True] * 3
    buffer = torch.empty(q.numel() + 1)
    misaligned = buffer[1:].view(q.shape).copy_(q)
    wide_rows = torch.nn.functional.pad(q, (0, 3))[..., :16]
    expanded = q[:, :1].expand(-1, 2, -1, -1)
    for other in (misaligned, wide_rows, expanded):
        assert uses_descriptors([other, k, v, grad], layout) == [False] * 3
        # The gradient is read by the backward kernels alone.
        assert uses_descriptors([q, k, v, other], layout) == [True, False, False]
        assert launch(kernels, [other, k, v, grad], layout, 0.25, False, DESCRIPTORS)[0][0].isfinite().all()
    for architecture, allowed in ((80, False), (86, False), (89, False), (90, True), (100, True), (120, True)):
        assert uses_descriptors([q, k, v, grad], layout, architecture=architecture) == [allowed] * 3


def test_where_descriptors_are_the_default():
    for architecture in (80, 86, 89, 90, 100, 120):
        for dtype in (torch.float32, torch.bfloat16):
            for direction in configs.ATTENTION_DIRECTIONS:
                config = configs.attention_config(architecture, dtype, 128, 1560, direction)
                wanted = architecture in (90, 100) and dtype == torch.bfloat16 and direction in ("fwd", "dq")
                assert config.descriptors == wanted


def test_sizes_and_strides_pick_no_other_binary():
    seen = set()
    for frames, tokens, B, transposed in ((3, 200, 1, False), (1, 333, 5, True), (21, 1560, 2, True)):
        S = FrameLayout(frames, tokens).sequence_length
        shape = (B, S, 4, 72) if transposed else (B, 4, S, 72)
        q = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        q = q.transpose(1, 2) if transposed else q
        (plan,) = kernels.plan_forward(q, q, q, q, torch.empty(B, 4, S), FrameLayout(frames, tokens), 1.0, False, 90)
        # A descriptor's type is its dtype and its tile.
        tiles = {n: (v.base.dtype, *v.block_shape) for n, v in plan.args.items() if hasattr(v, "block_shape")}
        assert tiles["q_ptr"] == tiles["k_ptr"] == (torch.bfloat16, 1, 1, 128, 128)
        constants = {n: v for n, v in plan.args.items() if n.isupper() and n not in "NUW"}
        seen.add(str((tiles, constants, plan.num_warps, plan.num_stages)))
    assert len(seen) == 1


POISONED = {
    # layout, (stream, block) that is poisoned; several blocks share a tile
    "future clean block": (FrameLayout(6, 5), (0, 4)),
    "first clean block": (FrameLayout(6, 5, window=1), (0, 0)),
    "another copy's block": (FrameLayout(4, 5, noisy_copies=2, noisy_first=True), (1, 2)),
    "behind the window": (FrameLayout(9, 4, window=2), (0, 3)),
    "behind the window, before the sink ends": (FrameLayout(9, 4, window=2, sink=1), (0, 1)),
    "short last block": (FrameLayout(7, 3, frames_per_block=2), (1, 3)),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 3e38])
@pytest.mark.parametrize("case", POISONED)
def test_what_a_row_does_not_see_cannot_reach_it(case, value):
    """q, k, v and grad of one block hold NaN, infinities or large numbers; whatever does not see it keeps its bits.

    A product of a masked tile meets them as 0 * nan, also for rows of the same tile that do see them.
    """
    layout, (stream, block) = POISONED[case]
    tensors = make(layout, dtype=torch.bfloat16)
    want, want_lse = launch(kernels, tensors, layout, 0.25, False, DESCRIPTORS)
    start = ((layout.noisy_start + (stream - 1) * layout.frames) if stream else layout.clean_start) + (
        block * layout.frames_per_block
    )
    tokens = slice(start * layout.tokens_per_frame, (start + layout.block_frames(block)) * layout.tokens_per_frame)
    for tensor in tensors:
        tensor[:, :, tokens] = value
    got, lse = launch(kernels, tensors, layout, 0.25, False, DESCRIPTORS)
    mask = layout.dense_mask()
    spoiled_rows = mask[:, tokens].any(1)
    spoiled_keys = mask[spoiled_rows].any(0)
    assert spoiled_rows.any() and not spoiled_rows.all() and not spoiled_keys.all()
    assert torch.equal(lse[:, :, ~spoiled_rows], want_lse[:, :, ~spoiled_rows])
    for name, a, b in zip(NAMES, got, want, strict=True):
        kept = ~(spoiled_rows if name in ("out", "dq") else spoiled_keys)
        assert torch.equal(a[:, :, kept], b[:, :, kept]), name
    # What does see them shows it.
    assert value == 3e38 or not got[0][:, :, spoiled_rows].isfinite().any()
