"""FrameLayout against the contract's sentences, written out pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout

layouts = st.builds(
    FrameLayout,
    frames=st.integers(1, 7),
    tokens_per_frame=st.integers(1, 3),
    frames_per_block=st.integers(1, 4),
    noisy_copies=st.integers(0, 3),
    noisy_first=st.booleans(),
    window=st.none() | st.integers(0, 4),
    sink=st.integers(0, 3),
)


def sees(layout: FrameLayout, q: int, k: int) -> bool:
    """One query token and one key token, from the definition."""

    def place(token):
        frame = token // layout.tokens_per_frame
        stream, frame = divmod(frame, layout.frames)
        if layout.noisy_first:
            kind = "clean" if stream == layout.noisy_copies else stream
        else:
            kind = "clean" if stream == 0 else stream - 1
        return kind, frame // layout.frames_per_block

    (q_kind, i), (k_kind, j) = place(q), place(k)
    if q_kind == "clean":
        allowed = k_kind == "clean" and j <= i
    else:
        allowed = (k_kind == "clean" and j < i) or (k_kind == q_kind and j == i)
    if allowed and i != j and layout.window is not None:
        allowed = j >= i - layout.window or j < layout.sink
    return allowed


@given(layouts)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_dense_mask_is_the_definition(layout):
    mask = layout.dense_mask()
    S = layout.sequence_length
    expected = torch.tensor([[sees(layout, q, k) for k in range(S)] for q in range(S)])
    assert torch.equal(mask, expected)
    assert layout.attended_pairs == int(expected.sum())


def test_mask_mod_drives_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout = FrameLayout(5, 20, frames_per_block=2, noisy_copies=2, window=1, sink=1)
    S = layout.sequence_length
    q, k, v = (torch.randn(1, 2, S, 16) for _ in range(3))
    block_mask = create_block_mask(layout.mask_mod(), None, None, S, S, device="cpu")
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.dense_mask())
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=block_mask), expected)


def test_split_gives_views_of_frames_and_tokens():
    for noisy_first in (False, True):
        layout = FrameLayout(3, 4, noisy_copies=2, noisy_first=noisy_first)
        frames = torch.arange(layout.total_frames)
        clean, noisy = layout.split(frames, 0)
        assert clean.tolist() == ([6, 7, 8] if noisy_first else [0, 1, 2])
        assert noisy.tolist() == ([0, 1, 2, 3, 4, 5] if noisy_first else [3, 4, 5, 6, 7, 8])
        tokens = torch.arange(layout.sequence_length)
        clean, noisy = layout.split(tokens, -1)
        assert clean.numel() == 12 and noisy.numel() == 24
        assert clean.data_ptr() in (tokens.data_ptr(), tokens[24:].data_ptr())


def test_counts():
    layout = FrameLayout(21, 1560)
    assert (layout.streams, layout.total_frames, layout.sequence_length) == (2, 42, 65520)
    assert layout.attended_pairs == 21 * 22 * 1560**2
    chunks = FrameLayout(21, 1560, frames_per_block=3)
    assert chunks.num_blocks == 7
    assert chunks.attended_pairs == 7 * 8 * 4680**2
    short = FrameLayout(7, 2, frames_per_block=3)
    assert short.num_blocks == 3 and [short.block_frames(b) for b in range(3)] == [3, 3, 1]


def test_layout_is_hashable_and_frozen():
    assert len({FrameLayout(3, 4), FrameLayout(3, 4), FrameLayout(3, 4, sink=1)}) == 2
    with pytest.raises(AttributeError):
        FrameLayout(3, 4).frames = 5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 0), ("frames", 2.0), ("frames", True), ("tokens_per_frame", 0), ("frames_per_block", 0),
        ("noisy_copies", -1), ("noisy_first", 1), ("window", -1), ("window", 1.5), ("sink", -1), ("sink", None),
    ],
)  # fmt: skip
def test_invalid_field_names_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: must be .*{value!r}"):
        FrameLayout(**{"frames": 4, "tokens_per_frame": 4, field: value})


def test_split_names_what_came():
    with pytest.raises(ValueError, match="dimension 0 must be total_frames = 8 or sequence_length = 32, got 9"):
        FrameLayout(4, 4).split(torch.zeros(9), 0)
