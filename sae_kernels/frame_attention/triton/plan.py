"""The launches of forward and backward as data: the layout in integers, strides, descriptors, grids."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from ..._launch import Launch
from ...layout import FrameLayout
from .. import configs as defaults
from .backward_kernels import (
    frame_attention_bwd_delta_kernel,
    frame_attention_bwd_dkdv_kernel,
    frame_attention_bwd_dq_kernel,
)
from .forward_kernels import frame_attention_fwd_kernel

# Heads are processed in sections whose keys and values fit in this many bytes of L2 (50 MB on H100, shared).
SECTION_BYTES = 24 << 20
MAX_TILE = 256  # rows or keys


@dataclass(frozen=True)
class Geometry:
    """The layout as the integers that the kernels take; names as in the module docstring."""

    N: int
    U: int
    W: int
    sink: int
    copies: int
    clean_rows: int  # streams of clean rows in q: 1, or 0 with noisy_queries_only
    clean_row: int  # where the clean rows begin in q, and so on
    noisy_row: int
    clean_key: int
    noisy_key: int

    @staticmethod
    def of(layout: FrameLayout, noisy_queries_only: bool) -> "Geometry":
        stream = layout.frames * layout.tokens_per_frame
        # Blocks and windows longer than the clip are cut to the clip, so that products stay below 2^31.
        block = min(layout.frames_per_block, layout.frames) * layout.tokens_per_frame
        blocks = layout.num_blocks
        return Geometry(
            N=stream,
            U=block,
            W=min(blocks if layout.window is None else layout.window, blocks) * block,
            sink=min(layout.sink, blocks) * block,
            copies=layout.noisy_copies,
            clean_rows=0 if noisy_queries_only else 1,
            clean_row=layout.clean_start * layout.tokens_per_frame,
            noisy_row=0 if noisy_queries_only else layout.noisy_start * layout.tokens_per_frame,
            clean_key=layout.clean_start * layout.tokens_per_frame,
            noisy_key=layout.noisy_start * layout.tokens_per_frame,
        )


def plan_forward(q, k, v, out, lse, layout, scale, noisy_queries_only, architecture, config=None) -> list[Launch]:
    """The launches of `forward` for an architecture (compute capability * 10); tensors may be meta tensors."""
    shared, geometry = _shared(layout, noisy_queries_only, scale, (q, k, v, out), q=q, k=k, v=v, o=out)
    config = config or _config(q, layout, architecture, "fwd")
    args = {
        **shared,
        **_operands(config, architecture, rows={"q_ptr": q}, keys={"k_ptr": k, "v_ptr": v}),
        "out_ptr": out, "lse_ptr": lse,
        **_heads(q, k, True),
        "scale": abs(scale), "NEGATIVE": scale < 0,
    }  # fmt: skip
    slots = (geometry.clean_rows + geometry.copies) * triton.cdiv(geometry.N, config.block_m)
    return [_launch(frame_attention_fwd_kernel, slots * args["all_heads"], args, config)]


class Gradients(NamedTuple):
    """What backward reads (delta, one fp32 number for each row, is room for its own use) and writes: dq, dk, dv."""

    grad_out: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def plan_backward(
    tensors: Gradients, layout, scale, noisy_queries_only, architecture, configs=(None, None, None)
) -> list[Launch]:
    """The launches of `backward`; tensors may be meta tensors. `configs`: of delta, dk/dv and dq."""
    grad_out, q, k, v, out, lse, delta, dq, dk, dv = tensors
    strided = {"q": q, "k": k, "v": v, "o": out, "g": grad_out, "dq": dq, "dk": dk, "dv": dv}
    shared, geometry = _shared(layout, noisy_queries_only, scale, strided.values(), **strided)
    shared |= {"lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "scale": scale}
    by_query, by_key = shared | _heads(q, k, True), shared | _heads(q, k, False)
    config = configs[0] or _config(q, layout, architecture, "delta")
    row_tiles = triton.cdiv(q.shape[2], config.block_m)
    args = by_query | {"out_ptr": out, "grad_ptr": grad_out, "BM": config.block_m}
    launches = [_launch(frame_attention_bwd_delta_kernel, row_tiles * args["all_heads"], args, config)]
    streamed = {"rows": {"q_ptr": q, "grad_ptr": grad_out}, "keys": {"k_ptr": k, "v_ptr": v}}
    config = configs[1] or _config(q, layout, architecture, "dkdv")
    slots = (1 + geometry.copies) * triton.cdiv(geometry.N, config.block_n)
    args = by_key | _operands(config, architecture, **streamed)
    launches.append(_launch(frame_attention_bwd_dkdv_kernel, slots * args["all_heads"], args, config))
    config = configs[2] or _config(q, layout, architecture, "dq")
    slots = (geometry.clean_rows + geometry.copies) * triton.cdiv(geometry.N, config.block_m)
    args = by_query | _operands(config, architecture, **streamed)
    launches.append(_launch(frame_attention_bwd_dq_kernel, slots * args["all_heads"], args, config))
    return launches


def _shared(layout, noisy_queries_only, scale, tensors, **strided) -> tuple[dict, Geometry]:
    """Arguments common to every kernel: geometry, strides, head dim, precision."""
    q = strided["q"]
    for name, tensor in strided.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: the kernels need a contiguous last dimension, got strides {tensor.stride()}")
    if layout.sequence_length >= 2**31 - 1024:
        raise ValueError(
            f"layout: sequence_length must be below 2**31 - 1024 for impl='triton', got {layout.sequence_length}"
        )
    geometry = Geometry.of(layout, noisy_queries_only)
    # Strides are passed in units of 16 bytes where all of them allow it: the compiler then knows that every row is
    # aligned, whatever the sizes, and no size selects another binary.
    unit = 16 // q.element_size()
    if any(s % unit for t in tensors for s, size in zip(t.stride()[:3], t.shape[:3], strict=True) if size > 1):
        unit = 1
    args = {**vars(geometry)}
    for name, tensor in strided.items():
        for dim, letter in enumerate("bhs"):
            args[f"stride_{name}{letter}"] = tensor.stride(dim) // unit if tensor.shape[dim] > 1 else 0
    head_dim = q.shape[-1]
    args |= {
        "rows": q.shape[2],
        "D": head_dim,
        "BD": max(16, triton.next_power_of_2(head_dim)),
        "UNIT": unit,
        "WIDE": any(t.stride(2) * MAX_TILE >= 2**31 for t in strided.values()),
        "HAS_WINDOW": layout.window is not None,
        "PRECISION": "tf32" if q.dtype == torch.float32 and _tf32_allowed() else "ieee",
    }
    return args, geometry


def _operands(config, architecture: int, rows: dict[str, torch.Tensor], keys: dict[str, torch.Tensor]) -> dict:
    """The tensors that a kernel reads in tiles: as descriptors if the configuration asks for them and all allow it."""
    args = {"BM": config.block_m, "BN": config.block_n, "TMA": False, **rows, **keys}
    if not config.descriptors or 0 < architecture < 90 or not all(map(_describable, (*rows.values(), *keys.values()))):
        return args
    args["TMA"] = True
    args |= {name: _descriptor(x, config.block_m) for name, x in rows.items()}
    return args | {name: _descriptor(x, config.block_n) for name, x in keys.items()}


def _describable(x: torch.Tensor) -> bool:
    """Whether the copy engine can address a tensor: 16-byte aligned, strides positive multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True) if size > 1]
    return x.data_ptr() % 16 == 0 and all(step % 16 == 0 and 0 < step < 2**40 for step in steps)


def _descriptor(x: torch.Tensor, tile_rows: int) -> TensorDescriptor:
    """Tiles [tile_rows, D] of x (B, H, S, D); what lies beyond S or D reads as zero.

    Coordinates count heads and tokens, so 32 bits hold them; the addresses made of them have 64.
    """
    unit = 16 // x.element_size()
    # The stride of a dimension of size 1 is never used, but must be legal.
    strides = [stride if size > 1 else unit for stride, size in zip(x.stride()[:3], x.shape[:3], strict=True)]
    width = max(16, triton.next_power_of_2(x.shape[3]))
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, tile_rows, width])


def _heads(q: torch.Tensor, k: torch.Tensor, by_query: bool) -> dict[str, int]:
    """Head arguments of a kernel that owns query heads and streams keys past them, or the reverse."""
    group = q.shape[1] // k.shape[1]
    rows = k.shape[2] if by_query else q.shape[2] * group
    streamed_bytes = 2 * rows * q.shape[3] * q.element_size()
    sharing = group if by_query else 1
    heads = q.shape[1] if by_query else k.shape[1]
    all_heads = q.shape[0] * heads
    section = min(max(1, SECTION_BYTES // streamed_bytes) * sharing, all_heads)
    return {"heads": heads, "group": group, "all_heads": all_heads, "section": section}


def _launch(kernel, programs: int, args: dict, config) -> Launch:
    return Launch(
        kernel, (programs,), {name: args[name] for name in kernel.arg_names}, config.num_warps, config.num_stages
    )


def _config(q, layout, architecture, direction):
    block = min(layout.frames_per_block, layout.frames) * layout.tokens_per_frame
    return defaults.attention_config(architecture, q.dtype, q.shape[-1], block, direction)


def _tf32_allowed() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
