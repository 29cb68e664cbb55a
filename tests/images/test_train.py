"""Training: the loss is the one it claims to be, runs resume exactly, and something is learnt."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from sae_diffusion.diffusion.schedules import scales_of
from sae_diffusion.images.cli import ImagesCommand
from sae_diffusion.images.data import ImageSet, digits
from sae_diffusion.images.evaluate import EvaluateConfig, contact_sheet, evaluate, sample_images
from sae_diffusion.images.model import NetConfig
from sae_diffusion.images.schedule import ScheduleConfig, in_flight, make_schedule
from sae_diffusion.images.study import StudyConfig, markdown, report, run_study, table
from sae_diffusion.images.train import (
    ImageTrainConfig,
    ImageTrainer,
    component_loss,
    load_model,
    new_model,
    stratified_times,
)
from sae_diffusion.train.checkpoint import save_checkpoint
from safetensors.torch import load_file

from sae_kernels import token_noise_eps

NET = NetConfig(channels=8, groups=4, token_channels=8)
TINY = ImageTrainConfig(net=NET, steps=6, batch_size=8, warmup=2)


@functools.lru_cache
def images() -> ImageSet:
    return digits()


def weights(trainer: ImageTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.net.named_parameters()}


def randomise(net: torch.nn.Module) -> None:
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)


@pytest.mark.parametrize(
    "schedule", [ScheduleConfig(softness=0.25), ScheduleConfig(kind="columns", b=0.6)], ids=["components", "columns"]
)
@pytest.mark.parametrize("weighting", ["elbo", "eps"])
def test_loss_is_the_error_of_eps_weighted_by_the_slope(schedule, weighting):
    """From x0_hat by its definition: eps_hat = (x - signal x0_hat) / noise, weight -d log-SNR / dt over its mean."""
    model = new_model(dataclasses.replace(TINY, schedule=schedule), images())
    net = model.net.double()
    randomise(net)
    z, t = torch.randn(5, 1, 8, 8, dtype=torch.float64), stratified_times(5, torch.Generator().manual_seed(1)).double()
    ours = component_loss(net, z, model.schedule, t, seed=3, offset=4, weighting=weighting)
    log_snr = model.schedule.log_snr(t)
    signal, noise = scales_of(log_snr, "vp")
    eps = token_noise_eps((5, 64), seed=3, offset=4, dtype=torch.float64).view_as(z)
    x = signal * z + noise * eps
    error = ((x - signal * net(x, log_snr)) / noise - eps).square()
    if weighting == "elbo":
        grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
        mean = torch.trapezoid(-model.schedule.log_snr_slope(grid).mean((1, 2, 3)), grid)
        error = error * -model.schedule.log_snr_slope(t) / mean
    torch.testing.assert_close(ours, error.mean((1, 2, 3)), rtol=1e-3 if weighting == "elbo" else 1e-6, atol=0)


def test_times_are_stratified_and_uniform():
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([stratified_times(4, generator) for _ in range(2000)])
    assert torch.equal((t * 4).floor(), torch.arange(4.0).expand(2000, 4))
    assert abs(t.mean().item() - 0.5) < 4 * (1 / 12) ** 0.5 / 4 / 2000**0.5


@pytest.mark.parametrize("times", ["uniform", "snr"])
def test_loss_of_the_untrained_network_is_its_expectation(times):
    """E of (eps_hat - eps)^2 of whitened components is signal^2 there, so the bound's loss is an integral of a sigmoid."""
    trainer = ImageTrainer(dataclasses.replace(TINY, times=times, schedule=ScheduleConfig(softness=0.25)), images())
    schedule, net = trainer.model.schedule, trainer.model.net
    t, weight = trainer.task.draw_times(600, torch.Generator().manual_seed(3))
    z = torch.randn(600, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        loss = component_loss(net, z, schedule, t, seed=1, offset=2) * weight
    ends = schedule.log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    # the integral of sigmoid(lambda) over lambda is softplus
    softplus = torch.nn.functional.softplus(ends)
    expected = ((softplus[0] - softplus[1]).mean() / (ends[0] - ends[1]).mean()).item()
    assert loss.mean().item() == pytest.approx(expected, abs=4 * loss.std().item() / 600**0.5)
    assert (weight.std() > 0.1) == (times == "snr")


def test_resumed_run_repeats_the_whole_one_bit_for_bit(tmp_path):
    whole = ImageTrainer(TINY, images(), tmp_path / "whole")
    whole.train()
    first = ImageTrainer(TINY, images(), tmp_path / "cut")
    first.train(until=3)
    second = ImageTrainer(TINY, images(), tmp_path / "cut")
    assert second.step == 3
    second.train()
    for name in ("model", "average", "optimizer", "components"):
        a, b = (load_file(tmp_path / run / "step-0000006" / f"{name}.safetensors") for run in ("whole", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name
    start = weights(ImageTrainer(TINY, images()))
    assert any((weights(second)[k] != start[k]).any() for k in start)


def test_seed_decides_and_average_differs_from_the_last_weights(tmp_path):
    runs = [ImageTrainer(dataclasses.replace(TINY, seed=s), images()) for s in (0, 0, 1)]
    for run in runs:
        run.train(until=2)
    a, b, c = (weights(run) for run in runs)
    assert all(torch.equal(a[k], b[k]) for k in a) and any((a[k] != c[k]).any() for k in a)
    trainer = ImageTrainer(TINY, images(), tmp_path)
    trainer.train()
    z, level = torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    averaged, last = load_model(tmp_path), load_model(tmp_path, average=False)
    assert averaged.step == 6
    assert torch.equal(last.denoise(z, level), trainer.model.denoise(z, level).detach())
    assert torch.equal(averaged.denoise(z, level), trainer.averaged().denoise(z, level))
    assert not torch.equal(averaged.denoise(z, level), last.denoise(z, level))


def test_other_runs_are_refused_by_name(tmp_path):
    ImageTrainer(TINY, images(), tmp_path).train(until=1)
    with pytest.raises(ValueError, match=r"basis: .* was trained with 'pca', this run has 'haar'"):
        ImageTrainer(dataclasses.replace(TINY, basis="haar"), images(), tmp_path)
    other = ImageSet("digits", 17, images().train[1:], images().heldout)
    with pytest.raises(ValueError, match="trained on other images"):
        ImageTrainer(TINY, other, tmp_path)
    with pytest.raises(FileNotFoundError, match="must be a checkpoint or a run folder"):
        load_model(tmp_path / "nothing")
    state = tmp_path / "step-0000001" / "state.json"
    state.write_text(state.read_text().replace('"levels": 17', '"levels": 18'))
    with pytest.raises(ValueError, match="does not match its digest"):
        load_model(tmp_path / "step-0000001")


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path):
    for steps in (4, 6):
        run_dir = tmp_path / str(steps)
        trainer = ImageTrainer(TINY, images(), run_dir, checkpoint_every=2 if steps == 6 else 3)
        trainer.model.net.last.weight.register_hook(lambda g, t=trainer: g * math.nan if t.step == 3 else g)
        with pytest.raises(FloatingPointError, match=r"of model is no longer finite at step 4; nothing was saved"):
            trainer.train(until=steps)
        resumed = ImageTrainer(TINY, images(), run_dir)
        assert resumed.step == (2 if steps == 6 else 3)
        assert resumed.ema.clips_seen == resumed.step
        resumed.train()


def test_a_run_folder_has_one_trainer_at_a_time(tmp_path):
    trainer = ImageTrainer(TINY, images(), tmp_path)
    original = trainer.train_step

    def step():
        with pytest.raises(RuntimeError, match=r"another process.* is training in this folder"):
            ImageTrainer(TINY, images(), tmp_path)
        return original()

    trainer.train_step = step
    trainer.train(until=2)
    other = ImageTrainer(TINY, images(), tmp_path)
    assert other.step == 2
    with pytest.raises(RuntimeError, match="another process"):
        trainer.train()


def test_a_state_that_is_not_of_images_is_named(tmp_path):
    ImageTrainer(TINY, images(), tmp_path).train(until=1)
    save_checkpoint(tmp_path, 2, {}, {})
    for call in (lambda: load_model(tmp_path), lambda: ImageTrainer(TINY, images(), tmp_path)):
        with pytest.raises(ValueError, match=r"step-0000002/state\.json: must have kind"):
            call()


def test_an_infinite_loss_stops_the_run():
    trainer = ImageTrainer(TINY, images(), log_every=1)
    trainer.model.net.place.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="the loss is no longer finite at step 1"):
        trainer.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(softness=-1.0), "softness: must be positive .*got -1"),
        (lambda: ScheduleConfig(softness=math.nan), "softness"),
        (lambda: ScheduleConfig(b=1.0), "b: must be in"),
        (lambda: ScheduleConfig(kind="diagonal"), "kind: must be one of components, columns, rows, got 'diagonal'"),
        (lambda: ScheduleConfig(start=-6.0), "start, end"),
        (lambda: ScheduleConfig(start=math.inf), "start: must be finite"),
        (lambda: ImageTrainConfig(steps=0), "steps: must be at least 1, got 0"),
        (lambda: ImageTrainConfig(lr=0.0), "lr: must be positive"),
        (lambda: ImageTrainConfig(ema=0.5), "ema: must be in"),
        (lambda: ImageTrainConfig(times="log"), "times: must be one of"),
        (lambda: ImageTrainConfig(weighting="x0"), "weighting: must be one of"),
        (lambda: EvaluateConfig(probes=0), "probes: must be at least 1, got 0"),
        (lambda: EvaluateConfig(tolerance=0.0), "tolerance"),
        (lambda: StudyConfig(softness=(1.0, 0.0)), "softness: must be positive"),
        (lambda: StudyConfig(seeds=(1, 1)), "seeds: must be one or more values, each once"),
        (lambda: dataclasses.replace(TINY, basis="wavelet"), "basis: must be one of .*'wavelet'"),
        (lambda: new_model(dataclasses.replace(TINY, basis="haar"), ImageSet("odd", 17, images().train[..., :7], images().heldout[..., :7])), "divisible by 2"),
        (lambda: sample_images(new_model(TINY, images()), 0), "count: must be at least 1, got 0"),
        (lambda: evaluate(new_model(TINY, images()), images().heldout[..., :4], EvaluateConfig()), r"images: must be \(N, 1, 8, 8\)"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_softness_1_is_equal_noise_in_the_data_and_inf_equal_log_snr():
    basis = new_model(TINY, images()).basis
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    standard = make_schedule(ScheduleConfig(softness=1.0), basis).log_snr(t) - basis.variance.log()
    assert (standard - standard[:, :, :1, :1]).abs().max() < 1e-12
    equal = make_schedule(ScheduleConfig(softness=math.inf), basis).log_snr(t)
    assert (equal - torch.tensor([7.0, 3.4, -5.0], dtype=torch.float64).view(3, 1, 1, 1)).abs().max() < 1e-12
    shares = [in_flight(make_schedule(ScheduleConfig(softness=s), basis)) for s in (math.inf, 1.0, 0.25, 1 / 32)]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1.0 and shares[-1] < 0.05


@pytest.mark.parametrize("basis", ["identity", "pca", "dct", "fourier", "haar"])
def test_untrained_model_has_the_bits_of_independent_normals(basis):
    """Through dequantisation, basis, whitening, flow, divergence (exact for a diagonal Jacobian) and prior."""
    model = new_model(dataclasses.replace(TINY, basis=basis, schedule=ScheduleConfig(start=9.0)), images())
    bits = evaluate(model, images().heldout, EvaluateConfig(images=6, tolerance=1e-5))
    assert np.abs(bits.bits - bits.gaussian).max() < 1e-3
    assert bits.standard_error == pytest.approx(bits.bits.std(ddof=1) / 6**0.5)


def test_rademacher_agrees_with_the_exact_divergence():
    """Independent probes scatter around the exact value, which is not that of the untrained network."""
    crops = ImageSet("crops", 17, images().train[..., 2:6, 2:6], images().heldout[..., 2:6, 2:6])
    model = new_model(dataclasses.replace(TINY, net=dataclasses.replace(NET, fourier=0)), crops)
    model.net.last.weight.data.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(2))
    model.net.requires_grad_(False)
    exact = evaluate(model, crops.heldout, EvaluateConfig(images=8, divergence="exact", tolerance=0.1))
    probed = evaluate(model, crops.heldout, EvaluateConfig(images=8, probes=32, tolerance=0.1))
    difference = exact.bits - probed.bits
    assert 0 < np.abs(difference).mean() < 0.1
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / 8**0.5
    assert np.abs(exact.bits - exact.gaussian).mean() > 5 * abs(difference.mean())


def test_training_beats_independent_normals_and_the_samples_are_images(tmp_path):
    config = dataclasses.replace(TINY, basis="identity", steps=100, batch_size=32, lr=6e-3, warmup=10)
    trainer = ImageTrainer(config, images(), tmp_path)
    trainer.train()
    model = trainer.averaged()
    bits = evaluate(model, images().heldout, EvaluateConfig(images=32, batch_size=16, tolerance=0.02))
    gain = bits.gaussian - bits.bits
    assert gain.mean() > 3 * gain.std(ddof=1) / 32**0.5
    pictures = sample_images(model, 3, steps=8)
    assert pictures.shape == (3, 1, 8, 8) and pictures.dtype == np.uint8 and pictures.max() <= 16
    assert np.array_equal(pictures, sample_images(model, 3, steps=8))
    assert not np.array_equal(pictures, sample_images(model, 3, steps=8, seed=1))


def test_contact_sheet_places_images_and_scales_levels():
    given = (np.arange(3 * 3 * 2 * 4, dtype=np.uint8) % 17).reshape(3, 3, 2, 4)
    sheet = contact_sheet(given, 17, columns=2, scale=2)
    assert sheet.shape == (2 * 2 * 3, 2 * 2 * 5, 3)
    shown = (given / 16 * 255).round().transpose(0, 2, 3, 1)
    small = sheet[::2, ::2]
    assert np.array_equal(small[:2, 5:9], shown[1]) and np.array_equal(small[3:5, :4], shown[2])
    assert (small[2] == 96).all() and (small[:, 4] == 96).all() and (small[3:5, 5:9] == 0).all()


def test_study_resumes_and_its_table_is_the_mean_over_seeds(tmp_path):
    study = StudyConfig(bases=("pca", "haar"), softness=(0.25,), seeds=(0, 1))
    quick, how = dataclasses.replace(TINY, steps=2), EvaluateConfig(images=4, tolerance=0.1)
    seen: list[str] = []
    options = {"samples": 2, "sample_steps": 2}
    results = run_study(study, quick, how, images(), tmp_path, progress=lambda *a: seen.append(a[2]), **options)
    assert len(seen) == 4 and seen[1].startswith("haar, softness 0.25, seed 0")
    assert {p.name for p in tmp_path.iterdir()} == {
        "bits-per-dim.json",
        "bits-per-dim.md",
        "bits-per-dim.png",
        "samples.png",
    }
    stored = json.loads((tmp_path / "bits-per-dim.json").read_text())
    assert len(stored["runs"]) == 4 and len(stored["samples"]) == 2 and stored["command"].startswith("sae")
    assert {"torch", "python"} <= stored["versions"].keys() and stored["date"].startswith("20")
    entry = next(e for e in table(stored) if (e["basis"], e["softness"]) == ("haar", 0.25))
    bits = np.array([r["bits"] for r in stored["runs"] if (r["basis"], r["softness"]) == ("haar", 0.25)])
    assert entry["bits"] == pytest.approx(bits.mean()) and entry["seeds"] == 2
    assert entry["error"] == pytest.approx(abs(bits[0] - bits[1]) / 2)
    assert f"{bits.mean():.3f} ± {entry['error']:.3f}" in markdown(results)
    # one cell is lost, and only that is made again, to the same bits
    stored["runs"] = stored["runs"][:3]
    (tmp_path / "bits-per-dim.json").write_text(json.dumps(stored))
    again = run_study(study, quick, how, images(), tmp_path, progress=lambda *a: seen.append(a[2]), **options)
    assert len(seen) == 5
    assert [r["bits"] for r in again["runs"]] == [r["bits"] for r in results["runs"]]
    with pytest.raises(ValueError, match="results with the same settings"):
        run_study(study, dataclasses.replace(quick, steps=3), how, images(), tmp_path)


def test_commands_from_training_to_bits(tmp_path, capsys):
    def sae(*arguments: str) -> str:
        tyro.cli(ImagesCommand, args=[str(a) for a in arguments]).run()
        return capsys.readouterr().out

    run = tmp_path / "run"
    train = ("train", "--run-dir", run, "--steps", "4", "--batch-size", "4", "--basis", "haar", "--schedule.softness", "0.5",
             "--net.channels", "8", "--checkpoint-every", "2", "--device", "cpu")  # fmt: skip
    assert "1438 images of (1, 8, 8), 359 held out" in sae(*train)
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "step-0000002", "step-0000004", "tensorboard"]
    assert "step 4" in sae(*train)
    assert "samples.png" in sae("sample", "--run-dir", run, "--count", "3", "--sampling-steps", "2", "--device", "cpu")
    assert "bits/dim on 4 held-out images" in sae(
        "evaluate", "--run-dir", run, "--images", "4", "--tolerance", "0.1", "--device", "cpu"
    )
    report = json.loads((run / "evaluation.json").read_text())
    assert report["images"] == 4 and report["step"] == 4 and 2 < report["bits_per_dim"] < 6
    with pytest.raises(FileNotFoundError, match="--data-path"):
        sae("train", "--run-dir", run, "--data", "cifar10")


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "images"


def test_documentation_has_the_committed_table():
    results = json.loads((RESULTS / "bits-per-dim.json").read_text(encoding="utf-8"))
    assert results["table"] == table(results)
    text = report(results)
    assert text == (RESULTS / "bits-per-dim.md").read_text(encoding="utf-8")
    page = (RESULTS.parents[2] / "docs" / "images.md").read_text(encoding="utf-8")
    assert text in page.partition("<!-- images:begin -->")[2].partition("<!-- images:end -->")[0]
