"""Cached inference equals the training pass: prefill its clean half, denoise its noisy half, for every split into chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import clip, compositions, cut, small

TOLERANCE = {"rtol": 0, "atol": 1e-10}


def check(net, frames: int, chunks, seed: int = 0, batch: int = 1) -> None:
    """Run `chunks` of clean frames through the cache, and denoise each next noisy block in between."""
    f = net.config.frames_per_block
    x, sigma, actions = clip(net, batch, frames, 2, seed)
    with torch.no_grad():
        expected = net(x, sigma, actions)
    cache = net.new_cache(batch)
    done = 0

    def denoise_next() -> None:
        if done < frames:
            end = min(done + f, frames)
            noisy = slice(frames + done, frames + end)
            got = net.denoise(x[:, noisy], sigma[:, noisy], cut(actions, done, end), cache)
            torch.testing.assert_close(got, expected[:, noisy], **TOLERANCE)

    denoise_next()
    for n in chunks:
        chunk = slice(done, done + n)
        got = net.prefill(x[:, chunk], sigma[:, chunk], cut(actions, done, done + n), cache)
        torch.testing.assert_close(got, expected[:, chunk], **TOLERANCE)
        done += n
        assert cache.frames == done
        denoise_next()


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_every_split_of_five_frames(mixing):
    net = small(temporal_mixing=mixing)
    for chunks in compositions(5):
        check(net, 5, chunks)


@pytest.mark.parametrize("mixing", ["joint", "gated"])
def test_every_split_into_blocks_of_two(mixing):
    net = small(temporal_mixing=mixing, frames_per_block=2)
    for chunks in compositions(3):
        check(net, 7, [2 * n for n in chunks])  # the seventh frame is a short last block


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (0, 2), (1, 0), (2, 0), (1, 1), (3, 2)])
def test_every_split_under_a_window(window, sink):
    net = small(window=window, sink=sink, temporal_mixing="gated")
    for chunks in [*compositions(4), (7,), (1, 6), (6, 1), (3, 3, 1), (1,) * 7]:
        check(net, 7, chunks)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_configuration(data):
    f = data.draw(st.integers(1, 3), "frames_per_block")
    net = small(
        temporal_mixing=data.draw(st.sampled_from(["joint", "gated"]), "mixing"),
        kernel_frames=data.draw(st.integers(2, 4), "kernel_frames"),
        frames_per_block=f,
        window=data.draw(st.sampled_from([None, 1, 2]), "window"),
        sink=data.draw(st.integers(0, 1), "sink"),
        patch_size=data.draw(st.sampled_from([1, 2]), "patch_size"),
        height=16,
        channel_mult=data.draw(st.sampled_from([(1,), (1, 2)]), "channel_mult"),
        video_attention=(),
        frame_attention=(),
        **data.draw(st.sampled_from([{}, {"num_actions": 0}, {"num_actions": 0, "action_dim": 2}]), "actions"),
    )
    chunks = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3), "chunks")
    frames = f * sum(chunks) + data.draw(st.integers(0, f), "last block")
    check(net, frames, [f * n for n in chunks], seed=data.draw(st.integers(0, 99), "seed"), batch=2)


def test_long_video_past_several_growths_of_the_buffers():
    net = small()
    check(net, 12, (1,) * 12)
    check(net, 12, (2, 9, 1))
