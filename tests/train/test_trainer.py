from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_diffusion.data import DataError, open_dataset
from sae_diffusion.model import Denoiser
from sae_diffusion.train import TrainConfig, Trainer, latest_checkpoint
from sae_diffusion.train.checkpoint import load_average, read_state
from sae_diffusion.train.ema import Snapshot
from sae_diffusion.train.loader import MicroBatchSampler, clip_index
from safetensors.torch import load_file
from train_stubs import (
    SIGINT,
    SIGKILL,
    SIGTERM,
    STATS,
    KilledAt,
    Stub,
    StubClips,
    StubConfig,
    config,
    environment,
    trainer,
)

SCRIPT = Path(__file__).with_name("train_stubs.py")
TIMES = ("seconds", "clips_per_second")


def metrics(run_dir) -> list[dict]:
    """metrics.jsonl without the wall-clock fields."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def tensors(path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: parameters, averages, optimizer, normaliser."""
    return {f"{f.name}:{name}": t for f in sorted(Path(path).glob("*.safetensors")) for name, t in load_file(f).items()}


def assert_same_tensors(a, b) -> None:
    one, other = tensors(a), tensors(b)
    assert one.keys() == other.keys() and len(one) > 30
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole")
    return trainer(run_dir).train().checkpoint


def test_uninterrupted_run(uninterrupted):
    state, records = read_state(uninterrupted), metrics(uninterrupted.parent)
    assert uninterrupted.name == "step-0000006"
    assert (state["step"], state["clips_seen"], state["micro_batches_seen"]) == (6, 24, 12)
    assert {p.suffix for p in uninterrupted.iterdir()} == {".safetensors", ".json"}
    assert {p.stem for p in uninterrupted.iterdir()} == {"model", "optimizer", "loss", "ema-0.05", "ema-0.1", "state"}
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["clips"] for r in records] == [4, 8, 12, 16, 20, 24]
    lrs = [1e-2 * min(i / 2, 1) / math.sqrt(max(i / 3, 1)) for i in range(1, 7)]
    assert [r["lr"] for r in records] == pytest.approx(lrs, rel=1e-12)
    assert all(math.isfinite(r["normalised_loss"]) and r["grad_norm"] > 0 for r in records)
    # before the first fit (after step 2) the divisor is 1, then it is not
    assert records[0]["normalised_loss"] == records[0]["loss"] and records[3]["normalised_loss"] != records[3]["loss"]


def test_resume_in_another_process_after_kill_9_is_bit_exact(uninterrupted, tmp_path):
    """Killed in step 5, after the checkpoint of step 3 and the metrics of steps 4: the second run repeats and goes on."""
    run = {"run_dir": str(tmp_path), "checkpoint_every": 3, "kill": [19, SIGKILL]}
    done = subprocess.run(
        [sys.executable, SCRIPT, json.dumps([run])], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == -SIGKILL, done.stderr
    assert latest_checkpoint(tmp_path).name == "step-0000003"
    assert [r["step"] for r in metrics(tmp_path)] == [1, 2, 3, 4]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line cut short
    result = trainer(tmp_path, checkpoint_every=3).train()
    assert (result.step, result.reason) == (6, "done")
    assert_same_tensors(result.checkpoint, uninterrupted)
    assert metrics(tmp_path) == metrics(uninterrupted.parent)


@pytest.mark.parametrize(("spatial_every", "precision", "log_every"), [(2, "fp32", 2), (0, "bf16", 4), (3, "fp16", 1)])
def test_resume_is_bit_exact_in_every_mode(tmp_path, spatial_every, precision, log_every):
    """Stopping by `steps` at 3, off the beat of logging, spatial steps and fits."""
    options = {"spatial_every": spatial_every, "precision": precision, "log_every": log_every, "snapshot_every": 2}
    whole = trainer(tmp_path / "a", **options).train()
    trainer(tmp_path / "b", **options, dataset=KilledAt(10, SIGTERM)).train()
    assert latest_checkpoint(tmp_path / "b").name == "step-0000003"
    parts = trainer(tmp_path / "b", **options).train()
    assert_same_tensors(whole.checkpoint, parts.checkpoint)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert read_state(whole.checkpoint)["scaler"] == read_state(parts.checkpoint)["scaler"]
    assert bool(read_state(whole.checkpoint)["scaler"]) == (precision == "fp16")
    names = sorted(p.name for p in (tmp_path / "b" / "ema").iterdir())
    assert names == [f"{8 * n:012d}-{std}.safetensors" for n in (1, 2, 3) for std in (0.05, 0.1)]
    for name in names:
        assert (tmp_path / "a" / "ema" / name).read_bytes() == (tmp_path / "b" / "ema" / name).read_bytes()


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_signals_save_and_end_cleanly(tmp_path, number):
    before = signal.getsignal(number)
    result = trainer(tmp_path, dataset=KilledAt(6, number)).train()
    assert (result.step, result.reason) == (2, signal.Signals(number).name)
    assert result.checkpoint == latest_checkpoint(tmp_path)
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_at_once(tmp_path):
    class Impatient(StubClips):
        def __getitem__(self, index):
            os.kill(os.getpid(), SIGINT)
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, dataset=Impatient()).train()


def test_max_seconds_stops_and_saves_and_leaves_the_schedule_alone(uninterrupted, tmp_path):
    result = trainer(tmp_path, max_seconds=0.0).train()
    assert (result.step, result.reason) == (1, "time")
    while result.reason == "time":
        result = trainer(tmp_path, max_seconds=0.0).train()
    assert result.step == 6
    assert_same_tensors(result.checkpoint, uninterrupted)


def test_kill_9_while_the_trainer_saves_loses_nothing(uninterrupted, tmp_path):
    trainer(tmp_path, steps=2).train()
    child = os.fork()
    if child == 0:
        from sae_diffusion.train import checkpoint

        real = checkpoint.save_file

        def die_after_half(tensors, path, metadata=None):
            if path.name.startswith("ema"):
                os.kill(os.getpid(), SIGKILL)
            real(tensors, path, metadata)

        checkpoint.save_file = die_after_half
        try:
            trainer(tmp_path, steps=4).train()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == SIGKILL
    assert (tmp_path / "tmp-step-0000004").is_dir()
    t = trainer(tmp_path)
    assert t.step == 2
    assert_same_tensors(t.train().checkpoint, uninterrupted)
    assert not list(tmp_path.glob("tmp-*"))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(uninterrupted, tmp_path):
    trainer(tmp_path, checkpoint_every=2, steps=4).train()
    file = tmp_path / "step-0000004" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(bytes(data))
    with pytest.warns(RuntimeWarning, match=r"step-0000004 is damaged .*optimizer\.safetensors: sha256 differs"):
        t = trainer(tmp_path, checkpoint_every=2)
    assert t.step == 2
    assert_same_tensors(t.train().checkpoint, uninterrupted)
    assert metrics(tmp_path) == metrics(uninterrupted.parent)


def test_resume_refuses_another_run_and_names_the_field(tmp_path, capsys):
    trainer(tmp_path, steps=1).train()
    with pytest.raises(ValueError, match=r"^model_config\.width: .*step-0000001 was trained with 8, this run has 16"):
        trainer(tmp_path, model_config=StubConfig(width=16))
    with pytest.raises(ValueError, match=r"^data\.fingerprint: .*'stripes-13', this run has 'stripes-14'"):
        trainer(tmp_path, dataset=StubClips(14))
    with pytest.raises(ValueError, match=r"^seed: .* with 7, this run has 8"):
        trainer(tmp_path, seed=8)
    with pytest.raises(ValueError, match=r"^ema_stds: "):
        trainer(tmp_path, ema_stds=(0.05,))
    with pytest.raises(ValueError, match=r"^spatial_every > 0: "):
        trainer(tmp_path, spatial_every=2)
    capsys.readouterr()
    assert trainer(tmp_path, steps=9, log_every=3, lr=0.5).step == 1
    assert "changed since the checkpoint: lr 0.01 -> 0.5\n" in capsys.readouterr().out


# ---- one holder of a run directory


def test_a_run_directory_has_one_trainer_at_a_time(tmp_path):
    t = trainer(tmp_path, steps=2)
    with pytest.raises(
        RuntimeError, match=f"^{re.escape(str(tmp_path))}: another process.* is training in this folder"
    ):
        trainer(tmp_path, steps=2)
    t.train()
    second = trainer(tmp_path, steps=3)
    with pytest.raises(RuntimeError, match="another process"):
        t.train()
    second.close()
    assert trainer(tmp_path, steps=3).train().step == 3
    # nor does one that was refused keep it, though its traceback lives
    with pytest.raises(ValueError, match=r"^seed: ") as refused:
        trainer(tmp_path, seed=8)
    assert refused.tb is not None and trainer(tmp_path, steps=4).step == 3


class Waits(StubClips):
    """Says that training is under way, then waits to be killed."""

    def __getitem__(self, index):
        print("reading", flush=True)
        signal.pause()


def test_kill_9_lets_go_of_the_run_directory_though_a_worker_lives_on(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_trainer import Waits; from train_stubs import trainer; "
        "trainer(sys.argv[2], dataset=Waits(), num_workers=1, steps=3).train()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(SCRIPT.parent), str(tmp_path)], env=environment(), stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "reading\n"
        named = rf" \({process.pid}\)" if str(process.pid) in locks() else ".*"
        with pytest.raises(RuntimeError, match=f"another process{named} is training in this folder"):
            trainer(tmp_path)
        process.kill()
        process.wait()
        assert trainer(tmp_path, steps=1).train().step == 1
    finally:
        with contextlib.suppress(ProcessLookupError):  # its workers
            os.killpg(process.pid, SIGKILL)
        process.wait()
        process.stdout.close()


def locks() -> str:
    path = Path("/proc/locks")
    return path.read_text() if path.exists() else ""


# ---- several micro-batches, several processes


def gradients_of_one_step(run_dir, **options) -> tuple[Trainer, list[torch.Tensor]]:
    """The trainer and the gradients its optimizer is given in the first step, zero where there is none."""
    t = trainer(run_dir, steps=1, grad_clip=0.0, model_config=StubConfig(dropout=0.0), **options)
    caught: list[torch.Tensor] = []
    t.optimizer.register_step_pre_hook(
        lambda *_: caught.extend(
            torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in t.model.parameters()
        )
    )
    t.train()
    return t, caught


def test_gradient_is_that_of_the_mean_over_the_global_batch(tmp_path, monkeypatch):
    """Against one backward pass through the mean of all frames' losses of the four micro-batches."""
    from sae_diffusion.train import objectives as module

    calls = []

    def keep(denoiser, *arguments, **options):
        calls.append((arguments, options))
        return real(denoiser, *arguments, **options)

    real = module.denoising_loss
    monkeypatch.setattr(module, "denoising_loss", keep)
    _, caught = gradients_of_one_step(tmp_path, micro_batch=1)
    assert len(calls) == 4
    assert len({options["seed"] for _, options in calls}) == 4
    torch.manual_seed(0)
    model = Stub(StubConfig(dropout=0.0))
    model.normalize_weights_()
    mean = torch.cat([real(model, *arguments, **options) for arguments, options in calls]).mean()
    mean.backward()
    assert mean.item() == pytest.approx(metrics(tmp_path)[0]["normalised_loss"], rel=1e-6)
    for got, p in zip(caught, model.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-6 * p.grad.abs().max().item())


def test_takes_the_loss_from_the_model_output_where_the_model_gives_it(tmp_path, monkeypatch):
    from sae_diffusion.train import objectives as module

    asked = []

    def keep(denoiser, *arguments, model_output, **options):
        asked.append(model_output)
        return real(denoiser, *arguments, model_output=False, **options)

    real = module.denoising_loss
    monkeypatch.setattr(module, "denoising_loss", keep)
    gradients_of_one_step(tmp_path / "without", micro_batch=4)
    monkeypatch.setattr(Stub, "gives_model_output", True, raising=False)
    gradients_of_one_step(tmp_path / "with", micro_batch=4)
    assert asked == [False, True] and Denoiser.gives_model_output


def test_accumulation_equals_one_large_batch(tmp_path, monkeypatch):
    """With noise that is a function of the clip alone, 4 micro-batches of 1 clip, 2 of 2 and 1 of 4 give one gradient."""
    from sae_diffusion.train import objectives as module

    def loss_by_clip(denoiser, x0, actions, sigmas, **options):
        sigma = 0.1 + x0.abs().mean(dim=(2, 3, 4)).repeat(1, 3)
        x = x0.repeat(1, 3, 1, 1, 1) * (1 + sigma[..., None, None, None])
        d = denoiser(x, sigma, torch.zeros_like(actions), noisy_copies=2)[:, 3:]
        return (d - x0.repeat(1, 2, 1, 1, 1)).square().mean(dim=(2, 3, 4))

    monkeypatch.setattr(module, "denoising_loss", loss_by_clip)
    whole, *split = (gradients_of_one_step(tmp_path / str(m), micro_batch=m)[1] for m in (4, 2, 1))
    for gradients in split:
        for a, b in zip(whole, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * a.abs().max().item())


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_two(runs: list[dict]) -> list[dict]:
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT, json.dumps(runs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [p.communicate() for p in processes]  # one that dies takes the other with it: gloo loses its peer
    finally:
        for p in processes:
            p.kill()
    assert all(p.returncode == 0 for p in processes), outputs
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Several runs of two gloo processes, one after the other in the same pair of interpreters."""
    d = tmp_path_factory.mktemp("ddp")
    runs = [
        {"run_dir": str(d / "two")},
        {"run_dir": str(d / "four"), "micro_batch": 1},
        {"run_dir": str(d / "spatial"), "spatial_every": 2, "precision": "bf16"},
        {"run_dir": str(d / "parts"), "kill": [6, SIGTERM]},
        {"run_dir": str(d / "parts"), "checkpoint_every": 5},
    ]
    return d, run_two(runs)


def test_two_processes_equal_one(two_processes, uninterrupted, tmp_path):
    """Two micro-batches on two processes: (g0 + g1) / 2 is rounded like g0 / 2 + g1 / 2, so every bit is the same."""
    directory, _ = two_processes
    assert metrics(directory / "two") == metrics(uninterrupted.parent)
    assert_same_tensors(directory / "two" / "step-0000006", uninterrupted)
    whole = trainer(tmp_path / "spatial", spatial_every=2, precision="bf16").train()
    assert metrics(directory / "spatial") == metrics(tmp_path / "spatial")
    assert_same_tensors(directory / "spatial" / "step-0000006", whole.checkpoint)


def test_two_processes_with_four_micro_batches_equal_one_to_rounding(two_processes, tmp_path):
    """(g0 + g2) + (g1 + g3) against ((g0 + g1) + g2) + g3: the first loss has no history and is the same to the bit."""
    directory, _ = two_processes
    trainer(tmp_path, micro_batch=1).train()
    one, two = metrics(tmp_path), metrics(directory / "four")
    assert one[0]["normalised_loss"] == two[0]["normalised_loss"]
    for a, b in zip(one, two, strict=True):
        # six Adam steps let the fp32 rounding of the gradient (2^-24) grow
        assert a["normalised_loss"] == pytest.approx(b["normalised_loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_two_processes_stop_together_and_resume(two_processes, uninterrupted):
    """The clip that sends the signal is read on both ranks: both stop after the same step and go on from there."""
    directory, results = two_processes
    assert results[3]["reason"] == "SIGTERM" and results[3]["step"] == 3
    assert results[4] == {"step": 6, "reason": "done", "checkpoint": str(directory / "parts" / "step-0000006")}
    assert_same_tensors(directory / "parts" / "step-0000006", uninterrupted)
    assert metrics(directory / "parts") == metrics(uninterrupted.parent)


def test_batch_must_split_over_processes_and_micro_batches(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^micro_batch: must divide batch_size = 4, got 3"):
        config(tmp_path, micro_batch=3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    with pytest.raises(ValueError, match=r"^micro_batch: .* = 2 must be a multiple of the number of processes = 4"):
        trainer(tmp_path)


# ---- data order


def test_data_order_is_one_permutation_after_another():
    order = [clip_index(p, 13, 3) for p in range(39)]
    epochs = [order[i : i + 13] for i in (0, 13, 26)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order[:13] != [clip_index(p, 13, 4) for p in range(13)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_order_of_one_process(world_size):
    def draw(clips_seen, rank, world, steps):
        sampler = MicroBatchSampler(
            13, 5, clips_seen=clips_seen, batch_size=12, micro_size=2, rank=rank, world_size=world
        )
        per_step = 6 // world
        drawn = list(itertools.islice(sampler, steps * per_step))
        return [drawn[i * per_step : (i + 1) * per_step] for i in range(steps)]

    alone = draw(0, 0, 1, 4)
    shares = [draw(0, rank, world_size, 4) for rank in range(world_size)]
    for step in range(4):
        assert [shares[m % world_size][step][m // world_size] for m in range(6)] == alone[step]
    assert draw(24, 0, 1, 2) == alone[2:]
    assert list(itertools.chain(*itertools.chain(*alone))) == [clip_index(p, 13, 5) for p in range(4 * 12)]


def test_workers_change_nothing(uninterrupted, tmp_path):
    result = trainer(tmp_path, num_workers=2).train()
    assert_same_tensors(result.checkpoint, uninterrupted)


# ---- the rest


def test_training_lowers_the_loss_and_averages_follow(tmp_path):
    result = trainer(tmp_path, steps=60, log_every=20, lr_ref_steps=0, noisy_copies=4, snapshot_every=15).train()
    records = metrics(tmp_path)
    assert [r["step"] for r in records] == [20, 40, 60]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    weights = load_file(result.checkpoint / "model.safetensors")
    average = load_average(result.checkpoint, 0.05)
    assert torch.equal(average["out.weight"], load_file(result.checkpoint / "ema-0.05.safetensors")["out.weight"])
    assert not torch.equal(average["out.weight"], weights["out.weight"])
    between = load_average(result.checkpoint, 0.07)["out.weight"]
    wider = load_average(result.checkpoint, 0.1)["out.weight"]
    assert 0 < (between - average["out.weight"]).norm() < (wider - average["out.weight"]).norm()


def test_every_knob_reaches_the_arithmetic(uninterrupted, tmp_path):
    reference = metrics(uninterrupted.parent)[-1]["normalised_loss"]
    changes = [
        {"seed": 8}, {"noisy_copies": 1}, {"lr": 2e-2}, {"lr_ramp_steps": 0}, {"lr_ref_steps": 0}, {"grad_clip": 1e-3},
        {"action_dropout": 1.0}, {"normalizer_every": 3}, {"weight_decay": 1.0}, {"betas": (0.5, 0.5)},
        {"precision": "bf16"}, {"micro_batch": 4}, {"spatial_every": 1},
    ]  # fmt: skip
    losses = [reference]
    for i, change in enumerate(changes):
        trainer(tmp_path / str(i), **change).train()
        losses.append(metrics(tmp_path / str(i))[-1]["normalised_loss"])
    assert len(set(losses)) == len(losses)


def test_actions_are_dropped_by_clip_and_never_invented(tmp_path):
    t = trainer(tmp_path)
    actions = torch.tensor([[-1, 0, 2], [-1, 1, 1]])
    assert torch.equal(t.task.actions(actions, torch.tensor([False, True])), torch.tensor([[-1, 0, 2], [-1, -1, -1]]))
    floats = t.task.actions(torch.ones(2, 3, 4), torch.tensor([True, False]))
    assert floats[0].isnan().all() and (floats[1] == 1).all()
    assert t.task.actions(None, torch.tensor([False])) is None
    plain = trainer(tmp_path / "plain", model_config=StubConfig(num_actions=0))
    assert plain.task.actions(actions, torch.tensor([False, False])) is None
    assert plain.train().step == 6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_has_the_gradient_of_fp32(uninterrupted, tmp_path, precision):
    """Not that of the scaled loss: the norm that is clipped and reported differs by the rounding of the activations."""
    trainer(tmp_path, precision=precision, steps=1).train()
    low, full = metrics(tmp_path)[0], metrics(uninterrupted.parent)[0]
    # one rounding is 2^-8 in bf16 and 2^-11 in fp16
    assert low["grad_norm"] == pytest.approx(full["grad_norm"], rel=2**-6)
    assert low["normalised_loss"] == pytest.approx(full["normalised_loss"], rel=2**-6)
    assert low["normalised_loss"] != full["normalised_loss"]


def test_fp16_skips_a_step_that_overflows_and_goes_on(tmp_path):
    t = trainer(tmp_path, precision="fp16", steps=4)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    t.train()
    records = metrics(tmp_path)
    assert any(r["grad_norm"] is None for r in records)
    assert all(torch.isfinite(v).all() for v in tensors(latest_checkpoint(tmp_path)).values())
    assert t.scaler.get_scale() < 2.0**120


def test_a_loss_that_is_not_finite_stops_training_and_spoils_no_checkpoint(tmp_path):
    t = trainer(tmp_path, steps=6, checkpoint_every=1, log_every=0)
    real = t.train_step

    def spoil():
        if t.step == 3:
            t.model.out.weight.data.fill_(math.nan)
        real()

    t.train_step = spoil
    with pytest.raises(FloatingPointError, match="no longer finite at step 4"):
        t.train()
    assert latest_checkpoint(tmp_path).name == "step-0000003"


def spoil_gradient_at(t, step, value=math.nan):
    """The gradient of out.weight is `value` in that step; its loss is finite."""

    def hook(gradient):
        return torch.full_like(gradient, value) if t.step == step - 1 else gradient

    t.model.out.weight.register_hook(hook)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"checkpoint_every": 1},
        {"checkpoint_every": 1, "log_every": 4},
        {"checkpoint_every": 1, "log_every": 0},
        {"checkpoint_every": 3, "steps": 4},
        {"checkpoint_every": 3, "steps": 4, "log_every": 0},
        {"checkpoint_every": 3, "snapshot_every": 1, "log_every": 0},
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path, options, value):
    t = trainer(tmp_path, **{"grad_clip": 0.0, **options})
    spoil_gradient_at(t, 4, value)
    with pytest.raises(FloatingPointError, match=r"^out\.weight of model is no longer finite at step 4"):
        t.train()
    assert max(p.name for p in tmp_path.glob("*step-*")) == latest_checkpoint(tmp_path).name == "step-0000003"
    assert all(math.isfinite(r["normalised_loss"]) and math.isfinite(r["grad_norm"]) for r in metrics(tmp_path))
    for path in (tmp_path / "ema").glob("*"):
        assert int(path.name[:12]) <= 12 and load_file(path)["out.weight"].isfinite().all()
    assert trainer(tmp_path, **options).train().reason == "done"


@pytest.mark.parametrize("column", [1, 2, 3])
def test_a_spoilt_loss_or_norm_since_the_last_record_is_not_saved(tmp_path, column):
    t = trainer(tmp_path)
    t._running["video"][column] = math.inf
    with pytest.raises(FloatingPointError, match="no longer finite at step 0; nothing was saved"):
        t.save()
    assert not list(tmp_path.glob("*step-*"))
    t.close()
    t = trainer(tmp_path, precision="fp16")
    t._running["video"][column] = math.inf
    if column == 3:  # a step that the loss scaler skipped
        assert t.save() == latest_checkpoint(tmp_path)
    else:
        with pytest.raises(FloatingPointError):
            t.save()


def test_a_spoilt_average_is_not_saved(tmp_path):
    t = trainer(tmp_path)
    t.ema.averages[0.1]["out.bias"][1] = math.nan
    with pytest.raises(FloatingPointError, match=r"^out\.bias of ema-0\.1 is no longer finite"):
        t.save()


def test_steps_that_fp16_skips_may_be_saved_and_resumed(tmp_path):
    """Between records, while the sum of norms is infinite."""
    options = {"precision": "fp16", "steps": 5, "log_every": 5, "checkpoint_every": 3}
    t = trainer(tmp_path, **options)
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    t.train()
    whole = metrics(tmp_path)
    assert whole[0]["grad_norm"] is None
    assert not load_file(tmp_path / "step-0000003" / "loss.safetensors")["running.video"][3].isfinite()
    shutil.rmtree(tmp_path / "step-0000005")
    t = trainer(tmp_path, **options)
    assert t.step == 3
    t.train()
    assert metrics(tmp_path) == whole


def test_resume_passes_over_a_checkpoint_that_is_not_finite(uninterrupted, tmp_path, monkeypatch):
    """As an older version wrote it; every hash holds."""
    from sae_diffusion.train import checkpoint
    from sae_diffusion.train import loop as module

    trainer(tmp_path, steps=2).train()
    with monkeypatch.context() as patch:
        for owner in (checkpoint, module):
            patch.setattr(owner, "check_finite", lambda *_: None)
        t = trainer(tmp_path, steps=4)
        t.ema.averages[0.05]["out.weight"].fill_(math.nan)
        t._after_step, t.check_finite = lambda *_: None, lambda: None
        t.train()
    assert (tmp_path / "step-0000004").is_dir()
    with pytest.warns(
        RuntimeWarning, match=r"step-0000004 is damaged .*ema-0\.05\.safetensors: tensor out\.weight is not"
    ):
        t = trainer(tmp_path)
    assert t.step == 2
    t.train()
    assert_same_tensors(tmp_path / "step-0000006", uninterrupted)


def test_a_full_disk_stops_the_run_in_one_line(tmp_path, monkeypatch):
    from sae_diffusion.train import checkpoint, ema

    trainer(tmp_path, steps=2).train()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for owner, what in ((checkpoint, "the checkpoint of step 3"), (ema, "the snapshot of step 3")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, "save_file", full)
            with pytest.raises(OSError) as caught:
                trainer(tmp_path, steps=3, snapshot_every=3).train()
        assert str(caught.value) == (
            f"{tmp_path}: {what} could not be written (No space left on device); the last checkpoint, step-0000002, is "
            "intact"
        )
        assert latest_checkpoint(tmp_path).name == "step-0000002" and not list(tmp_path.rglob("*tmp*"))
    t = trainer(tmp_path, steps=3)
    real = t.train_step

    def step():
        real()
        monkeypatch.setattr(t.reporter, "_file", open("/dev/full", "a"))  # noqa: SIM115 - the reporter closes it

    t.train_step = step
    with pytest.raises(OSError, match=f"^{re.escape(str(tmp_path))}: metrics could not be written .No space left"):
        t.train()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("change", ["cut short", "other content", "gone"])
def test_data_that_change_under_a_run_are_named(tmp_path, workers, change):
    """Not a bus error, a traceback in a RuntimeError, or another loss."""
    path, rng = tmp_path / "data" / "a.npz", np.random.default_rng(0)
    path.parent.mkdir()
    np.savez(path, frames=rng.integers(0, 256, (40, 3, 4, 4, 2), dtype=np.uint8))
    dataset = open_dataset(path, 3)

    def spoil(t, step):
        if change == "cut short":
            os.truncate(path, 500)
        elif change == "gone":
            path.unlink(missing_ok=True)
        else:
            np.savez(path, frames=np.full((40, 3, 4, 4, 2), 255, np.uint8))

    t = trainer(
        tmp_path / "run", dataset=dataset, num_workers=workers, steps=40, sample_every=2, checkpoint_every=2,
        on_sample=spoil, keep_checkpoints=0,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"a\.npz.*(has changed since it was opened|can no longer be opened)") as caught:
        t.train()
    assert "\n" not in str(caught.value)
    # what the workers had read before is trained on
    assert 2 <= t.step < 12 and latest_checkpoint(tmp_path / "run").name >= "step-0000002"


def test_resume_counts_on_from_the_checkpoint(tmp_path):
    trainer(tmp_path, steps=3).train()
    t = trainer(tmp_path, steps=5)
    assert (t.step, t.clips_seen, t.ema.clips_seen, t.micro_batches_seen) == (3, 12, 12, 6)
    t.train()
    header = Snapshot.read(tmp_path / "step-0000005" / "ema-0.1.safetensors")
    assert (header.clips_seen, header.std) == (20, 0.1)


def test_resume_drops_the_metrics_after_the_checkpoint(tmp_path):
    trainer(tmp_path, steps=4, checkpoint_every=2).train()
    whole = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in whole] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "step-0000004")
    seen = []

    def look(t, step):
        seen.append((tmp_path / "metrics.jsonl").read_text().splitlines())

    trainer(tmp_path, steps=4, sample_every=3, on_sample=look).train()
    # when step 3 is done: what was before the checkpoint as it was, then the new line
    assert seen[0][:2] == whole[:2] and len(seen[0]) == 3
    records = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in records] == [1, 2, 3, 4]


def test_callback_sees_eval_mode_and_leaves_training_as_it_was(uninterrupted, tmp_path):
    seen = []

    def on_sample(t, step):
        assert not t.model.training and not torch.is_grad_enabled()
        before = {n: p.clone() for n, p in t.model.named_parameters()}
        with t.ema_weights(0.1) as model:
            assert torch.equal(model.out.weight, t.ema.averages[0.1]["out.weight"])
        assert all(torch.equal(p, before[n]) for n, p in t.model.named_parameters())
        torch.randn(step)
        seen.append(step)

    result = trainer(tmp_path, sample_every=2, on_sample=on_sample).train()
    assert seen == [2, 4, 6]
    assert_same_tensors(result.checkpoint, uninterrupted)


def test_plain_lines_without_a_terminal_and_tensorboard_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_diffusion.progress.EVERY", math.inf)  # no lines between, however slow the machine
    trainer(tmp_path, log_every=3, tensorboard=True).train()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train ")]
    assert (
        len(lines) == 2
        and lines[0].startswith("train 3/6 steps, loss ")
        and "clips/s" in lines[0]
        and lines[0].endswith(" left")
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"normalised_loss", "loss", "lr", "grad_norm", "clips_per_second"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("normalised_loss")] == [3, 6]


@pytest.mark.parametrize(
    ("field", "value"),
    [("batch_size", 0), ("steps", -1), ("precision", "fp8"), ("lr", 0.0), ("action_dropout", 1.5), ("noisy_copies", 0)],
)
def test_config_names_the_field(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .*got "):
        TrainConfig(**{field: value})


def test_an_empty_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^dataset: must have at least one clip"):
        Trainer(config(tmp_path), Stub(), StubClips(0), STATS)


def test_compiled_training_is_the_same_training(uninterrupted, tmp_path, monkeypatch):
    """With a back end that changes nothing: what is compiled is what is trained, saved and resumed."""
    compiled = []

    def compile(module):
        compiled.append(module)
        return real(module, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    trainer(tmp_path, compile=True, steps=2).train()
    result = trainer(tmp_path, compile=True).train()
    assert len(compiled) == 2
    assert_same_tensors(result.checkpoint, uninterrupted)
