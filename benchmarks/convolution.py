"""causal_conv3d against what libraries offer: every stream convolved by itself, or the reference network's sequence.

B batch, T frames, F = (1 + K) T, I and O channels in and out, kt x 3 x 3 taps, Y, X pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from sae_kernels import FrameLayout, causal_conv3d
from sae_kernels.causal_conv3d import configs, ops, reference

from . import gate, measure
from .gate import Inputs
from .registry import Case, Contender, Problem

# The frames before frame 0, as in the network.
PAD = 1.0
KT = 3


def _case(name: str, about: str, *, cpu: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """`cpu` holds what differs on the CPU, None where the case is for a GPU only."""
    extra = {key: options.pop(key) for key in ("priority", "quick", "dry") if key in options}
    cuda = {"dtype": "bf16", "T": 16, **options}
    smaller = None if cpu is None else cuda | {"dtype": "fp32", "B": 1} | dict(cpu)
    return Case("convolution", name, about, cuda=cuda, cpu=smaller, **extra)


# size: Y = X. I, O channels. gated: per-frame scales on past and last taps. compile: also a compiled peer, which takes
# half a minute on a CPU. The reference trains LunarLander with 8 clips, Counter-Strike with 2.
CASES = [
    _case("lunar-lander-16", "16x16 level of the lunar-lander network", size=16, I=128, O=128, B=8,
          cpu={"compile": True}, priority=3, quick=True),
    _case("counter-strike-16", "16x16 level of the counter-strike network", size=16, I=256, O=256, B=2, priority=3,
          quick=True),
    _case("lunar-lander-32", "32x32 level of the lunar-lander network", size=32, I=64, O=64, B=8, cpu={},
          priority=13),
    _case("lunar-lander-4", "4x4 level of the lunar-lander network", size=4, I=256, O=256, B=8, cpu={}, priority=14,
          quick=True),
    _case("lunar-lander-16-gated", "the same with gated mixing: a scale for past and present of each frame", size=16,
          I=128, O=128, B=8, gated=True, cpu={"compile": True}, priority=15),
    _case("lunar-lander-16-up", "first decoder block of the 16x16 level", size=16, I=256, O=128, B=8, priority=30),
    _case("lunar-lander-8", "8x8 level of the lunar-lander network", size=8, I=128, O=128, B=8, priority=31),
    _case("counter-strike-32", "32x32 level of the counter-strike network", size=32, I=128, O=128, B=2, gated=True,
          priority=32),
    _case("counter-strike-8", "8x8 level of the counter-strike network", size=8, I=512, O=512, B=2, gated=True,
          priority=16),
    _case("counter-strike-4", "4x4 level of the counter-strike network", size=4, I=512, O=512, B=2, gated=True,
          priority=33),
    _case("lunar-lander-16-k4", "four noisy copies of one clean clip", size=16, I=128, O=128, B=4, K=4, priority=34),
    _case("smoke", "milliseconds for everything", size=5, I=4, O=6, B=2, T=3, cpu={"B": 2}, dry=True),
]  # fmt: skip


def build(shape: Mapping[str, Any], device: str) -> Problem:
    layout = FrameLayout(shape["T"], shape["size"] ** 2, noisy_copies=shape.get("K", 1))
    dtype, gated = measure.DTYPES[shape["dtype"]], shape.get("gated", False)
    B, I, O, size, frames = shape["B"], shape["I"], shape["O"], shape["size"], layout.total_frames
    if device == "cuda":
        torch.backends.cudnn.benchmark = True  # the peers' best algorithms

    def make_inputs(index: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(index)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=device)

        def video(channels: int) -> torch.Tensor:
            return draw(B, frames, size, size, channels).to(dtype).permute(0, 4, 1, 2, 3)

        weight = (draw(O, I, KT, 3, 3) / (I * KT * 9) ** 0.5).to(dtype)
        tensors = [video(I), weight]
        if gated:
            g = torch.rand(B, frames, generator=generator, device=device)
            norm = torch.hypot(1 - g, g)
            tensors += [(g / norm).to(dtype), ((1 - g) / norm).to(dtype)]
        return Inputs(tuple(t.requires_grad_() for t in tensors), video(O))

    contenders = gate.ours(ops, device, lambda impl: gate.directions(bind(_ours(impl), layout)))
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        launch = gate.directions(bind(_ours("triton"), layout))
        for name, change in (("pointers", {"boxes": False}), ("boxes", {"boxes": True}), ("one sum", {"parts": 0})):
            configured = {key: _with_configs(call, **change) for key, call in launch.items()}
            note = f"triton with {name} in forward and data gradient"
            contenders.append(Contender(f"sae_kernels ({name})", configured, "ours", note, optional=True))
    for name, function in (("two passes", two_passes), ("reference sequence", reference_sequence)):
        launch = gate.directions(bind(function, layout))
        contenders.append(Contender(name, launch, note="channels_last_3d"))
        contenders.append(Contender(f"{name}, NCHW frames", launch, adapt=_frames_contiguous))
    if device == "cuda" or shape.get("compile"):
        # Bound first: Dynamo then specialises on the layout's integers.
        compiled = torch.compile(bind(reference_sequence, layout), dynamic=False)
        contenders.append(Contender("reference sequence, compiled", gate.directions(compiled), compiled=True))
    contenders.append(_plain(layout, shape, device, dtype))
    flops, moved = work(shape, layout), _bytes(shape, layout, dtype)
    return Problem(make_inputs, contenders, _check(make_inputs, layout), shape["dtype"], flops, moved)


def bind(function: Callable[..., torch.Tensor], layout: FrameLayout) -> Callable[..., torch.Tensor]:
    return lambda x, weight, past_scale=None, last_scale=None: function(x, weight, layout, past_scale, last_scale)


def work(shape: Mapping[str, Any], layout: FrameLayout) -> dict[str, int]:
    """(kt - 1) T + F tap passes of 3 x 3 taps forward; data and weight gradient cost as much again, each."""
    passes = (KT - 1) * layout.frames + layout.total_frames
    forward = 2 * passes * 9 * shape["B"] * shape["I"] * shape["O"] * shape["size"] ** 2
    return {"fwd": forward, "fwd+bwd": 3 * forward}


def _bytes(shape: Mapping[str, Any], layout: FrameLayout, dtype: torch.dtype) -> dict[str, int]:
    """Forward reads x and weight and writes y; backward reads x, weight and dy and writes dx and dweight."""
    pixels = shape["B"] * layout.total_frames * shape["size"] ** 2
    x, y, weight = pixels * shape["I"], pixels * shape["O"], shape["I"] * shape["O"] * KT * 9
    forward = (x + y + weight) * dtype.itemsize
    return {"fwd": forward, "fwd+bwd": forward + (2 * x + y + 2 * weight) * dtype.itemsize}


def _check(make_inputs: Callable[[int], Inputs], layout: FrameLayout) -> Callable[[Contender, str], None]:
    """Compares the last batch item, all gradients included: the gradient handed in is zero for the others."""
    made: dict[str, Any] = {}
    names = ("out", "dx", "dweight", "dpast_scale", "dlast_scale")

    def last_item(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if name == "dweight" else tensor[-1:]

    def check(contender: Contender, direction: str) -> None:
        if not made:
            inputs = make_inputs(0)
            x, weight, *scales = inputs.tensors
            inputs.grad[:-1] = 0
            launch = gate.directions(
                lambda x, w, p=None, s=None: reference.causal_conv3d(x, w, layout, p, s, None, PAD)
            )["fwd+bwd"]
            for key, cast in (
                ("eager", lambda t: t),
                ("gold", torch.Tensor.double),
                ("absolute", lambda t: t.double().abs()),
            ):
                given = [cast(t.detach()).requires_grad_() for t in (x[-1:], weight, *(s[-1:] for s in scales))]
                made[key] = dict(zip(names, launch(Inputs(tuple(given), cast(inputs.grad[-1:])))))
            made["roundings"] = gate.roundings_of_sums(made["gold"], made["absolute"], x.dtype)
            made["inputs"] = inputs
        given = made["inputs"] if contender.adapt is None else contender.adapt(made["inputs"])
        results = dict(zip(names, contender.launch[direction](given)))
        compared = {n: last_item(n, r) for n, r in results.items()}
        gate.hold(contender, compared, made["gold"], made["eager"], roundings=made["roundings"])

    return check


# --- the contenders: (x, weight, layout, past_scale, last_scale) -> y


def _ours(impl: str) -> Callable[..., torch.Tensor]:
    def run(x, weight, layout, past_scale, last_scale):
        return causal_conv3d(x, weight, layout, past_scale=past_scale, last_scale=last_scale, pad_value=PAD, impl=impl)

    return run


def _with_configs(call: Callable[[Inputs], Any], **change: Any) -> Callable[[Inputs], Any]:
    """The call with every configuration of forward and data gradient changed."""

    @functools.cache
    def changed(architecture, dtype, reduced, produced, pixels, direction):
        config = choose(architecture, dtype, reduced, produced, pixels, direction)
        return dataclasses.replace(config, **change) if direction in ("fwd", "dgrad", "dgrad_dot") else config

    def run(inputs: Inputs) -> Any:
        configs.conv_config = changed
        try:
            return call(inputs)
        finally:
            configs.conv_config = choose

    choose = configs.conv_config
    return run


def two_passes(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: FrameLayout,
    past_scale: torch.Tensor | None = None,
    last_scale: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    pad_value: float = PAD,
) -> torch.Tensor:
    """Every stream runs all its taps over the clean past by itself: kt (1 + K) T tap passes."""
    padded = _padded(x, weight, layout, history, pad_value)
    outs = []
    for stream in range(layout.streams):
        span = slice(stream * layout.frames, (stream + 1) * layout.frames)
        clean = span.start == layout.clean_start
        if clean and past_scale is None:
            outs.append(F.conv3d(padded, weight, padding=(0, 1, 1)))
            continue
        past = F.conv3d(padded[:, :, :-1], weight[:, :, :-1], padding=(0, 1, 1))
        scales = (None, None) if past_scale is None else (past_scale[:, span], last_scale[:, span])
        outs.append(_mix(_last_taps(x[:, :, span], weight), past, *scales))
    return torch.cat(outs, dim=2)


def reference_sequence(
    x: torch.Tensor,
    weight: torch.Tensor,
    layout: FrameLayout,
    past_scale: torch.Tensor | None = None,
    last_scale: torch.Tensor | None = None,
    history: torch.Tensor | None = None,
    pad_value: float = PAD,
) -> torch.Tensor:
    """What the reference network does: conv2d over all frames, conv3d over the clean ones, stack, weighted sum."""
    padded = _padded(x, weight, layout, history, pad_value)
    past = F.conv3d(padded[:, :, :-1], weight[:, :, :-1], padding=(0, 1, 1))
    past = torch.stack([past] * layout.streams, dim=2).flatten(2, 3)
    return _mix(_last_taps(x, weight), past, past_scale, last_scale)


def _padded(x, weight, layout, history, pad_value) -> torch.Tensor:
    """The clean stream after kt - 1 earlier frames."""
    clean = x[:, :, layout.clean_start : layout.clean_start + layout.frames]
    if history is None:
        history = torch.full_like(clean[:, :, :1], pad_value).repeat(1, 1, weight.shape[2] - 1, 1, 1)
    return torch.cat((history, clean), dim=2)


def _last_taps(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    images = x.transpose(1, 2).flatten(0, 1)
    return F.conv2d(images, weight[:, :, -1], padding=1).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _mix(last, past, past_scale, last_scale) -> torch.Tensor:
    if past_scale is None:
        return last + past
    return last_scale[:, None, :, None, None] * last + past_scale[:, None, :, None, None] * past


def _frames_contiguous(inputs: Inputs) -> Inputs:
    """(B, F, C, Y, X) in memory, the layout the reference keeps its activations in."""

    def convert(t: torch.Tensor) -> torch.Tensor:
        if t.ndim != 5 or t.shape[2] == KT:
            return t
        return t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(t.requires_grad)

    return Inputs(tuple(map(convert, inputs.tensors)), convert(inputs.grad))


def _plain(layout, shape, device, dtype) -> Contender:
    """The yardstick: a plain causal conv3d of every stream over its own past, padded beforehand."""
    B, I, O, size, T = shape["B"], shape["I"], shape["O"], shape["size"], layout.frames
    sets: list[Inputs] = []

    def own_inputs() -> Inputs:
        while len(sets) < 2:
            x, grad = (
                torch.randn(B * layout.streams, t, size, size, c, device=device).to(dtype).permute(0, 4, 1, 2, 3)
                for t, c in ((T + KT - 1, I), (T, O))
            )
            weight = (torch.randn(O, I, KT, 3, 3, device=device) / (I * KT * 9) ** 0.5).to(dtype)
            sets.append(Inputs((x.requires_grad_(), weight.requires_grad_()), grad))
        sets.append(sets.pop(0))
        return sets[0]

    launch = gate.directions(lambda x, w: F.conv3d(x, w, padding=(0, 1, 1)))
    own = {key: lambda _, call=call: call(own_inputs()) for key, call in launch.items()}
    note = "another function: each stream over its own past, kt (1 + K) T tap passes in one call, padding not timed"
    passes = (KT - 1) * T + layout.total_frames
    flops = {key: n * KT * layout.total_frames // passes for key, n in work(shape, layout).items()}
    return Contender("plain conv3d on every stream", own, "other", note, flops=flops, bytes={})
