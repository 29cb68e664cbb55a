"""The command line, in-process: help, presets and overrides, errors, and collect -> train -> sample on a micro model."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sae_diffusion import cli
from sae_diffusion.lock import RunLock
from sae_diffusion.presets import PRESETS
from sae_diffusion.settings import read_config


def words(line: str) -> list[str]:
    return line.split()


MICRO = words(
    "--model.height=16 --model.width=16 --model.model-channels=4 --model.channel-mult 1 2 --model.video-attention=4 "
    "--clip-length=4 --batch-size=2 --num-workers=0 --no-tensorboard --clips.heldout-fraction=0.5 --device=cpu "
    # a network that has learned nothing draws noise, rather than the frame before again
    "--model.prior=data --precision=fp32"
)


def fails(arguments: list[str], capsys) -> str:
    """The one line that a failing command writes to stderr."""
    capsys.readouterr()
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("sae: ") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("recorded") / "data"
    arguments = f"collect --out {out} --episodes 10 --size 16 16 --max-frames 8 --frame-skip 4 --seed 1".split()
    assert cli.main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def trained(recorded, tmp_path_factory):
    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", f"--data={recorded}", f"--run-dir={run}", "--steps=2", "--sample-every=2", "--log-every=1"]
    assert cli.main([*arguments, *MICRO, "--sampler.sampling-steps=2"]) == 0
    return run


COMMANDS = """collect; train; sample; info; schedule; data check; series train; series sample; series plot; series study;
    images train; images sample; images evaluate; images compare"""


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS.split(";")])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--seed" in text and "--device" in text and "--debug" in text


def test_presets_set_defaults_and_options_override_them():
    plain = cli.parse(["train", "--preset", "lunar-lander"])
    preset = PRESETS["lunar-lander"]
    assert (plain.model, plain.train, plain.sampler, plain.clips) == (
        preset.model,
        preset.train,
        preset.sampler,
        preset.clips,
    )
    changed = cli.parse(
        words(
            "train --preset=lunar-lander --steps 7 --noise.mean 1.5 --model.channel-mult 1 2 --model.video-attention 16"
            " --clips.frame-stride 3 --seed 4 --device cpu"
        )
    )
    assert changed.train.steps == 7 and changed.train.noise.mean == 1.5 and changed.train.seed == 4
    assert changed.train.noise.std == preset.train.noise.std and changed.train.lr == preset.train.lr
    assert changed.model.channel_mult == (1, 2) and changed.model.model_channels == preset.model.model_channels
    assert changed.clips.frame_stride == 3
    assert cli.parse(words("sample --run-dir x --preset counter-strike")).sampler == PRESETS["counter-strike"].sampler


def test_unknown_options_end_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--nope", "1"])
    assert end.value.code == 2
    assert "--nope" in capsys.readouterr().err


def test_errors_are_one_line(capsys, tmp_path, recorded):
    assert "preset: must be one of tiny, lunar-lander, counter-strike, got 'huge'" in fails(
        ["train", "--preset", "huge"], capsys
    )
    assert "--data" in fails(["train"], capsys)
    assert str(tmp_path / "none") in fails(["train", "--data", str(tmp_path / "none")], capsys)
    assert str(tmp_path) in fails(["sample", "--run-dir", str(tmp_path)], capsys)
    assert "NoSuch-v0" in fails(["collect", "--out", str(tmp_path / "x"), "--env", "NoSuch-v0"], capsys)
    assert "cuda" in fails(
        ["train", "--data", str(recorded), "--device", "cuda:99", "--run-dir", str(tmp_path)], capsys
    )
    assert "at least 40 frames" in fails(
        ["train", "--data", str(recorded), "--clip-length=40", "--clips.on-error=raise"], capsys
    )


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", "--run-dir", str(tmp_path), "--debug"])


def test_train_writes_checkpoint_strip_and_how_clips_were_cut(trained):
    state = json.loads((trained / "step-0000002" / "state.json").read_text())
    assert state["step"] == 2 and state["model_config"]["num_actions"] == 4 and state["model_config"]["height"] == 16
    name, settings = read_config(trained / "config.yaml")
    assert name == "tiny" and settings.clips.heldout_fraction == 0.5 and settings.sampler.sampling_steps == 2
    assert json.loads(json.dumps(dataclasses.asdict(settings.model))) == state["model_config"]
    # `sae sample` takes the run's sampler, unless a preset or an option says otherwise.
    assert cli.parse(["sample", f"--run-dir={trained}"]).sampler.sampling_steps == 2
    assert cli.parse(words(f"sample --run-dir {trained}/step-0000002 --guidance 3")).sampler.sampling_steps == 2
    assert cli.parse(words(f"sample --run-dir {trained} --preset tiny")).sampler == PRESETS["tiny"].sampler
    assert Image.open(trained / "samples" / "step-0000002.png").size[0] > 16
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_run_from_the_settings_of_another_has_the_same(trained, tmp_path):
    """config.yaml and the losses; run_dir is the one thing that the command line says otherwise."""
    again = tmp_path / "again"
    assert cli.main(["train", f"--config={trained / 'config.yaml'}", f"--run-dir={again}"]) == 0
    first, second = ((run / "config.yaml").read_text() for run in (trained, again))
    assert second == first.replace(f"run_dir: {trained}", f"run_dir: {again}") != first

    def losses(run):
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines][:2]

    assert losses(again) == losses(trained)


def test_a_dry_run_measures_and_writes_nothing(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(recorded.rglob("*"))
    arguments = ["train", f"--data={recorded}", "--run-dir=run", "--steps=7", "--micro-batch=1", *MICRO]
    assert cli.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "clips of 4 frames" in out[0] and out[0].endswith(" M parameters on cpu in fp32")
    assert re.fullmatch(r"memory on cpu: [\d.]+ MiB for weights, gradients, optimizer and 2 averages, [\d.]+ MiB for the "
                        r"backward pass of a micro-batch of 1 clip", out[1])  # fmt: skip
    assert re.match(r"time: [\d.e-]+ s a step, 7 steps take about \d+:\d\d; reading the clips of a step takes ", out[2])
    assert len(out) == 3 and not list(tmp_path.iterdir()) and sorted(recorded.rglob("*")) == before
    # what is there already stays as it is, and is not asked
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("not: ours")
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "not: ours"
    assert "at least 40 frames" in fails(
        [*arguments, "--dry-run", "--clip-length=40", "--clips.on-error=raise"], capsys
    )
    assert "lr" in fails([*arguments, "--dry-run", "--lr=-1"], capsys)


def test_training_goes_on_where_it_stopped(recorded, trained, tmp_path, capsys):
    run = Path(shutil.copytree(trained, tmp_path / "run"))  # others read what two steps left
    arguments = ["train", f"--data={recorded}", f"--run-dir={run}", "--steps=3", *MICRO]
    assert cli.main(arguments) == 0
    assert "resuming" in capsys.readouterr().out
    assert (run / "step-0000003").is_dir()


def test_time_left_is_never_more_than_the_time_allowed(recorded, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sae_diffusion.progress.EVERY", 0.0)
    arguments = ["train", f"--data={recorded}", f"--run-dir={tmp_path}", "--steps=1000000", "--max-seconds=1", *MICRO]
    assert cli.main([*arguments, "--log-every=2"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train ")]
    assert len(lines) > 2 and all(line.endswith((" 0:00 left", " 0:01 left")) for line in lines)


def test_a_run_folder_in_use_is_one_line(recorded, tmp_path, capsys):
    arguments = ["train", f"--data={recorded}", "--steps=2", *MICRO]
    for command in (
        [*arguments, f"--run-dir={tmp_path}"],
        ["series", "train", f"--run-dir={tmp_path}", "--steps=1", "--device=cpu"],
        ["images", "train", f"--run-dir={tmp_path}", "--steps=1", "--device=cpu"],
    ):
        with RunLock(tmp_path, "training in"):
            assert "is training in this folder" in fails(command, capsys)
        assert not list(tmp_path.iterdir())


def test_sample_continues_heldout_clips(recorded, trained, tmp_path):
    arguments = f"sample --run-dir {trained} --data {recorded} --out {tmp_path} --frames 3 --context 2 --sampling-steps 2 --scale 1"
    assert cli.main([*arguments.split(), "--samples=2", "--guidance=1.5", "--ema=0.1", "--device=cpu"]) == 0
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert gif.n_frames == 5
    assert (tmp_path / "rollout.mp4").stat().st_size > 0
    # Recorded above generated: the context is the same in both, what follows is not.
    picture = np.asarray(Image.open(tmp_path / "strip.png"))
    assert picture.shape[0] >= 2 * 2 * 16


def pictures(trained, folder, *options: str) -> np.ndarray:
    """The strip of one video of two frames."""
    arguments = f"sample --run-dir {trained} --out {folder} --frames 2 --samples 1 --device cpu"
    assert cli.main([*arguments.split(), *options]) == 0
    return np.asarray(Image.open(folder / "strip.png"))


def test_sample_is_seeded_and_needs_no_data(trained, tmp_path):
    first = pictures(trained, tmp_path / "a", "--sampling-steps=2")
    assert np.array_equal(pictures(trained, tmp_path / "b", "--sampling-steps=2"), first)
    assert not np.array_equal(pictures(trained, tmp_path / "c", "--sampling-steps=2", "--seed=1"), first)


def test_sample_takes_any_solver(trained, tmp_path, capsys):
    solvers = ("heun", "euler", "dpm++2m", "ancestral", "stochastic-heun")
    drawn = [pictures(trained, tmp_path / s, f"--solver={s}", "--sampling-steps=4") for s in solvers]
    assert all(not np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2))
    assert np.array_equal(
        pictures(trained, tmp_path / "churn", "--solver=heun", "--churn=40", "--sampling-steps=4"), drawn[-1]
    )
    error = fails(words(f"sample --run-dir {trained} --solver ancestral --churn 2"), capsys)
    assert "churn: must be 0 for solver 'ancestral', got 2.0" in error


def test_sample_takes_random_actions_and_a_guide(recorded, trained, tmp_path):
    # Episodes have 8 frames: with random actions a film may be longer than what was recorded.
    arguments = (
        f"sample --run-dir {trained} --guide {trained} --guide-ema None --guidance-kind auto --guidance 2 --data {recorded} "
        f"--actions random --out {tmp_path} --frames 10 --context 3 --samples 1 --sampling-steps 1 --device cpu"
    )
    assert cli.main(arguments.split()) == 0
    with Image.open(tmp_path / "rollout.gif") as gif:
        assert gif.n_frames == 13


def test_info_names_every_op_and_why_not(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("frame_attention", "causal_conv3d", "token_noise", "not cuda:", "torch", "gymnasium"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ops"]["frame_attention"]["cpu"]["auto"] and result["model layer"]["tyro"]


def test_schedule_is_printed_or_drawn(tmp_path, capsys):
    assert cli.main(words("schedule --tokens 3 --window 1 --rows 3")) == 0
    last = capsys.readouterr().out.splitlines()[-2].split()
    # At t = 2/3 the last two tokens are noise and token 0, which is generated first, is clean still.
    assert [float(v) for v in last] == pytest.approx([0.667, 9.2, -4.6, -4.6], abs=1e-3)
    assert cli.main(words(f"schedule --kind rolling --plot {tmp_path / 'a' / 'schedule.png'}")) == 0
    assert (tmp_path / "a" / "schedule.png").read_bytes()[1:4] == b"PNG"
    assert cli.main(words("schedule --window 0")) == 2
    assert "window: must be" in capsys.readouterr().err


def test_series_and_images_are_reached(tmp_path, capsys):
    assert cli.main(words(f"series plot --out {tmp_path / 'series.png'}")) == 0
    assert (tmp_path / "series.png").exists()
    assert cli.main(words(f"series sample --run-dir {tmp_path / 'none'}")) == 2
    assert cli.main(words(f"images evaluate --run-dir {tmp_path / 'none'}")) == 2
    assert capsys.readouterr().err.count("sae: ") == 2
