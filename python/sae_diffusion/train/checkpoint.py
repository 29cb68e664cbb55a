"""Checkpoints: one folder each, put in place by a rename, every file hashed; safetensors and JSON only, no pickle.

run_dir/step-0000123/model.safetensors        parameters and buffers
                     ema-0.05.safetensors ... averages of the parameters
                     optimizer.safetensors    <parameter>.<state>, such as blocks.0.weight.exp_avg
                     loss.safetensors         loss normaliser and running means
                     state.json               counters, configurations, statistics, versions, sha256 of every file
run_dir/ema/                                  snapshots for post-hoc reconstruction
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..disk import file_digest, fsync_path
from .ema import Snapshot, list_snapshots, reconstruct
from .files import check_header, load_into

STATE = "state.json"
RUNNING = "running."  # prefix of sums for the next record, infinite after a step that the loss scaler skipped
_NAME = re.compile(r"step-(\d{7,})")
_FILE = re.compile(r"[\w.-]+\.safetensors")


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    import numpy
    import safetensors

    import sae_kernels

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "sae_kernels": sae_kernels.__version__,
    }


def provenance() -> dict[str, Any]:
    """Of the results of a command: when, by what, with what and on how many cores they were made."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["sae", *sys.argv[1:]]),
        "versions": versions(),
        "cores": os.cpu_count(),
    }


def check_finite(files: Mapping[str, Mapping[str, torch.Tensor]], step: int) -> None:
    """Check all floating-point tensors, waiting for the device once; the sums named `RUNNING` are left out.

    Raises:
        FloatingPointError: a tensor holds NaN or infinity; the message names the step and the first such tensor.
    """
    tensors = {
        f"{name} of {stem}": t.detach()
        for stem, content in files.items()
        for name, t in content.items()
        if t.is_floating_point() and t.numel() and not name.startswith(RUNNING)
    }
    if math.isfinite(torch.nn.utils.get_total_norm(list(tensors.values()), math.inf).item()):
        return
    first = next(name for name, t in tensors.items() if not torch.isfinite(t).all())
    raise FloatingPointError(
        f"{first} is no longer finite at step {step}; nothing was saved; lower lr or clip gradients"
    )


@contextmanager
def naming_write_errors(run_dir: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turns an error of a full or failing disk into one line: what could not be written, where, and what is left.

    Raises:
        OSError: `what` could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, _WriteError):
            raise
        saved = list_checkpoints(run_dir)
        stands = f"the last checkpoint, {saved[-1].name}, is intact" if saved else "there is no checkpoint yet"
        reason = getattr(error, "strerror", None) or str(error)
        raise _WriteError(f"{run_dir}: {what} could not be written ({reason}); {stands}") from error


class _WriteError(OSError):
    """An OSError whose message is already complete."""


def save_checkpoint(
    run_dir: str | os.PathLike[str],
    step: int,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int = 3,
    metadata: Mapping[str, dict[str, str]] | None = None,
) -> Path:
    """Write run_dir/step-<step> whole or not at all.

    Args:
        files: stem -> tensors, written as <stem>.safetensors.
        state: JSON values, written to state.json with `step`, versions and hashes.
        keep: how many of the latest checkpoints to keep; 0 = all.
        metadata: stem -> strings for that file's header.

    Raises:
        FloatingPointError: a tensor is not finite, see `check_finite`; nothing was written.
        OSError: it could not be written, as on a full disk; nothing of it is left, and earlier checkpoints are intact.
    """
    check_finite(files, step)
    run_dir = Path(run_dir)
    final = run_dir / f"step-{step:07d}"
    temporary = run_dir / f"tmp-{final.name}"
    with naming_write_errors(run_dir, f"the checkpoint of step {step}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        if final.exists():
            reason = verify_checkpoint(final)
            if reason is None:
                return final
            final.rename(_free_name(run_dir / f"corrupt-{final.name}"))
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write_files(temporary, step, files, state, metadata or {})
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        os.rename(temporary, final)
        fsync_path(run_dir)
    if keep > 0:
        # later steps are damaged ones that a resume has skipped: they must not displace the one just written
        paths = list_checkpoints(run_dir)
        for old in paths[: paths.index(final) + 1][:-keep]:
            shutil.rmtree(old)
    for stale in run_dir.glob("tmp-step-*"):
        shutil.rmtree(stale)
    return final


def _write_files(
    folder: Path,
    step: int,
    files: Mapping[str, Mapping[str, torch.Tensor]],
    state: Mapping[str, Any],
    metadata: Mapping[str, dict[str, str]],
) -> None:
    folder.mkdir()
    hashes = {}
    for stem, tensors in files.items():
        path = folder / f"{stem}.safetensors"
        on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(on_cpu, path, metadata.get(stem))
        fsync_path(path)
        hashes[path.name] = file_digest(path)
    content = json.loads(json.dumps({**state, "step": step, "versions": versions(), "sha256": hashes}))
    with open(folder / STATE, "w", encoding="utf-8") as file:
        json.dump({**content, "digest": _digest(content)}, file, indent=1)
    fsync_path(folder / STATE)
    fsync_path(folder)


def _free_name(path: Path) -> Path:
    count = 1
    while path.exists():
        path = path.with_name(f"{path.name.split('~')[0]}~{count}")
        count += 1
    return path


def list_checkpoints(run_dir: str | os.PathLike[str]) -> list[Path]:
    """Checkpoint folders by step, oldest first; complete by construction, but not verified."""
    found = [(int(m[1]), p) for p in Path(run_dir).glob("step-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def read_state(path: str | os.PathLike[str], **fields: type | tuple[type, ...]) -> dict[str, Any]:
    """state.json of a checkpoint, which must hold `fields`, each of its type.

    Raises:
        ValueError: it is missing, unreadable, does not match its own digest, or has no such field.
    """
    path = Path(path) / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError(f"must be a JSON object, got a {type(state).__name__}")
        digest = state.pop("digest", None)
        expected = _digest(state)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error!r})") from error
    if digest != expected:
        raise ValueError(f"{path}: content does not match its digest")
    for name, kind in {"step": int, "sha256": dict, **fields}.items():
        if name not in state:
            raise ValueError(f"{path}: must have {name}, got none; it is of another kind of run")
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise ValueError(f"{path}: {name} has the wrong type, {type(state[name]).__name__}")
    return state


def verify_checkpoint(path: str | os.PathLike[str]) -> str | None:
    """None if every file exists, has the right hash and holds finite numbers only; else what is wrong."""
    path = Path(path)
    try:
        hashes = read_state(path)["sha256"]
    except ValueError as error:
        return str(error)
    for name in hashes:
        # a name must not lead out of the folder
        if not _FILE.fullmatch(name):
            return f"{path / STATE}: names in sha256 must be plain names of safetensors files, got {name!r}"
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            return f"{file}: missing"
        if file_digest(file) != expected:
            return f"{file}: sha256 differs from the one in {STATE}"
    for name in hashes:
        if (reason := _not_finite(path / name)) is not None:
            return reason
    return None


def _not_finite(path: Path) -> str | None:
    """Which tensor of a safetensors file is not finite, or None; read tensor by tensor."""
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if not name.startswith(RUNNING) and not torch.isfinite(file.get_tensor(name)).all():
                    return f"{path}: tensor {name} is not finite"
    except (SafetensorError, OSError) as error:
        return f"{path}: cannot be read ({error})"
    return None


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> Path | None:
    """The latest checkpoint that passes `verify_checkpoint`, or None; later, damaged ones are RuntimeWarnings."""
    for path in reversed(list_checkpoints(run_dir)):
        reason = verify_checkpoint(path)
        if reason is None:
            return path
        warnings.warn(f"checkpoint {path.name} is damaged and is skipped: {reason}", RuntimeWarning, stacklevel=2)
    return None


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """`path` itself if it is a checkpoint, or the latest undamaged one of a run folder.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: `path` is a checkpoint and is damaged or not finite.
    """
    path = Path(path)
    if (path / STATE).is_file():
        if (reason := verify_checkpoint(path)) is not None:
            raise ValueError(reason)
        return path
    latest = latest_checkpoint(path)
    if latest is None:
        raise FileNotFoundError(f"{path}: must be a checkpoint or a run folder with one")
    return latest


def load_denoiser(
    path: str | os.PathLike[str], ema: float | None = None, *, device: torch.device | str = "cpu"
) -> tuple[Any, Any, dict[str, Any]]:
    """A trained network, ready for sampling.

    Args:
        path: a checkpoint folder, or a run folder, whose latest undamaged checkpoint is taken.
        ema: relative width of the average to load; None = the weights as trained. A width that was not tracked is
            reconstructed from the run's snapshots.

    Returns:
        (Denoiser in eval mode, FrameStats, state.json as a dict).

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the checkpoint is damaged or not finite, or a tensor does not fit the model that its configuration
            describes.
    """
    from ..data import FrameStats
    from ..model import Denoiser, ModelConfig

    path = find_checkpoint(path)
    state = read_state(path, model_config=dict, frame_stats=str)
    try:
        config = ModelConfig(**state["model_config"])
        stats = FrameStats.from_json(state["frame_stats"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path / STATE}: must describe a denoiser ({error!r})") from error
    half = state.get("weights") == "float16"
    with torch.device("meta"):
        empty = Denoiser(config)
        weights = {name: p.half() for name, p in empty.named_parameters()} if half else {}
    check_header(path / "model.safetensors", empty.state_dict() | weights)
    model = Denoiser(config)
    load_into(path / "model.safetensors", model.state_dict(), check_dtype=not half)
    if ema is not None:
        with torch.no_grad():
            average = load_average(path, ema)
            for name, p in model.named_parameters():
                p.copy_(average[name])
    return model.to(device).eval(), stats, state


def load_average(path: str | os.PathLike[str], std: float) -> dict[str, torch.Tensor]:
    """The average of relative width `std` at a checkpoint, as tracked or reconstructed from snapshots."""
    path = Path(path)
    own = [Snapshot.read(p) for p in sorted(path.glob("ema-*.safetensors"))]
    if not own:
        raise ValueError(f"{path}: must hold averages of the weights, got none")
    now = own[0].clips_seen
    return reconstruct([*list_snapshots(path.parent / "ema"), *own], std, now)
