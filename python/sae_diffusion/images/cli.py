"""The commands `sae images train | sample | evaluate | compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..checks import Count, Natural, check_fields
from ..progress import progress_bar
from .config import EvaluateConfig, ImageTrainConfig, StudyConfig

# 22 s of training on one core for each run of the study
STUDY_TRAIN = ImageTrainConfig(steps=1600)


@dataclass(frozen=True, kw_only=True)
class ImagesTrain:
    """Train on scikit-learn's digits, or on CIFAR-10 from its binary files; the same command resumes.

    Args:
        run_dir: folder for checkpoints, metrics and curves.
        train: settings of the run.
        checkpoint_every: steps between checkpoints; one more is written at the end.
        log_every: steps between lines of metrics.jsonl.
        tensorboard: also write TensorBoard curves.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path = Path("runs/images")
    train: Annotated[ImageTrainConfig, tyro.conf.arg(name="")] = field(default_factory=ImageTrainConfig)
    checkpoint_every: Natural = 1000
    log_every: Natural = 100
    tensorboard: bool = True
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        check_fields(self)
        from ..devices import pick_device
        from .data import open_images
        from .train import ImageTrainer

        images = open_images(self.train.data, self.train.data_path)
        trainer = ImageTrainer(
            self.train, images, self.run_dir, checkpoint_every=self.checkpoint_every, log_every=self.log_every,
            tensorboard=self.tensorboard, device=pick_device(self.device),
        )  # fmt: skip
        print(
            f"{len(images.train)} images of {images.shape}, {len(images.heldout)} held out; "
            f"{trainer.model.net.num_parameters() / 1e3:.0f} k parameters on {trainer.device}"
        )
        reason = trainer.train().reason
        print(f"{self.run_dir}: step {trainer.step} after {trainer.seconds:.0f} s of training, stopped by: {reason}")


@dataclass(frozen=True, kw_only=True)
class ImagesSample:
    """Generate images with a trained network; writes samples.png.

    Args:
        run_dir: run folder or checkpoint.
        out: picture to write; "None": <run_dir>/samples.png.
        count: number of images.
        sampling_steps: of the solver; components one after another need more steps than all together.
        solver: "ancestral" draws from the closed-form posterior, "ddim", "euler", "heun" and "dpm++2m" follow the flow.
        weights: the averaged weights, or those as trained.
        scale: factor by which the picture is enlarged.
        seed: of noise.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path
    out: Path | None = None
    count: Count = 64
    sampling_steps: Count = 128
    solver: Literal["ancestral", "ddpm", "ddim", "euler", "heun", "dpm++2m"] = "ddim"
    weights: Literal["average", "trained"] = "average"
    scale: Count = 4
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        check_fields(self)
        from ..devices import pick_device
        from ..media import write_png
        from ..runs import run_folder
        from .evaluate import contact_sheet, sample_images
        from .train import load_model

        model = load_model(self.run_dir, average=self.weights == "average", device=pick_device(self.device))
        with progress_bar("sample", self.sampling_steps, "steps") as bar:
            images = sample_images(
                model, self.count, steps=self.sampling_steps, solver=self.solver, seed=self.seed, callback=bar.update
            )
        out = self.out or run_folder(self.run_dir) / "samples.png"
        out.parent.mkdir(parents=True, exist_ok=True)
        write_png(out, contact_sheet(images, model.levels, columns=min(16, self.count), scale=self.scale))
        print(out)


@dataclass(frozen=True, kw_only=True)
class ImagesEvaluate:
    """Bits per dimension of a trained network on held-out images; writes evaluation.json into the run folder.

    Args:
        run_dir: run folder or checkpoint.
        evaluate: settings; the seed chooses images, dequantisation and probes.
        data_path: where the images of the run are now, if they have moved.
        weights: the averaged weights, or those as trained.
        device: "auto" takes CUDA where there is one.
        debug: show the traceback of an error.
    """

    run_dir: Path
    evaluate: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = field(default_factory=EvaluateConfig)
    data_path: str | None = None
    weights: Literal["average", "trained"] = "average"
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        from ..devices import pick_device
        from ..disk import write_json
        from ..runs import run_folder
        from .data import open_images
        from .evaluate import evaluate
        from .train import load_model

        model = load_model(self.run_dir, average=self.weights == "average", device=pick_device(self.device))
        images = open_images(model.config.data, self.data_path or model.config.data_path)
        with progress_bar(
            "evaluate", min(self.evaluate.images or len(images.heldout), len(images.heldout)), "images"
        ) as bar:
            bits = evaluate(model, images.heldout, self.evaluate, callback=bar.update)
        report = {
            "bits_per_dim": bits.mean, "standard_error": bits.standard_error, "images": len(bits.bits),
            "independent_normals": float(bits.gaussian.mean()), "step": model.step,
            "settings": dataclasses.asdict(self.evaluate),
        }  # fmt: skip
        write_json(run_folder(self.run_dir) / "evaluation.json", report)
        print(
            f"{bits.mean:.4f} +- {bits.standard_error:.4f} bits/dim on {len(bits.bits)} held-out images; "
            f"independent normal components have {bits.gaussian.mean():.4f}"
        )


@dataclass(frozen=True, kw_only=True)
class ImagesCompare:
    """Bits per dimension over bases and softness, each trained with several seeds; the same command resumes.

    Writes bits-per-dim.json, .md and .png, and samples.png with a row for each basis and softness.

    Args:
        out: folder to write into.
        study: the grid.
        train: settings of all runs; basis, softness and seed come from the grid.
        evaluate: settings of the measurement, the same for all.
        seed: added to the seeds of `study`.
        device: accepted for consistency; the study runs on the CPU.
        debug: show the traceback of an error.
    """

    out: Path = Path("runs/images-compare")
    study: StudyConfig = field(default_factory=StudyConfig)
    train: ImageTrainConfig = STUDY_TRAIN
    evaluate: EvaluateConfig = field(default_factory=lambda: EvaluateConfig(images=192, batch_size=192, probes=4))
    seed: int = 0
    device: str = "auto"
    debug: bool = False

    def run(self) -> None:
        from .data import open_images
        from .study import RESULTS, markdown, run_study

        study = dataclasses.replace(self.study, seeds=tuple(s + self.seed for s in self.study.seeds))
        images = open_images(self.train.data, self.train.data_path)
        with progress_bar("compare", len(study.cells()), "runs") as bar:

            def progress(done: int, total: int, text: str) -> None:
                bar.update(done, text)
                print(f"{done}/{total} {text}", flush=True)

            results = run_study(study, self.train, self.evaluate, images, self.out, progress=progress)
        print(f"\n{markdown(results)}\n{self.out / RESULTS}")


ImagesCommand = (
    Annotated[ImagesTrain, tyro.conf.subcommand("train")]
    | Annotated[ImagesSample, tyro.conf.subcommand("sample")]
    | Annotated[ImagesEvaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[ImagesCompare, tyro.conf.subcommand("compare")]
)
