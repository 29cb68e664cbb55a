"""token_noise from tensor operations, on any device, in pieces of bounded size.

A sequence (B, F, ...) is seen as (B, R, T, ...), so that x and per-frame scales broadcast over the R streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
KEY_STEP_0, KEY_STEP_1 = 0x9E3779B9, 0xBB67AE85
WORD = 0xFFFFFFFF

# Elements made at a time. A piece needs about 20 bytes of temporaries for each: 20 MiB, inside a last-level cache. On a
# GPU a piece costs about 130 launches, which four times as many elements hide.
PIECE = 1 << 20


def philox(
    c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor, c3: torch.Tensor, k0: int, k1: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32-10 in int64, ten operations a round; the counters' storage is consumed.

    A product of two 32-bit words wraps to the right 64 bits. The low words keep their upper halves until the next
    round's mask, which the right shift (it carries the sign) needs in any case.
    """
    h0, h1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(10):
        c0.mul_(MULTIPLIER_0)
        c2.mul_(MULTIPLIER_1)
        torch.bitwise_right_shift(c0, 32, out=h0)
        torch.bitwise_right_shift(c2, 32, out=h1)
        h1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD)
        h0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)
        c0, c1, c2, c3, h0, h1 = h1, c2, h0, c0, c1, c3
        k0, k1 = (k0 + KEY_STEP_0) & WORD, (k1 + KEY_STEP_1) & WORD
    return c0, c1.bitwise_and_(WORD), c2, c3.bitwise_and_(WORD)


def normals(start: int, count: int, seed: int, offset: int, device: torch.device) -> torch.Tensor:
    """Elements [start, start + count) of the noise, fp32."""
    first, last = start // 4, -(-(start + count) // 4)
    c0 = torch.arange(first, last, dtype=torch.int64, device=device)
    c1 = c0 >> 32
    c2, c3 = torch.full_like(c0, offset & WORD), torch.full_like(c0, (offset >> 32) & WORD)
    words = philox(c0.bitwise_and_(WORD), c1, c2, c3, seed & WORD, (seed >> 32) & WORD)
    out = torch.empty(last - first, 4, dtype=torch.float32, device=device)
    for pair in (0, 2):
        radius, angle = (w.to(torch.float32).add_(0.5).mul_(2.0**-32) for w in words[pair : pair + 2])
        radius.log_().mul_(-2).sqrt_()
        angle.mul_(2 * math.pi)
        torch.mul(radius, angle.cos(), out=out[:, pair])
        torch.mul(radius, angle.sin_(), out=out[:, pair + 1])
    return out.view(-1).narrow(0, start - 4 * first, count)


def pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Cut a contiguous tensor into boxes of at most `limit` elements: (first element, start and size in each dim).

    A box is one index of the leading dims, a range of the next one and all of the others, hence contiguous.
    """
    dim, inner = len(shape) - 1, 1
    while dim > 0 and inner * shape[dim] <= limit:
        inner *= shape[dim]
        dim -= 1
    step = max(1, limit // inner)
    for outer in range(math.prod(shape[:dim])):
        index: list[int] = []
        rest = outer
        for size in reversed(shape[:dim]):
            index.insert(0, rest % size)
            rest //= size
        for begin in range(0, shape[dim], step):
            size = min(step, shape[dim] - begin)
            start = [*index, begin] + [0] * (len(shape) - dim - 1)
            yield (outer * shape[dim] + begin) * inner, start, [1] * dim + [size] + list(shape[dim + 1 :])


def take(tensor: torch.Tensor, start: list[int], size: list[int]) -> torch.Tensor:
    """The box of a tensor that broadcasts along its dims of size 1."""
    for dim in range(tensor.ndim):
        if tensor.shape[dim] != 1:
            tensor = tensor.narrow(dim, start[dim], size[dim])
    return tensor


def by_stream(tensor: torch.Tensor, streams: int) -> torch.Tensor:
    """(B, F or 1, ...) as (B, R or 1, T or 1, ...)."""
    return tensor.unsqueeze(1) if tensor.shape[1] == 1 else tensor.unflatten(1, (streams, -1))


def _limit(device: torch.device) -> int:
    return PIECE if device.type == "cpu" else 4 * PIECE


def eps(out: torch.Tensor, seed: int, offset: int) -> None:
    """Fill a contiguous tensor with standard normals."""
    flat, limit = out.view(-1), _limit(out.device)
    for start in range(0, flat.numel(), limit):
        piece = flat[start : start + limit]
        piece.copy_(normals(start, piece.numel(), seed, offset, out.device))


def forward(
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    out: torch.Tensor,
    noise: torch.Tensor | None,
    streams: int,
    seed: int,
    offset: int,
) -> None:
    """Write signal_scale x + noise_scale eps to `out` (B, F, ...), and eps to `noise` if given; both contiguous."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, out = x.unsqueeze(1), out.unflatten(1, (streams, -1))
    signal_scale, noise_scale = by_stream(signal_scale, streams), by_stream(noise_scale, streams)
    noise = None if noise is None else noise.view(out.shape)
    for first, *box in pieces(out.shape, _limit(x.device)):
        value = normals(first, math.prod(box[1]), seed, offset, x.device).view(box[1]).to(compute)
        if noise is not None:
            take(noise, *box).copy_(value)
        value.mul_(take(noise_scale, *box).to(compute))
        value.addcmul_(take(x, *box).to(compute), take(signal_scale, *box).to(compute))
        take(out, *box).copy_(value)


def backward(
    grad_out: torch.Tensor,
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    grad_x: torch.Tensor | None,
    grad_signal: torch.Tensor | None,
    grad_noise: torch.Tensor | None,
    seed: int,
    offset: int,
) -> None:
    """Write the gradients that are not None. eps is generated again, not stored."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    streams = grad_out.shape[1] // x.shape[1]
    x, grad_out = x.unsqueeze(1), grad_out.unflatten(1, (streams, -1))
    if grad_x is not None:
        _grad_x(grad_out, by_stream(signal_scale, streams), grad_x.unsqueeze(1), compute)

    sum_signal, sum_noise = (
        None if target is None else torch.zeros_like(by_stream(target, streams), dtype=compute)
        for target in (grad_signal, grad_noise)
    )
    if sum_signal is None and sum_noise is None:
        return
    for first, *box in pieces(grad_out.shape, _limit(x.device)):
        grad = take(grad_out, *box).to(compute)
        if sum_signal is not None:
            part = take(sum_signal, *box)
            part.add_((grad * take(x, *box).to(compute)).sum_to_size(part.shape))
        if sum_noise is not None:
            part = take(sum_noise, *box)
            noise = normals(first, grad.numel(), seed, offset, x.device).view(grad.shape)
            part.add_((grad * noise).sum_to_size(part.shape))
    for target, total in ((grad_signal, sum_signal), (grad_noise, sum_noise)):
        if target is not None and total is not None:
            target.copy_(total.view(target.shape))


def _grad_x(grad_out: torch.Tensor, signal_scale: torch.Tensor, grad_x: torch.Tensor, compute: torch.dtype) -> None:
    """Sum over the streams of signal_scale grad_out; all (B, R or 1, T or 1, ...)."""
    for _, start, size in pieces(grad_x.shape, _limit(grad_x.device)):
        total = torch.zeros(size, dtype=compute, device=grad_x.device)
        for stream in range(grad_out.shape[1]):
            box = [start[0], stream, *start[2:]], size
            total.addcmul_(take(grad_out, *box).to(compute), take(signal_scale, *box).to(compute))
        take(grad_x, start, size).copy_(total)
