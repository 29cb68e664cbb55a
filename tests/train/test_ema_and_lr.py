from __future__ import annotations

import errno
import math
import re
import shutil

import numpy as np
import pytest
import torch
from sae_diffusion import disk
from sae_diffusion.train.ema import (
    PowerEMA,
    Snapshot,
    decay,
    gamma_from_std,
    list_snapshots,
    posthoc_coefficients,
    reconstruct,
    std_from_gamma,
)
from sae_diffusion.train.lr import power_law_lr
from safetensors.torch import load_file, save_file
from torch import nn


def test_lr_schedule_values():
    """ref / sqrt(max(i / 100, 1)) * min(i / 10, 1)."""
    expected = {1: 0.001, 5: 0.005, 10: 0.01, 50: 0.01, 100: 0.01, 400: 0.005, 10_000: 0.001}
    for step, lr in expected.items():
        assert power_law_lr(step, 0.01, ref_steps=100, ramp_steps=10) == pytest.approx(lr, rel=1e-14)
    # a ramp longer than the plateau: both factors act
    assert power_law_lr(200, 1.0, ref_steps=100, ramp_steps=400) == pytest.approx(0.5 / math.sqrt(2), rel=1e-14)
    assert power_law_lr(10**6, 3e-4, ref_steps=0) == 3e-4
    with pytest.raises(ValueError, match=r"^step: .* got 0"):
        power_law_lr(0, 1.0, ref_steps=1)


def test_gamma_and_width_are_inverse_and_match_the_paper():
    # Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma = 16.97 and 6.94
    assert gamma_from_std(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_from_std(0.10) == pytest.approx(6.94, abs=5e-3)
    for std in np.linspace(0.005, 0.2886, 40):
        assert std_from_gamma(gamma_from_std(std)) == pytest.approx(std, rel=1e-9)
    # the width is the standard deviation of the profile (gamma + 1) tau^gamma on [0, 1]
    gamma, n = gamma_from_std(0.08), 200_000
    tau = (np.arange(n) + 0.5) / n
    p = (gamma + 1) * tau**gamma / n
    mean = (p * tau).sum()
    assert math.sqrt((p * (tau - mean) ** 2).sum()) == pytest.approx(0.08, rel=1e-6)
    for std in (0.0, -0.1, 0.29):
        with pytest.raises(ValueError, match=r"^std: "):
            gamma_from_std(std)


def test_decay_is_the_paper_s_beta_and_forgets_the_start():
    gamma = gamma_from_std(0.1)
    for t in (2, 3, 10, 1000):
        assert decay(0.1, t - 1, t) == pytest.approx((1 - 1 / t) ** (gamma + 1), rel=1e-12)
    assert decay(0.1, 0, 1) == 0.0 and decay(0.1, 0, 256) == 0.0
    with pytest.raises(ValueError, match=r"^clips_seen: .* got 5"):
        decay(0.1, 5, 5)
    model = nn.Linear(2, 2)
    ema = PowerEMA(model, (0.05, 0.1))
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model, 8)
    assert all(torch.equal(average["weight"], model.weight) for average in ema.averages.values())


class Trajectory(nn.Module):
    """theta(t) = (t^2, cos(w t) + t, 1) at relative time t in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def move(self, t: float) -> None:
        self.theta.data = torch.tensor([t**2, math.cos(9 * t) + t, 1.0], dtype=torch.float64)


STEPS, BATCH = 1000, 8


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run that keeps 0.05 and 0.10, snapshots every 1/20, and the truth for other widths."""
    directory = tmp_path_factory.mktemp("ema")
    model = Trajectory()
    kept = PowerEMA(model, (0.05, 0.10))
    direct = PowerEMA(model, (0.03, 0.07, 0.15, 0.2))
    halfway = {}
    for step in range(1, STEPS + 1):
        model.move(step / STEPS)
        for ema in (kept, direct):
            ema.update(model, step * BATCH)
        if step % (STEPS // 20) == 0:
            kept.save_snapshot(directory)
        if step == STEPS // 2:
            halfway = {std: average["theta"].clone() for std, average in direct.averages.items()}
    return directory, kept, direct, halfway


def test_average_of_a_known_trajectory(tracked):
    """Integral of (g+1) t^g t^2 over [0, 1] is (g+1)/(g+3); the staircase lies at most 1/STEPS later."""
    _, kept, direct, _ = tracked
    for ema in (kept, direct):
        for std, average in ema.averages.items():
            gamma = gamma_from_std(std)
            assert average["theta"][0].item() == pytest.approx((gamma + 1) / (gamma + 3), abs=2 / STEPS)
            assert average["theta"][2].item() == pytest.approx(1.0, rel=1e-12)


EDGES = np.arange(STEPS + 1) / STEPS
THETA = np.stack([EDGES[1:] ** 2, np.cos(9 * EDGES[1:]) + EDGES[1:], np.ones(STEPS)])


def mass(std: float, end: float) -> np.ndarray:
    """What each step weighs in an average of this width taken at relative time `end`."""
    return np.diff(np.minimum(EDGES / end, 1.0) ** (gamma_from_std(std) + 1))


@pytest.mark.parametrize("end", [1.0, 0.5])
@pytest.mark.parametrize("std", [0.03, 0.07, 0.15, 0.2])
def test_reconstruction_equals_the_width_tracked_directly(tracked, std, end):
    """Off by exactly the integral of (p_wanted - sum x p) theta, and that mismatch is small between the tracked widths."""
    directory, _, direct, halfway = tracked
    snapshots = list_snapshots(directory)
    assert len(snapshots) == 40
    target = round(end * STEPS * BATCH)
    true = (direct.averages[std]["theta"] if end == 1.0 else halfway[std]).numpy()
    np.testing.assert_allclose(THETA @ mass(std, end), true, atol=1e-12)
    got = reconstruct(snapshots, std, target)["theta"].numpy()
    usable = [s for s in snapshots if s.clips_seen <= target]
    x = posthoc_coefficients([s.clips_seen for s in usable], [s.std for s in usable], target, std)
    mismatch = -mass(std, end)
    for coefficient, s in zip(x, usable):
        mismatch += coefficient * mass(s.std, s.clips_seen / (STEPS * BATCH))
    np.testing.assert_allclose(got - true, THETA @ mismatch, atol=1e-10)
    if end == 1.0 and std in (0.07, 0.15):
        # 20 snapshots of two widths: the closed form leaves 0.25 % and 0.58 % of the profile's norm
        assert np.linalg.norm(mismatch) < 0.006 * np.linalg.norm(mass(std, end))
        assert np.abs(got - true).max() < 1e-3


def test_least_squares_beats_its_neighbours():
    """The coefficients minimise the distance of profiles: a quadrature of it grows when any of them is moved."""
    times, stds = [400, 700, 1000, 1000], [0.1, 0.1, 0.05, 0.1]
    x = posthoc_coefficients(times, stds, 1000, 0.08)
    tau = (np.arange(100_000) + 0.5) / 100_000

    def profile(std, end):
        gamma = gamma_from_std(std)
        return np.where(tau <= end, (gamma + 1) * np.minimum(tau / end, 1) ** gamma / end, 0.0)

    basis = np.stack([profile(s, t / 1000) for s, t in zip(stds, times)])

    def distance(c):
        return ((profile(0.08, 1.0) - c @ basis) ** 2).mean()

    best = distance(x)
    for i in range(4):
        for change in (-0.01, 0.01):
            moved = x.copy()
            moved[i] += change
            assert distance(moved) > best


def test_a_saved_width_comes_back_as_it_is(tracked):
    directory, kept, _, _ = tracked
    snapshots = list_snapshots(directory)
    for std in (0.05, 0.10):
        assert torch.equal(reconstruct(snapshots, std)["theta"], kept.averages[std]["theta"])
        coefficients = posthoc_coefficients(
            [s.clips_seen for s in snapshots], [s.std for s in snapshots], STEPS * BATCH, std
        )
        chosen = [s.clips_seen == STEPS * BATCH and s.std == std for s in snapshots]
        np.testing.assert_allclose(coefficients, np.array(chosen, dtype=float), atol=1e-6)


def test_snapshot_files_and_errors(tracked, tmp_path):
    directory, kept, _, _ = tracked
    newest = list_snapshots(directory)[-1]
    assert newest == Snapshot(directory / "000000008000-0.1.safetensors", 8000, 0.1)
    assert torch.equal(load_file(newest.path)["theta"], kept.averages[0.1]["theta"])
    assert list_snapshots(tmp_path / "none") == []
    with pytest.raises(ValueError, match=r"^snapshots: must hold at least one"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match=r"^clips_seen: must be at least .*, got 5"):
        reconstruct(list_snapshots(directory), 0.1, 5)
    with pytest.raises(ValueError, match=r"^stds: must be distinct"):
        PowerEMA(Trajectory(), (0.1, 0.1))
    other = PowerEMA(nn.Linear(1, 1), (0.1,))
    other.update(nn.Linear(1, 1), 20000)
    other.save_snapshot(tmp_path)
    with pytest.raises(ValueError, match="tensor theta is missing"):
        reconstruct([newest, *list_snapshots(tmp_path)], 0.07)


DAMAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "empty": lambda path: path.write_bytes(b""),
    "no average": lambda path: save_file({"theta": torch.zeros(2)}, path),
    "header": lambda path: save_file({"theta": torch.zeros(2)}, path, {"average": "[1]"}),
    "width": lambda path: save_file({"theta": torch.zeros(2)}, path, {"average": '{"std": NaN, "clips_seen": 8}'}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_snapshot_is_named_and_leaves_the_others(tracked, tmp_path, damage):
    shutil.copytree(tracked[0], tmp_path / "ema")
    whole = list_snapshots(tmp_path / "ema")
    lost = whole[3]
    DAMAGES[damage](lost.path)
    with pytest.warns(
        RuntimeWarning, match=f"^snapshot {lost.path.name} is damaged and is skipped: .*{lost.path.name}"
    ):
        left = list_snapshots(tmp_path / "ema")
    assert left == [s for s in whole if s != lost]
    assert reconstruct(left, 0.07)["theta"].isfinite().all()
    with pytest.raises(ValueError, match=re.escape(str(lost.path))):
        Snapshot.read(lost.path)


def test_an_average_that_is_not_finite_is_named(tmp_path):
    ema = PowerEMA(nn.Linear(2, 1), (0.05, 0.1))
    for clips in (8, 16):
        ema.update(nn.Linear(2, 1), clips)
        ema.averages[0.1]["bias"].fill_(math.inf if clips == 8 else 0)
        ema.save_snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"000000000008-0\.1\.safetensors: tensor bias is not finite"):
        reconstruct(list_snapshots(tmp_path), 0.07)


def test_a_full_disk_leaves_no_half_snapshot(tmp_path, monkeypatch):
    ema = PowerEMA(nn.Linear(2, 1), (0.05, 0.1))
    ema.update(nn.Linear(2, 1), 8)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "fsync_path", full)
    with pytest.raises(OSError, match="No space left"):
        ema.save_snapshot(tmp_path)
    assert not list(tmp_path.iterdir())
