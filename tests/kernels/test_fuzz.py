"""Drawn calls of every public op, forward and backward, in any memory layout, against fp64 references.

What is drawn is the description of a call; its data come from a seed. A call is one implementation's forward and, where
there is one, backward. Composed, C++ and the reference itself take part in every draw, Triton (interpreted) in few.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from attention_layouts import layouts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sae_kernels as sk
from sae_kernels import FrameLayout
from sae_kernels.activations import ops as activations
from sae_kernels.frame_attention import ops as attention
from sae_kernels.qk_prepare import ops as qk
from sae_kernels.testing import STRIDES, assert_within_budget, strided

CALLS: Counter[str] = Counter()
LOW = {torch.float64: torch.float32}  # what is computed in fp64 must be at least as good as fp32
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
KINDS = st.lists(st.sampled_from(STRIDES), min_size=6, max_size=6)
SCALES = st.lists(st.sampled_from([1.0, 1.0, 1.0, 1e-3, 30.0]), min_size=4, max_size=4)
SEEDS = st.integers(0, 2**31)
TRITON = st.integers(0, 15)

# Draws of each op; calls are at least twice as many.
DRAWS = {
    "mp_silu": 80, "modulated_silu": 70, "mp_sum": 80, "mp_sum_tensor": 70, "mp_cat": 70, "pixel_norm": 70,
    "pixel_norm_silu": 60, "normalize_weight": 70, "normalize_weights": 60, "normalize_weights_": 60,
    "token_noise": 60, "token_noise_eps": 40, "edm_loss": 60, "qk_prepare": 60, "qkv_prepare": 50,
    "causal_conv3d": 50, "past_term": 40, "frame_attention": 60,
}  # fmt: skip


def fuzz(op: str, **drawn) -> Callable:
    """Run a test on the op's number of draws, and see that each made its calls."""

    def decorate(test: Callable) -> Callable:
        @given(**drawn)
        @settings(
            max_examples=DRAWS[op],
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def draw(**description):
            test(**description)

        @pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")
        def counted():
            CALLS[op] = 0
            draw()
            assert CALLS[op] >= 2 * DRAWS[op]

        return counted

    return decorate


def test_number_of_calls():
    public = {name for name in sk.__all__ if name[0].islower() and callable(getattr(sk, name))}
    assert public <= set(DRAWS), f"not fuzzed: {public - set(DRAWS)}"
    assert 2 * sum(DRAWS.values()) >= 2000


def make(shapes: Sequence[Sequence[int]], kinds: Sequence[str], scales: Sequence[float], dtype, seed) -> list:
    """Tensors of these shapes, strides and magnitudes; numbers that fp32 and the dtype both hold."""
    made = []
    for index, shape in enumerate(shapes):
        x = strided(shape, kinds[index % len(kinds)], LOW.get(dtype, dtype), seed + index)
        if scales[index % len(scales)] != 1.0:
            # In place in memory: a product would be dense.
            x = x.detach()
            values = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
            values.mul_(scales[index % len(scales)])
        made.append(x if x.dtype == dtype else widened(x, dtype))
    return made


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In another dtype, with the same strides."""
    storage = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return storage.to(dtype).as_strided(x.shape, x.stride(), x.storage_offset())


def run(call: Callable, impl: str, inputs: Sequence[torch.Tensor], kind: str, lowest: torch.dtype, seed: int) -> list:
    """Outputs, then gradients of the inputs, of output gradients that `lowest` holds."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = call(impl, *inputs)
    outs = list(outs) if isinstance(outs, (tuple, list)) else [outs]
    some = [o for o in outs if o.requires_grad]
    grads = [widened(strided(o.shape, kind, lowest, seed + 77 + i), o.dtype) for i, o in enumerate(some)]
    found = torch.autograd.grad(some, inputs, grads, allow_unused=True)
    return [*outs, *(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))]


def hold(
    op: str, call: Callable, inputs: Sequence[torch.Tensor], impls: Sequence[str], kind: str, seed: int, terms=None
):
    """Every implementation within the budget; terms: for each result, the size of what may cancel in it."""
    dtype = inputs[0].dtype
    low = LOW.get(dtype, dtype)
    lowest = torch.bfloat16 if low == torch.bfloat16 else torch.float16
    plain = [x.detach().clone(memory_format=torch.contiguous_format) for x in inputs]
    gold = run(call, "reference", [x.double() for x in plain], kind, lowest, seed)
    eager = run(call, "reference", [x.to(low) if x.dtype == dtype else x for x in plain], kind, lowest, seed)
    for impl in impls:
        actual = run(call, impl, inputs, kind, lowest, seed)
        CALLS[op] += 1
        for index, (a, g, e) in enumerate(zip(actual, gold, eager, strict=True)):
            e = e.to(LOW.get(e.dtype, e.dtype)).contiguous()
            a, g = a.to(e.dtype).contiguous(), g.double().contiguous()
            # Out of the range of the dtype: eager is no yardstick there.
            fits = e.isfinite() & g.to(e.dtype).isfinite()
            size = float(terms[index]) if terms else 0.0
            a, g, e = (torch.cat([x[fits], torch.full_like(x[fits], size)]) for x in (a, g, e))
            strides = [(tuple(x.shape), x.stride(), x.storage_offset()) for x in inputs]
            assert_within_budget(a, g, e, f"{op} by {impl}, result {index}, {dtype}, {strides}, gradient {kind}")


def chosen(triton: int, *others: str, dtype=torch.float32) -> list[str]:
    """One draw in sixteen runs Triton too."""
    return ["composed", "reference", *others, *["triton"] * (triton == 0 and dtype != torch.float64)]


def native(ops, dtype: torch.dtype) -> list[str]:
    """The C++ kernels, where there are some for this dtype."""
    return [impl for impl in ops.implementations(torch.device("cpu"), dtype)[0] if impl == "cpp"]


def largest(x: torch.Tensor) -> float:
    return x.detach().double().abs().max().item() if x.numel() else 0.0


SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 5, 8]), min_size=1, max_size=4)
# One element of several to a norm, so that its gradient is not all cancellation.
VIDEO = st.tuples(
    st.integers(0, 2), st.sampled_from([3, 4, 8, 17]), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)
)


@fuzz("mp_silu", shape=SHAPE, dtype=DTYPES, kinds=KINDS, scales=SCALES, seed=SEEDS, triton=TRITON)
def test_mp_silu(shape, dtype, kinds, scales, seed, triton):
    inputs = make([shape], kinds, scales, dtype, seed)
    hold(
        "mp_silu",
        lambda impl, x: sk.mp_silu(x, impl=impl),
        inputs,
        chosen(triton, *native(activations, dtype), dtype=dtype),
        kinds[-1],
        seed,
    )


@fuzz("modulated_silu", shape=VIDEO, dtype=DTYPES, kinds=KINDS, seed=SEEDS, triton=TRITON)
def test_modulated_silu(shape, dtype, kinds, seed, triton):
    B, C, F, *_ = shape
    x, scale = make([shape, (B, F, C)], kinds, [1.0], dtype, seed)
    # A scale's gradient is a sum over pixels.
    terms = [0, 0, math.prod(shape[3:]) * largest(x) * 4]
    call = lambda impl, x, scale: sk.modulated_silu(x, scale, impl=impl)  # noqa: E731
    hold(
        "modulated_silu",
        call,
        [x, scale],
        chosen(triton, *native(activations, dtype), dtype=dtype),
        kinds[-1],
        seed,
        terms,
    )


@fuzz(
    "mp_sum",
    shape=SHAPE,
    dtype=DTYPES,
    kinds=KINDS,
    t=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    limit=st.sampled_from([None, 1e4]),
    seed=SEEDS,
    triton=TRITON,
)
def test_mp_sum(shape, dtype, kinds, t, limit, seed, triton):
    a, b = make([shape, shape], kinds, [1.0], dtype, seed)
    call = lambda impl, a, b: sk.mp_sum(a, b, t, limit=limit, impl=impl)  # noqa: E731
    hold(
        "mp_sum",
        call,
        [a, b],
        chosen(triton, *native(activations, dtype), dtype=dtype),
        kinds[-1],
        seed,
        [largest(a) + largest(b), 0, 0],
    )


@fuzz("mp_sum_tensor", shape=VIDEO, dtype=DTYPES, kinds=KINDS, inside=st.booleans(), seed=SEEDS, triton=TRITON)
def test_mp_sum_of_a_tensor(shape, dtype, kinds, inside, seed, triton):
    B, _, F = shape[:3]
    a, b, t = make([shape, shape, (B, 1, F, 1, 1) if not inside else (1, 1, *shape[2:])], kinds, [1.0], dtype, seed)
    size = largest(a) + largest(b)
    call = lambda impl, a, b, t: sk.mp_sum(a, b, t, impl=impl)  # noqa: E731
    impls = chosen(triton + inside, dtype=dtype)
    hold(
        "mp_sum_tensor", call, [a, b, t], impls, kinds[-1], seed, [size, 3, 3, 3 * size * a.numel() / max(t.numel(), 1)]
    )


@fuzz(
    "mp_cat",
    shape=SHAPE,
    dtype=DTYPES,
    kinds=KINDS,
    dim=st.integers(0, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    seed=SEEDS,
    triton=TRITON,
)
def test_mp_cat(shape, dtype, kinds, dim, sizes, seed, triton):
    dim %= len(shape)
    a, b = make([[*shape[:dim], size, *shape[dim + 1 :]] for size in sizes], kinds, [1.0], dtype, seed)
    call = lambda impl, a, b: sk.mp_cat(a, b, dim, 0.3, impl=impl)  # noqa: E731
    hold("mp_cat", call, [a, b], chosen(triton, *native(activations, dtype), dtype=dtype), kinds[-1], seed)


def norm_terms(x: torch.Tensor, dims, results: int) -> list[float]:
    """grad / rms - y <grad, y> / (n rms): both terms are of the size of grad over the least rms."""
    rms = x.detach().double().square().mean(dim=dims).sqrt() if x.numel() else torch.ones(1)
    return [0] * results + [8 / (rms.min().item() + 1e-4)]


@fuzz(
    "pixel_norm",
    shape=VIDEO,
    dtype=DTYPES,
    kinds=KINDS,
    dim=st.integers(0, 4),
    scales=SCALES,
    seed=SEEDS,
    triton=TRITON,
)
def test_pixel_norm(shape, dtype, kinds, dim, scales, seed, triton):
    shape = (max(shape[0], 1), *shape[1:]) if dim == 0 else shape
    (x,) = make([shape], kinds, scales, dtype, seed)
    call = lambda impl, x: sk.pixel_norm(x, dim, impl=impl)  # noqa: E731
    hold(
        "pixel_norm",
        call,
        [x],
        chosen(triton, *native(activations, dtype), dtype=dtype),
        kinds[-1],
        seed,
        norm_terms(x, dim, 1),
    )


@fuzz("pixel_norm_silu", shape=VIDEO, dtype=DTYPES, kinds=KINDS, seed=SEEDS, triton=TRITON)
def test_pixel_norm_silu(shape, dtype, kinds, seed, triton):
    (x,) = make([shape], kinds, [1.0], dtype, seed)
    call = lambda impl, x: sk.pixel_norm_silu(x, impl=impl)  # noqa: E731
    hold(
        "pixel_norm_silu",
        call,
        [x],
        chosen(triton, *native(activations, dtype), dtype=dtype),
        kinds[-1],
        seed,
        norm_terms(x, 1, 2),
    )


WEIGHT = st.tuples(st.integers(0, 4), st.integers(1, 5), st.sampled_from([1, 3]), st.integers(2, 3))


@fuzz("normalize_weight", shape=WEIGHT, dtype=DTYPES, kinds=KINDS, seed=SEEDS, triton=TRITON)
def test_normalize_weight(shape, dtype, kinds, seed, triton):
    w, gain = make([shape, ()], kinds, [1.0], dtype, seed)
    _, size = norm_terms(w, (1, 2, 3), 1)
    size *= max(largest(gain), 1)
    call = lambda impl, w, gain: sk.normalize_weight(w, gain, impl=impl)  # noqa: E731
    hold("normalize_weight", call, [w, gain], chosen(triton, dtype=dtype), kinds[-1], seed, [0, size, w.numel() * 4])


@fuzz("normalize_weights", shapes=st.lists(WEIGHT, min_size=1, max_size=3), dtype=DTYPES, kinds=KINDS, seed=SEEDS)
def test_normalize_weights(shapes, dtype, kinds, seed):
    weights = make(shapes, kinds, [1.0], dtype, seed)

    def call(impl, *weights):
        if impl == "reference":
            return [sk.normalize_weight(w, 0.7, impl=impl) for w in weights]
        return sk.normalize_weights(weights, [0.7] * len(weights), impl=impl)

    terms = [0] * len(weights) + [norm_terms(w, (1, 2, 3), 0)[0] for w in weights]
    hold("normalize_weights", call, weights, ["composed", "auto"], kinds[-1], seed, terms)


@fuzz(
    "token_noise",
    shape=SHAPE,
    dtype=DTYPES,
    kinds=KINDS,
    copies=st.integers(0, 2),
    full=st.booleans(),
    seed=SEEDS,
    triton=TRITON,
)
def test_token_noise(shape, dtype, kinds, copies, full, seed, triton):
    B, T, *rest = (min(shape[0], 2), max(1, min(shape[-1], 3)), *(min(n, 3) for n in shape[1:-1]))
    layout = FrameLayout(T, 1, noisy_copies=copies)
    F = layout.total_frames
    scale = (B, F, *rest) if full else (B, F)
    inputs = make([(B, T, *rest), scale, scale], kinds, [1.0], dtype, seed)

    def call(impl, x, signal, noise):
        return sk.token_noise(x, signal, noise, layout, seed=seed, offset=3, impl=impl)

    shared = math.prod(rest) * 40
    terms = [
        largest(inputs[0]) * largest(inputs[1]) + 6 * largest(inputs[2]),
        (1 + copies) * 4 * largest(inputs[1]),
        shared,
        shared,
    ]
    hold("token_noise", call, inputs, [*chosen(triton, dtype=dtype), "auto"], kinds[-1], seed, terms)


@fuzz(
    "token_noise_eps",
    shape=SHAPE,
    dtype=DTYPES,
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(-(2**63), 2**63 - 1),
    triton=TRITON,
)
def test_token_noise_eps(shape, dtype, seed, offset, triton):
    def eps(impl, dtype):
        return sk.token_noise_eps(shape, seed=seed, offset=offset, dtype=dtype, impl=impl)

    gold, eager = eps("reference", torch.float32).double(), eps("reference", LOW.get(dtype, dtype))
    for impl in [*chosen(triton, dtype=dtype), "auto"]:
        CALLS["token_noise_eps"] += 1
        assert_within_budget(eps(impl, dtype).to(eager.dtype), gold, eager, impl)


@fuzz("edm_loss", shape=VIDEO, dtype=DTYPES, kinds=KINDS, copies=st.integers(1, 2), first=st.booleans(), seed=SEEDS)
def test_edm_loss(shape, dtype, kinds, copies, first, seed):
    B, _, T, *rest = shape
    layout = FrameLayout(T, 1, noisy_copies=copies, noisy_first=first)
    raw, x0, sigma = make([(B, copies * T, 2, *rest), (B, T, 2, *rest), (B, copies * T)], kinds, [1.0], dtype, seed)
    sigma = widened(strided(sigma.shape, kinds[2], torch.float32, seed).abs() + 0.1, torch.float32)

    def call(impl, raw):
        return sk.edm_loss(raw, x0.to(raw.dtype), sigma.to(raw.dtype), layout, seed=seed, offset=1, impl=impl)

    sizes = (largest(raw) + largest(x0) + 6) ** 2
    hold("edm_loss", call, [raw], ["composed", "reference", "auto"], kinds[-1], seed, [sizes, 8 * sizes**0.5])


HEADS = st.sampled_from([(1, 1), (2, 1), (3, 3)])
PREPARE = {
    "B": st.integers(0, 2), "heads": HEADS, "D": st.sampled_from([2, 6, 8, 16]), "frames": st.integers(1, 3), "tokens": st.integers(1, 4),
    "dtype": DTYPES, "kinds": KINDS, "interleaved": st.booleans(), "normalize": st.booleans(), "turned": st.sampled_from(["layout", "tensor", "none"]),
    "seed": SEEDS, "triton": TRITON,
}  # fmt: skip


def places(turned, layout, seed):
    if turned == "tensor":
        return (
            strided((layout.sequence_length,), STRIDES[seed % len(STRIDES)], torch.float32, seed)
            .mul(1000)
            .to(torch.int64)
        )
    return layout if turned == "layout" else None


@fuzz("qk_prepare", **PREPARE)
def test_qk_prepare(B, heads, D, frames, tokens, dtype, kinds, interleaved, normalize, turned, seed, triton):
    layout = FrameLayout(frames, tokens)
    S = layout.sequence_length
    inputs = make([(B, heads[0], S, D), (B, heads[1], S, D), (B, heads[1], S, D)], kinds, [1.0], dtype, seed)
    options = {"interleaved": interleaved, "normalize": normalize, "normalize_v": True}

    def call(impl, q, k, v):
        return sk.qk_prepare(q, k, v, places(turned, layout, seed), **options, impl=impl)

    terms = [3 * largest(x) + 3 for x in inputs] + [norm_terms(x, -1, 0)[0] for x in inputs]
    hold("qk_prepare", call, inputs, chosen(triton, *native(qk, dtype), dtype=dtype), kinds[-1], seed, terms)


@fuzz("qkv_prepare", **PREPARE)
def test_qkv_prepare(B, heads, D, frames, tokens, dtype, kinds, interleaved, normalize, turned, seed, triton):
    layout = FrameLayout(frames, tokens)
    (qkv,) = make([(B, layout.sequence_length, heads[0] + 2 * heads[1], D)], kinds, [1.0], dtype, seed)
    options = {"interleaved": interleaved, "normalize": normalize, "kv_heads": heads[1]}

    def call(impl, qkv):
        return sk.qkv_prepare(qkv, places(turned, layout, seed), **options, impl=impl)

    terms = [3 * largest(qkv) + 3] * 3 + norm_terms(qkv, -1, 0)
    hold("qkv_prepare", call, [qkv], chosen(triton, *native(qk, dtype), dtype=dtype), kinds[-1], seed, terms)


CONV = {
    "B": st.integers(0, 2), "channels": st.tuples(st.sampled_from([1, 3, 8]), st.sampled_from([1, 4, 8])), "size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "kernel": st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.sampled_from([1, 3])), "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    "kinds": KINDS, "seed": SEEDS, "triton": TRITON,
}  # fmt: skip


def conv_terms(weight: torch.Tensor, video: torch.Tensor, inputs: Sequence[torch.Tensor], streams: int) -> list[float]:
    """Sums of so many products, in fp32 whatever the dtype of the result: out, then each gradient, 4 the largest grad."""
    Cout, taps, pixels = weight.shape[0], weight[0].numel(), video[:, 0].numel()
    w, x = largest(weight), largest(video)
    scales = max([1.0, *(largest(t) for t in inputs if t.ndim == 2)])
    history, image = [4 * w * scales * (taps * Cout * streams) ** 0.5], math.prod(video.shape[3:])
    of_scales = [4 * w * x * (Cout * taps * image) ** 0.5] * 2 if len(inputs) > 2 else []
    terms = [w * x * scales * taps**0.5, *history, 4 * x * scales * pixels**0.5, *of_scales, *history]
    lower = torch.finfo(torch.float32).eps / torch.finfo(video.dtype).eps
    return [size * min(lower, 1) for size in terms[: 1 + len(inputs)]]


@fuzz("causal_conv3d", **CONV, layout=layouts(3, tokens=1, blocks=2), history=st.booleans())
def test_causal_conv3d(B, channels, size, kernel, dtype, kinds, seed, triton, layout, history):
    F, (Cin, Cout) = layout.total_frames, channels
    shapes = [(B, Cin, F, *size), (Cout, Cin, *kernel), (B, F), (B, F), (B, Cin, kernel[0] - 1, *size)]
    inputs = make(shapes[: 5 if history else 4], kinds, [1.0], dtype, seed)

    def call(impl, x, weight, past_scale, last_scale, history=None):
        return sk.causal_conv3d(
            x, weight, layout, past_scale=past_scale, last_scale=last_scale, history=history, pad_value=0.5, impl=impl
        )

    impls = chosen(triton + (layout.frames_per_block > 1 and layout.noisy_copies > 0), dtype=dtype)
    hold(
        "causal_conv3d", call, inputs, impls, kinds[-1], seed, conv_terms(inputs[1], inputs[0], inputs, layout.streams)
    )


@fuzz("past_term", **CONV)
def test_past_term(B, channels, size, kernel, dtype, kinds, seed, triton):
    inputs = make([(B, channels[0], kernel[0] - 1, *size), (*channels[::-1], *kernel)], kinds, [1.0], dtype, seed)
    call = lambda impl, history, weight: sk.past_term(history, weight, impl=impl)  # noqa: E731
    hold(
        "past_term",
        call,
        inputs,
        chosen(triton, dtype=dtype),
        kinds[-1],
        seed,
        conv_terms(inputs[1], inputs[0], inputs, 1),
    )


@fuzz(
    "frame_attention",
    B=st.integers(0, 2),
    heads=HEADS,
    D=st.sampled_from([1, 8, 17]),
    layout=layouts(6, tokens=9, blocks=3),
    long=st.booleans(),
    noisy=st.booleans(),
    dtype=DTYPES,
    kinds=KINDS,
    seed=SEEDS,
    triton=TRITON,
)
def test_frame_attention(B, heads, D, layout, long, noisy, dtype, kinds, seed, triton):
    if long and triton:  # beyond a group of blocks, with parts that every row sees
        layout = FrameLayout(2, 150, noisy_copies=1, noisy_first=layout.noisy_first)
    noisy = noisy and layout.noisy_copies > 0
    S = layout.sequence_length
    rows = S - layout.frames * layout.tokens_per_frame if noisy else S
    q, k, v = make([(B, heads[0], rows, D), (B, heads[1], S, D), (B, heads[1], S, D)], kinds, [1.0], dtype, seed)

    def call(impl, q, k, v):
        return sk.frame_attention(q, k, v, layout, noisy_queries_only=noisy, impl=impl)

    # dq = scale sum p (dp - delta) k; a key is read by every row of the group at most.
    product = 4 * D**0.5 * max(largest(v), 1)
    readers = heads[0] / heads[1] * rows
    terms = [largest(v), product * max(largest(k), 1), product * max(largest(q), 1) * readers**0.5, 4 * readers**0.5]
    impls = chosen(triton, *native(attention, dtype), dtype=dtype)
    hold("frame_attention", call, [q, k, v], impls, kinds[-1], seed, terms)


def self_overlaps(kind: str) -> bool:
    return kind in ("expanded", "expanded everywhere", "overlapping")


@fuzz("normalize_weights_", shapes=st.lists(WEIGHT, min_size=1, max_size=3), dtype=DTYPES, kinds=KINDS, seed=SEEDS)
def test_normalize_weights_in_place(shapes, dtype, kinds, seed):
    kinds = ["contiguous" if self_overlaps(kind) else kind for kind in kinds]
    for impl in ("composed", "auto"):
        weights = make(shapes, kinds, [1.0], dtype, seed)
        gold, eager = (
            [
                sk.normalize_weight(w.to(t).contiguous(), math.prod(w.shape[1:]) ** 0.5, impl="reference")
                for w in weights
            ]
            for t in (torch.float64, LOW.get(dtype, dtype))
        )
        sk.normalize_weights_(weights, impl=impl)
        CALLS["normalize_weights_"] += 1
        for w, g, e in zip(weights, gold, eager, strict=True):
            assert_within_budget(w.to(e.dtype), g, e, f"{impl}, strides {w.stride()}")
