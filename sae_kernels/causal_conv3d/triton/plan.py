"""The launches of forward and backward as data: operands, units, boxes, parts, grids."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._launch import Launch
from .. import configs as defaults
from .backward_kernels import causal_conv3d_streams_kernel
from .forward_kernels import causal_conv3d_combine_kernel, causal_conv3d_kernel
from .primitives import AHEAD, BACK
from .weight_kernels import causal_conv3d_weight_kernel


def plan_forward(
    x, weight, past_scale, last_scale, history, pad_value, layout, architecture, config=None, keep_past=True
) -> tuple[list[Launch], torch.Tensor, torch.Tensor | None]:
    """(the launches of `forward`, out, past) for an architecture; tensors may be meta tensors."""
    x, weight = channels_last(x), _packed(weight)
    B, _, _, Y, X = x.shape
    Cout, kt = weight.shape[0], weight.shape[2]
    T = layout.frames
    out = _video(x, (B, Cout, layout.total_frames, Y, X))
    past = _video(x, (B, Cout, T, Y, X)) if keep_past and kt > 1 else None
    job = Pass(
        "fwd", x.narrow(2, layout.clean_start, T), x, weight, T, history=_history(x, history, pad_value, kt),
        streams=layout.streams, past_scale=past_scale, last_scale=last_scale, out=out, past=past,
    )  # fmt: skip
    return _convolution(job, architecture, config), out, past


def plan_backward(
    grad, x, weight, past_scale, last_scale, history, past, pad_value, layout, mask, architecture, configs=None
) -> tuple[
    list[Launch],
    torch.Tensor | None,
    list[torch.Tensor],
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor | None,
]:
    """(launches, grad_x, fp32 parts of grad_weight, of past_scale's gradient, of last_scale's, grad_history).

    `configs` maps directions to configurations that replace the chosen ones.
    """
    need_x, need_weight, need_past_scale, need_last_scale, need_history = mask
    configs = configs or {}
    x, grad, weight = channels_last(x), channels_last(grad), _packed(weight)
    B, Cin, F, Y, X = x.shape
    Cout, kt = weight.shape[0], weight.shape[2]
    T, streams = layout.frames, layout.streams
    need_history = need_history and history is not None
    source = _history(x, history, pad_value, kt)
    clean = x.narrow(2, layout.clean_start, T)
    launches = []
    if kt > 1 and need_past_scale and past is None:
        past = _video(x, (B, Cout, T, Y, X))
        job = Pass("fwd", clean, None, weight, T, history=source, past=past)
        launches += _convolution(job, architecture, configs.get("fwd"))
    need_sum = kt > 1 and (need_x or need_weight or need_history)
    total, scaled, past_dot = grad, grad, None
    if need_sum and (streams > 1 or past_scale is not None):
        total = _video(x, (B, Cout, T, Y, X))
    if need_weight and last_scale is not None:
        scaled = _video(x, grad.shape)
    if total is not grad or scaled is not grad or (kt > 1 and need_past_scale):
        launch, past_dot = _streams_pass(
            grad, past if kt > 1 and need_past_scale else None, past_scale, last_scale,
            total if total is not grad else None, scaled if scaled is not grad else None,
            streams=streams, frames=T, architecture=architecture, config=configs.get("streams"),
        )  # fmt: skip
        launches.append(launch)

    grad_x = _video(x, x.shape) if need_x else None
    grad_history = _video(x, (B, Cin, kt - 1, Y, X)) if need_history else None
    last_dot = None
    if need_x or need_last_scale:
        job = Pass(
            "dgrad", total if need_x and kt > 1 else None, grad, weight, T,
            streams=streams, clean=layout.clean_start // T, last_scale=last_scale,
            dot_with=x if need_last_scale else None, out=grad_x,
        )  # fmt: skip
        launches += _convolution(job, architecture, configs.get("dgrad"))
        last_dot = launches[-1].args["dot_ptr"].unflatten(1, (B, F, Y * X)) if need_last_scale else None
    if grad_history is not None and kt > 1:
        job = Pass("dgrad", total, None, weight, kt - 1, first_frame=1 - kt, past=grad_history)
        launches += _convolution(job, architecture, configs.get("dgrad"))
    parts: list[torch.Tensor] = []
    if need_weight:
        if kt > 1:
            launches.append(_weight_gradient(total, clean, source, weight, parts, True, architecture, configs))
        launches.append(_weight_gradient(scaled, x, None, weight, parts, False, architecture, configs))
    return launches, grad_x, parts, past_dot, last_dot, grad_history


def plan_past_term(history, weight, architecture, config=None) -> tuple[list[Launch], torch.Tensor]:
    """(launches, past (B, Cout, 1, Y, X))."""
    history, weight = channels_last(history), _packed(weight)
    past = _video(history, (history.shape[0], weight.shape[0], 1, *history.shape[3:]))
    job = Pass("fwd", history, None, weight, 1, first_frame=history.shape[2], past=past)
    return _convolution(job, architecture, config), past


def plan_past_term_backward(
    grad, history, weight, mask, architecture, configs=None
) -> tuple[list[Launch], torch.Tensor | None, list[torch.Tensor]]:
    """(launches, grad_history, fp32 parts of grad_weight); grad is (B, Cout, 1, Y, X)."""
    configs = configs or {}
    history, grad, weight = channels_last(history), channels_last(grad), _packed(weight)
    launches, grad_history = [], None
    parts: list[torch.Tensor] = []
    if mask[0]:
        grad_history = _video(history, history.shape)
        frames = history.shape[2]
        job = Pass("dgrad", grad, None, weight, frames, first_frame=-frames, past=grad_history)
        launches += _convolution(job, architecture, configs.get("dgrad"))
    if mask[1]:
        launches.append(_weight_gradient(grad, history, history, weight, parts, True, architecture, configs))
    return launches, grad_history, parts


@dataclass(frozen=True)
class Pass:
    """What the main kernel reads, combines and writes: past taps of a past_source, last taps of a source."""

    direction: str  # "fwd" or "dgrad"
    past_source: torch.Tensor | None
    source: torch.Tensor | None
    weight: torch.Tensor
    frames: int
    history: torch.Tensor | None = None
    first_frame: int = 0
    streams: int = 0
    clean: int = 0
    past_scale: torch.Tensor | None = None
    last_scale: torch.Tensor | None = None
    dot_with: torch.Tensor | None = None
    out: torch.Tensor | None = None
    past: torch.Tensor | None = None


def _convolution(job: Pass, architecture: int, config: defaults.ConvConfig | None = None) -> list[Launch]:
    """The main kernel, and the one that combines its parts where programs share a tile."""
    direction, frames, weight, streams = job.direction, job.frames, job.weight, job.streams
    past_source, source, history, dot_with = job.past_source, job.source, job.history, job.dot_with
    past_scale, last_scale, out, past = job.past_scale, job.last_scale, job.out, job.past
    like = past_source if source is None else source
    assert like is not None
    none = like.new_empty(0)
    B, K, _, Y, X = like.shape
    Cout, Cin, kt, ky, kx = weight.shape
    back = direction == "fwd"
    N = Cout if back else Cin
    has_past = past_source is not None and kt > 1
    videos: dict[str, torch.Tensor] = {
        "p": past_source if has_past and past_source is not None else like,
        "h": like if history is None else history,
        "x": like,
        "z": like if dot_with is None else dot_with,
    }
    unit_k, unit_n = _unit(K, *[videos[name] for name in "phx"]), _unit(N, dtype=like.dtype)
    unit_z = _unit(N, videos["z"])
    # The packed weight has Cin innermost, which is reduced forward and produced backward.
    unit_w = unit_k if back else unit_n
    config = config or defaults.conv_config(
        architecture, like.dtype, K, N, Y * X, direction if dot_with is None else "dgrad_dot"
    )
    rows = _rows_of(B, frames, Y, X, streams)
    box = None
    used = [videos["p"]] * has_past + [like] * (source is not None)
    aligned = unit_k > 1 and unit_w > 1 and weight.data_ptr() % 16 == 0
    if config.boxes and aligned and all(map(_has_strides, used)):
        box = _box(config.block_m, frames, Y, X)
    if config.boxes and box is None and dot_with is not None:
        # Addresses take the registers that a tile of z needs.
        config = dataclasses.replace(config, block_n=max(16, config.block_n // 2))
    tiles_m = B * _boxes(box, frames, Y, X) if box else _ceil(rows, config.block_m)
    tiles_n = _ceil(N, config.block_n)
    past_parts = has_past * (config.parts * (kt - 1) or 1)
    last_parts = (source is not None) * (config.parts or 1)
    spread = config.parts > 0 and defaults.conv_spread(
        architecture, tiles_m * tiles_n, Y * X, past_parts + streams * last_parts, dot_with is not None
    )
    units = past_parts + streams * last_parts if spread else 1
    args = {
        "p_ptr": videos["p"] if has_past else none,
        "h_ptr": none if history is None else history,
        "x_ptr": none if source is None else source,
        "w_ptr": weight,
        "z_ptr": none if dot_with is None else dot_with,
        "past_scale_ptr": none if past_scale is None else past_scale.contiguous(),
        "last_scale_ptr": none if last_scale is None else last_scale.contiguous(),
        "out_ptr": none if out is None else out,
        "past_ptr": none if past is None else past,
        "dot_ptr": none if dot_with is None else like.new_empty(tiles_n, rows * streams, dtype=torch.float32),
        "part_ptr": like.new_empty(units, rows, N, dtype=torch.float32) if spread else none,
        "p_box": _video_boxes(videos["p"], box, config.block_k) if box and has_past else none,
        "x_box": _video_boxes(like, box, config.block_k) if box and source is not None else none,
        "w_box": _weight_boxes(weight, config, back) if box else none,
        **_strides("p", videos["p"], unit_k), **_strides("h", videos["h"], unit_k),
        **_strides("x", videos["x"], unit_k), **_strides("z", videos["z"], unit_z),
        "stride_wo": kt * ky * kx * Cin // unit_w, "stride_wt": Cin // unit_w,
        "rows": rows, "frames": frames, "first_frame": job.first_frame, "source_frames": videos["p"].shape[2],
        "Y": Y, "X": X, "K": K // unit_k, "N": N // unit_n, "streams": streams, "clean": job.clean,
        "past_parts": past_parts, "last_parts": max(last_parts, 1),
        "KT": kt, "KY": ky, "KX": kx,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        **dict(zip(("BF", "BY", "BX"), box or (0, 0, 0), strict=True)),
        "UNIT_K": unit_k, "UNIT_N": unit_n, "UNIT_Z": unit_z,
        "DIRECTION": BACK.value if back else AHEAD.value,
        "PAST": has_past, "LAST": source is not None, "STORE_PAST": past is not None,
        "HAS_PAST_SCALE": past_scale is not None, "HAS_LAST_SCALE": last_scale is not None,
        "STORE_OUT": out is not None, "DOT": dot_with is not None, "HAS_HISTORY": has_past and history is not None,
        "PARTS": config.parts > 0, "SPREAD": spread,
        "WHOLE": K % config.block_k == 0 and N % config.block_n == 0,
        "WIDE": _wide(*videos.values(), weight, out, past), "PRECISION": _precision(like.dtype),
    }  # fmt: skip
    launches = [_launch(causal_conv3d_kernel, (tiles_m * tiles_n, units), args, config)]
    if spread:
        launches[0].args.update(dict.fromkeys(("z_ptr", "out_ptr", "past_ptr", "dot_ptr"), none))
        # The same columns: the dot products of a row are one sum for each tile of them.
        combine = args | {"BM": 32}
        programs = _ceil(rows, combine["BM"]) * tiles_n
        launches.append(_launch(causal_conv3d_combine_kernel, (programs, 1), combine, config))
    return launches


# Pixels in boxes for each pixel of a clip up to which boxes are taken: what they save is arithmetic of addresses and
# masks, not products (`configs` has the counts). The batch does not enter: no row's result may depend on it.
BOX_WASTE = 1.125


def _box(pixels: int, frames: int, Y: int, X: int) -> tuple[int, int, int] | None:
    """The box of a tile of `pixels`; None if boxes would be too much border."""
    box = defaults.conv_box(pixels, Y, X)
    return box if _boxes(box, frames, Y, X) * pixels <= BOX_WASTE * frames * Y * X else None


def _boxes(box: tuple[int, int, int], frames: int, Y: int, X: int) -> int:
    """Boxes that cover a clip."""
    return _ceil(frames, box[0]) * _ceil(Y, box[1]) * _ceil(X, box[2])


def _has_strides(video: torch.Tensor) -> bool:
    """Whether a descriptor can address the video: no dimension has stride 0."""
    return all(stride > 0 for size, stride in zip(video.shape, video.stride(), strict=True) if size > 1)


def _video_boxes(video: torch.Tensor, box: tuple[int, int, int], channels: int) -> TensorDescriptor:
    """The video as (B, F, Y, X, C), in boxes of one batch item."""
    order = (0, 2, 3, 4)
    unit = 16 // video.element_size()
    strides = [video.stride(dim) if video.shape[dim] > 1 else unit for dim in order]
    shape = [video.shape[dim] for dim in order]
    return TensorDescriptor(video, [*shape, video.shape[1]], [*strides, 1], [1, *box, channels])


def _weight_boxes(weight: torch.Tensor, config: defaults.ConvConfig, back: bool) -> TensorDescriptor:
    """The packed weight as (Cout, taps x Cin)."""
    Cout, columns = weight.shape[0], weight[0].numel()
    block = [config.block_n, config.block_k] if back else [config.block_k, config.block_n]
    return TensorDescriptor(weight, [Cout, columns], [columns, 1], block)


def _streams_pass(
    grad, past, past_scale, last_scale, total, scaled, *, streams, frames, architecture, config=None
) -> tuple[Launch, torch.Tensor | None]:
    none = grad.new_empty(0)
    B, N, F, Y, X = grad.shape
    config = config or defaults.conv_config(architecture, grad.dtype, N, N, Y * X, "streams")
    rows = _rows_of(B, frames, Y, X, streams)
    tiles_n = _ceil(N, config.block_n)
    dot = None if past is None else grad.new_empty(tiles_n, rows * streams, dtype=torch.float32)
    unit_k, unit_n = _unit(N, grad), _unit(N, dtype=grad.dtype)
    args = {
        "g_ptr": grad, "past_ptr": none if past is None else past,
        "past_scale_ptr": none if past_scale is None else past_scale.contiguous(),
        "last_scale_ptr": none if scaled is None else last_scale.contiguous(),
        "sum_ptr": none if total is None else total, "scaled_ptr": none if scaled is None else scaled,
        "dot_ptr": none if dot is None else dot,
        **_strides("g", grad, unit_k),
        "rows": rows, "frames": frames, "Y": Y, "X": X, "N": N // unit_n, "streams": streams,
        "BM": config.block_m, "BN": config.block_n, "UNIT_K": unit_k, "UNIT_N": unit_n,
        "HAS_PAST_SCALE": past_scale is not None, "SUM": total is not None, "SCALED": scaled is not None,
        "DOT": dot is not None, "WIDE": _wide(grad, past, total, scaled),
    }  # fmt: skip
    launch = _launch(causal_conv3d_streams_kernel, (_ceil(rows, config.block_m) * tiles_n,), args, config)
    return launch, None if dot is None else dot.unflatten(1, (B, F, Y * X))


def _weight_gradient(grad, source, history, weight, parts, past, architecture, configs) -> Launch:
    """Past taps or last taps; appends its fp32 buffer (splits, Cout, taps, Cin) to parts."""
    B, _, frames, Y, X = grad.shape
    Cout, Cin, kt, ky, kx = weight.shape
    history = source if history is None else history
    unit_k, unit_n = _unit(Cout, grad), _unit(Cin, source, history)
    config = configs.get("wgrad") or defaults.conv_config(architecture, grad.dtype, Cout, Cin, Y * X, "wgrad")
    rows = _rows_of(B, frames, Y, X)
    taps = ky * kx * ((kt - 1) if past else 1)
    programs = taps * _ceil(Cout, config.block_m) * _ceil(Cin, config.block_n)
    blocks = _ceil(rows, config.block_k)
    box = None
    if config.boxes and unit_k > 1 and unit_n > 1 and _has_strides(grad) and _has_strides(source):
        box = _box(config.block_k, frames, Y, X)
    blocks = B * _boxes(box, frames, Y, X) if box else blocks
    # Enough programs for a large GPU, but no part so short that writing and reading it costs more.
    splits = max(1, min(_ceil(WEIGHT_PROGRAMS, programs), blocks // SPLIT_BLOCKS))
    chunk = _ceil(blocks, splits)
    splits = _ceil(blocks, chunk)
    part = grad.new_empty(splits, Cout, taps, Cin, dtype=torch.float32)
    parts.append(part)
    args = {
        "g_ptr": grad, "x_ptr": source, "h_ptr": history, "part_ptr": part,
        "g_box": _video_boxes(grad, box, config.block_m) if box else grad,
        "x_box": _video_boxes(source, box, config.block_n) if box else grad,
        **_strides("g", grad, unit_k), **_strides("x", source, unit_n), **_strides("h", history, unit_n),
        "rows": rows, "frames": frames, "Y": Y, "X": X, "K": Cout // unit_k, "N": Cin // unit_n,
        "chunk": chunk if box else chunk * config.block_k,
        "KT": kt, "KY": ky, "KX": kx, "PAST": past,
        "BM": config.block_m, "BN": config.block_n, "BK": config.block_k,
        **dict(zip(("BF", "BY", "BX"), box or (0, 0, 0), strict=True)), "UNIT_K": unit_k, "UNIT_N": unit_n,
        "WHOLE": Cout % config.block_m == 0 and Cin % config.block_n == 0,
        "WIDE": _wide(grad, source, history), "PRECISION": _precision(grad.dtype),
    }  # fmt: skip
    return _launch(causal_conv3d_weight_kernel, (splits * programs,), args, config)


# Programs that a launch of the weight gradient aims at: four for each multiprocessor of an H100.
WEIGHT_PROGRAMS = 528
SPLIT_BLOCKS = 4  # least tiles of pixels in a part


def channels_last(video: torch.Tensor) -> torch.Tensor:
    """The video with its channels adjacent, itself if they are: any other strides will do."""
    if video.stride(1) == 1 or video.shape[1] == 1:
        return video
    return video.contiguous(memory_format=torch.channels_last_3d)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """The weight in memory as (Cout, kt, ky, kx, Cin)."""
    return weight.contiguous(memory_format=torch.channels_last_3d)


def _history(x: torch.Tensor, history: torch.Tensor | None, pad_value: float, kt: int) -> torch.Tensor | None:
    """The kt - 1 frames before frame 0; without history one row of channels, at stride 0 all of them."""
    if kt == 1:
        return None
    if history is not None:
        return channels_last(history)
    B, Cin, _, Y, X = x.shape
    return x.new_full((1, Cin, 1, 1, 1), pad_value).expand(B, Cin, kt - 1, Y, X)


def _video(like: torch.Tensor, shape) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def _unit(channels: int, *videos: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    """Elements in 16 bytes if every pixel of the videos begins at a multiple of that, else 1.

    Sizes and strides handed over in this unit tell the compiler the alignment, whatever the sizes: no size selects
    another binary.
    """
    unit = 16 // (dtype or videos[0].dtype).itemsize
    strides = [s for v in videos for dim, s in enumerate(v.stride()) if dim != 1 and v.shape[dim] > 1]
    aligned = not any(stride % unit for stride in strides) and not any(v.data_ptr() % 16 for v in videos)
    return unit if aligned and channels % unit == 0 else 1


def _strides(name: str, video: torch.Tensor, unit: int) -> dict[str, int]:
    dims = {"b": 0, "f": 2, "y": 3, "x": 4}
    return {
        f"stride_{name}{letter}": video.stride(dim) // unit if video.shape[dim] > 1 else 0
        for letter, dim in dims.items()
    }


def _wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an element's offset, of which parts may reach twice beyond the tensor, needs more than 32 bits."""
    return any(
        4 * sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31
        for t in tensors
        if t is not None
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _rows_of(B: int, frames: int, Y: int, X: int, streams: int = 1) -> int:
    """Pixel rows of one stream; those of all streams are counted in 32 bits."""
    if B * frames * streams * Y * X >= 2**31 - 1024:
        raise ValueError(
            "x: B * F * Y * X must be below 2**31 - 1024 for impl='triton', "
            f"got {B} * {frames * streams} * {Y} * {X} = {B * frames * streams * Y * X}"
        )
    return B * frames * Y * X


def _precision(dtype: torch.dtype) -> str:
    """TF32 where PyTorch's own convolutions would use it."""
    convolutions = getattr(torch.backends.cudnn, "conv")  # noqa: B009 (unknown to the type checker)
    return "tf32" if dtype == torch.float32 and convolutions.fp32_precision == "tf32" else "ieee"


def _launch(kernel, grid: tuple[int, ...], args: dict, config) -> Launch:
    return Launch(kernel, grid, {name: args[name] for name in kernel.arg_names}, config.num_warps, config.num_stages)


@dataclass(frozen=True)
class Work:
    """What launches do: passes of one time tap over one frame, multiply-adds, and the bytes of every operand once."""

    tap_passes: int
    multiply_adds: int
    bytes: int


def work(launches: list[Launch]) -> Work:
    """Counted from the arguments that the launches hand to the kernels; batch and all streams together."""
    passes = operations = total = 0
    for launch in launches:
        args = launch.args
        touched: dict[int, int] = {}
        for value in args.values():
            if isinstance(value, torch.Tensor):
                size = math.prod(s for s, stride in zip(value.shape, value.stride(), strict=True) if stride)
                memory = value.untyped_storage()._cdata
                touched[memory] = max(touched.get(memory, 0), size * value.element_size())
        total += sum(touched.values())
        if "KT" in args:
            images = args["rows"] // (args["Y"] * args["X"])
            # The weight gradient counts the frames of all streams as its own.
            last = args["LAST"] * args["streams"] if "LAST" in args else not args["PAST"]
            here = images * ((args["KT"] - 1) * args["PAST"] + last)
            passes += here
            channels = args["K"] * args["UNIT_K"] * args["N"] * args["UNIT_N"]
            operations += here * args["KY"] * args["KX"] * args["Y"] * args["X"] * channels
    return Work(passes, operations, total)
