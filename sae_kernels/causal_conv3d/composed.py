"""The shared-past convolution from library 2D convolutions (oneDNN on the CPU, cuDNN on CUDA).

The last taps are one conv2d over all frames of all streams: channels_last_3d memory is (B, F, Y, X, C), so
the frames are a free view. The past taps are one conv2d over the T clean frames with the kt - 1 taps stacked in
the input channels: the stack is the only copy, the library accumulates over all past taps before it rounds, and
the tap passes are exactly (kt - 1) T. A conv3d over the padded clean frames does the same arithmetic, but falls
off oneDNN's fast path below 96 channels (T = 16, 2 threads: 64 channels at 16x16 6.2 ms against 1.5 ms, 32 at
32x32 20 ms against 1.6 ms) and gains at most 12 % above it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ..layout import FrameLayout


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    keep_past: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out (B, Cout, F, Y, X), past (B, Cout, R T, Y, X) or None if kt = 1 or not kept); R is `_rows`."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    out = _video(_conv(_images(x), _last_kernel(weight)), x.shape[0])
    if last_scale is not None:
        out.mul_(_per_frame(last_scale))
    if weight.shape[2] == 1:
        return out, None
    past = _past(x, weight, history, pad_value, layout)
    groups, shared = _groups(out, layout), past.unsqueeze(2)
    if past_scale is None:
        groups.add_(shared)
    else:
        groups.addcmul_(shared, _groups(_per_frame(past_scale), layout))
    return out, past if keep_past else None


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    past_scale: torch.Tensor | None,
    last_scale: torch.Tensor | None,
    history: torch.Tensor | None,
    past: torch.Tensor | None,
    pad_value: float,
    layout: FrameLayout,
    mask: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of (x, weight, past_scale, last_scale, history), None where `mask` does not ask.

    Past taps act on the past_scale-weighted sum over the streams of `grad`, last taps on each frame's own.
    `past` is what `forward` returned, or None to have it computed again where past_scale's gradient needs it.
    """
    need_x, need_weight, need_past_scale, need_last_scale, need_history = mask
    B, kt = x.shape[0], weight.shape[2]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    grad = grad.contiguous(memory_format=torch.channels_last_3d)
    grad_x = grad_past_scale = grad_last_scale = grad_history = None
    grad_weight = torch.empty_like(weight) if need_weight else None

    last = _last_kernel(weight)
    if need_x or need_last_scale:
        # y = s (W conv x) gives dx = s u and ds = <x, u>, with u the data gradient of the unscaled dy.
        grad_x = _video(_data_gradient(_images(grad), last), B)
        if need_last_scale:
            grad_last_scale = (x * grad_x).sum((1, 3, 4))
        if last_scale is not None:
            grad_x.mul_(_per_frame(last_scale))
    if grad_weight is not None:
        scaled = grad if last_scale is None else grad * _per_frame(last_scale)
        grad_weight[:, :, -1] = _kernel_gradient(_images(scaled), _images(x), last)
    if history is not None and need_history:
        grad_history = torch.zeros_like(history, memory_format=torch.channels_last_3d)

    if kt == 1:
        grad_past_scale = x.new_zeros(B, x.shape[2]) if need_past_scale else None
    else:
        groups = _groups(grad, layout)
        if need_past_scale:
            past = _past(x, weight, history, pad_value, layout) if past is None else past
            grad_past_scale = (groups * past.unsqueeze(2)).sum((1, 4, 5)).flatten(1)
        if need_weight or need_x or need_history:
            total, kernel = _images(_sum_groups(groups, past_scale, layout)), _past_kernel(weight)
            if grad_weight is not None:
                sources = _stack_sources(x, history, pad_value, kt, layout)
                _put_past_kernel(grad_weight, _kernel_gradient(total, sources, kernel))
            if need_x or need_history:
                grad_sources = _data_gradient(total, kernel)
                _add_source_gradients(grad_sources, grad_x if need_x else None, grad_history, kt, layout)
    return grad_x if need_x else None, grad_weight, grad_past_scale, grad_last_scale, grad_history


def past_term(history: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """history (B, Cin, kt - 1, Y, X) -> (B, Cout, Y, X), channels_last."""
    return _conv(_stack_history(history), _past_kernel(weight))


def past_term_backward(
    grad: torch.Tensor, history: torch.Tensor, weight: torch.Tensor, mask: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of (history, weight), None where `mask` does not ask."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    kernel, grad_history, grad_weight = _past_kernel(weight), None, None
    if mask[0]:
        grad_history = _data_gradient(grad, kernel).unflatten(1, (history.shape[2], -1)).transpose(1, 2)
        grad_history = grad_history.contiguous(memory_format=torch.channels_last_3d)
    if mask[1]:
        grad_weight = torch.zeros_like(weight)
        _put_past_kernel(grad_weight, _kernel_gradient(grad, _stack_history(history), kernel))
    return grad_history, grad_weight


def _rows(layout: FrameLayout) -> int:
    """R, streams with a past of their own: all share one unless noisy frames see their own block."""
    return layout.streams if layout.frames_per_block > 1 else 1


def _own_spans(layout: FrameLayout, lag: int) -> Iterator[tuple[int, int]]:
    """Intervals of frames whose source `lag` frames earlier is in their block: noisy ones read their own."""
    f = layout.frames_per_block
    for start in range(0, layout.frames, f):
        end = min(start + f, layout.frames)
        if start + lag < end:
            yield start + lag, end


def _streams(video: torch.Tensor, layout: FrameLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (clean (B, 1, T, Y, X, C), noisy (B, K, T, Y, X, C)) of a (B, C, F, Y, X) tensor."""
    streams = video.permute(0, 2, 3, 4, 1).unflatten(1, (layout.streams, layout.frames))
    clean = layout.clean_start // layout.frames
    return streams[:, clean : clean + 1], _noisy(streams, layout)


def _noisy(streams: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
    first = layout.noisy_start // layout.frames
    return streams[:, first : first + layout.noisy_copies]


def _stack_sources(
    x: torch.Tensor, history: torch.Tensor | None, pad_value: float, kt: int, layout: FrameLayout
) -> torch.Tensor:
    B, C, _, Y, X = x.shape
    T, R = layout.frames, _rows(layout)
    clean, noisy = _streams(x, layout)
    sources = x.new_empty(B, R, T, Y, X, kt - 1, C)
    for tap in range(kt - 1):
        lag = kt - 1 - tap
        rows, early = sources[..., tap, :], min(lag, T)
        rows[:, :, early:] = clean[:, :, : T - early]
        if history is None:
            rows[:, :, :early] = pad_value
        else:
            rows[:, :, :early] = history[:, :, tap : tap + early].permute(0, 2, 3, 4, 1).unsqueeze(1)
        if R > 1:
            for start, end in _own_spans(layout, lag):
                _noisy(rows, layout)[:, :, start:end] = noisy[:, :, start - lag : end - lag]
    return sources.flatten(5).flatten(0, 2).permute(0, 3, 1, 2)


def _add_source_gradients(
    grad_sources: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_history: torch.Tensor | None,
    kt: int,
    layout: FrameLayout,
) -> None:
    """The transpose of `_stack_sources`: adds to grad_x and grad_history, overwrites grad_sources."""
    T, R = layout.frames, _rows(layout)
    per_tap = grad_sources.permute(0, 2, 3, 1).unflatten(3, (kt - 1, -1)).unflatten(0, (-1, R, T))
    clean, noisy = (None, None) if grad_x is None else _streams(grad_x, layout)
    for tap in range(kt - 1):
        lag = kt - 1 - tap
        rows, early = per_tap[..., tap, :], min(lag, T)
        if R > 1:
            for start, end in _own_spans(layout, lag):
                own = _noisy(rows, layout)[:, :, start:end]
                if noisy is not None:
                    noisy[:, :, start - lag : end - lag] += own
                own.zero_()
            rows = rows.sum(1, keepdim=True)
        if clean is not None:
            clean[:, :, : T - early] += rows[:, :, early:]
        if grad_history is not None:
            grad_history[:, :, tap : tap + early] += rows[:, 0, :early].permute(0, 4, 1, 2, 3)


def _stack_history(history: torch.Tensor) -> torch.Tensor:
    stacked = history.permute(0, 3, 4, 2, 1).flatten(3).permute(0, 3, 1, 2)
    return stacked.contiguous(memory_format=torch.channels_last)


def _last_kernel(weight: torch.Tensor) -> torch.Tensor:
    return weight[:, :, -1].contiguous(memory_format=torch.channels_last)


def _past_kernel(weight: torch.Tensor) -> torch.Tensor:
    """(Cout, (kt - 1) Cin, ky, kx), input channels in the order of `_stack_sources`."""
    return weight[:, :, :-1].transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)


def _put_past_kernel(grad_weight: torch.Tensor, grad_kernel: torch.Tensor) -> None:
    grad_weight[:, :, :-1] = grad_kernel.unflatten(1, (-1, grad_weight.shape[1])).transpose(1, 2)


def _past(x, weight, history, pad_value, layout) -> torch.Tensor:
    sources = _stack_sources(x, history, pad_value, weight.shape[2], layout)
    return _video(_conv(sources, _past_kernel(weight)), x.shape[0])


def _per_frame(scale: torch.Tensor) -> torch.Tensor:
    return scale[:, None, :, None, None]


def _groups(video: torch.Tensor, layout: FrameLayout) -> torch.Tensor:
    """(B, C, F, Y, X) -> (B, C, G, R T, Y, X), the G groups of frames that share one past."""
    R = _rows(layout)
    return video.unflatten(2, (layout.streams // R, R * layout.frames))


def _sum_groups(groups: torch.Tensor, past_scale: torch.Tensor | None, layout: FrameLayout) -> torch.Tensor:
    """The sum over groups of past_scale * group, (B, C, R T, Y, X) channels_last_3d."""
    first, *others = groups.unbind(2)
    if past_scale is None:
        total = first
        for index, group in enumerate(others):
            total = total.add_(group) if index else total + group
    else:
        scale, *scales = _groups(_per_frame(past_scale), layout).unbind(2)
        total = first * scale
        for group, scale in zip(others, scales):
            total.addcmul_(group, scale)
    return total.contiguous(memory_format=torch.channels_last_3d)


def _images(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(1, 2).flatten(0, 1)


def _video(images: torch.Tensor, batch: int) -> torch.Tensor:
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


def _padding(kernel: torch.Tensor) -> list[int]:
    return [kernel.shape[2] // 2, kernel.shape[3] // 2]


def _conv(images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    with _deterministic(images.device):
        out = F.conv2d(images, kernel, padding=_padding(kernel))
    return out.contiguous(memory_format=torch.channels_last)


def _data_gradient(grad: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    images = grad.new_empty(1).expand(grad.shape[0], kernel.shape[1], *grad.shape[2:])  # only its shape is used
    grad_images = _conv_backward(grad, images, kernel, [True, False, False])[0]
    return grad_images.contiguous(memory_format=torch.channels_last)


def _kernel_gradient(grad: torch.Tensor, images: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    return _conv_backward(grad, images, kernel, [False, True, False])[1]


def _conv_backward(grad: torch.Tensor, images: torch.Tensor, kernel: torch.Tensor, mask: list[bool]):
    with _deterministic(images.device):
        return torch.ops.aten.convolution_backward(
            grad, images, kernel, None, [1, 1], _padding(kernel), [1, 1], False, [0, 0], 1, mask
        )


@contextlib.contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """Keep cuDNN from choosing weight-gradient algorithms that add in a random order."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before
