"""`sae data check`: what is good, what is not and why, and the exit code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sae_diffusion import cli
from sae_diffusion.data.check import check_data


@pytest.fixture
def folder(tmp_path):
    """good.npz, two clips of 5 frames with 3 actions, and a bad file for each reason."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 5, 4, 6, 3), np.uint8)
    np.savez(tmp_path / "good.npz", frames=frames, actions=np.zeros((2, 4), np.int64))
    np.savez(tmp_path / "other-size.npz", frames=frames[0, :, :2], actions=np.zeros(4, np.int64))
    np.savez(tmp_path / "no-actions.npz", frames=frames[0])
    np.savez(tmp_path / "short.npz", frames=frames[0, :2], actions=np.zeros(1, np.int64))
    np.savez(tmp_path / "wrong-rows.npz", frames=frames[0], actions=np.zeros(2, np.int64))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-40])
    return tmp_path


def test_each_source_is_good_or_has_a_reason(folder):
    found = {source.source.removeprefix(f"{folder}/"): source for source in check_data(folder, clip_length=3)}
    assert list(found) == [
        "good.npz, clip 0",
        "good.npz, clip 1",
        "no-actions.npz",
        "other-size.npz",
        "short.npz",
        "torn.npz",
        "wrong-rows.npz",
    ]
    for n in (0, 1):
        source = found[f"good.npz, clip {n}"]
        assert source.ok and (source.frames, source.shape, source.dtype) == (5, (4, 6, 3), "uint8")
        assert source.actions == "discrete actions" and str(source) == "5 frames 4x6x3 uint8, discrete actions"
    for name, reason in (
        ("no-actions.npz", "has no actions, "), ("other-size.npz", "frames are (2, 6, 3), those of"),
        ("short.npz", "must have at least 3 frames, got 2"), ("torn.npz", "unreadable npz"),
        ("wrong-rows.npz", "5 frames must have 4 rows of actions"),
    ):  # fmt: skip
        assert not found[name].ok and found[name].reason.startswith(reason) and str(found[name]) == found[name].reason


def test_size_and_stride_are_those_of_the_clips(folder):
    sized = {source.source.rpartition("/")[2]: source for source in check_data(folder, size=(4, 4))}
    assert sized["other-size.npz"].ok and sized["short.npz"].ok and not sized["no-actions.npz"].ok
    strided = list(check_data(folder / "good.npz", clip_length=3, frame_stride=3))
    assert [source.reason for source in strided] == ["must have at least 7 frames, got 5"] * 2


def test_latents_are_read_to_the_end(tmp_path):
    frames = np.zeros((300, 2, 2, 4), np.float32)
    frames[299, 1, 1, 3] = np.nan
    np.savez(tmp_path / "a.npz", frames=frames[:299])
    np.savez(tmp_path / "b.npz", frames=frames)
    first, second = check_data(tmp_path)
    assert first.ok and second.reason == "frames range(256, 300) hold NaN or infinity" and second.frames == 300


def test_the_command_says_it_with_its_exit_code(folder, capsys):
    assert cli.main(["data", "check", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"ok  {folder}/good.npz, clip 0: 5 frames 4x6x3 uint8, discrete actions"
    assert lines[2].startswith(f"bad {folder}/no-actions.npz: has no actions")
    assert lines[-1] == f"{folder}: 3 good sources of 12 frames, 4 bad"
    assert cli.main(["data", "check", str(folder / "good.npz")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{folder}/good.npz: 2 good sources of 10 frames, 0 bad"
    assert cli.main(["data", "check", str(folder), "--json", "--clip-length", "3"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["good"], found["bad"], found["frames"], len(found["sources"])) == (2, 5, 10, 7)
    assert found["sources"][0] == {
        "ok": True, "source": f"{folder}/good.npz, clip 0", "reason": None, "frames": 5, "shape": [4, 6, 3],
        "dtype": "uint8", "actions": "discrete actions",
    }  # fmt: skip


def test_what_cannot_be_looked_through(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], "none: does not exist"),
        ([str(tmp_path)], "has neither dataset.json, nor videos, nor npz files"),
        ([str(tmp_path), "--clip-length=0"], "clip_length: must be at least 1, got 0"),
    ):
        assert cli.main(["data", "check", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["data", "chek", str(tmp_path)]) == 2
    assert "task: must be check, got 'chek'" in capsys.readouterr().err
