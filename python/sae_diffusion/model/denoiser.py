"""The denoiser D(x; sigma): EDM preconditioning for each frame around the U-Net, in training and in sampling."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sae_kernels import normalize_weights, normalize_weights_
from sae_kernels._deprecated import renamed_arguments, renamed_attributes

from .attention import TemporalAttention
from .cache import Cache
from .config import ModelConfig
from .conv import CausalConv
from .frame_pass import FramePass
from .layers import NormalizedModule
from .prior import FramePrior
from .unet import UNet

# Noise levels below this one get its label, so that level 0 has a finite label.
SMALLEST_SIGMA_LABEL = 1e-4


@renamed_attributes(gives_raw_output="gives_model_output")
class Denoiser(nn.Module):
    """Estimate of the clean frames from noisy ones, their noise levels, their actions and the clean frames before them.

    With s the frame's noise level and d = sigma_data (Karras et al. 2022, table 1):
    D = c_skip x + c_out UNet(c_in x, ln(s) / 4), c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2),
    c_in = 1 / sqrt(s^2 + d^2).

    Frames are (B, F, C, Y, X) floats; sigma is (B, F), a standard deviation in the units of the data; actions are
    (B, T) integers with -1 for none, (B, T, A) floats with NaN for none, or None; action i is the one that caused
    frame i. Results are fp32, or fp64 for a network in fp64; the U-Net computes in the dtype of its parameters or of
    autocast.
    """

    # Tells losses that forward takes model_output=True.
    gives_model_output = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.prior = FramePrior(config)
        self.unet = UNet(config)
        self._layers = [module for module in self.modules() if isinstance(module, NormalizedModule)]
        # In a training pass, normalise the weights of all layers in one launch, and their gradients in another. Turn
        # this off if parameters are sharded or gradients are sent while backward runs: they all arrive at its end.
        self.weights_at_once = True
        for name, module in self.named_modules():
            if isinstance(module, (CausalConv, TemporalAttention)):
                module.key = name

    @renamed_arguments(raw="model_output")
    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        actions: Tensor | None = None,
        *,
        noisy_copies: int = 1,
        spatial_only: bool = False,
        model_output: bool = False,
    ) -> Tensor:
        """Denoise whole sequences: the clean stream, then `noisy_copies` noisy copies of it.

        Args:
            x: (B, F, C, Y, X), F = (1 + noisy_copies) T.
            sigma: (B, F).
            actions: of T frames, shared by all streams.
            noisy_copies: K >= 0; 0 is the plain causal sequence.
            spatial_only: every frame by itself, without a past; F is then any number of frames, noisy_copies is ignored
                and actions are of F frames.
            model_output: return the U-Net's output itself, which c_out multiplies, shaped like x and in its own dtype.

        Returns:
            D, like x.

        Raises:
            ValueError, TypeError: an argument breaks its rule.
        """
        streams = 1 if spatial_only else 1 + noisy_copies
        if streams < 1:
            raise ValueError(f"noisy_copies: must be >= 0, got {noisy_copies}")
        self._check(x, sigma)
        if x.shape[1] == 0 or x.shape[1] % streams:
            raise ValueError(f"x: frames must be a positive multiple of 1 + noisy_copies = {streams}, got {x.shape[1]}")
        mode = "spatial" if spatial_only else "sequence"
        return self._run(x, sigma, actions, mode, noisy_copies=streams - 1, model_output=model_output)

    def new_cache(self, batch: int) -> Cache:
        """An empty cache for `batch` videos."""
        return Cache(self.config, batch)

    @torch.no_grad()
    def prefill(self, x: Tensor, sigma: Tensor, actions: Tensor | None, cache: Cache) -> Tensor:
        """Append n clean frames to the cache; returns their D, the clean half of the training pass.

        Args:
            x: (B, n, C, Y, X), whole blocks of frames_per_block.
            sigma: (B, n), the noise levels with which the frames are labelled.
            actions: of the n frames.
        """
        self._check(x, sigma, cache)
        self._check_blocks(x)
        out = self._run(x, sigma, actions, "prefill", cache=cache)
        cache.frames += x.shape[1]
        return out

    @torch.no_grad()
    def denoise(self, x: Tensor, sigma: Tensor, actions: Tensor | None, cache: Cache) -> Tensor:
        """D of the next block given the cache, the noisy half of the training pass.

        The cache does not change, so later calls are not affected.

        Args:
            x: (B, n, C, Y, X), n = frames_per_block, or fewer for the last block of a clip.
            sigma: (B, n).
            actions: of the n frames.
        """
        self._check(x, sigma, cache)
        if not 1 <= x.shape[1] <= self.config.frames_per_block:
            raise ValueError(
                f"x: frames must be 1 to frames_per_block = {self.config.frames_per_block}, got {x.shape[1]}"
            )
        return self._run(x, sigma, actions, "denoise", cache=cache)

    @torch.no_grad()
    def denoise_sequence(self, x: Tensor, sigma: Tensor, actions: Tensor | None, cache: Cache) -> Tensor:
        """D of several blocks in flight after the cache, each frame at its own noise level, causal among themselves.

        Equals the last n frames of the plain causal pass (noisy_copies=0) over the cached frames and these, and is
        meant for networks trained with independent noise levels. The cache does not change.

        Args:
            x: (B, n, C, Y, X), whole blocks of frames_per_block.
            sigma: (B, n).
            actions: of the n frames.
        """
        self._check(x, sigma, cache)
        self._check_blocks(x)
        return self._run(x, sigma, actions, "flight", cache=cache)

    def expected(self, cache: Cache) -> Tensor | None:
        """The prior's mean (B, C, Y, X) of the frames after the cache; None for 0."""
        if cache.last is None:
            return None
        frame, level = cache.last
        prior = self.prior(frame[:, None], level[:, None], cache.last)
        return None if prior is None else prior[0][:, 0]

    def normalize_weights_(self) -> None:
        """Give every stored weight unit RMS for each output channel, in place; call before each training step."""
        normalize_weights_([weight for layer in self._layers for weight in layer.raw_weights()])

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def _run(
        self,
        x: Tensor,
        sigma: Tensor,
        actions: Tensor | None,
        mode: str,
        *,
        noisy_copies: int = 0,
        cache: Cache | None = None,
        model_output: bool = False,
    ) -> Tensor:
        frames = x.shape[1] // (1 + noisy_copies)
        self._check_actions(actions, x.shape[0], frames)
        weights = self.unet.out_gain.dtype
        dtype = torch.float64 if weights == torch.float64 else torch.float32
        x, sigma = x.to(dtype), sigma.to(dtype)
        mean, std = self._expected(x, sigma, mode, frames, cache)
        total = sigma**2 + std**2
        c_noise = sigma.clamp(min=SMALLEST_SIGMA_LABEL).log() / 4
        frame_pass = FramePass(self.config, mode, frames, c_noise, noisy_copies=noisy_copies, cache=cache)

        unknown = x if mean is None else x - mean
        inputs = unknown * total.rsqrt()[:, :, None, None, None]
        if self.prior.uses_past:
            scale = (sigma**2 + self.config.sigma_data**2).rsqrt()[:, :, None, None, None]
            inputs = torch.cat([inputs, x * scale], dim=2)
        if self.config.patch_size > 1:
            inputs = F.pixel_unshuffle(inputs, self.config.patch_size)
        run: Callable[..., Tensor] = self.unet
        if (
            mode == "sequence"
            and self.weights_at_once
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            run = self._with_weights_at_once
        out = run(inputs.to(weights).transpose(1, 2), actions, frame_pass).transpose(1, 2)
        if self.config.patch_size > 1:
            out = F.pixel_shuffle(out, self.config.patch_size)
        if model_output:
            return out
        out = out.to(dtype)
        c_skip = std**2 / total
        c_out = sigma * std * total.rsqrt()
        denoised = c_skip[:, :, None, None, None] * unknown + c_out[:, :, None, None, None] * out
        return denoised if mean is None else denoised + mean

    def _expected(
        self, x: Tensor, sigma: Tensor, mode: str, frames: int, cache: Cache | None
    ) -> tuple[Tensor | None, Tensor | float]:
        """The prior of every frame of a call: its mean, None for 0, and its deviation."""
        seen, levels = x[:, :frames], sigma[:, :frames]
        prior = None if mode == "spatial" else self.prior(seen, levels, None if cache is None else cache.last)
        if cache is not None and mode == "prefill" and self.prior.uses_past:
            cache.last = seen[:, -1].clone(), levels[:, -1].clone()
        if prior is None:
            return None, self.config.sigma_data
        mean, std = prior
        streams = x.shape[1] // frames
        return mean.repeat(1, streams, 1, 1, 1), std.repeat(1, streams)

    def _with_weights_at_once(self, x: Tensor, actions: Tensor | None, frames: FramePass) -> Tensor:
        owners = [(layer, weight) for layer in self._layers for weight in layer.raw_weights()]
        device = x.device.type
        # what convolutions and linear layers would cast each of them to
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        made = normalize_weights([weight for _, weight in owners], dtype=None if x.dtype == torch.float64 else dtype)
        for (layer, weight), normalized in zip(owners, made, strict=True):
            layer.given[weight] = normalized
        try:
            return self.unet(x, actions, frames)
        finally:
            for layer in self._layers:
                layer.given.clear()

    def _check(self, x: Tensor, sigma: Tensor, cache: Cache | None = None) -> None:
        c = self.config
        if not x.is_floating_point():
            raise TypeError(f"x: must be floating-point, got {x.dtype}")
        if x.ndim != 5 or x.shape[2:] != (c.channels, c.height, c.width):
            raise ValueError(f"x: must be (B, F, {c.channels}, {c.height}, {c.width}), got {tuple(x.shape)}")
        if sigma.shape != x.shape[:2]:
            raise ValueError(f"sigma: must be (B, F) = {tuple(x.shape[:2])}, got {tuple(sigma.shape)}")
        if cache is not None and cache.batch != x.shape[0]:
            raise ValueError(f"cache: must be for the batch of x = {x.shape[0]}, got one for {cache.batch}")
        if cache is not None and cache.config != c:
            raise ValueError("cache: must be from new_cache of a denoiser with the same configuration, got another")

    def _check_blocks(self, x: Tensor) -> None:
        n, block = x.shape[1], self.config.frames_per_block
        if n == 0 or n % block:
            raise ValueError(f"x: frames must be a positive multiple of frames_per_block = {block}, got {n}")

    def _check_actions(self, actions: Tensor | None, batch: int, frames: int) -> None:
        c = self.config
        if actions is None:
            return
        if c.num_actions:
            if actions.is_floating_point():
                raise TypeError(f"actions: must be integers, num_actions = {c.num_actions}, got {actions.dtype}")
            want: tuple[int, ...] = (batch, frames)
        elif c.action_dim:
            if not actions.is_floating_point():
                raise TypeError(f"actions: must be floating-point, action_dim = {c.action_dim}, got {actions.dtype}")
            want = (batch, frames, c.action_dim)
        else:
            raise ValueError("actions: must be None for a model with num_actions = 0 and action_dim = 0")
        if actions.shape != want:
            raise ValueError(f"actions: must have shape {want}, got {tuple(actions.shape)}")
