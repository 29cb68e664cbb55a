"""The command line before anything runs: help for every option, one meaning for each, the version, what is missing."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import sae_diffusion.__main__ as program
from sae_diffusion import cli
from sae_diffusion.presets import PRESETS, PresetName

import sae_kernels

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "collect", "train", "sample", "evaluate", "info", "schedule", "data check", "series train", "series sample", "series plot", "series study",
    "images train", "images sample", "images evaluate", "images compare",
)  # fmt: skip


def explanation(of: type, name: str) -> str:
    """What a dataclass's docstring says of one field, and of that field alone."""
    found = re.search(rf"^        {name}: ((?:.+\n)(?: {{12}}.+\n)*)", of.__doc__ or "", re.MULTILINE)
    assert found, f"{of.__name__}.{name} has no help of its own"
    return found[1]


def options(of: type) -> typing.Iterator[str]:
    """The help of every option that a command's dataclass makes."""
    hints = typing.get_type_hints(of)
    for field in dataclasses.fields(of):
        if dataclasses.is_dataclass(hints[field.name]):
            explanation(of, field.name)
            yield from options(hints[field.name])
        else:
            yield explanation(of, field.name)


def letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli.parse([*command.split(), "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_of_its_own(command, capsys):
    shown = letters(help_of(command, capsys))
    shown += letters(help_of("data", capsys)) if command == "data check" else ""  # what is given is not shown again
    required = ["--run-dir=x"] if "sample" in command or "evaluate" in command else []
    required += ["x"] if command == "data check" else []
    required += ["--out=x"] if command == "collect" else []
    parsed = cli.parse([*command.split(), *required])
    of = type(getattr(parsed, "command", parsed))
    texts = list(options(of))
    assert texts
    for text in texts:
        assert letters(text) in shown, f"sae {command} --help does not show: {text}"


def test_an_option_means_one_thing(capsys):
    """--steps are steps of training; those of a solver are --sampling-steps."""
    for command in COMMANDS:
        shown = help_of(command, capsys)
        trains = command in ("train", "series train", "images train", "series study", "images compare")
        assert bool(re.search(r"--(train\.)?steps ", shown)) == trains, command
        assert not re.search(r"--sampler\.steps ", shown), command
        assert ("sampling-steps " in shown) == (command not in ("collect", "info", "schedule", "data check", "series plot", "series train",
                                                              "images train", "images evaluate", "images compare")), command  # fmt: skip


def test_presets_are_listed(capsys):
    assert typing.get_args(PresetName) == tuple(PRESETS)
    for command in ("train", "sample", "evaluate"):
        shown = help_of(command, capsys)
        assert all(name in shown for name in PRESETS)


def test_version_is_that_of_the_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sae {sae_kernels.__version__}\n"


def run_without(packages: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed program where some packages are not."""
    code = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages.split()!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
sys.argv = ["sae", *{arguments!r}]
from sae_diffusion.__main__ import main
sys.exit(main())
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_without_the_extras_one_line_says_what_to_install(tmp_path):
    assert 'sae = "sae_diffusion.__main__:main"' in (ROOT / "pyproject.toml").read_text()
    for missing, arguments in (
        ("tyro", ("--help",)),
        ("safetensors", ("sample", f"--run-dir={tmp_path}")),
        ("matplotlib", ("series", "plot", f"--out={tmp_path / 'x.png'}")),
    ):
        done = run_without(missing, *arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("sae: ") and missing in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert program.INSTALL in done.stderr


def test_ranks_let_rank_0_speak_first(monkeypatch, capsys):
    slept: list[float] = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    for rank, waits in (("0", []), ("1", [cli.RANK_0_SECONDS])):
        monkeypatch.setenv("RANK", rank)
        slept.clear()
        assert cli.main(["train"]) == 2 and slept == waits
        assert capsys.readouterr().err.count("sae: data") == 1


def test_torchrun_shows_an_error_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sae_diffusion", "train"],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("sae: data: must name the training data") == 1, done.stderr
