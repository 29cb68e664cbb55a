"""frame_attention against the ways there are without it.

B batch, Hq and Hkv heads, S tokens, D head dim, T frames, P tokens per frame, K noisy copies.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from sae_kernels import FrameLayout, frame_attention
from sae_kernels.frame_attention import configs, ops

from . import gate, measure
from .gate import Inputs
from .registry import Case, Contender, Missing, Problem


def _case(name: str, about: str, *, cpu: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """`cpu` holds what differs on the CPU, None where the case is for a GPU only."""
    extra = {key: options.pop(key) for key in ("priority", "quick", "dry") if key in options}
    cuda = {"dtype": "bf16", **options}
    smaller = None if cpu is None else cuda | {"dtype": "fp32"} | dict(cpu)
    return Case("attention", name, about, cuda=cuda, cpu=smaller, **extra)


# T frames, P tokens, B, H (query heads), D; optionally Hkv, K, f (frames per block), noisy_first, window, sink, dtype.
CASES = [
    _case(
        "16x256", "16 frames of 16x16 latents, the shape the reference tests its attention with",
        T=16, P=256, B=8, H=8, D=64, cpu={"B": 1, "H": 2}, priority=1, quick=True,
    ),
    _case(
        "wan-480p", "Wan 1.3B at 480p as Self-Forcing trains it, one frame at a time",
        T=21, P=1560, B=1, H=12, D=128, priority=2, quick=True,
    ),
    _case(
        "lunar-lander-8x8", "8x8 level of the lunar-lander network, where a 128-token block holds two frames",
        T=16, P=64, B=8, H=2, D=64, dtype="fp16", cpu={"B": 2}, priority=10, quick=True,
    ),
    _case(
        "lunar-lander-4x4", "4x4 level of the lunar-lander network: 16 tokens per frame",
        T=16, P=16, B=8, H=4, D=64, dtype="fp16", cpu={"B": 4}, priority=11,
    ),
    _case(
        "bd3lm-1024-b16", "BD3-LM, 1024 tokens in blocks of 16, noisy copy first",
        T=64, P=16, B=8, H=12, D=64, noisy_first=True, cpu={"B": 1, "H": 4}, priority=12,
    ),
    _case(
        "wan-480p-3", "Wan 1.3B at 480p, three frames denoised together",
        T=21, P=1560, f=3, B=1, H=12, D=128, priority=20,
    ),
    _case("31x880", "31 frames of 880 tokens, the size of LongLive", T=31, P=880, B=1, H=12, D=128, priority=21),
    _case("acdit-image", "ACDiT images: 4 blocks of 256 tokens", T=4, P=256, B=16, H=12, D=64, priority=22),
    _case(
        "sdar-4096-b4", "SDAR: 4096 tokens in blocks of 4, grouped queries",
        T=1024, P=4, B=2, H=32, Hkv=8, D=128, noisy_first=True, priority=23,
    ),
    _case(
        "fast-dllm-2048-b32", "Fast-dLLM v2 on Qwen2.5-7B: 2048 tokens in blocks of 32, grouped queries",
        T=64, P=32, B=2, H=28, Hkv=4, D=128, noisy_first=True, priority=24,
    ),
    _case(
        "16x256-k4", "16 frames of 256 tokens, four noisy copies of one clean clip",
        T=16, P=256, K=4, B=4, H=8, D=64, priority=25,
    ),
    _case("wan-720p", "Wan 1.3B at 720p: 151,200 tokens", T=21, P=3600, B=1, H=12, D=128, priority=60),
    _case("smoke", "seconds for everything", T=3, P=5, B=2, H=2, D=16, cpu={}, dry=True),
]  # fmt: skip


def layout_of(shape: Mapping[str, Any]) -> FrameLayout:
    return FrameLayout(
        shape["T"],
        shape["P"],
        frames_per_block=shape.get("f", 1),
        noisy_copies=shape.get("K", 1),
        noisy_first=shape.get("noisy_first", False),
        window=shape.get("window"),
        sink=shape.get("sink", 0),
    )


def build(shape: Mapping[str, Any], device: str) -> Problem:
    layout, dtype = layout_of(shape), measure.DTYPES[shape["dtype"]]
    B, Hq, D, S = shape["B"], shape["H"], shape["D"], layout.sequence_length
    Hkv = shape.get("Hkv", Hq)

    def make_inputs(index: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(index)

        def draw(heads: int) -> torch.Tensor:
            # As a network makes them: (B, S, H, D) transposed.
            return torch.randn(B, S, heads, D, generator=generator, device=device).to(dtype).transpose(1, 2)

        q, k, v, grad = draw(Hq), draw(Hkv), draw(Hkv), draw(Hq)
        return Inputs(tuple(t.requires_grad_() for t in (q, k, v)), grad)

    contenders = gate.ours(
        ops, device, lambda impl: gate.directions(lambda q, k, v: frame_attention(q, k, v, layout, impl=impl))
    )
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        launch = gate.directions(lambda q, k, v: frame_attention(q, k, v, layout, impl="triton"))
        for name, descriptors in (("pointers", False), ("descriptors", True)):
            configured = {key: _through(call, descriptors) for key, call in launch.items()}
            note = f"triton, tiles read through {name}"
            contenders.append(Contender(f"sae_kernels ({name})", configured, "ours", note, optional=True))
    missing: list[Missing] = []
    for add in (_dense_mask, _flex, _packed):
        add(layout, shape, device, contenders, missing)
    pairs = B * Hq * layout.attended_pairs
    _dense_causal(layout, shape, device, contenders, missing)
    flops, moved = work(pairs, D), _bytes(B, Hq, Hkv, S, D, dtype)
    return Problem(make_inputs, contenders, _check(make_inputs, layout), shape["dtype"], flops, moved, missing)


def _through(call: Callable[[Inputs], Any], descriptors: bool) -> Callable[[Inputs], Any]:
    """The call with the shipped tiles, read through descriptors or through pointers."""
    choose = configs.attention_config

    def changed(*key: Any) -> configs.AttentionConfig:
        return dataclasses.replace(choose(*key), descriptors=descriptors)

    def run(inputs: Inputs) -> Any:
        configs.attention_config = changed
        try:
            return call(inputs)
        finally:
            configs.attention_config = choose

    return run


def work(pairs: int, D: int) -> dict[str, int]:
    """4 D operations for each visible pair forward, 2.5 times that backward (five matrix products for two)."""
    return {"fwd": 4 * D * pairs, "fwd+bwd": 14 * D * pairs}


def _bytes(B: int, Hq: int, Hkv: int, S: int, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Each input read once, each output written once; backward reads q, k, v, out, its gradient and lse again."""
    one, lse = B * S * D * dtype.itemsize, 4 * B * Hq * S
    forward = one * (2 * Hq + 2 * Hkv) + lse
    return {"fwd": forward, "fwd+bwd": forward + one * (4 * Hq + 4 * Hkv) + lse}


# --- the gate


def exact(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, layout: FrameLayout, rows: int | None = None
) -> dict[str, torch.Tensor]:
    """out, dq, dk, dv of some query heads (G, S, D) that share one key head k, v (S, D), by dense masked softmax.

    Row chunks of at most `rows` scores (by default more on a GPU) bound memory. Every intermediate has the
    dtype of q, as in eager PyTorch; sums over chunks are kept in fp32 or wider.
    """
    S, D = k.shape
    scale, mask_mod = D**-0.5, layout.mask_mod()
    columns = torch.arange(S, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros(S, D, dtype=wide, device=q.device) for _ in range(2))
    step = max(1, (rows or (1 << 26 if q.is_cuda else 1 << 24)) // S)
    for start in range(0, S, step):
        index = slice(start, min(start + step, S))
        visible = mask_mod(0, 0, columns[index, None], columns[None])
        for head in range(q.shape[0]):
            scores = (q[head, index] @ k.T * scale).masked_fill_(~visible, float("-inf"))
            p = scores.softmax(dim=-1)
            del scores
            out[head, index] = p @ v
            dv += (p.T @ grad[head, index]).to(wide)
            dp = grad[head, index] @ v.T
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
            del p, dp
            dq[head, index] = ds @ k
            dk += (ds.T @ q[head, index]).to(wide)
    return {"out": out, "dq": dq, "dk": dk.to(q.dtype), "dv": dv.to(q.dtype)}


def _check(make_inputs: Callable[[int], Inputs], layout: FrameLayout) -> Callable[[Contender, str], None]:
    """Compares the last batch item's last key head and its query heads, all rows, out and gradients."""
    made: dict[str, Any] = {}

    def check(contender: Contender, direction: str) -> None:
        if not made:
            inputs = make_inputs(0)
            q, k, v = (t.detach() for t in inputs.tensors)
            group = q.shape[1] // k.shape[1]
            given = (q[-1, -group:], k[-1, -1], v[-1, -1], inputs.grad[-1, -group:])
            made["gold"] = exact(*(t.double() for t in given), layout)
            made["eager"] = exact(*given, layout)
            made["inputs"], made["group"] = inputs, group
        results = contender.launch[direction](made["inputs"])
        picked = {
            name: result[-1, -1] if name in ("dk", "dv") else result[-1, -made["group"] :]
            for name, result in zip(("out", "dq", "dk", "dv"), results)
        }
        gate.hold(contender, picked, made["gold"], made["eager"])

    return check


# --- peers


def _dense_mask(layout, shape, device, contenders, missing) -> None:
    name, S = "dense-mask SDPA", layout.sequence_length
    limit = torch.cuda.mem_get_info()[0] // 8 if device == "cuda" else 1 << 30
    if limit < S * S:
        missing.append(Missing(name, f"its mask alone takes {S * S / 1e9:.1f} GB"))
        return
    start = time.perf_counter()
    mask = layout.dense_mask(device)
    measure.synchronize(device)
    setup = {"mask_seconds": time.perf_counter() - start, "mask_bytes": measure.nbytes(mask)}
    gqa = shape.get("Hkv", shape["H"]) != shape["H"]
    launch = gate.directions(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa))
    contenders.append(Contender(name, launch, setup=setup))


def _flex(layout, shape, device, contenders, missing) -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    S, gqa = layout.sequence_length, shape.get("Hkv", shape["H"]) != shape["H"]
    setup: dict[str, float] = {}
    made: dict[str, Any] = {}

    def block_mask():
        if not made:
            # Uncompiled creation holds the S x S mask; compiled creation does not, but compiles for every S.
            compiled = device == "cuda" and S > 16384

            def create():
                made["mask"] = create_block_mask(layout.mask_mod(), None, None, S, S, device=device, _compile=compiled)

            create()
            start = time.perf_counter()
            create()
            measure.synchronize(device)
            setup["mask_seconds"] = time.perf_counter() - start
            setup["mask_peak_bytes"], _ = measure.peak_memory(create, device)
            setup["mask_bytes"] = measure.nbytes(made["mask"])
        return made["mask"]

    def function(options: dict[str, Any] | None):
        compiled = torch.compile(flex_attention, dynamic=False)

        def run(q, k, v):
            if device == "cpu":
                q, k, v = q.detach(), k.detach(), v.detach()
            return compiled(q, k, v, block_mask=block_mask(), enable_gqa=gqa, kernel_options=options)

        return gate.directions(run, backward=device == "cuda")

    contenders.append(Contender("compiled FlexAttention", function(None), setup=setup, compiled=True))
    name = "FlexAttention, FLASH backend"
    if device == "cpu":
        missing.append(Missing("compiled FlexAttention", "PyTorch has no backward pass for it on the CPU", "fwd+bwd"))
        missing.append(Missing(name, "CUDA only"))
        return
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError as error:
        missing.append(Missing(name, f"needs the package flash-attn-4: {error}"))
    else:
        contenders.append(Contender(name, function({"BACKEND": "FLASH"}), setup=setup, compiled=True))


def packed_calls(layout: FrameLayout, batch: int, device: str) -> list[dict[str, Any]]:
    """The mask as two variable-length calls, one for clean rows and one for noisy rows, a sequence for each block.

    Clean block i: keys of its visible clean blocks and itself. Noisy block i: those before it and itself. Keys are
    repeated for every block that sees them. Row and key indices count tokens of the (B S) sequence.
    """
    P, f, T = layout.tokens_per_frame, layout.frames_per_block, layout.frames
    S = layout.sequence_length

    def tokens(stream_frame: int, block: int) -> torch.Tensor:
        start = (stream_frame + block * f) * P
        return torch.arange(start, start + layout.block_frames(block) * P)

    calls = []
    noisy = [layout.noisy_start + copy * T for copy in range(layout.noisy_copies)]
    for streams in ([layout.clean_start], noisy):
        rows, keys = [], []
        for item in range(batch):
            for stream in streams:
                for block in range(layout.num_blocks):
                    past = [tokens(layout.clean_start, j) for j in range(block) if layout.visible(block, j)]
                    own = tokens(stream, block)
                    rows.append(own + item * S)
                    keys.append(torch.cat([*past, own]) + item * S)
        if rows:
            calls.append(
                {
                    "rows": torch.cat(rows).to(device),
                    "keys": torch.cat(keys).to(device),
                    "cu_rows": _offsets(rows, device),
                    "cu_keys": _offsets(keys, device),
                    "max_rows": max(map(len, rows)),
                    "max_keys": max(map(len, keys)),
                }
            )
    return calls


def _offsets(parts: list[torch.Tensor], device: str) -> torch.Tensor:
    lengths = torch.tensor([0, *map(len, parts)])
    return lengths.cumsum(0).to(device, torch.int32)


def packed_attention(calls: list[dict[str, Any]], varlen: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """(q, k, v) -> out by `packed_calls`; varlen takes q, k, v (tokens, H, D), cu_rows, cu_keys, max_rows, max_keys."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        B, _, S, _ = q.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        out = torch.empty_like(q)
        for c in calls:
            part = varlen(
                q[c["rows"]], k[c["keys"]], v[c["keys"]], c["cu_rows"], c["cu_keys"], c["max_rows"], c["max_keys"]
            )
            out = out.index_copy(0, c["rows"], part)
        return out.unflatten(0, (B, S)).transpose(1, 2)

    return run


def _packed(layout, shape, device, contenders, missing) -> None:
    name = "two packed flash calls"
    gqa = shape.get("Hkv", shape["H"]) != shape["H"]
    if device == "cpu":
        missing.append(Missing(name, "variable-length flash attention is CUDA only"))
        return
    try:
        from flash_attn import flash_attn_varlen_func

        note = "flash_attn"

        def varlen(q, k, v, *where):
            return flash_attn_varlen_func(q, k, v, *where)
    except ImportError:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            missing.append(Missing(name, f"neither flash_attn nor torch.nn.attention.varlen is there: {error}"))
            return
        note = "torch.nn.attention.varlen"
        if gqa:
            missing.append(Missing(name, "flash_attn is not there; torch's varlen_attn lacks grouped queries"))
            return

        def varlen(q, k, v, *where):
            return varlen_attn(q, k, v, *where)

    calls = packed_calls(layout, shape["B"], device)
    contenders.append(Contender(name, gate.directions(packed_attention(calls, varlen)), note=note))


def _dense_causal(layout, shape, device, contenders, missing) -> None:
    """The yardstick: plain causal attention whose triangle holds as many pairs, on the libraries' best kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    B, Hq, D = shape["B"], shape["H"], shape["D"]
    N = max(128, round(math.sqrt(2 * layout.attended_pairs) / 128) * 128)
    dtype, gqa = measure.DTYPES[shape["dtype"]], shape.get("Hkv", Hq) != Hq
    sets: list[Inputs] = []

    def own_inputs() -> Inputs:
        while len(sets) < 2:
            heads = (Hq, shape.get("Hkv", Hq), shape.get("Hkv", Hq), Hq)
            q, k, v, grad = (torch.randn(B, N, h, D, device=device).to(dtype).transpose(1, 2) for h in heads)
            sets.append(Inputs(tuple(t.requires_grad_() for t in (q, k, v)), grad))
        sets.append(sets.pop(0))
        return sets[0]

    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends = {"cuDNN": SDPBackend.CUDNN_ATTENTION} | backends
    else:
        missing.append(Missing("dense causal, cuDNN", "CUDA only"))
    for name, backend in backends.items():

        def run(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)

        launch = {key: lambda _, call=call: call(own_inputs()) for key, call in gate.directions(run).items()}
        note = f"another function: plain causal attention over {N} tokens, about as many pairs"
        flops = work(B * Hq * N * (N + 1) // 2, D)
        contenders.append(Contender(f"dense causal, {name}", launch, "other", note, flops=flops, bytes={}))
