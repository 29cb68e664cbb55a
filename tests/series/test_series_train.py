"""Training: what the losses are, that it learns, that it resumes to the bit; sampling at both ends."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from sae_diffusion.diffusion import schedules
from sae_diffusion.diffusion.solvers import sample, start, to_x0
from sae_diffusion.series import Source
from sae_diffusion.series.config import ScheduleConfig, SeriesTrainConfig
from sae_diffusion.series.data import SeriesStats
from sae_diffusion.series.model import SeriesDenoiser, SeriesModelConfig
from sae_diffusion.series.sampling import error_quartiles, generate, negative_log_likelihood
from sae_diffusion.series.train import (
    SeriesTrainer,
    draw_times,
    learning_rate,
    load_series_model,
    series_loss,
)
from sae_diffusion.train.checkpoint import save_checkpoint
from series_cases import TINY, tiny


def average_of(trainer):
    return trainer.ema.averages[trainer.config.ema]


def state_of(trainer):
    tensors = {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average_of(trainer).items()}
    for i, state in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    return {k: v.clone() for k, v in tensors.items()}


@pytest.mark.parametrize("prediction", ["x0", "eps", "v"])
@pytest.mark.parametrize("features", ["scales", "log_snr"])
def test_network_sees_levels_and_neighbours(prediction, features):
    torch.manual_seed(0)
    model = SeriesDenoiser(dataclasses.replace(TINY, prediction=prediction, features=features), 6, 2).double()
    torch.nn.init.normal_(model.head.weight)
    x, level = torch.randn(3, 6, 2).double(), torch.randn(3, 6).double()
    out = model(x, level)
    assert out.shape == x.shape and out.dtype == x.dtype
    for moved_x, moved_level in ((x.clone(), level), (x, level.clone())):
        (moved_x if moved_x is not x else moved_level)[1, 4] += 1
        changed = (model(moved_x, moved_level) != out).flatten(2).any(dim=2)
        assert changed[1].all()  # no causal mask: both sides notice
        assert not changed[[0, 2]].any()
    signal, noise = (s.unsqueeze(-1) for s in schedules.scales_of(level, "vp"))
    torch.testing.assert_close(out, to_x0(model.predict(x, level), x, signal, noise, prediction))


def test_network_knows_positions():
    torch.manual_seed(0)
    model = SeriesDenoiser(TINY, 6).double()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.zeros_(model.blocks[0].bias)  # by the position table alone
    x, level = torch.randn(1, 6, 1).double(), torch.zeros(1, 6).double()
    assert not torch.allclose(model(x.flip(1), level), model(x, level).flip(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SeriesModelConfig(width=30, heads=4), "width: must be even and a multiple of heads 4, got 30"),
        (lambda: SeriesModelConfig(layers=0), "layers: must be at least 1"),
        (lambda: SeriesModelConfig(prediction="score"), "prediction: must be one of x0, eps, v"),
        (lambda: SeriesDenoiser(TINY, 0), "length, channels: must be at least 1"),
        (lambda: SeriesDenoiser(TINY, 6)(torch.zeros(2, 5, 1), torch.zeros(2, 5)), r"x: must have shape \(B, 6, 1\)"),
        (
            lambda: SeriesDenoiser(TINY, 6)(torch.zeros(2, 6, 1), torch.zeros(2, 1)),
            r"log_snr: must have shape \(2, 6\)",
        ),
        (lambda: ScheduleConfig(kind="sorted"), "kind: must be one of"),
        (lambda: ScheduleConfig(window=0), "window: must be positive, got 0"),
        (lambda: ScheduleConfig(windows=()), "windows: must be positive"),
        (lambda: ScheduleConfig(start=-5.0), "start, end: must be finite, start above end"),
        (lambda: SeriesTrainConfig(steps=0), "steps: must be at least 1"),
        (lambda: SeriesTrainConfig(ema=1.0), r"ema: must be in \[0, 1\)"),
        (lambda: SeriesTrainConfig(loss="hinge"), "loss: must be one of"),
        (lambda: SeriesTrainConfig(device="abacus"), None),
        (lambda: generate(SeriesDenoiser(TINY, 6), None, None, 0), "count: must be at least 1"),
    ],
)
def test_refusals(call, message):
    if message is None:
        with pytest.raises(ValueError, match=r"device: must name a device .*, got 'abacus'"):
            SeriesTrainer(call())
        return
    with pytest.raises(ValueError, match=message):
        call()


def test_times_are_stratified_and_belong_to_the_step():
    t = draw_times(16, None, 0, 3)
    assert torch.equal((t * 16).floor(), torch.arange(16.0).double())
    assert torch.equal(t, draw_times(16, None, 0, 3)) and not torch.equal(t, draw_times(16, None, 0, 4))
    own = draw_times(16, 5, 0, 3)
    assert torch.equal((own * 16).floor().sort(dim=0).values, torch.arange(16.0).double()[:, None].expand(16, 5))
    assert not torch.equal(own[:, 0].argsort(), own[:, 1].argsort())


class Oracle(torch.nn.Module):
    """Knows the clean series, and is wrong by `error` in x0."""

    def __init__(self, x, error, kind):
        super().__init__()
        self.x, self.error, self.config = x, error, SeriesModelConfig(prediction=kind)

    def predict(self, noisy, log_snr):
        a, b = (s.unsqueeze(-1) for s in schedules.scales_of(log_snr, "vp"))
        x0 = self.x + self.error
        eps = (noisy - a * x0) / b
        return {"x0": x0, "eps": eps, "v": a * eps - b * x0}[self.config.prediction]


@pytest.mark.parametrize("kind", ["x0", "eps", "v"])
def test_losses_are_their_formulas(kind):
    schedule = schedules.Staggered(5, 2.0, schedules.LogLinear(3.0, -3.0))
    x, t = torch.randn(64, 5, 1), draw_times(64, None, 0, 1)
    model = Oracle(x, 0.1, kind)
    level, slope = schedule.log_snr(t), schedule.log_snr_slope(t)
    snr, changing = level.exp(), (slope < 0).double()
    factor = {"x0": torch.ones_like(snr), "eps": snr, "v": 1 + snr}
    for space, weight in factor.items():
        expected = (0.01 * weight * changing).sum() / changing.sum()
        got = series_loss(model, x, schedule, t, loss="masked", space=space)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
        got = series_loss(model, x, schedule, t, loss="simple", space=space)
        torch.testing.assert_close(got.double(), 0.01 * weight.mean(), rtol=1e-4, atol=0)
    # 1/2 ∫ error² (-ds/dt) dt = 0.01/2 (s(0) - s(1)) per token, over stratified times to their discretisation
    fine = draw_times(4096, None, 0, 1)
    big = Oracle(torch.zeros(4096, 5, 1), 0.1, kind)
    elbo = series_loss(big, big.x, schedule, fine, loss="vlb")
    assert elbo.item() == pytest.approx(5 * 0.005 * (math.exp(3) - math.exp(-3)), rel=2e-2)


def test_mixed_rows_follow_their_windows():
    config = ScheduleConfig(kind="mixed", windows=(1, 4, math.inf), window=4.0)
    mixed = config.build_training(6)
    assert isinstance(mixed, schedules.Mixed)
    t = draw_times(9, None, 0, 0)
    for k, window in enumerate((1, 4, math.inf)):
        part = schedules.Staggered(6, window, schedules.LogLinear())
        for name in ("log_snr", "log_snr_slope"):
            assert torch.equal(getattr(mixed, name)(t)[k::3], getattr(part, name)(t[k::3]))
    assert config.build(6).window == 4.0
    config = dataclasses.replace(config, kind="independent")
    assert isinstance(config.build_training(6), schedules.Independent) and config.build(6).window == 4.0


def test_learning_rate():
    config = SeriesTrainConfig(steps=100, warmup=10, lr=1.0, final_lr=0.1)
    assert learning_rate(config, 5) == pytest.approx(0.5) and learning_rate(config, 10) == 1.0
    assert learning_rate(config, 55) == pytest.approx(0.55) and learning_rate(config, 100) == pytest.approx(0.1)


def test_training_learns_a_law(tmp_path):
    # 1 - x of a noisy neighbour tells a token much more than its own level does
    config = tiny(
        tmp_path, source=Source("one-minus-x", length=4), schedule=ScheduleConfig(kind="independent"), steps=120,
        batch=64, lr=1e-2, warmup=5, ema=0.9,
    )  # fmt: skip
    trainer = SeriesTrainer(config)
    losses = [trainer.train_step().item() for _ in range(config.steps)]
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:10])
    schedule = ScheduleConfig(window=1.0).build(4)
    x = generate(trainer.averaged(), trainer.stats, schedule, 64, steps=24)
    untrained = generate(SeriesTrainer(config).averaged(), trainer.stats, schedule, 64, steps=24)
    assert error_quartiles(config.source, x)["median"] < 0.3 * error_quartiles(config.source, untrained)["median"]


def test_resume_is_bit_exact(tmp_path):
    whole = SeriesTrainer(tiny(tmp_path / "whole"))
    assert whole.train().reason == "done"
    config = tiny(tmp_path / "cut")
    cut = SeriesTrainer(config)
    original = cut.train_step

    def interrupted():
        loss = original()
        if cut.step == 7:
            cut._stop = "SIGTERM"
        return loss

    cut.train_step = interrupted
    assert cut.train().reason == "SIGTERM" and cut.step == 7
    resumed = SeriesTrainer(config)
    assert resumed.train().reason == "done" and resumed.step == 12
    expected, got = state_of(whole), state_of(resumed)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    lines = (tmp_path / "cut" / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize("changes", [{"checkpoint_every": 4}, {"steps": 4}, {"steps": 4, "log_every": 3}], ids=str)
def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path, changes):
    config = tiny(tmp_path, **{"checkpoint_every": 3, **changes})
    trainer = SeriesTrainer(config)
    trainer.model.head.bias.register_hook(lambda g: g * math.nan if trainer.step == 3 else g)
    with pytest.raises(FloatingPointError, match=r"of model is no longer finite at step 4; nothing was saved"):
        trainer.train()
    assert not (config.run_dir / "step-0000004").exists()
    resumed = SeriesTrainer(config)
    assert resumed.resume() == (config.checkpoint_every == 3) and resumed.train().reason == "done"


def test_a_run_folder_has_one_trainer_at_a_time(tmp_path):
    config = tiny(tmp_path, steps=2)
    trainer, seen = SeriesTrainer(config), []

    def step():
        with pytest.raises(RuntimeError, match=r"another process.* is training in this folder"):
            SeriesTrainer(config).train()
        seen.append(trainer.step)
        return original()

    original, trainer.train_step = trainer.train_step, step
    assert trainer.train().reason == "done" and seen == [0, 1]
    assert SeriesTrainer(config).train().reason == "done"


def test_a_state_that_is_not_of_series_is_named(tmp_path):
    config = tiny(tmp_path, steps=1)
    SeriesTrainer(config).train()
    save_checkpoint(
        config.run_dir, 2, {}, {"config": {"pace": 1}, "length": 5, "channels": 1, "scaling": "vp", "stats": {}}
    )
    with pytest.raises(ValueError, match=r"step-0000002/state\.json: config\.pace: unknown option"):
        load_series_model(config.run_dir)
    save_checkpoint(config.run_dir, 3, {}, {})
    for call in (lambda: load_series_model(config.run_dir), SeriesTrainer(config).resume):
        with pytest.raises(ValueError, match=r"step-0000003/state\.json: must have config"):
            call()


def test_resume_refuses_other_settings(tmp_path):
    config = tiny(tmp_path, steps=1)
    SeriesTrainer(config).train()
    with pytest.raises(ValueError, match=r"lr: .* was trained with 0\.002, this run has 0\.1"):
        SeriesTrainer(dataclasses.replace(config, lr=0.1)).train()


def test_resume_refuses_other_series(tmp_path):
    path = tmp_path / "x.npz"
    x = Source("mixture", 5).sample(20, 0)
    np.savez(path, series=x)
    config = tiny(tmp_path, data=path, steps=1)
    SeriesTrainer(config).train()
    assert SeriesTrainer(config).resume()
    x[0, 0] += 1e-9
    x[1:] += 1e-9
    np.savez(path, series=x)
    with pytest.raises(ValueError, match=r"data: .* was trained on other series"):
        SeriesTrainer(config).resume()


def test_loading_gives_the_average_or_the_weights(tmp_path):
    config = tiny(tmp_path)
    trainer = SeriesTrainer(config)
    trainer.train()
    averaged, stats, loaded = load_series_model(config.run_dir)
    trained, _, _ = load_series_model(config.run_dir, average=False)
    assert loaded == config
    np.testing.assert_array_equal(stats.std, trainer.stats.std)
    own = trainer.task.parameters
    for p, q, mean, raw in zip(averaged.parameters(), trained.parameters(), average_of(trainer).values(), own):
        assert torch.equal(p, mean) and torch.equal(q, raw)
    assert any(not torch.equal(p, q) for p, q in zip(averaged.parameters(), trained.parameters()))
    file = next((tmp_path / "run").glob("step-*")) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="sha256"):
        load_series_model(file.parent)
    with pytest.raises(FileNotFoundError, match="must be a checkpoint or a run folder"):
        load_series_model(tmp_path / "nothing")


def test_own_data_are_split_before_statistics(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, series=Source("mixture", 6).sample(40, 0).repeat(2, axis=2))
    trainer = SeriesTrainer(tiny(tmp_path, data=path, heldout_fraction=0.25, source=Source()))
    assert trainer.task.data.shape == (30, 6, 2) and trainer.task.heldout.shape == (10, 6, 2)
    np.testing.assert_array_equal(trainer.stats.mean, trainer.task.data.mean(axis=0))
    assert trainer.task.batch(1).shape == (8, 6, 2)
    assert not torch.equal(trainer.task.batch(1), trainer.task.batch(2)) and torch.equal(
        trainer.task.batch(1), trainer.task.batch(1)
    )
    trainer.train_step()


def trained(prediction="v"):
    torch.manual_seed(1)
    model = SeriesDenoiser(dataclasses.replace(TINY, prediction=prediction), 5).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def test_wide_window_is_joint_generation():
    """w -> infinity is the schedule that noises all tokens together, up to w's finite lag."""
    model, stats = trained(), SeriesStats(np.zeros((5, 1)), np.ones((5, 1)))
    joint = generate(model, stats, schedules.Together((5,)), 16, steps=20, solver="ddim")
    wide = generate(model, stats, schedules.Staggered(5, 1e9), 16, steps=20, solver="ddim")
    np.testing.assert_allclose(wide, joint, atol=1e-4)


def test_window_one_is_autoregressive_generation():
    """A dedicated loop, token by token with finished ones held fixed, gives the same series."""
    model, stats = trained(), SeriesStats(np.zeros((5, 1)), np.ones((5, 1)))
    curve, per_token = schedules.LogLinear(), 8
    got = generate(model, stats, schedules.Staggered(5, 1.0), 4, steps=5 * per_token, solver="ddim", seed=3)
    from sae_diffusion.diffusion.noise import derive_seed

    x = start((4, 5, 1), schedules.Together((5,)), seed=derive_seed(3, 0))
    levels = curve(torch.linspace(1, 0, per_token + 1, dtype=torch.float64))
    with torch.no_grad():
        for token in range(5):
            for now, then in itertools.pairwise(levels):
                level = torch.full((4, 5), levels[0].item())
                level[:, :token], level[:, token] = levels[-1].item(), now.item()
                a, s = (v.item() for v in schedules.scales_of(now, "vp"))
                b, q = (v.item() for v in schedules.scales_of(then, "vp"))
                x0 = model(x, level)[:, token]
                x[:, token] = b * x0 + q * (x[:, token] - a * x0) / s
        clean = model(x, torch.full((4, 5), levels[-1].item()))
    np.testing.assert_allclose(got, clean.double().numpy(), atol=2e-5)


def test_generate_takes_every_solver_and_counts_steps():
    model, stats = trained(), SeriesStats(np.full((5, 1), 3.0), np.full((5, 1), 2.0))
    schedule, seen = schedules.Staggered(5, 2.0), []
    for solver in ("ancestral", "ddpm", "ddim", "euler", "heun", "dpm++2m", "stochastic-heun"):
        x = generate(model, stats, schedule, 3, steps=4, solver=solver, batch=2, callback=seen.append)
        assert x.shape == (3, 5, 1) and np.isfinite(x).all()
    assert seen == [1, 2, 3, 4, 5, 6, 7, 8] * 7
    z = sample(model, start((2, 5, 1), schedule, seed=0), schedule, schedule.times(2))
    assert z.shape == (2, 5, 1)


def test_given_points_are_kept_and_continued():
    model, stats = trained(), SeriesStats(np.full((5, 1), 3.0), np.full((5, 1), 2.0))
    schedule = schedules.Staggered(5, 2.0)
    given = np.random.default_rng(0).normal(3, 2, (4, 2, 1))
    x = generate(model, stats, schedule, 4, steps=12, given=given, batch=3)
    np.testing.assert_array_equal(x[:, :2], given)
    moved = given.copy()
    moved[3, 1] += 2
    y = generate(model, stats, schedule, 4, steps=12, given=moved, batch=3)
    np.testing.assert_array_equal(x[:3], y[:3])
    assert (x[3, 2:] != y[3, 2:]).all()
    for wrong in (given[:3], given[:, :, 0], np.zeros((4, 5, 1)), np.full((4, 2, 1), np.nan)):
        with pytest.raises(ValueError, match=r"given: must be finite, of shape \(4, 1 to 4, 1\)"):
            generate(model, stats, schedule, 4, given=wrong)


def test_given_points_enter_at_the_least_noise():
    seen = []

    def watch(x, log_snr):
        seen.append((x.clone(), log_snr.clone()))
        return torch.zeros_like(x)

    model = trained()
    model.forward = watch
    stats = SeriesStats(np.full((5, 1), 3.0), np.full((5, 1), 2.0))
    generate(model, stats, schedules.Staggered(5, 2.0), 256, steps=2, given=np.full((256, 2, 1), 7.0))
    x, level = seen[0]
    torch.testing.assert_close(level[:, :2].double(), torch.full((256, 2), 9.2).double())
    assert (level[:, 2:] < 9.2).all()
    signal, noise = (s.item() for s in schedules.scales_of(torch.tensor(9.2), "vp"))
    assert (x[:, :2].mean() - signal * 2).abs() < 5 * noise / math.sqrt(512)
    assert x[:, :2].std().item() == pytest.approx(noise, rel=0.2)


class Exact(torch.nn.Module):
    """x0_hat of independent N(0, 1) series: signal x."""

    def __init__(self):
        super().__init__()
        self.anything = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, log_snr):
        return x * torch.sigmoid(log_snr).sqrt().unsqueeze(-1).to(x)


def test_likelihood_is_in_data_units():
    rng = np.random.default_rng(0)
    std = rng.uniform(0.1, 5.0, (4, 2))
    stats = SeriesStats(rng.normal(size=(4, 2)), std)
    x = stats.mean + std * rng.normal(size=(6, 4, 2))
    nats = negative_log_likelihood(Exact(), stats, schedules.Staggered(4, 2.0), x, batch=4)
    z = (x - stats.mean) / std
    expected = (0.5 * z**2 + 0.5 * math.log(2 * math.pi) + np.log(std)).sum(axis=(1, 2))
    np.testing.assert_allclose(nats, expected, atol=5e-3)
