"""A whole training step: weight normalisation, noise, network, loss, backward, AdamW; ours against library calls."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sae_diffusion.diffusion.loss import denoising_loss
from sae_diffusion.diffusion.noise import NoiseConfig, sample_sigmas
from sae_diffusion.model import Denoiser, ModelConfig
from sae_diffusion.presets import MODELS

from sae_kernels import FrameLayout

from . import attention, convolution, gate, measure, naive
from .registry import Case, Contender, Missing, Problem

# preset, B clips, T frames, K noisy copies; gate_T: frames the gate looks at, because it needs the network in fp64.
CASES = [
    Case("train-step", "lunar-lander", "the lunar-lander preset, 16 frames",
         {"preset": "lunar-lander", "B": 8, "T": 16, "K": 1, "dtype": "bf16", "gate_T": 3},
         {"preset": "lunar-lander", "B": 1, "T": 16, "K": 1, "dtype": "fp32", "gate_T": 3}, 5, True,
         cpu_priority=90),  # six minutes on two cores: when all else is done
    Case("train-step", "counter-strike", "the counter-strike preset, 16 frames",
         {"preset": "counter-strike", "B": 2, "T": 16, "K": 1, "dtype": "bf16", "gate_T": 3}, None, 19),
    Case("train-step", "tiny", "the preset of the demo, 16 frames",
         {"preset": "tiny", "B": 8, "T": 16, "K": 1, "dtype": "bf16", "gate_T": 4},
         {"preset": "tiny", "B": 1, "T": 16, "K": 1, "dtype": "fp32", "gate_T": 4}, 20),
    Case("train-step", "tiny-k3", "the preset of the demo, three noisy copies of one clean clip",
         {"preset": "tiny", "B": 4, "T": 16, "K": 3, "dtype": "bf16", "gate_T": 3},
         {"preset": "tiny", "B": 1, "T": 16, "K": 3, "dtype": "fp32", "gate_T": 3}, 35),
    Case("train-step", "tiny-bf16", "the preset of the demo under autocast, beside itself in fp32", None,
         {"preset": "tiny", "B": 1, "T": 16, "K": 3, "dtype": "bf16", "gate_T": 3}, 36),
    Case("train-step", "smoke", "a second for everything", None,
         {"preset": "nano", "B": 1, "T": 2, "K": 1, "dtype": "fp32", "gate_T": 2}, dry=True),
]  # fmt: skip


# For dry runs and tests.
NANO = ModelConfig(
    height=8, width=8, model_channels=8, channel_mult=(1, 2), blocks_per_level=1, video_attention=(4,), head_dim=8,
    num_actions=2,
)  # fmt: skip


def config_of(shape: Mapping[str, Any]) -> ModelConfig:
    return NANO if shape["preset"] == "nano" else MODELS[shape["preset"]]


def network(config: ModelConfig, device: str) -> Denoiser:
    """A fresh network whose gains are not zero, as after some training; else most of its gradients were."""
    torch.manual_seed(0)
    model = Denoiser(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("emb_gain", "out_gain")):
                parameter.fill_(0.5)
    return model.to(device)


def clips(config: ModelConfig, B: int, T: int, K: int, device: str, index: int) -> dict[str, Any]:
    """Random clips, noise levels and actions."""
    generator = torch.Generator().manual_seed(index)
    x0 = torch.randn(B, T, config.channels, config.height, config.width, generator=generator)
    actions = None
    if config.num_actions:
        actions = torch.randint(0, config.num_actions, (B, T), generator=generator).to(device)
    sigmas = sample_sigmas(NoiseConfig(), B, T, K, generator)
    return {"x0": x0.to(device), "sigmas": sigmas.to(device), "actions": actions, "K": K, "seed": index}


def precision(device: str, dtype: str) -> contextlib.AbstractContextManager:
    """Autocast for bf16 and fp16, nothing for the rest."""
    if dtype in ("bf16", "fp16"):
        return torch.autocast(device, measure.DTYPES[dtype])
    return contextlib.nullcontext()


def loss_of(model: Denoiser, batch: Mapping[str, Any], dtype: str) -> torch.Tensor:
    with precision(batch["x0"].device.type, dtype):
        return denoising_loss(
            model,
            batch["x0"],
            batch["actions"],
            batch["sigmas"],
            noisy_copies=batch["K"],
            seed=batch["seed"],
            sigma_data=model.config.sigma_data,
            prior=model.prior,
        ).mean()


def build(shape: Mapping[str, Any], device: str) -> Problem:
    naive.forget()
    config = config_of(shape)
    B, T, K, dtype = (shape[key] for key in ("B", "T", "K", "dtype"))
    model = network(config, device)
    # The contenders share the weights; steps this small leave them as they are.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.99), fused=device == "cuda")

    def step(batch: Mapping[str, Any], dtype: str = dtype) -> None:
        model.normalize_weights_()
        loss_of(model, batch, dtype).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def inside(conv: Callable, attend: Callable) -> Callable[[Mapping[str, Any]], None]:
        def run(batch: Mapping[str, Any]) -> None:
            with naive.swapped(conv, attend):
                step(batch)

        return run

    contenders = [Contender("sae_kernels", {"step": step}, "ours")]
    for name, route in naive.routes(device).items():
        contenders.append(Contender(name, {"step": inside(*route)}, compiled="Flex" in name))
    if device == "cpu" and dtype != "fp32":
        contenders.append(Contender("the same, fp32", {"step": lambda batch: step(batch, "fp32")}))
    missing = []
    if device == "cpu":
        reason = "PyTorch has no backward pass for it on the CPU"
        missing.append(Missing("reference sequence, FlexAttention", reason))
    flops = {"step": work(model, clips(config, B, T, K, device, 0), dtype)}
    return Problem(
        lambda i: clips(config, B, T, K, device, i),
        contenders,
        _check(config, shape, device),
        dtype,
        flops,
        missing=missing,
        unit="step",
        largest_sets=4,
    )


def work(model: Denoiser, batch: Mapping[str, Any], dtype: str) -> int:
    """Operations of the step's convolutions and frame attention, forward and backward; the rest is some percent."""
    total = 0

    def conv(x, weight, layout: FrameLayout, **_):
        nonlocal total
        shape = {"B": x.shape[0], "I": x.shape[1], "O": weight.shape[0], "size": 1}
        per_pixel = convolution.work(shape, layout)["fwd+bwd"]
        total += per_pixel * x.shape[3] * x.shape[4]
        return x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])

    def attend(q, k, v, layout: FrameLayout, **_):
        nonlocal total
        total += attention.work(q.shape[0] * q.shape[1] * layout.attended_pairs, q.shape[3])["fwd+bwd"]
        return torch.zeros_like(q)

    with torch.no_grad(), naive.swapped(conv, attend):
        loss_of(model, batch, dtype)
    return total


def _check(config: ModelConfig, shape: Mapping[str, Any], device: str) -> Callable[[Contender, str], None]:
    """Loss and gradients of one clip of gate_T frames.

    Gold is the network on separate past taps and a dense mask in fp64, eager the same at its dtype. All gradients
    as one vector are held to the budget, with four roundings for each convolution. The loss, each weight's gradient,
    and those of all gains together (a single sum may cancel and keep few digits) are held to half the digits.
    """
    made: dict[str, Any] = {}
    dtype = measure.DTYPES[shape["dtype"]]

    def gradients(model: Denoiser, batch: Mapping[str, Any], precision: str) -> dict[str, torch.Tensor]:
        loss = loss_of(model, batch, precision)
        names, parameters = zip(*model.named_parameters())
        found = torch.autograd.grad(loss, parameters)
        return {"loss": loss.detach(), **dict(zip(names, found))}

    def as_one(results: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([g.flatten() for name, g in results.items() if name != "loss"])

    def pooled(results: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        small = [g.flatten() for name, g in results.items() if name != "loss" and g.numel() <= 2]
        large = {name: g for name, g in results.items() if name == "loss" or g.numel() > 2}
        return large | {"gains": torch.cat(small)}

    def check(contender: Contender, direction: str) -> None:
        if not made:
            model = network(config, device)
            batch = clips(config, 1, shape["gate_T"], shape["K"], device, 0)
            wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
            with naive.swapped(naive.TWO_PASSES, naive.dense_attention):
                made["gold"] = gradients(copy.deepcopy(model).double(), wide, "fp64")
                made["eager"] = gradients(model, batch, shape["dtype"])
            made["model"], made["batch"] = model, batch
        route = naive.routes(device).get(contender.name)
        with naive.swapped(*route) if route else contextlib.nullcontext():
            results = gradients(made["model"], made["batch"], shape["dtype"])
        gold, eager = made["gold"], made["eager"]
        parts, gold_parts = pooled(results), pooled(gold)
        for name, part in parts.items():
            gate.assert_half_the_digits(part.to(dtype), gold_parts[name], name)
        if contender.kind == "ours":
            layers = sum(isinstance(m, naive.model_conv.CausalConv) for m in made["model"].modules())
            name = "gradients"
            gate.hold(
                contender,
                {name: as_one(results).to(dtype)},
                {name: as_one(gold)},
                {name: as_one(eager)},
                roundings=4.0 * layers,
            )

    return check
