"""Settings as YAML: what wins over what, errors that name file and key, and the file beside a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from sae_diffusion import cli
from sae_diffusion.diffusion.config import SamplerConfig
from sae_diffusion.presets import PRESETS, ClipConfig, Preset
from sae_diffusion.settings import read_config, read_run_settings, write_config


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def parts(command) -> Preset:
    return Preset(command.model, command.train, command.sampler, command.clips)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(file):
    path = file(
        "preset: lunar-lander\nsteps: 7\nlr: 1e-3\nmax_seconds: null\nbetas: [0.8, 0.9]\nnoise: {mean: 1}\n"
        "model: {window: 8, channel_mult: [1, 2, 2, 2]}\nclips:\n  clip_stride: 3\nsampler: {solver: euler, churn_max: .inf}\n"
    )
    base = PRESETS["lunar-lander"]
    want = Preset(
        replace(base.model, window=8, channel_mult=(1, 2, 2, 2)),
        replace(base.train, steps=7, lr=1e-3, betas=(0.8, 0.9), noise=replace(base.train.noise, mean=1.0)),
        replace(base.sampler, solver="euler"),
        ClipConfig(clip_stride=3),
    )
    assert read_config(path) == ("lunar-lander", want)
    got = cli.parse(["train", f"--config={path}"])
    assert parts(got) == want and got.preset == "lunar-lander" and got.config == path
    got = cli.parse(["train", "--config", str(path), "--steps=9", "--noise.std", "1.5", "--model.window=None"])
    train = replace(want.train, steps=9, noise=replace(want.train.noise, std=1.5))
    assert parts(got) == replace(want, train=train, model=replace(want.model, window=None))
    # another preset under the same file
    got = cli.parse(["train", f"--config={path}", "--preset=counter-strike", "--model.frame-attention"])
    assert got.preset == "counter-strike" and got.train.steps == 7
    assert got.train.micro_batch == PRESETS["counter-strike"].train.micro_batch


def test_the_example_is_read():
    path = Path(__file__).parents[2] / "examples" / "run.yaml"
    name, settings = read_config(path)
    assert name == "tiny" and settings.train.lr == 1e-2 and settings.model.model_channels == 24
    assert settings.train.noise == replace(PRESETS["tiny"].train.noise, std=1.2)


def test_an_empty_file_is_the_preset_and_the_last_of_two_options_counts(file):
    assert read_config(file("")) == ("tiny", PRESETS["tiny"])
    assert read_config(file("# nothing\n"), default="lunar-lander") == ("lunar-lander", PRESETS["lunar-lander"])
    got = cli.parse(["train", "--preset=tiny", "--preset", "lunar-lander"])
    assert got.preset == "lunar-lander" and parts(got) == PRESETS["lunar-lander"]


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_written_is_read_again_as_it_was(name, tmp_path):
    settings = PRESETS[name]
    settings = replace(
        settings,
        train=replace(settings.train, data="1e3", run_dir="a: b # 'ü'", eps=1e-8, max_seconds=0.1, ema_stds=(0.1,)),
        sampler=replace(settings.sampler, churn_min=1 / 3, guidance=1.0000000000000002),
    )
    path = tmp_path / "new" / "config.yaml"
    write_config(path, name, settings)
    assert read_config(path) == (name, settings)
    text = path.read_bytes()
    write_config(path, *read_config(path))
    assert path.read_bytes() == text
    assert parts(cli.parse(["train", f"--config={path}"])) == settings
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]
    # all of it, so that it stays as it was when a preset changes
    other = next(other for other in PRESETS if other != name)
    assert read_config(path, preset=other) == (other, settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "stepz: unknown option; did you mean steps?"),
        ("batch-size: 3", "batch-size: unknown option; did you mean batch_size?"),
        ("xyz: 3", "xyz: unknown option"),
        ("model: {windw: 3}", "model.windw: unknown option; did you mean window?"),
        ("noise: {mean_: 3}", "noise.mean_: unknown option; did you mean mean?"),
        ("preset: huge", "preset: must be one of tiny, lunar-lander, counter-strike, got 'huge'"),
        ("preset: [tiny]", "preset: must be one of tiny, lunar-lander, counter-strike, got ['tiny']"),
        ("steps: many", "steps: must be an integer, got 'many'"),
        ("steps: 3.0", "steps: must be an integer, got 3.0"),
        ("steps: true", "steps: must be an integer, got True"),
        ("lr: fast", "lr: must be a number, got 'fast'"),
        ("lr: true", "lr: must be a number, got True"),
        ("lr: [1]", "lr: must be a number, got [1]"),
        ("compile: 1", "compile: must be true or false, got 1"),
        ("data: 3", "data: must be text, got 3"),
        ("max_seconds: soon", "max_seconds: must be a number or null, got 'soon'"),
        ("precision: fp8", "precision: must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("betas: [0.9]", "betas: must be a list of 2 numbers, got [0.9]"),
        ("ema_stds: 0.1", "ema_stds: must be a list of numbers, got 0.1"),
        ("model: {channel_mult: [1, x]}", "model.channel_mult: must be a list of integers, got [1, 'x']"),
        ("model: 3", "model: must be a mapping of options to values, got 3"),
        ("model:", "model: must be a mapping of options to values, got None"),
        ("noise: [1]", "noise: must be a mapping of options to values, got [1]"),
        ("- steps", "must be a mapping of options to values, got list"),
        ("steps: -1", "steps: must be at least 0, got -1"),
        ("clips: {frame_stride: 0}", "clips.frame_stride: must be at least 1, got 0"),
        ("noise: {std: -1}", "noise.std: must be at least 0, got -1.0"),
        ("steps: 1\nsteps: 2", "line 1: steps: must be given once, got it again"),
        ("3: 2", "line 1: keys must be names, got 3"),
        ("steps: 1\n  lr: 2", "line 2: must be valid YAML: mapping values are not allowed here"),
        ("steps: !!python/object:os.system x", "line 1: must be valid YAML: could not determine a constructor"),
        ("lr: 1" + 400 * "0", "lr: must be a number"),
    ],
)
def test_errors_name_file_and_key(text, message, file, capsys):
    path = file(text)
    with pytest.raises(ValueError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert cli.main(["train", f"--config={path}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"sae: {path}: {message}") and err.count("\n") == 1


def test_a_file_that_is_not_there_or_no_text_is_one_line(tmp_path, capsys):
    assert cli.main(["train", f"--config={tmp_path / 'none.yaml'}"]) == 2
    assert str(tmp_path / "none.yaml") in capsys.readouterr().err
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\xfa")
    assert cli.main(["train", f"--config={tmp_path / 'x.yaml'}"]) == 2
    assert str(tmp_path / "x.yaml") in capsys.readouterr().err


def test_settings_of_a_run_are_found_from_its_checkpoints(tmp_path):
    settings = replace(PRESETS["tiny"], clips=ClipConfig(heldout_fraction=0.25))
    write_config(tmp_path / "config.yaml", "tiny", settings)
    assert read_run_settings(tmp_path) == read_run_settings(tmp_path / "step-0000001")
    assert read_run_settings(tmp_path) == (settings.clips, settings.sampler)


@pytest.mark.parametrize("name", ["steps", "sampling_steps"])
def test_run_json_of_an_older_run_is_read(name, tmp_path):
    """As it was written before there was config.yaml, and before the solver's steps were named sampling_steps."""
    sampler = {
        name: 5,
        "sigma_min": 0.1,
        "sigma_max": 10.0,
        "rho": 3.0,
        "churn": None,
        "solver": "heun",
        "guidance": 2.0,
    }
    clips = {"frame_stride": 2, "clip_stride": None, "heldout_fraction": 0.5, "on_error": "skip"}
    (tmp_path / "run.json").write_text(json.dumps({"clips": clips, "sampler": sampler}))
    want = SamplerConfig(sampling_steps=5, sigma_min=0.1, sigma_max=10.0, rho=3.0, guidance=2.0)
    assert read_run_settings(tmp_path) == (ClipConfig(2, None, 0.5, "skip"), want)
    assert cli.parse(["sample", f"--run-dir={tmp_path}"]).sampler == want
    # the file that came after it counts
    write_config(tmp_path / "config.yaml", "tiny", PRESETS["tiny"])
    assert cli.parse(["sample", f"--run-dir={tmp_path}"]).sampler == PRESETS["tiny"].sampler
    assert read_run_settings(tmp_path / "elsewhere" / "step-0000001") is None
