"""token_noise in Triton: one program makes a block of one frame for every stream, from all four words of a group.

The logarithm and the sine are polynomials, as in csrc/philox.h: the fast ones of the language are absolutely, not
relatively, accurate next to u = 1. Backward is made of library calls around one kernel for eps: data needs no gradient.
"""

import torch
import triton
import triton.language as tl

from .._launch import Launch, run

BLOCK = 1024

_INTEGERS = ["seed", "offset", "inner_units", "frames", "streams", "blocks",
             *(f"{scale}_{dim}" for scale in ("signal", "scale") for dim in "brt")]  # fmt: skip


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10; uint32 throughout."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    return (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32


@triton.jit
def _radius(u):
    """sqrt(-2 ln u) with u = m 2^e, m in [sqrt(1/2), sqrt(2)), from a polynomial of m - 1."""
    shifted = u.to(tl.uint32, bitcast=True) - 0x3F3504F3
    e = (shifted.to(tl.int32, bitcast=True) >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.0763442963, 0.127615497)
    p = tl.fma(p, f, -0.131601945)
    p = tl.fma(p, f, 0.142017618)
    p = tl.fma(p, f, -0.166233569)
    p = tl.fma(p, f, 0.200012267)
    p = tl.fma(p, f, -0.250008225)
    p = tl.fma(p, f, 0.333333313)
    f2 = f * f
    # ln 2 = 0.693359375 - 0.000212194442; e times the first is exact, and what the sum with f loses is added back.
    head = e * 0.693359375
    total = head + f
    lost = (head - total) + f
    tail = tl.fma(f * f2, p, tl.fma(f2, -0.5, tl.fma(e, -0.000212194442, lost)))
    return tl.sqrt_rn(-2.0 * (total + tail))


@triton.jit
def _box_muller(word0, word1):
    radius = _radius(_uniform(word0))
    # The angle is rounded to fp32, as in the reference; the reduction by multiples of pi / 2 (20 bits each) is exact.
    angle = _uniform(word1) * 6.2831854820251465
    quadrant = (angle * 0.63661975 + 0.5).to(tl.int32)
    q = quadrant.to(tl.float32)
    a = ((angle - q * 1.5707950592041016) - q * 1.2675900507019833e-06) - q * 7.443548e-13
    a2 = a * a
    s = tl.fma(a2, -0.000195171378, 0.00833217707)
    s = tl.fma(s, a2, -0.166666552)
    s = tl.fma(s * a2, a, a)
    c = tl.fma(a2, 2.443827e-05, -0.00138873665)
    c = tl.fma(c, a2, 0.0416666456)
    half = 0.5 * a2
    top = 1.0 - half
    c = top + tl.fma(c * a2, a2, (1.0 - top) - half)
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@triton.jit
def _normals(group, seed, offset):
    """Four normals of each group [G] as [4 G], in the order of the elements."""
    # The interpreter takes the type of an integer from its value, not from its annotation.
    seed = seed.to(tl.int64)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    counter = tl.zeros_like(group) + offset.to(tl.int64)
    w0, w1, w2, w3 = _philox(
        (group & 0xFFFFFFFF).to(tl.uint32),
        ((group >> 32) & 0xFFFFFFFF).to(tl.uint32),
        (counter & 0xFFFFFFFF).to(tl.uint32),
        ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32),
        k0,
        k1,
    )
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * group.shape[0])


@triton.jit(do_not_specialize=_INTEGERS)
def token_noise_fwd_kernel(
    x_ptr, signal_ptr, scale_ptr, out_ptr, noise_ptr,
    seed: tl.int64, offset: tl.int64, inner_units: tl.int64, frames: tl.int64, streams: tl.int64, blocks: tl.int64,
    signal_b: tl.int64, signal_r: tl.int64, signal_t: tl.int64, scale_b: tl.int64, scale_r: tl.int64, scale_t: tl.int64,
    SIGNAL_INNER: tl.constexpr, SCALE_INNER: tl.constexpr, NOISE: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[b, r, t, i] = signal x[b, t, i] + scale eps. A frame of 4 n elements starts on a group in every stream; of
    another size it does not, and blocks overlap by a group. Sizes in units of UNIT elements let the compiler know that
    16-byte accesses stay inside the mask."""
    ALIGNED: tl.constexpr = UNIT % 4 == 0
    inner = inner_units * UNIT
    STEP: tl.constexpr = BLOCK if ALIGNED else BLOCK - 4
    program = tl.program_id(0).to(tl.int64)
    frame = program // blocks
    first = (program - frame * blocks) * STEP
    batch = frame // frames
    t = frame - batch * frames
    end = tl.minimum(first + STEP, inner)
    x_ptr += frame * inner
    signal_ptr += batch * signal_b + t * signal_t
    scale_ptr += batch * scale_b + t * scale_t
    i = first + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], tl.float32)
    if ALIGNED:
        x = tl.load(x_ptr + i, mask=i < inner, other=0.0).to(tl.float32)
    for r in range(streams):
        start = ((batch * streams + r) * frames + t) * inner
        group = (start + first) // 4 + tl.arange(0, BLOCK // 4)
        z = _normals(group, seed, offset)
        if ALIGNED:
            ok = i < inner
        else:
            i = (start + first) // 4 * 4 - start + tl.arange(0, BLOCK)
            ok = (i >= first) & (i < end)
            x = tl.load(x_ptr + i, mask=ok, other=0.0).to(tl.float32)
        if SIGNAL_INNER:
            signal = tl.load(signal_ptr + r * signal_r + i, mask=ok, other=0.0).to(tl.float32)
        else:
            signal = tl.load(signal_ptr + r * signal_r).to(tl.float32)
        if SCALE_INNER:
            scale = tl.load(scale_ptr + r * scale_r + i, mask=ok, other=0.0).to(tl.float32)
        else:
            scale = tl.load(scale_ptr + r * scale_r).to(tl.float32)
        y = tl.fma(x, tl.zeros_like(x) + signal, scale * z)
        tl.store(out_ptr + start + i, y.to(out_ptr.dtype.element_ty), mask=ok)
        if NOISE:
            tl.store(noise_ptr + start + i, z.to(noise_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["seed", "offset", "units"])
def token_noise_eps_kernel(
    out_ptr, seed: tl.int64, offset: tl.int64, units: tl.int64, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    z = _normals(program * (BLOCK // 4) + tl.arange(0, BLOCK // 4), seed, offset)
    i = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, z.to(out_ptr.dtype.element_ty), mask=i < units * UNIT)


def _unit(size: int) -> int:
    """16, 8 or 4 if that divides size, else 1."""
    return next((unit for unit in (16, 8, 4) if size % unit == 0), 1)


def plan_eps(out: torch.Tensor, seed: int, offset: int) -> list[Launch]:
    unit = _unit(out.numel())
    args = {"out_ptr": out, "seed": seed, "offset": offset, "units": out.numel() // unit, "UNIT": unit, "BLOCK": BLOCK}
    return [Launch(token_noise_eps_kernel, (-(-out.numel() // BLOCK),), args, num_warps=4, num_stages=1)]


def plan_forward(
    x: torch.Tensor,
    signal_scale: torch.Tensor,
    noise_scale: torch.Tensor,
    out: torch.Tensor,
    noise: torch.Tensor | None,
    streams: int,
    seed: int,
    offset: int,
) -> list[Launch]:
    B, T = x.shape[:2]
    inner = x[0, 0].numel()
    unit = _unit(inner)
    block = min(BLOCK, max(16, triton.next_power_of_2(inner)))
    blocks = -(-inner // (block if unit > 1 else block - 4))
    args: dict = {"x_ptr": x.contiguous(), "out_ptr": out, "noise_ptr": out if noise is None else noise}
    for name, value in (("signal", signal_scale), ("scale", noise_scale)):
        varies = any(n > 1 for n in value.shape[2:])
        if varies:
            value = value.expand(value.shape[:2] + x.shape[2:]).contiguous()
        args[f"{name}_ptr"] = value
        args[f"{name}_b"] = 0 if value.shape[0] == 1 else value.stride(0)
        args[f"{name}_t"] = 0 if value.shape[1] == 1 else value.stride(1)
        args[f"{name}_r"] = T * args[f"{name}_t"]
        args[f"{name.upper()}_INNER"] = varies
    args |= {
        "seed": seed,
        "offset": offset,
        "inner_units": inner // unit,
        "frames": T,
        "streams": streams,
        "blocks": blocks,
    }
    args |= {"NOISE": noise is not None, "UNIT": unit, "BLOCK": block}
    warps = max(1, min(4, block // 256))
    return [Launch(token_noise_fwd_kernel, (B * T * blocks,), args, num_warps=warps, num_stages=1)]


def eps(out: torch.Tensor, seed: int, offset: int) -> None:
    """Fill a contiguous tensor with standard normals."""
    run(plan_eps(out, seed, offset), out.device)


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
    run(plan_forward(x, signal_scale, noise_scale, out, noise, streams, seed, offset), x.device)


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
    grad = grad_out.float()
    streams = grad.shape[1] // x.shape[1]
    if grad_x is not None:
        grad_x.copy_((grad * signal_scale.float()).unflatten(1, (streams, -1)).sum(1))
    if grad_signal is not None:
        data = torch.cat([x.float()] * streams, dim=1)
        grad_signal.copy_(data.mul_(grad).sum_to_size(grad_signal.shape))
    if grad_noise is not None:
        noise = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        eps(noise, seed, offset)
        grad_noise.copy_(noise.mul_(grad).sum_to_size(grad_noise.shape))
