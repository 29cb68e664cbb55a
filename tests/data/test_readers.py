"""Readers: windows and action alignment against a plain reading, damage, side files, splits, processes."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import shutil
import tempfile
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import sae_toy_env
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_diffusion.data import Clip, DataError, Timing, collate, collect, open_dataset
from sae_diffusion.data.dataset import is_heldout

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """A test draws the same numbers in any order of tests."""
    global RNG
    RNG = np.random.default_rng(0)


def video(frames=20, size=(6, 8), channels=3):
    return RNG.integers(0, 256, (frames, *size, channels), dtype=np.uint8)


def write_video(path, frames=40, size=(48, 64), key_every=8, codec="libx264"):
    """Moving squares with B-frames and a key frame now and then; returns every decoded frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.options = {"g": str(key_every), "bf": "2", "preset": "ultrafast"}
        for t in range(frames):
            image = np.full((*size, 3), (t * 6) % 256, np.uint8)
            image[t % 30 : t % 30 + 12, t : t + 12] = (255, 40, t * 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([image.to_ndarray(format="rgb24") for image in container.decode(video=0)])


@functools.cache
def recorded() -> Path:
    """Five toy episodes in three shards, made once per process."""
    root = Path(tempfile.mkdtemp()) / "recorded"
    collect("sae_toy_env:SaeToy-v0", root, episodes=5, size=sae_toy_env.SIZE, episodes_per_shard=2, timing=Timing(1, 1))
    return root


def all_clips(dataset):
    return [dataset[i] for i in range(len(dataset))]


def same(a, b):
    return all(
        np.array_equal(x.frames, y.frames) and np.array_equal(x.actions, y.actions) for x, y in zip(a, b, strict=True)
    )


# ---- windows and actions ----


@given(
    lengths=st.lists(st.integers(1, 23), min_size=1, max_size=4),
    clip=st.integers(1, 6),
    stride=st.integers(1, 4),
    step=st.none() | st.integers(1, 9),
    kind=st.sampled_from(["none", "discrete", "continuous"]),
    extra=st.booleans(),
    compressed=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_clip_is_the_plain_slice_of_its_episode(lengths, clip, stride, step, kind, extra, compressed):
    span = (clip - 1) * stride + 1
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for n, length in enumerate(lengths):
            frames = np.zeros((length, 1, 2, 3), np.uint8)
            frames[:, 0, 0, 0], frames[:, 0, 1, 2] = np.arange(length), n
            rows = np.arange(length - 1 + extra) + 100 * n
            arrays = {"frames": frames}
            if kind == "discrete":
                arrays["actions"] = rows
            elif kind == "continuous":
                arrays["actions"] = np.stack([rows, -rows], 1).astype(np.float64)
            (np.savez_compressed if compressed else np.savez)(f"{folder}/{n}.npz", **arrays)
            for start in range(0, length - span + 1, step or span):
                causes = [100 * n + t - stride if t >= stride else None for t in range(start, start + span, stride)]
                expected.append((n, list(range(start, start + span, stride)), causes))
        if not expected:
            with pytest.raises(DataError, match=r"must have at least \d+ frames"):
                open_dataset(folder, clip, frame_stride=stride, clip_stride=step)
            return
        clips = open_dataset(folder, clip, frame_stride=stride, clip_stride=step, on_error="skip")
        assert len(clips.skipped) == sum(length < span for length in lengths)
        assert len(clips) == len(expected)
        for got, (n, indices, causes) in zip(all_clips(clips), expected, strict=True):
            np.testing.assert_array_equal(got.frames[:, 0, 0, 0], indices)
            assert (got.frames[:, 0, 1, 2] == n).all() and f"{n}.npz" in got.source
            if kind == "none":
                assert got.actions is None
            elif kind == "discrete":
                assert got.actions.dtype == np.int64
                assert got.actions.tolist() == [-1 if c is None else c for c in causes]
            else:
                assert got.actions.dtype == np.float32
                wanted = [[np.nan] * 2 if c is None else [c, -c] for c in causes]
                np.testing.assert_array_equal(got.actions, np.array(wanted, np.float32))


def test_index_bounds():
    clips = open_dataset(recorded(), 4)
    assert np.array_equal(clips[-1].frames, clips[len(clips) - 1].frames)
    for index in (len(clips), -len(clips) - 1):
        with pytest.raises(IndexError, match=str(index)):
            clips[index]


def test_several_clips_in_one_npz(tmp_path):
    frames, actions = RNG.integers(0, 256, (3, 7, 4, 5, 1), dtype=np.uint8), RNG.integers(0, 4, (3, 6))
    actions[1, 2] = 8
    np.savez(tmp_path / "a.npz", frames=np.asfortranarray(frames), actions=actions)
    for path in (tmp_path, tmp_path / "a.npz"):
        clips = open_dataset(path, 7)
        assert (len(clips), clips.frame_shape, clips.num_actions) == (3, (4, 5, 1), 9)
        for n, clip in enumerate(all_clips(clips)):
            np.testing.assert_array_equal(clip.frames, frames[n])
            np.testing.assert_array_equal(clip.actions, [-1, *actions[n]])


def test_latents(tmp_path):
    for name, dtype in (("a", np.float16), ("b", np.float64)):
        latents = RNG.normal(size=(6, 3, 3, 8)).astype(dtype)
        np.savez(tmp_path / f"{name}.npz", frames=latents)
    clips = open_dataset(tmp_path, 6)
    assert clips.is_latent and clips.frame_shape == (3, 3, 8) and clips[1].frames.dtype == np.float32
    np.testing.assert_array_equal(clips[1].frames, latents.astype(np.float32))
    with pytest.raises(DataError, match="is for images only"):
        open_dataset(tmp_path, 6, size=(2, 2))
    latents[4, 1, 1, 1] = np.nan
    np.savez(tmp_path / "b.npz", frames=latents)
    with pytest.raises(DataError, match=r"b\.npz.*NaN"):
        open_dataset(tmp_path, 6)[1]
    assert open_dataset(tmp_path, 4)[1] is not None


# ---- what cannot be used ----


def outcome(folder, clip, on_error):
    """(clips, skipped) or the error, of opening and reading everything."""
    try:
        dataset = open_dataset(folder, clip, on_error=on_error)
        return all_clips(dataset), dataset.skipped
    except DataError as error:
        return error, []


def damaged_or_same(folder, good, clip):
    """A damaged copy gives an error naming its file, or exactly the good data."""
    got, _ = outcome(folder, clip, "raise")
    assert str(folder) in got.source if isinstance(got, DataError) else same(got, good)
    got, skipped = outcome(folder, clip, "skip")
    if isinstance(got, DataError):
        assert "nothing to read" in got.reason
        return
    known = {(c.frames.tobytes(), c.actions.tobytes()) for c in good}
    assert all((c.frames.tobytes(), c.actions.tobytes()) in known for c in got)
    assert len(got) == len(good) or skipped


@pytest.mark.parametrize("container", ["recorded", "npz"])
def test_no_damage_is_silent(container, tmp_path):
    """A byte changed or the end cut off, at 60 places all over the file."""
    if container == "recorded":
        shutil.copytree(recorded(), tmp_path, dirs_exist_ok=True)
        file = tmp_path / "shard-00001.npz"
    else:
        file = tmp_path / "a.npz"
        # beyond 4096 bytes: zipfile reads less at once and so checks it whatever the reader does
        np.savez(file, frames=video(9, (24, 24)), actions=RNG.integers(0, 4, 8))
        np.savez(tmp_path / "b.npz", frames=video(9, (24, 24)), actions=RNG.integers(0, 4, 8))
    good, data = all_clips(open_dataset(tmp_path, 4)), file.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of names that a changed byte made twins
        for place in np.linspace(0, len(data) - 1, 60).astype(int):
            changed = bytearray(data)
            changed[place] ^= 0x55
            file.write_bytes(changed)
            damaged_or_same(tmp_path, good, 4)
        for place in np.linspace(0, len(data) - 1, 10).astype(int):
            file.write_bytes(data[:place])
            with pytest.raises(DataError, match=file.name):
                open_dataset(tmp_path, 4)
            damaged_or_same(tmp_path, good, 4)


def test_a_damaged_chunk_names_the_episode_and_is_skipped_alone(tmp_path):
    shutil.copytree(recorded(), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "shard-00000.npz"
    data = bytearray(file.read_bytes())
    data[400] ^= 1  # inside the first episode's first chunk of frames
    file.write_bytes(data)
    clips = open_dataset(tmp_path, 4)
    with pytest.raises(DataError, match=r"shard-00000\.npz, episode 0"):
        clips[0]
    clips = open_dataset(tmp_path, 4, on_error="skip")
    assert len(clips.skipped) == 1 and "episode 0" in clips.skipped[0][0] and len(clips.episodes) == 4
    all_clips(clips)


def test_short_clips_raise_or_are_listed(tmp_path):
    for name, frames in (("a", 9), ("b", 5), ("c", 12)):
        np.savez(tmp_path / f"{name}.npz", frames=video(frames))
    with pytest.raises(DataError, match=r"b\.npz: must have at least 8 frames, got 5"):
        open_dataset(tmp_path, 8)
    clips = open_dataset(tmp_path, 8, on_error="skip")
    assert [Path(s).name for s, _ in clips.skipped] == ["b.npz"] and len(clips) == 2
    with pytest.raises(DataError, match=r"nothing to read: 3 usable.*3 skipped"):
        open_dataset(tmp_path, 40, on_error="skip")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": video(9, (6, 9))}, r"frames are \(6, 9, 3\), those of .*a\.npz are \(6, 8, 3\); give a size"),
        ({"frames": np.zeros((9, 6, 8, 3), np.float32)}, "frames are float32, those of"),
        ({"frames": np.zeros((9, 6, 8, 3), np.int32)}, "uint8 or floats, got int32"),
        ({"frames": np.zeros((9, 6, 8), np.uint8)}, r"got \(9, 6, 8\)"),
        ({"frames": np.zeros((0, 6, 8, 3), np.uint8)}, r"got \(0, 6, 8, 3\)"),
        ({"video": video(9)}, r"must hold an array `frames`, got .*video"),
        ({"frames": np.array([None, {}], object)}, "uint8 or floats, got object"),
        ({"frames": video(9), "actions": np.array([{}] * 8, object)}, "unreadable npz.*allow_pickle"),
        ({"frames": video(9), "actions": None}, r"has no actions, .*a\.npz has discrete actions"),
        ({"frames": video(9), "actions": np.zeros((8, 2))}, "has continuous actions of 2 numbers"),
        ({"frames": video(9), "actions": np.zeros(7, int)}, r"9 frames must have 8 rows of actions .* or 9 .*, got 7"),
        ({"frames": video(9), "actions": np.full(8, -1)}, "-1 to -1"),
        ({"frames": video(9), "actions": np.zeros((8, 2), int)}, r"one integer or A floats per row.*\(8, 2\)"),
        ({"frames": video(9), "actions": np.zeros(8, bool)}, "got bool"),
        ({"frames": video(9), "actions": np.full((8, 1), np.inf)}, "action 0 is NaN or infinite"),
        ({"frames": video(9)[None], "actions": np.zeros((2, 8), int)}, r"for frames .*, got \(2, 8\)"),
    ],
)
def test_wrong_files_are_named_or_skipped(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", frames=video(9), actions=np.zeros(8, int))
    np.savez(tmp_path / "b.npz", **{k: v for k, v in {"actions": np.zeros(8, int), **arrays}.items() if v is not None})
    with pytest.raises(DataError, match=rf"(?s)b\.npz.*{message}"):
        open_dataset(tmp_path, 9)
    clips = open_dataset(tmp_path, 9, on_error="skip")
    assert len(clips) == 1 and "b.npz" in clips.skipped[0][0]


def test_a_size_brings_different_shapes_together(tmp_path):
    big = video(5, (8, 12))
    np.savez(tmp_path / "a.npz", frames=big)
    np.savez(tmp_path / "b.npz", frames=video(5, (4, 6)))
    clips = open_dataset(tmp_path, 5, size=(4, 6))
    assert clips.frame_shape == (4, 6, 3)
    mean = big.reshape(5, 4, 2, 6, 2, 3).mean((2, 4))
    assert np.abs(clips[0].frames - mean).max() <= 1  # rounded along x, then along y


def test_wrong_paths_and_arguments(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nowhere", 4)
    with pytest.raises(DataError, match="neither"):
        open_dataset(tmp_path, 4)
    np.savez(tmp_path / "a.npz", frames=video())
    (tmp_path / "b.mp4").write_bytes(b"")
    with pytest.raises(DataError, match="both"):
        open_dataset(tmp_path, 4)
    for wrong in (
        {"on_error": "ignore"}, {"split": "test"}, {"heldout_fraction": 2}, {"size": (4,)}, {"frame_stride": 0},
        {"clip_stride": 0}, {"clip_length": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            open_dataset(**{"path": recorded(), "clip_length": 4, **wrong})
    (tmp_path / "c").mkdir()
    for text in ("{", "[]", '{"format": "sae-episodes", "version": 2}'):
        (tmp_path / "c" / "dataset.json").write_text(text)
        with pytest.raises(DataError, match=r"dataset\.json: must be a description"):
            open_dataset(tmp_path / "c", 4)
    shutil.copy(recorded() / "dataset.json", tmp_path / "c" / "dataset.json")
    with pytest.raises(DataError, match="must hold a complete shard"):
        open_dataset(tmp_path / "c", 4)


# ---- video ----


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_video_clips_equal_a_full_decode(tmp_path, codec):
    whole = {f"{n}.mp4": write_video(tmp_path / f"{n}.mp4", frames, codec=codec) for n, frames in ((0, 40), (1, 19))}
    for stride in (1, 3):
        clips = open_dataset(tmp_path, 4, frame_stride=stride, clip_stride=1)
        assert len(clips) == 59 - 2 * 3 * stride and clips.frame_shape == (48, 64, 3)
        for i in RNG.permutation(len(clips)):
            episode, indices = clips.locate(int(i))
            assert np.array_equal(clips[i].frames, whole[Path(episode.source).name][list(indices)]), i


def test_a_late_clip_does_not_decode_the_start(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 60, key_every=6)
    clips, decoded = open_dataset(tmp_path, 2, clip_stride=1), []
    real = av.open

    class Counting:
        def __init__(self, container):
            self.container, self.streams, self.seek = container, container.streams, container.seek

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.container.close()

        def decode(self, stream):
            for image in self.container.decode(stream):
                decoded.append(image.pts)
                yield image

    monkeypatch.setattr(av, "open", lambda *a, **k: Counting(real(*a, **k)))
    clips[50]
    assert 2 <= len(decoded) <= 2 + 6


def test_broken_videos(tmp_path):
    write_video(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    fast = tmp_path / "fast.mkv"
    write_video(fast)
    # `moov` in front, so that a cut file still opens
    with (
        av.open(str(tmp_path / "a.mp4")) as source,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    front = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "front.mp4").write_bytes(front[: len(front) * 2 // 3])
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    with pytest.raises(DataError, match=r"cut\.mp4: unreadable video"):
        open_dataset(tmp_path, 4)
    clips = open_dataset(tmp_path, 4, on_error="skip")
    assert sorted(Path(s).name for s, _ in clips.skipped) == ["cut.mp4", "empty.mp4", "front.mp4", "text.mp4"]
    assert sorted(Path(e.source).name for e in clips.episodes) == ["a.mp4", "fast.mkv"]


def test_decoders_leave_no_threads_for_a_fork_to_trip_over(tmp_path):
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("counts threads in /proc")
    write_video(tmp_path / "a.mp4")
    (tmp_path / "a.actions.npy").write_bytes(b"")
    before = len(list(tasks.iterdir()))
    with pytest.raises(DataError) as held:
        open_dataset(tmp_path, 4)
    (tmp_path / "a.actions.npy").unlink()
    clips = open_dataset(tmp_path, 4)
    write_video(tmp_path / "a.mp4", 10)
    with pytest.raises(DataError, match="has changed since") as held_too:
        clips[len(clips) - 1]
    assert held.traceback and held_too.traceback and len(list(tasks.iterdir())) == before


def side(path, kind, rows):
    if kind == "npy":
        np.save(path.with_suffix(".actions.npy"), rows)
    elif kind == "json":
        path.with_suffix(".actions.json").write_text(json.dumps(rows.tolist()))
    elif kind == "json object":
        path.with_suffix(".actions.json").write_text(json.dumps({"actions": rows.tolist()}))
    else:
        lines = [",".join(map(str, np.atleast_1d(row))) for row in rows]
        header = "action\n" if rows.ndim == 1 else "x,y\n"
        path.with_suffix(".actions.csv").write_text(header * (kind == "csv header") + "\n".join(lines) + "\n\n")


@pytest.mark.parametrize("kind", ["npy", "json", "json object", "csv", "csv header"])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("continuous", [False, True])
def test_side_files(tmp_path, kind, extra, continuous):
    write_video(tmp_path / "sub" / "a.mp4", 6)
    rows = RNG.normal(size=(5 + extra, 2)) if continuous else np.array([3, 0, 2, 1, 3, 9][: 5 + extra])
    side(tmp_path / "sub" / "a.mp4", kind, rows)
    clips = open_dataset(tmp_path, 6)
    if continuous:
        assert (clips.num_actions, clips.action_dim) == (0, 2)
        np.testing.assert_array_equal(clips[0].actions[1:], rows[:5].astype(np.float32))
    else:
        assert (clips.num_actions, clips.action_dim) == (4, 0)
        np.testing.assert_array_equal(clips[0].actions, [-1, 3, 0, 2, 1, 3])
    rows[2] = rows[0]
    side(tmp_path / "sub" / "a.mp4", kind, rows)
    assert open_dataset(tmp_path, 6).fingerprint() != clips.fingerprint()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("csv", "1\n2\n", "6 frames must have 5 rows of actions .*, got 2"),
        ("csv", "1,2\n3\n1,1\n2,2\n3,3\n", "row 1 must hold 2 numbers"),
        ("csv", "1\n2\nleft\n3\n4\n", "row 2 must hold 1 numbers, got 'left'"),
        ("csv", "", "got 0"),
        ("json", "[1, 2", "unreadable actions"),
        ("json", "[[1, 2], [3], [4], [5], [6]]", "unreadable actions"),
        ("json", '["a", "b", "c", "d", "e"]', "integers or floats"),
        ("json", "[true, true, false, true, true]", "got bool"),
        ("npy", "not numpy", "unreadable actions"),
    ],
)
def test_bad_side_files(tmp_path, name, text, message):
    write_video(tmp_path / "a.mp4", 6)
    (tmp_path / f"a.actions.{name}").write_text(text)
    with pytest.raises(DataError, match=rf"a\.actions\.{name}.*{message}"):
        open_dataset(tmp_path, 6)


def test_two_side_files_or_a_missing_one(tmp_path):
    write_video(tmp_path / "a.mp4", 6)
    write_video(tmp_path / "b.mp4", 6)
    side(tmp_path / "a.mp4", "npy", np.zeros(5, int))
    with pytest.raises(DataError, match=r"b\.mp4: has no actions, .*a\.mp4 has discrete"):
        open_dataset(tmp_path, 6)
    side(tmp_path / "a.mp4", "csv", np.zeros(5, int))
    with pytest.raises(DataError, match=r"a\.mp4: must have one file of actions"):
        open_dataset(tmp_path, 6)


# ---- splits, identity, processes ----


def test_splits_are_disjoint_complete_and_stay(tmp_path):
    def names(split, fraction=0.3):
        clips = open_dataset(tmp_path, 2, split=split, heldout_fraction=fraction)
        return {Path(e.source).name for e in clips.episodes}

    for n in range(0, 40, 2):
        np.savez(tmp_path / f"{n:02d}.npz", frames=video(2, (2, 2)))
    train, held = names("train"), names("heldout")
    assert train and held and not train & held and train | held == names("all")
    for n in range(1, 40, 2):
        np.savez(tmp_path / f"{n:02d}.npz", frames=video(2, (2, 2)))
    assert train < names("train") and held < names("heldout")
    with pytest.raises(DataError, match="0 of them in split 'heldout'"):
        names("heldout", 0.0)


@given(fraction=st.floats(0, 1))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_share_of_held_out_episodes(fraction):
    drawn = [is_heldout(f"episode/{n}", fraction) for n in range(1000)]
    assert abs(np.mean(drawn) - fraction) < 5 * np.sqrt(0.25 / 1000)
    assert all(is_heldout(f"episode/{n}", min(1, fraction * 1.5)) for n in range(1000) if drawn[n])


def test_recorded_identity_survives_moving_and_growing(tmp_path):
    settings = {"size": sae_toy_env.SIZE, "timing": Timing(1, 1)}
    collect("sae_toy_env:SaeToy-v0", tmp_path / "x", episodes=9, episodes_per_shard=4, **settings)
    old = {e.identity: e.stamp for e in open_dataset(recorded(), 4).episodes}
    new = {e.identity: e.stamp for e in open_dataset(tmp_path / "x", 4).episodes}
    assert len(new) == 9 and old.items() <= new.items()


def test_fingerprint(tmp_path):
    frames, actions = video(9), RNG.integers(0, 4, 8)

    def fingerprint(folder, frames=frames, actions=actions, name="a"):
        folder.mkdir()
        np.savez(folder / f"{name}.npz", frames=frames, actions=actions)
        return open_dataset(folder, 4).fingerprint()

    changed = frames.copy()
    changed[3, 2, 1, 0] ^= 1
    first = fingerprint(tmp_path / "0")
    assert fingerprint(tmp_path / "1") == first
    assert len({first, fingerprint(tmp_path / "2", changed), fingerprint(tmp_path / "3", actions=actions[::-1]),
                fingerprint(tmp_path / "4", name="b")}) == 4  # fmt: skip
    assert open_dataset(recorded(), 4).fingerprint() == open_dataset(recorded(), 9, clip_stride=3).fingerprint()


@pytest.mark.parametrize("kind", ["recorded", "npz", "compressed", "video"])
def test_in_loader_processes_and_after_pickling(tmp_path, kind):
    path = tmp_path
    if kind == "recorded":
        path = recorded()
    elif kind == "video":
        write_video(tmp_path / "a.mp4", 30)
    else:
        save = np.savez if kind == "npz" else np.savez_compressed
        for n in range(3):
            save(tmp_path / f"{n}.npz", frames=video(12), actions=RNG.integers(0, 4, 11))
    clips = open_dataset(path, 4, clip_stride=3)
    here = all_clips(clips)  # leaves the files open, as the worst case for a fork
    copy = pickle.loads(pickle.dumps(clips))  # how a spawned loader process is given them; no file holds it
    assert same(all_clips(copy), here) and copy.fingerprint() == clips.fingerprint()
    loader = torch.utils.data.DataLoader(
        clips, batch_size=2, num_workers=2, collate_fn=collate, multiprocessing_context="fork"
    )
    frames = torch.cat([batch[0] for batch in loader])
    np.testing.assert_array_equal(frames.numpy(), np.stack([clip.frames for clip in here]))


# ---- files that change while they are open ----


def write_content(kind, folder, seed):
    """The file whose clips are read; its size does not depend on the seed where the format allows that."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    if kind == "video":
        path = folder / "a.mp4"
        write_video(path, 30, size=(48, 64 if seed == 0 else 80))
    elif kind == "recorded":
        shutil.rmtree(folder)
        collect(
            "sae_toy_env:SaeToy-v0", folder, episodes=3, size=sae_toy_env.SIZE, episodes_per_shard=4,
            timing=Timing(1, 1), seed=seed,
        )  # fmt: skip
        path = folder / "shard-00000.npz"
    else:
        path = folder / "a.npz"
        save = np.savez if kind == "npz" else np.savez_compressed
        save(path, frames=rng.integers(0, 256, (3, 12, 6, 8, 3), dtype=np.uint8), actions=rng.integers(0, 4, (3, 11)))
    return path


def cut_short(path, other):
    os.truncate(path, path.stat().st_size // 3)


def empty(path, other):
    os.truncate(path, 0)


def overwrite(path, other):
    with open(path, "r+b") as file:
        file.write(other.read_bytes())
        file.truncate()


def put_in_place(path, other):
    shutil.copy(other, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def remove(path, other):
    path.unlink()


@pytest.mark.parametrize("change", [cut_short, empty, overwrite, put_in_place, remove], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["recorded", "npz", "compressed", "video"])
def test_a_file_that_changes_under_a_reader_is_named_at_the_next_read(tmp_path, kind, change):
    path = write_content(kind, tmp_path / "data", 0)
    other = write_content(kind, tmp_path / "other", 1)
    clips = open_dataset(tmp_path / "data", 4)
    fresh = pickle.loads(pickle.dumps(clips))  # as in a loader's process: nothing is open yet
    for i in range(len(clips)):
        clips[i]
    change(path, other)
    for data in (clips, fresh):
        for i in (0, len(clips) - 1):
            with pytest.raises(
                DataError, match=rf"{path.name}.*(has changed since it was opened|can no longer be opened)"
            ):
                data[i]


@pytest.mark.parametrize("kind", ["recorded", "npz", "compressed", "video"])
def test_the_same_content_under_another_time_passes(tmp_path, kind):
    path = write_content(kind, tmp_path / "data", 0)
    shutil.copy(path, tmp_path / "copy")
    clips = open_dataset(tmp_path / "data", 4)
    before = all_clips(clips)
    os.utime(path, ns=(1, 1))
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(all_clips(clips), before, strict=True))
    put_in_place(path, tmp_path / "copy")
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(all_clips(clips), before, strict=True))


def test_a_folder_that_grows_goes_on_being_read(tmp_path):
    settings = {"size": sae_toy_env.SIZE, "timing": Timing(1, 1), "episodes_per_shard": 4}
    collect("sae_toy_env:SaeToy-v0", tmp_path, episodes=2, **settings)
    clips = open_dataset(tmp_path, 2)
    fresh, before = pickle.loads(pickle.dumps(clips)), all_clips(clips)
    collect("sae_toy_env:SaeToy-v0", tmp_path, episodes=6, **settings)
    for data in (clips, fresh):
        assert same(all_clips(data), before)


def test_large_stored_arrays_are_read_by_the_clip(tmp_path):
    """Every stride and both memory orders, from clips that begin anywhere; latents of each float type."""
    for dtype in ("u1", "<f2", "<f8", ">f4"):
        frames = RNG.integers(0, 200, (2, 9, 3, 2, 2)).astype(dtype)
        for name, array in (("c", frames), ("f", np.asfortranarray(frames))):
            np.savez(tmp_path / f"{name}.npz", frames=array)
            for stride in (1, 2, 4):
                for clip in all_clips(open_dataset(tmp_path / f"{name}.npz", 3, frame_stride=stride, clip_stride=1)):
                    n, start = (int(x) for x in re.search(r"clip (\d), frame (\d)", clip.source).groups())
                    np.testing.assert_array_equal(clip.frames, frames[n, start : start + 2 * stride + 1 : stride])


def test_the_number_of_clips(tmp_path):
    """floor((length - span) / stride) + 1 of each episode, span = (clip - 1) * frame stride + 1."""
    for name, length in (("a", 11), ("b", 5), ("c", 4)):
        np.savez(tmp_path / f"{name}.npz", frames=video(length, (2, 2)))
    for clip, frame_stride, clip_stride, expected in [
        (4, 1, None, 2 + 1 + 1), (4, 1, 1, 8 + 2 + 1), (4, 1, 3, 3 + 1 + 1), (2, 3, 1, 8 + 2 + 1), (1, 1, None, 20),
        (2, 3, None, 2 + 1 + 1), (1, 5, 4, 3 + 2 + 1),
    ]:  # fmt: skip
        clips = open_dataset(tmp_path, clip, frame_stride=frame_stride, clip_stride=clip_stride)
        assert len(clips) == expected and len(all_clips(clips)) == expected


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5, 0.9])
def test_the_held_out_fraction_is_the_one_asked_for(tmp_path, fraction):
    """Of 400 episodes, within 4 standard deviations, which for 0.1 excludes half and double of it."""
    np.savez(tmp_path / "a.npz", frames=np.zeros((400, 2, 1, 1, 1), np.uint8))
    for split, share in (("heldout", fraction), ("train", 1 - fraction), ("all", 1.0)):
        found = len(open_dataset(tmp_path, 2, split=split, heldout_fraction=fraction).episodes)
        assert abs(found / 400 - share) <= 4 * (fraction * (1 - fraction) / 400) ** 0.5
    default = len(open_dataset(tmp_path, 2, split="heldout").episodes)
    assert default == len(open_dataset(tmp_path, 2, split="heldout", heldout_fraction=0.1).episodes)


def test_collate():
    def clip(actions):
        return Clip(video(3), actions, "here")

    frames, actions = collate([clip(np.arange(3)), clip(np.arange(3) + 5)])
    assert frames.shape == (2, 3, 6, 8, 3) and frames.dtype == torch.uint8
    assert actions.dtype == torch.int64 and actions.tolist() == [[0, 1, 2], [5, 6, 7]]
    assert collate([clip(None)])[1] is None
    assert collate([clip(np.ones((3, 2), np.float32))])[1].shape == (1, 3, 2)
    with pytest.raises(ValueError, match="1 of 2"):
        collate([clip(None), clip(np.arange(3))])


@pytest.mark.parametrize("many", [False, True])
def test_channels_first_and_pixels_as_floats_are_refused_by_name(tmp_path, many):
    """Neither is taken for a picture of 3 rows, nor for latents; what is alike and legitimate is read."""
    frames = RNG.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)

    def opened(array):
        np.savez(tmp_path / "x.npz", frames=np.stack([array, array]) if many else array)
        return open_dataset(tmp_path / "x.npz", 2)

    with pytest.raises(DataError, match=r"channels last, \(T, Y, X, C\), got what looks like \(T, C, Y, X\)"):
        opened(np.moveaxis(frames, -1, -3))
    for pixels in (frames.astype(np.float32), frames.astype(np.float64) * 0.7):
        with pytest.raises(
            DataError, match=r"float frames must be latents, got values from 0 to .* like those of pixels"
        ):
            opened(np.maximum(pixels - pixels.min(), 0))
    assert opened(frames).frame_shape == (16, 16, 3) and opened(frames[:, :3, :4]).frame_shape == (3, 4, 3)
    latents = RNG.standard_normal((6, 4, 4, 8)).astype(np.float32) * 20
    assert opened(latents).is_latent and opened(np.abs(latents) / 100).is_latent
    # Where others can be read, it is skipped and named.
    np.savez(tmp_path / "y.npz", frames=np.moveaxis(frames, -1, -3))
    opened(frames)
    skipped = open_dataset(tmp_path, 2, on_error="skip").skipped
    assert len(skipped) == 1 and skipped[0][0].endswith("y.npz") and "channels last" in skipped[0][1]
