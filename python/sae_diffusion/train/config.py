"""The settings of a training run, apart from the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ..checks import BelowOne, Checked, Count, Fraction, Natural, NotNegative, Positive, Rule
from ..diffusion.config import NoiseConfig, OwnContextConfig
from ..renamed import current_value

MAX_STD = 12**-0.5  # of an average of weights: gamma = 0, a plain average over all of training
RelativeWidth = Annotated[float, Rule(f"in (0, {MAX_STD:.4f}]", lambda std: 0 < std <= MAX_STD)]

# must not change when a run resumes: they decide the weights, the data order or the averages
FIXED_ON_RESUME = ("clip_length", "seed", "ema_stds", "normalizer_size", "objective")
# may change silently: they do not enter the arithmetic
FREE_ON_RESUME = (
    "data", "run_dir", "steps", "max_seconds", "num_workers", "compile", "device", "checkpoint_every",
    "keep_checkpoints", "snapshot_every", "log_every", "heldout_every", "sample_every", "tensorboard",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(Checked):
    """A training run; the same values and the same command resume it.

    Args:
        data: path of the training data.
        run_dir: where checkpoints, metrics.jsonl, TensorBoard curves and EMA snapshots go.
        clip_length: T, frames in a clip.
        batch_size: clips in a step, over all processes.
        micro_batch: clips in one forward pass; None = batch_size. batch_size / micro_batch must be a multiple of the
            number of processes. Random numbers belong to the micro-batch, so results do not depend on that number.
        objective: "teacher_forcing", noisy frames see the clean frames before them; "forcing" (diffusion forcing), one
            sequence whose frames all have noise levels of their own and see each other's noisy frames, for sampling
            with several frames in flight.
        clean_frames: probability that a frame of "forcing" is nearly clean, as finished frames are in sampling: its
            level is drawn from U(0, noise.context_sigma_max).
        noisy_copies: K, noisy copies that share a clip's clean copy; "forcing" has none.
        steps: optimizer steps in total.
        max_seconds: stop and save after this much wall time of this call; None = no limit.
        seed: of the data order and of all noise.
        noise: distribution of the noise levels.
        own_context: when and how the network is shown its own frames as context; "forcing", whose past is noisy
            anyway, makes no use of it.
        first_weight: weight of the loss of frames without past, relative to the others; 0 leaves them out.
        first_fit: frames without past have their own loss normaliser: at high noise levels their loss is many times
            that of other frames.
        lr: largest learning rate, see `power_law_lr`.
        lr_ref_steps: optimizer steps after which the learning rate falls as 1 / sqrt(step).
        lr_ramp_steps: optimizer steps over which the learning rate rises from 0.
        lr_decay: "power", as above; "cosine", half a cosine down to 0 at `steps` instead.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of AdamW.
        grad_clip: largest gradient norm; 0 = no clipping.
        precision: of the forward and backward pass (autocast); weights, loss and optimizer stay fp32. "auto" takes bf16
            where the device multiplies in it (CUDA from 8.0, CPUs with AVX-512-BF16 or AMX), else fp32, and says which.
        spatial_every: every n-th step trains each frame by itself, without a past; 0 = never.
        action_dropout: probability that a clip is shown without its actions.
        ema_stds: relative widths of the tracked averages.
        normalizer_size: pairs of noise level and loss that the loss normaliser keeps.
        normalizer_every: steps between the normaliser's fits.
        checkpoint_every: steps between checkpoints; 0 = at the end only.
        snapshot_every: steps between snapshots of the averages, from which other widths can be made; 0 = none.
        log_every: steps between records of the metrics; 0 = none. `loss` is the denoising loss, weighted as in EDM so
            that all noise levels count equally: it falls as the network learns. `normalised_loss` is minimised: that
            loss divided by its running fit over noise level; it need not fall, and can rise.
        heldout_every: steps between measurements of `heldout_loss`, the loss of 8 held-out clips; a multiple of
            log_every; 0 = never.
        sample_every: steps between strips of generated frames; 0 = none.
        keep_checkpoints: how many of the latest checkpoints to keep; 0 = all.
        num_workers: data loading processes of each rank; results do not depend on it.
        compile: run the network through torch.compile.
        device: "auto" takes CUDA where there is one.
        tensorboard: write TensorBoard curves; metrics.jsonl is always written.

    Raises:
        ValueError: a field breaks its rule; the message names field, rule and value.
    """

    data: str = ""
    run_dir: str = "runs/train"
    clip_length: Count = 16
    batch_size: Count = 8
    micro_batch: Count | None = None
    objective: Literal["teacher_forcing", "forcing"] = "teacher_forcing"
    clean_frames: Fraction = 0.25
    noisy_copies: Count = 1
    steps: Natural = 40_000
    max_seconds: NotNegative | None = None
    seed: Natural = 0
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    own_context: OwnContextConfig = field(default_factory=OwnContextConfig)
    first_weight: NotNegative = 1.0
    first_fit: bool = False
    lr: Positive = 1e-2
    lr_ref_steps: Natural = 800
    lr_ramp_steps: Natural = 800
    lr_decay: Literal["power", "cosine"] = "power"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    grad_clip: NotNegative = 0.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    spatial_every: Natural = 0
    action_dropout: Fraction = 0.0
    ema_stds: tuple[RelativeWidth, ...] = (0.05, 0.10)
    normalizer_size: Count = 10_000
    normalizer_every: Count = 50
    checkpoint_every: Natural = 1000
    keep_checkpoints: Natural = 3
    snapshot_every: Natural = 1000
    log_every: Natural = 50
    heldout_every: Natural = 500
    sample_every: Natural = 0
    num_workers: Natural = 2
    compile: bool = False
    device: str = "auto"
    tensorboard: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "objective", current_value("objective", self.objective))
        super().__post_init__()
        if len(set(self.ema_stds)) != len(self.ema_stds):
            raise ValueError(f"ema_stds: must be distinct, got {self.ema_stds}")
        if self.batch_size % self.micro_size:
            raise ValueError(f"micro_batch: must divide batch_size = {self.batch_size}, got {self.micro_size}")

    @property
    def micro_size(self) -> int:
        """Clips in one forward pass."""
        return self.batch_size if self.micro_batch is None else self.micro_batch

    @property
    def micro_batches(self) -> int:
        """Forward passes in a step, over all processes."""
        return self.batch_size // self.micro_size
