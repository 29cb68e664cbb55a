"""The commands `sae series train | sample | plot | study`."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..checks import Count, InnerFraction, Natural, Positive, check_fields
from ..progress import progress_bar
from .config import SeriesTrainConfig, Source, StudyConfig

Solver = Literal["ancestral", "ddpm", "ddim", "euler", "heun", "dpm++2m", "stochastic-heun"]


@dataclass(frozen=True, kw_only=True)
class SeriesTrain:
    """Train on a generator or on your own series; the same command resumes.

    Your own series: --data FILE, an .npz (count, length, channels), or a .csv or .parquet in the long format (columns
    series, time, then channels) or in the wide one (a row per series, a column per point).

    Args:
        train: settings of the run.
        debug: show the traceback of an error.
    """

    train: Annotated[SeriesTrainConfig, tyro.conf.arg(name="")] = field(default_factory=SeriesTrainConfig)
    debug: bool = False

    def run(self) -> None:
        from .train import SeriesTrainer

        trainer = SeriesTrainer(self.train)
        given = "fresh series" if trainer.task.data is None else f"{len(trainer.task.data)} series"
        print(
            f"{given} of {trainer.model.length} points and {trainer.model.channels} channels; "
            f"{trainer.model.num_parameters() / 1e3:.0f} k parameters on {trainer.device}"
        )
        reason = trainer.train().reason
        print(f"{self.train.run_dir}: step {trainer.step}, stopped by: {reason}")


@dataclass(frozen=True, kw_only=True)
class SeriesSample:
    """Generate series or continue held-out ones, and measure the network; writes samples.npz, report.json, samples.png.

    Args:
        run_dir: run folder or checkpoint.
        out: folder to write into; "None": <run_dir>/samples.
        count: number of series.
        sampling_steps: of the solver.
        solver: "ancestral" draws from the closed-form posterior, "ddim", "euler", "heun" and "dpm++2m" follow the flow.
        eta: of "ddim".
        window: tokens in flight, in place of the run's; for networks trained on "independent" levels or "mixed"
            windows. 1 is autoregressive, inf is joint.
        given: number of first points of held-out series to continue; 0 generates from nothing.
        likelihood: number of held-out series whose negative log-likelihood is measured; 0 = none. A few give an
            estimate within a minute; the standard error in report.json falls with the square root of their number,
            and above about ten the time grows in proportion.
        tolerance: of the likelihood's solver, relative and absolute; 1e-4 takes several times as long as 1e-3.
        divergence: of the likelihood; "exact" takes a backward pass for each point and channel instead of one.
        weights: the averaged weights, or those as trained.
        seed: of noise.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path
    out: Path | None = None
    count: Count = 256
    sampling_steps: Count = 400
    solver: Solver = "ancestral"
    eta: float = 0.0
    window: float | None = None
    given: Natural = 0
    likelihood: Natural = 16
    tolerance: InnerFraction = 1e-3
    divergence: Literal["rademacher", "exact"] = "rademacher"
    weights: Literal["average", "trained"] = "average"
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        check_fields(self)
        import numpy as np

        from ..devices import pick_device
        from ..runs import run_folder
        from .data import read_series, split_series
        from .plot import plot_series
        from .sampling import error_quartiles, generate, negative_log_likelihood
        from .train import heldout_series, load_series_model

        model, stats, config = load_series_model(
            self.run_dir, average=self.weights == "average", device=pick_device(self.device)
        )
        chosen = config.schedule
        if self.window is not None:
            chosen = dataclasses.replace(chosen, kind="staggered", window=self.window)
        schedule = chosen.build(model.length)
        if config.data is None:
            true = heldout_series(config.source, max(self.likelihood, self.count), config.seed)
        else:
            true = split_series(read_series(config.data), config.heldout_fraction, config.seed)[1]
        # if there are fewer held-out series than requested, they are continued more than once
        given = true[np.arange(self.count) % len(true), : self.given] if self.given else None
        batch = 256
        with progress_bar("sample", -(-self.count // batch) * self.sampling_steps, "steps") as bar:
            x = generate(
                model, stats, schedule, self.count, steps=self.sampling_steps, solver=self.solver, eta=self.eta,
                seed=self.seed, batch=batch, given=given, callback=bar.update,
            )  # fmt: skip
        report: dict[str, object] = {
            "count": self.count, "sampling_steps": self.sampling_steps, "solver": self.solver, "seed": self.seed,
            "given": self.given, "schedule": dataclasses.asdict(chosen),
        }  # fmt: skip
        if config.data is None and config.source.has_clauses:
            error = error_quartiles(config.source, x)
            report["clause_error"] = error
            print(f"clause error: median {error['median']:.4g}, quartiles {error['q25']:.4g} and {error['q75']:.4g}")
        if self.likelihood:
            with progress_bar("likelihood", min(self.likelihood, len(true)), "series") as bar:
                nats = negative_log_likelihood(
                    model, stats, schedule, true[: self.likelihood], divergence=self.divergence, seed=self.seed,
                    tolerance=self.tolerance, callback=bar.update,
                )  # fmt: skip
            report["nll"] = {
                "nats_per_series": float(nats.mean()),
                "standard_error": float(nats.std(ddof=1) / math.sqrt(len(nats))) if len(nats) > 1 else None,
                "series": len(nats),
            }
            spread = f" +- {nats.std(ddof=1) / math.sqrt(len(nats)):.2g}" if len(nats) > 1 else ""
            print(f"held-out series: {nats.mean():.4g}{spread} nats each ({len(nats)} of them; --likelihood for more)")
        out = self.out or run_folder(self.run_dir) / "samples"
        out.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(out / "samples.npz", series=x, heldout=true)
        (out / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
        plot_series(out / "samples.png", {"generated": x, "held out": true})
        for name in ("samples.npz", "report.json", "samples.png"):
            print(out / name)


@dataclass(frozen=True, kw_only=True)
class SeriesPlot:
    """Draw series of a file or of a generator, or draw the results of a study again.

    Args:
        data: .csv, .parquet or .npz file of series; "None" draws `source`.
        study: windows.json of a study, drawn instead of series.
        source: the generator.
        out: picture to write.
        count: series taken from the generator.
        shown: series drawn as lines.
        channel: of the series.
        seed: of the generator.
        device: accepted for consistency.
        debug: show the traceback of an error.
    """

    data: Path | None = None
    study: Path | None = None
    source: Source = field(default_factory=Source)
    out: Path = Path("series.png")
    count: int = 256
    shown: int = 4
    channel: int = 0
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        from .data import read_series
        from .plot import plot_series, plot_study

        if self.study is not None:
            result = json.loads(self.study.read_text(encoding="utf-8"))
            print(plot_study(self.out, result["rows"], result["settings"]["length"]))
            return
        if self.data is not None:
            x, name = read_series(self.data), self.data.name
        else:
            x, name = self.source.sample(self.count, self.seed), self.source.kind
        if not 0 <= self.channel < x.shape[2]:
            raise ValueError(f"channel: must be in [0, {x.shape[2]}), got {self.channel}")
        print(plot_series(self.out, {name: x}, shown=self.shown, channel=self.channel))


# About three CPU minutes, less than two minutes on two cores; enough to show the shape.
QUICK = StudyConfig(
    windows=(1, 4, 12, 64, 256), seeds=(0,), losses=("x0",), own_losses=(), base_steps=1500, samples=128
)


@dataclass(frozen=True, kw_only=True)
class SeriesStudy:
    """Clause error over window, for natural and permuted chains; writes windows.json, windows.md and windows.png.

    The same command continues an interrupted study.

    Args:
        out: folder to write into.
        study: grid and budget.
        minutes: begin no training on a window after this time; also replaces the default grid by a small one.
        workers: processes, one thread each.
        seed: added to the seeds of `study`.
        device: accepted for consistency; the study runs on the CPU.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/series-study")
    study: Annotated[StudyConfig, tyro.conf.arg(name="")] = field(default_factory=StudyConfig)
    minutes: Positive | None = None
    workers: int = 2
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        check_fields(self)
        from .study import RESULT, run_study, table

        config = QUICK if self.minutes is not None and self.study == StudyConfig() else self.study
        config = dataclasses.replace(config, seeds=tuple(seed + self.seed for seed in config.seeds))
        total = len(config.lines()) * len(config.windows)
        with progress_bar("study", total, "networks") as bar:
            result = run_study(
                config, self.out, workers=self.workers,
                max_seconds=None if self.minutes is None else 60 * self.minutes,
                callback=lambda done, _total: bar.update(done),
            )  # fmt: skip
        print(table(result))
        for suffix in ("json", "md", "png"):
            print(self.out / f"{RESULT}.{suffix}")


SeriesCommand = (
    Annotated[SeriesTrain, tyro.conf.subcommand("train")]
    | Annotated[SeriesSample, tyro.conf.subcommand("sample")]
    | Annotated[SeriesPlot, tyro.conf.subcommand("plot")]
    | Annotated[SeriesStudy, tyro.conf.subcommand("study")]
)
