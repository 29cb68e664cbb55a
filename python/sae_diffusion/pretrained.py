"""Trained networks that come with the package, and how one is made of a run.

pretrained/<name>/config.yaml          settings of the run, its sampler among them
                  step-0000123/        one checkpoint: the averaged weights in half precision, and state.json
                  data/                episodes that it was not trained on, as `sae collect` writes them
                  card.json            how it was made, and what was measured
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .diffusion.config import SamplerConfig

FOLDER = Path(__file__).parent / "pretrained"
CARD = "card.json"


def pretrained_names() -> list[str]:
    """What there is."""
    return sorted(path.parent.name for path in FOLDER.glob(f"*/{CARD}"))


def pretrained_folder(name: str) -> Path:
    """The run folder of a trained network.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in pretrained_names():
        raise ValueError(f"pretrained: must be one of {', '.join(pretrained_names()) or 'none'}, got {name!r}")
    return FOLDER / name


def load_pretrained(name: str, *, device: torch.device | str = "cpu") -> tuple[Any, Any, dict[str, Any]]:
    """A network that comes with the package: (Denoiser in eval mode, FrameStats, state.json), see `load_denoiser`.

    Raises:
        ValueError: there is none of this name.
    """
    from .train.checkpoint import load_denoiser

    return load_denoiser(pretrained_folder(name), device=device)


def export_run(
    run_dir: Path | str, out: Path | str, *, ema: float, data: Path | str, card: dict[str, Any],
    sampler: SamplerConfig | None = None,
) -> Path:  # fmt: skip
    """Make `out` of the latest checkpoint of a run, in the form above.

    Args:
        ema: relative width of the average that becomes the weights.
        data: a folder of `sae collect` with episodes that were not trained on.
        card: JSON values.
        sampler: in place of the run's.

    Raises:
        FileExistsError: `out` exists.
    """
    from .settings import CONFIG_FILE, read_config, write_config
    from .train.checkpoint import load_denoiser, save_checkpoint
    from .train.task import json_fields

    run_dir, out = Path(run_dir), Path(out)
    model, _, state = load_denoiser(run_dir, ema)
    preset, settings = read_config(run_dir / CONFIG_FILE)
    # nobody else has the run's folders, and no episode that others bring was trained on
    train = dataclasses.replace(settings.train, data="", run_dir=f"runs/{out.name}")
    clips = dataclasses.replace(settings.clips, heldout_fraction=1.0)
    weights = model.state_dict() | {name: p.half() for name, p in model.named_parameters()}
    out.mkdir(parents=True)
    kept = {key: state[key] for key in ("model_config", "frame_stats", "clips_seen", "seconds")}
    kept |= {"train_config": json_fields(train), "weights": "float16"}
    save_checkpoint(out, state["step"], {"model": weights}, kept)
    write_config(
        out / CONFIG_FILE,
        preset,
        dataclasses.replace(settings, train=train, clips=clips, sampler=sampler or settings.sampler),
    )
    shutil.copytree(data, out / "data", ignore=shutil.ignore_patterns(".*", "staging"))
    (out / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    return out
