"""Hypothesis draws of layouts."""

from __future__ import annotations

from hypothesis import strategies as st

from sae_kernels import FrameLayout


def layouts(most_frames: int, tokens: int, blocks: int) -> st.SearchStrategy[FrameLayout]:
    """Layouts up to these numbers of frames, tokens per frame and frames per block.

    Half of the draws have a window and a sink, and most of these frames enough that blocks lie between the two: drawn
    each by itself, hardly any do.
    """

    def build(kind, window, sink, frames, tokens_per_frame, frames_per_block, noisy_copies, noisy_first):
        if kind == "both":
            frames = min(most_frames, (window + sink + 1) * frames_per_block + frames)
            # One token that sees itself alone has gradients that cancel to zero: no bound is relative to that.
            tokens_per_frame = max(2, tokens_per_frame)
        window = None if kind == "neither" else window
        sink = sink if kind == "both" else 0
        return FrameLayout(frames, tokens_per_frame, frames_per_block, noisy_copies, noisy_first, window, sink)

    return st.builds(
        build,
        st.sampled_from(("neither", "both", "window", "both")),
        window=st.integers(0, 3),
        sink=st.integers(1, 2),
        frames=st.integers(1, most_frames),
        tokens_per_frame=st.integers(1, tokens),
        frames_per_block=st.integers(1, blocks),
        noisy_copies=st.integers(0, 3),
        noisy_first=st.booleans(),
    )
