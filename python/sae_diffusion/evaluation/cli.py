"""The command `sae evaluate`."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..diffusion.config import SamplerConfig
from ..presets import ClipConfig, PresetName
from ..progress import progress_bar
from ..settings import read_run_data, read_run_settings
from .config import EvaluationConfig


def settings_as_json(config: Any) -> dict[str, Any]:
    """Fields by name; infinity, which JSON does not have, as text."""
    fields = dataclasses.asdict(config)
    return {name: str(value) if value == math.inf else value for name, value in fields.items()}


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a trained model on held-out clips, against repeating the last given frame; or measure films alone.

    Writes evaluation.json, plots of the curves in it and strips of the films, and prints tables.

    Args:
        run_dir: run folder or checkpoint.
        pretrained: a network that comes with the package, in place of --run-dir, on its own held-out clips if --data
            names no others; writes into runs/<name>/evaluation.
        films: instead of a run, an npz as `sae sample --npz` writes it, made with any tool: uint8 arrays `recorded` and
            `generated` (N, T, Y, X, C), the given frames included; `context` is their number, if not --context.
        data: folder or file that context and actions come from; "None" takes the data that the run was trained on.
        split: episodes to continue: "heldout", "train" or "all"; "None" takes held-out ones, or all if none is held
            out or --data is one file.
        out: folder to write into; "None": <run_dir>/evaluation, or a folder beside --films.
        npz: file to write the films to, as with `sae sample`.
        evaluation: what is measured.
        in_flight: frames that are generated together, each at its own noise level, for networks trained with
            --objective forcing; "None" finishes each frame before it begins the next.
        ema: relative width of the average of weights; "None" takes the weights as trained.
        preset: sets the sampler's defaults, in place of the run.
        sampler: the sampler.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path | None = None
    pretrained: str | None = None
    films: Path | None = None
    data: Path | None = None
    split: Literal["heldout", "train", "all"] | None = None
    out: Path | None = None
    npz: Path | None = None
    evaluation: Annotated[EvaluationConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluationConfig)
    in_flight: int | None = None
    ema: float | None = 0.05
    preset: PresetName | None = None
    sampler: Annotated[SamplerConfig, tyro.conf.arg(name="")] = field(default_factory=SamplerConfig)
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        if (self.run_dir is None) == (self.films is None):
            raise ValueError("run_dir, films: name a run with --run-dir or films with --films, one of them")
        from ..runs import run_folder
        from .report import show, write_evaluation

        if self.films is not None:
            evaluation, about = self.measure_films(self.films)
            out = self.out or self.films.with_name(f"{self.films.stem}-evaluation")
        else:
            assert self.run_dir is not None
            evaluation, about = self.measure_run(self.run_dir)
            out = self.out or run_folder(self.run_dir) / "evaluation"
        for note in evaluation.numbers["notes"]:
            print(f"note: {note}", file=sys.stderr)
        if self.npz is not None:
            evaluation.films.save(self.npz)
            print(self.npz)
        paths = write_evaluation(out, evaluation, about)
        show(evaluation.numbers)
        for path in paths:
            print(path)

    def measure_films(self, path: Path) -> tuple[Any, dict[str, Any]]:
        """The films in a file, and what they are."""
        from .films import evaluate_films, read_films
        from .run import Evaluation, wanted_object

        films = read_films(path, self.evaluation.context)
        with progress_bar("evaluate", 100, "%") as bar:
            measured = evaluate_films(
                films, wanted=wanted_object(self.evaluation, self.data), seed=self.evaluation.seed,
                callback=lambda share: bar.update(100 * share),
            )  # fmt: skip
        notes = measured.pop("notes")
        return Evaluation({"films": measured, "notes": notes}, films), {
            "films": str(path), "seed": self.evaluation.seed,
        }  # fmt: skip

    def measure_run(self, path: Path) -> tuple[Any, dict[str, Any]]:
        """The run in this folder, or of this checkpoint, and what it is."""
        data = self.data or read_run_data(path)
        if data is None:
            raise ValueError(f"data: {path} does not say what it was trained on; name clips with --data FOLDER")
        from ..devices import pick_device
        from ..diffusion.sampler import check_independent_levels
        from ..train.checkpoint import load_denoiser
        from .run import evaluate_run

        model, stats, state = load_denoiser(path, self.ema, device=pick_device(self.device))
        if self.in_flight is not None:
            check_independent_levels(state)
        settings = read_run_settings(path)
        with progress_bar("evaluate", 100, "%") as bar:
            evaluation = evaluate_run(
                model, stats, data, settings[0] if settings else ClipConfig(), self.sampler, self.evaluation,
                split=self.split, in_flight=self.in_flight,
                callback=lambda share, what: bar.update(100 * share, what),
            )  # fmt: skip
        return evaluation, {
            "run": str(path), "step": state["step"], "parameters": model.num_parameters(), "data": str(data),
            "split": self.split, "ema": self.ema, "in_flight": self.in_flight,
            "sampler": settings_as_json(self.sampler), "evaluation": settings_as_json(self.evaluation),
        }  # fmt: skip
