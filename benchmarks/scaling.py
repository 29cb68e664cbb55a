"""Cost of one training frame against the length of its context, for three ways to train on clips.

One clean-and-noisy pass gives T training frames, each with all frames before it as context. One pass per frame (as with
cross-attention to a context) gives one, from T - 1 clean frames and a noisy one. So does a frame of frame stacking,
whose T - 1 context frames are channels of a spatial network's input; T of them are run together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sae_diffusion.model import Denoiser
from sae_diffusion.model.conv import CausalConv
from sae_diffusion.model.frame_pass import FramePass

from . import gate, measure, naive, train_step
from .registry import Case, Contender, Problem


def _cases() -> list[Case]:
    cases = []
    for T in (2, 4, 8, 16, 32, 64):
        cpu = {"preset": "tiny", "T": T, "dtype": "fp32"} if T <= 32 else None
        cuda = {"preset": "lunar-lander", "T": T, "dtype": "bf16"}
        about = f"a training frame with a context of up to {T} frames"
        cases.append(Case("scaling", f"T{T}", about, cuda, cpu, 50 + T // 8, quick=T in (4, 16)))
    return cases


CASES = [
    *_cases(),
    Case("scaling", "smoke", "a second for everything", None, {"preset": "nano", "T": 2, "dtype": "fp32"}, dry=True),
]


def build(shape: Mapping[str, Any], device: str) -> Problem:
    naive.forget()
    config, T, dtype = train_step.config_of(shape), shape["T"], shape["dtype"]
    model = train_step.network(config, device)
    stacked = _stacked(config, T, device)

    def make_inputs(index: int) -> dict[str, torch.Tensor]:
        return train_step.clips(config, 1, T, 1, device, index)

    def backward(loss: torch.Tensor, network: torch.nn.Module) -> None:
        loss.backward()
        network.zero_grad(set_to_none=True)

    def one_pass(batch: Mapping[str, Any]) -> torch.Tensor:
        """(1, T, C, Y, X): the noisy half."""
        x0, sigmas = batch["x0"], batch["sigmas"]
        return model(torch.cat((x0, x0), dim=1), sigmas, batch["actions"])[:, T:]

    def per_frame(network: Denoiser, batch: Mapping[str, Any]) -> torch.Tensor:
        """(1, 1, C, Y, X): the last frame after T - 1 clean ones."""
        sigmas = batch["sigmas"]
        labels = torch.cat((sigmas[:, : T - 1], sigmas[:, -1:]), dim=1)
        return network(batch["x0"], labels, batch["actions"], noisy_copies=0)[:, -1:]

    def stack(batch: Mapping[str, Any]) -> torch.Tensor:
        """(1, C, T, Y, X): T frames, as many as one pass of ours trains, each with T frames as channels."""
        x = batch["x0"].flatten(1, 2).unsqueeze(1).repeat(1, T, 1, 1, 1)
        frames = FramePass(config, "spatial", T, batch["sigmas"][:, T:].log() / 4)
        if config.patch_size > 1:
            x = F.pixel_unshuffle(x, config.patch_size)
        return stacked(x.transpose(1, 2), batch["actions"], frames)

    def launch(forward: Callable[[Mapping[str, Any]], torch.Tensor], network: torch.nn.Module) -> dict[str, Callable]:
        def run(batch: Mapping[str, Any]) -> None:
            with train_step.precision(device, dtype):
                loss = forward(batch).square().mean()
            backward(loss, network)

        return {"fwd+bwd": run}

    contenders = [
        Contender("one clean-and-noisy pass", launch(one_pass, model), "ours", units=T),
        Contender("one pass per frame", launch(lambda b: per_frame(model, b), model)),
        Contender(
            "frame stacking",
            launch(stack, stacked),
            "other",
            "another function: the context enters as channels of the first convolution, and no layer looks back",
            units=T,
        ),
    ]
    made: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def check(contender: Contender, direction: str) -> None:
        batch = make_inputs(0)
        if not made:
            wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
            made["gold"] = per_frame(train_step.network(config, device).double(), wide)
            with train_step.precision(device, dtype), naive.swapped(naive.TWO_PASSES, naive.dense_attention):
                made["eager"] = per_frame(model, batch)
        with train_step.precision(device, dtype):
            out = per_frame(model, batch) if contender.kind == "peer" else one_pass(batch)[:, -1:]
        layers = sum(isinstance(m, CausalConv) for m in model.modules())
        results = {"D": out.to(measure.DTYPES[dtype])}
        gate.hold(contender, results, {"D": made["gold"]}, {"D": made["eager"]}, roundings=4.0 * layers)

    return Problem(make_inputs, contenders, check, dtype, unit="training frame", largest_sets=4)


def _stacked(config, T: int, device: str) -> torch.nn.Module:
    """The network's U-Net with T frames, each once, as input channels and one as output."""
    unet = train_step.network(dataclasses.replace(config, channels=config.channels * T, prior="data"), "cpu").unet
    unet.conv_out = CausalConv(config.level_channels[0], config.patch_channels, config)
    return unet.to(device)
