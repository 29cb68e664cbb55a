"""Recording: alignment, ends, seeds, resume, parallel workers, refusals."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sae_toy_env
from sae_diffusion.data import DataError, Timing, collect, open_dataset
from sae_diffusion.data import format as storage

TOY = "sae_toy_env:SaeToy-v0"


def toy(out, episodes=5, **settings):
    timing = {f.name: settings.pop(f.name) for f in dataclasses.fields(Timing) if f.name in settings}
    settings["timing"] = Timing(**timing)
    return collect(TOY, out, **{"episodes": episodes, "size": sae_toy_env.SIZE, "episodes_per_shard": 2, **settings})


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def episodes_of(folder):
    """[(frames, actions, index entry)] in order, through the shards alone."""
    found = []
    for path in sorted(Path(folder).glob("shard-*.npz")):
        shard = storage.Shard(path)
        for number, entry in shard.episodes.items():
            found.append((shard.frames(number, range(entry["frames"])), shard.actions(number), entry))
    return found


@pytest.mark.parametrize(("frame_skip", "hold", "skip_first"), [(1, 1, 0), (2, 8, 0), (2, 2, 4), (3, 6, 3)])
def test_action_t_causes_frame_t_plus_1(tmp_path, frame_skip, hold, skip_first):
    toy(tmp_path, frame_skip=frame_skip, hold=hold, skip_first=skip_first)
    changed = 0
    for frames, actions, _ in episodes_of(tmp_path):
        assert len(actions) == len(frames) - 1
        np.testing.assert_array_equal(frames[1:, 0, 1, 0], actions + 1)
        steps = frames[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(steps[:-1], skip_first + frame_skip * np.arange(len(steps) - 1))
        assert 0 < steps[-1] - steps[-2] <= frame_skip
        for t in range(1, len(actions)):
            if (skip_first + t * frame_skip) % hold:
                assert actions[t] == actions[t - 1]
            changed += actions[t] != actions[t - 1]
    assert changed > 5
    clips = open_dataset(tmp_path, 3, clip_stride=1, on_error="skip")
    for i in range(0, len(clips), 3):
        frames, actions = clips[i].frames, clips[i].actions
        if frames[0, 0, 0, 0] == skip_first:
            assert actions[0] == -1
            actions, frames = actions[1:], frames[1:]
        np.testing.assert_array_equal(frames[:, 0, 1, 0], actions + 1)


def test_continuous_actions_and_shifted_discrete_ones(tmp_path):
    toy(tmp_path / "c", 2, env_kwargs={"space": "continuous"})
    for frames, actions, _ in episodes_of(tmp_path / "c"):
        assert actions.dtype == np.float32 and actions.shape == (len(frames) - 1, 2)
        np.testing.assert_array_equal(frames[1:, 0, 1, :2], np.round((actions + 1) * 100).astype(np.uint8))
    clips = open_dataset(tmp_path / "c", 4)
    assert (clips.num_actions, clips.action_dim) == (0, 2)
    assert np.isnan(clips[0].actions[0]).all() and np.isfinite(clips[0].actions[1:]).all()
    toy(tmp_path / "d", 2, env_kwargs={"start": 7})
    for frames, actions, _ in episodes_of(tmp_path / "d"):
        assert actions.min() >= 0 and actions.max() < 5
        np.testing.assert_array_equal(frames[1:, 0, 1, 0], actions + 1)


@pytest.mark.parametrize(
    ("settings", "last_step", "frames", "end"),
    [
        ({"env_kwargs": {"length": 9}}, 9, 6, "terminated"),  # the last frame comes after one step, not two
        ({"env_kwargs": {"length": 50, "max_episode_steps": 7}}, 7, 5, "truncated"),
        ({"env_kwargs": {"length": 50}, "max_frames": 4}, 6, 4, "max_frames"),
        ({"env_kwargs": {"length": 3}, "skip_first": 6}, 3, 1, "terminated"),
    ],
)
def test_an_episode_ends_with_its_last_frame(tmp_path, settings, last_step, frames, end):
    toy(tmp_path, 2, **settings)
    for video, _, entry in episodes_of(tmp_path):
        assert (int(video[-1, 0, 0, 0]), len(video), entry["end"]) == (last_step, frames, end)
        assert entry["frames"] == frames


def test_long_episodes_cross_chunks(tmp_path):
    toy(tmp_path, 1, frame_skip=1, hold=1, env_kwargs={"length": 2 * storage.FRAMES_PER_CHUNK + 3})
    (frames, _, _), n = episodes_of(tmp_path)[0], 2 * storage.FRAMES_PER_CHUNK + 4
    np.testing.assert_array_equal(frames[:, 0, 0, 0], np.arange(n))


def test_every_interruption_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    """Fail at the 1st, 2nd, ... rename, before or after it, then call again."""
    toy(tmp_path / "whole")
    whole, real = content(tmp_path / "whole"), os.replace
    assert sorted(whole) == ["dataset.json", "shard-00000.npz", "shard-00001.npz", "shard-00002.npz"]
    for before in (True, False):
        for point in range(9):  # dataset.json, five episodes, three shards
            calls = 0

            def failing(source, target, before=before, point=point):
                nonlocal calls
                calls += 1
                if calls != point + 1:
                    return real(source, target)
                if not before:
                    real(source, target)
                raise KeyboardInterrupt

            out = tmp_path / f"{point}{before}"
            monkeypatch.setattr(os, "replace", failing)
            with pytest.raises(KeyboardInterrupt):
                toy(out)
            monkeypatch.setattr(os, "replace", real)
            toy(out)
            assert content(out) == whole, (before, point)


def test_a_killed_process_loses_and_repeats_nothing(tmp_path):
    code = (
        "import os, signal, sys; from sae_diffusion.data.record import collect\n"
        "assert 'torch' not in sys.modules, 'recording workers must start fast'\n"
        "def stop(done, total, frames):\n    if done == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"collect({TOY!r}, {str(tmp_path / 'killed')!r}, episodes=5, size={sae_toy_env.SIZE}, "
        "episodes_per_shard=2, progress=stop)"
    )
    path = os.pathsep.join([str(Path(sae_toy_env.__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == -signal.SIGKILL
    assert sorted(content(tmp_path / "killed")) == [
        "dataset.json", "shard-00000.npz", "staging/episode-00000002.npz"
    ]  # fmt: skip
    (tmp_path / "killed" / "staging" / ".episode-00000003.npz.1.tmp").write_bytes(b"half an episode")
    seen = []
    result = toy(tmp_path / "killed", progress=lambda *a: seen.append(a))
    assert result.recorded == 2 and result.episodes == 5
    assert [s[:2] for s in seen] == [(4, 5), (5, 5)] and seen[-1][2] == result.frames
    toy(tmp_path / "whole")
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_two_workers_and_growth_give_the_same_bytes(tmp_path):
    toy(tmp_path / "one", 7)
    toy(tmp_path / "two", 7, num_workers=2)
    assert content(tmp_path / "two") == content(tmp_path / "one")
    for episodes in (3, 3, 7, 4):
        result = toy(tmp_path / "grown", episodes)
    assert content(tmp_path / "grown") == content(tmp_path / "one")
    assert (result.episodes, result.recorded) == (7, 0)
    toy(tmp_path / "seed", 7, seed=1)
    assert content(tmp_path / "seed").keys() == content(tmp_path / "one").keys()
    assert not np.array_equal(episodes_of(tmp_path / "seed")[0][0][0], episodes_of(tmp_path / "one")[0][0][0])
    firsts = [frames[0].tobytes() for frames, _, _ in episodes_of(tmp_path / "one")]
    assert len(set(firsts)) == 7


@pytest.mark.parametrize(
    ("field", "settings"),
    [("seed", {"seed": 3}), ("size", {"size": (6, 5)}), ("frame_skip", {"frame_skip": 4}), ("policy", {"hold": 4}),
     ("max_frames", {"max_frames": 9}), ("env_kwargs", {"env_kwargs": {"length": 8}})],
)  # fmt: skip
def test_other_settings_are_refused_by_name(tmp_path, field, settings):
    toy(tmp_path, 1)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=rf"with {field}=.*got {field}="):
        toy(tmp_path, 2, **settings)
    assert content(tmp_path) == before


def test_folders_that_are_not_ours_or_in_use_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be empty or hold dataset\.json"):
        toy(tmp_path / "a")
    toy(tmp_path / "b", 1)
    handle = os.open(tmp_path / "b", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(RuntimeError, match="another process"):
        toy(tmp_path / "b", 2)
    os.close(handle)
    shard = tmp_path / "b" / "shard-00000.npz"
    shard.write_bytes(shard.read_bytes()[:-30])
    with pytest.raises(DataError, match="shard-00000"):
        toy(tmp_path / "b", 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_kwargs": {"render": "float"}}, r"uint8 \(Y, X, 3\).*float64 \(12, 10, 3\)"),
        ({"env_kwargs": {"render": "grey"}}, r"got uint8 \(12, 10\)"),
        ({"env_kwargs": {"render": "none"}}, "got NoneType"),
        ({"env_kwargs": {"space": "several"}}, "action space, got MultiBinary"),
        ({"hold": 3}, "multiples of frame_skip = 2"),
        ({"skip_first": 1}, "multiples of frame_skip = 2"),
        ({"episodes": 0}, "episodes: must be at least 1, got 0"),
        ({"size": (0, 4)}, "size: must be"),
        ({"policy": "expert"}, "policy: .*'expert'"),
        ({"policy": lambda *_: 99}, r"policy: must return a member of Discrete\(5\), got 99"),
    ],
)
def test_bad_arguments(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        toy(tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out/*.npz")) and not list(tmp_path.rglob("*.tmp"))


def test_missing_environments_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="NoSuchGame"):
        collect("NoSuchGame-v0", tmp_path / "x", episodes=1)
    if importlib.util.find_spec("ale_py") is None:
        with pytest.raises(ImportError, match="ale_py"):
            collect("ALE/Pong-v5", tmp_path / "x", episodes=1)


def test_own_policies_see_the_observation_and_are_recorded_by_name(tmp_path):
    toy(tmp_path, 1, policy=sae_toy_env.alternate, hold=4, env_kwargs={"length": 20})
    _, actions, _ = episodes_of(tmp_path)[0]
    np.testing.assert_array_equal(actions, [4, 4, 2, 2, 4, 4, 2, 2, 4, 4])
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["policy"] == {"name": "sae_toy_env.alternate", "hold": 4}


def test_lunar_lander(tmp_path):
    for out in ("a", "b"):
        result = collect(
            "LunarLander-v3", tmp_path / out, episodes=2, size=(16, 24), seed=5, timing=Timing(max_frames=12)
        )
        assert (result.episodes, result.frames) == (2, 24)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    clips = open_dataset(tmp_path / "a", 12)
    assert (len(clips), clips.frame_shape, clips.num_actions, clips.fps) == (2, (16, 24, 3), 4, 25)
    frames = clips[0].frames
    assert frames[0].max() > 200 and frames[0].std() > 20 and (frames[0] != frames[-1]).any()
    assert clips[0].actions.shape == (12,) and set(clips[0].actions[1:]) <= {0, 1, 2, 3}


def test_frames_are_averaged_by_area():
    frames = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 3), dtype=np.uint8)
    mean = frames.reshape(2, 3, 4, 4, 2, 3).mean((2, 4))
    # rounded along x and then along y, half each
    assert np.abs(storage.resize_frames(frames, (3, 4)) - mean).max() <= 1
    assert np.abs(storage.resize_frames(frames[..., :2], (3, 4)) - mean[..., :2]).max() <= 1
    assert storage.resize_frames(frames, (5, 3)).shape == (2, 5, 3, 3)
    assert storage.resize_frames(frames, (12, 8)) is frames
