"""qk_prepare: the reference against equations and finite differences, the implementations against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout, _extension, _launch, qk_prepare, qkv_prepare
from sae_kernels.qk_prepare import ops
from sae_kernels.testing import assert_within_budget, noncontiguous

LOW = [torch.float32, torch.bfloat16, torch.float16]
LAYOUT = FrameLayout(3, 4)


def explicit(*shape):
    return torch.randint(-50, 1000, shape, generator=torch.Generator().manual_seed(1))


# name: (heads of q, heads of k and v, D, positions, options); B = 2. Sequences of 24 tokens but for K = 0 and 3.
CASES = {
    "frames": (2, 2, 16, LAYOUT, {"normalize_v": True}),
    "start": (2, 2, 16, LAYOUT, {"start": 7}),
    "noisy first": (2, 2, 16, FrameLayout(3, 4, noisy_first=True), {}),
    "K=0": (3, 3, 8, FrameLayout(5, 3, noisy_copies=0), {"start": 1000}),
    "K=3": (2, 1, 8, FrameLayout(2, 3, noisy_copies=3), {"normalize_v": True}),
    "grouped": (6, 2, 16, LAYOUT, {}),
    "interleaved": (2, 2, 16, LAYOUT, {"interleaved": True, "normalize_v": True}),
    "partial": (2, 2, 20, LAYOUT, {"axes": (12,)}),
    "partial interleaved": (2, 2, 20, LAYOUT, {"axes": (12,), "interleaved": True}),
    "odd head dim": (2, 2, 13, LAYOUT, {"axes": (6,), "normalize_v": True}),
    "one channel more": (2, 1, 9, LAYOUT, {"axes": (8,), "interleaved": True}),
    "grid": (2, 2, 16, FrameLayout(2, 6), {"grid": (2, 3)}),
    "grid interleaved": (2, 1, 24, FrameLayout(2, 6, noisy_first=True), {"grid": (3, 2), "start": 5, "interleaved": True}),
    "grid of chosen axes": (2, 2, 16, FrameLayout(2, 6), {"grid": (2, 3), "axes": (2, 8, 4)}),
    "grid without frames": (2, 2, 16, FrameLayout(2, 6), {"grid": (2, 3), "axes": (0, 8, 8)}),
    "positions": (2, 2, 16, explicit(24), {}),
    "positions by batch": (2, 1, 16, explicit(2, 24), {"interleaved": True}),
    "positions on three axes": (2, 2, 16, explicit(24, 3), {"axes": (4, 6, 6)}),
    "positions on two axes by batch": (2, 2, 16, explicit(2, 24, 2), {"axes": (4, 8)}),
    "another base and eps": (2, 2, 16, LAYOUT, {"base": 100.0, "eps": 0.05}),
    "rotation alone": (2, 2, 16, LAYOUT, {"normalize": False}),
    "norm of v alone": (2, 2, 16, LAYOUT, {"normalize": False, "normalize_v": True}),
    "norm alone": (2, 2, 7, None, {"normalize_v": True}),
}  # fmt: skip


def length(positions):
    return positions.sequence_length if isinstance(positions, FrameLayout) else 24


def make(name, dtype=torch.float32, seed=0, inside=False, B=2):
    """([q, k, v], upstream gradients), in memory (B, H, S, D), or (B, S, H, D) if `inside`."""
    Hq, Hkv, D, positions, _ = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def tensor(heads):
        x = torch.randn(B, heads, length(positions), D, generator=generator).to(dtype)
        return x.transpose(1, 2).contiguous().transpose(1, 2) if inside else x

    return [tensor(h) for h in (Hq, Hkv, Hkv)], [tensor(h) for h in (Hq, Hkv, Hkv)]


def run(name, inputs, grads, dtype, **extra):
    """[q, k, v, and the gradients of q, k, v]"""
    *_, positions, options = CASES[name]
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outs = qk_prepare(*inputs, positions, **options, **extra)
    return [*outs, *torch.autograd.grad(outs, inputs, [g.to(dtype) for g in grads])]


def run_packed(name, inputs, grads, dtype, **extra):
    """The same from one tensor; its gradient comes back in three."""
    *_, positions, options = CASES[name]
    heads = [x.shape[1] for x in inputs]
    # Cut out of a longer tensor: heads are not adjacent in memory to the next token's.
    buffer = torch.full(
        (inputs[0].shape[0], inputs[0].shape[2], sum(heads) + 1, inputs[0].shape[3]), math.nan, dtype=dtype
    )
    buffer[:, :, 1:] = torch.cat(inputs, dim=1).transpose(1, 2).detach()
    qkv = buffer[:, :, 1:].requires_grad_()
    outs = qkv_prepare(qkv, positions, kv_heads=heads[1], **options, **extra)
    (grad,) = torch.autograd.grad(outs, qkv, [g.to(dtype) for g in grads])
    return [*outs, *grad.transpose(1, 2).split(heads, dim=1)]


NAMES = ("q", "k", "v", "grad q", "grad k", "grad v")


def compare(name, inputs, grads, impl="composed", function=run):
    dtype = inputs[0].dtype
    actual = function(name, inputs, grads, dtype, impl=impl)
    gold = run(name, inputs, grads, torch.float64, impl="reference")
    eager = run(name, inputs, grads, dtype, impl="reference")
    for what, *results in zip(NAMES, actual, gold, eager, strict=True):
        assert results[0].dtype == dtype
        assert_within_budget(*results, f"{name}: {what}")
    return actual


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_by_hand(name, interleaved):
    """Each head as the text says it: its unit vector, and each pair as a complex number times e^(i angle)."""
    *_, D, positions, options = CASES[name]
    options = options | {"interleaved": interleaved}
    inputs, _ = make(name, torch.float64)
    outs = qk_prepare(*inputs, positions, **options, impl="reference")
    axes = options.get("axes", (D - 4 * (D // 6), *[2 * (D // 6)] * 2) if "grid" in options else (D,))
    pairs = [(axis, j, w) for axis, w in enumerate(axes) for j in range(w // 2)] if positions is not None else []
    for index, (x, got) in enumerate(zip(inputs, outs, strict=True)):
        for b, h, s in ((0, 0, 0), (1, x.shape[1] - 1, 5), (1, 0, x.shape[2] - 1)):
            want = x[b, h, s].tolist()
            if options.get("normalize_v", False) if index == 2 else options.get("normalize", True):
                rms = math.sqrt(sum(c * c for c in want) / D)
                want = [c / (options.get("eps", 1e-4) + rms) for c in want]
            for p, (axis, j, w) in enumerate(pairs if index < 2 else []):
                if isinstance(positions, FrameLayout):
                    P, X = positions.tokens_per_frame, options.get("grid", (1, positions.tokens_per_frame))[1]
                    place = (options.get("start", 0) + s // P % positions.frames, s % P // X, s % P % X)[axis]
                else:
                    at = positions if positions.ndim == 1 + (len(axes) > 1) else positions[b]
                    place = (at[s] if at.ndim == 1 else at[s, axis]).item()
                angle = place * options.get("base", 10000.0) ** (-2 * j / w)
                first, second = (2 * p, 2 * p + 1) if interleaved else (p, p + len(pairs))
                z = complex(want[first], want[second]) * complex(math.cos(angle), math.sin(angle))
                want[first], want[second] = z.real, z.imag
            assert got[b, h, s].tolist() == pytest.approx(want, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("impl", ["reference", "composed"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name, impl):
    *_, positions, options = CASES[name]
    inputs = [x[:, :1].double().requires_grad_() for x in make(name)[0]]
    assert torch.autograd.gradcheck(lambda *a: qk_prepare(*a, positions, impl=impl, **options), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_composed_is_the_reference(name, dtype, monkeypatch):
    inputs, grads = make(name, dtype)
    actual = compare(name, inputs, grads)
    assert all(x.is_contiguous() for x in actual)
    packed = compare(name, inputs, grads, function=run_packed)
    assert all(x.transpose(1, 2).is_contiguous() for x in packed[:3])
    assert all(torch.equal(a, p) for a, p in zip(actual, packed, strict=True))
    monkeypatch.setattr(ops.composed, "PIECE", 200)
    assert all(torch.equal(a, p) for a, p in zip(actual, compare(name, inputs, grads), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_fp64(name):
    inputs, grads = make(name, torch.float64)
    got, want = (run(name, inputs, grads, torch.float64, impl=impl) for impl in ("composed", "reference"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


needs_triton = pytest.mark.skipif(
    _launch.why_not(torch.device("cpu")) is not None, reason=str(_launch.why_not(torch.device("cpu")))
)


@needs_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_triton_is_the_reference(name, dtype):
    inputs, grads = make(name, dtype)
    compare(name, inputs, grads, impl="triton", function=run_packed)
    # Aligned whole heads, then a stride in tokens and one that is not a multiple of 16 bytes.
    inputs, grads = make(name, dtype, inside=True)
    inputs, grads = [noncontiguous(x, 2) for x in inputs], [noncontiguous(g, 3) for g in grads]
    compare(name, inputs, grads, impl="triton")


@needs_triton
@pytest.mark.parametrize(("D", "S"), [(64, 40), (128, 17), (2, 9), (1, 5), (256, 9), (96, 23)])
def test_triton_of_real_widths_and_ragged_tiles(D, S):
    """Lengths that no tile divides, more heads than one program takes."""
    q, k = torch.randn(1, 5, S, D), torch.randn(1, 1, S, D)
    positions = torch.arange(S) if D > 1 else None
    gold = qk_prepare(q.double(), k.double(), None, positions, impl="reference")
    eager = qk_prepare(q, k, None, positions, impl="reference")
    for results in zip(qk_prepare(q, k, None, positions, impl="triton"), gold, eager, strict=True):
        assert_within_budget(*results, f"D={D}")


needs_cpp = pytest.mark.skipif(_extension.library("cpu") is not None, reason=str(_extension.library("cpu")))
REGISTERED = ["composed", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
IMPLEMENTATIONS = [*REGISTERED, "reference"]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_angles_are_exact_at_frame_a_million(impl, interleaved):
    """cos and sin within 2^-22 of those of the true angle.

    The angle may be off by 3 x 2^-25 of pi / 4 by fp32, and 10^6 x (2^-53 + 2 pi 2^-65) by frequency and fixed point:
    7.1e-8; sine, cosine and their rounding add 1.5 x 2^-24 at most. In fp32 position x frequency is off by 0.05.
    """
    D = 128
    pairs = torch.tensor([1.0, 0.0]).repeat(D // 2) if interleaved else torch.tensor([1.0] * 64 + [0.0] * 64)
    frames = [0, 1, 2, 3, 5, 1000, 65_537, 10**6 - 1, 10**6, 10**6 + 1, -1, -(10**6)]
    q, _ = qk_prepare(
        *[pairs.expand(1, 1, len(frames), D)] * 2, positions=torch.tensor(frames), normalize=False, impl=impl,
        interleaved=interleaved,
    )  # fmt: skip
    q = q[0, 0].double().unflatten(-1, (-1, 2)) if interleaved else torch.stack(q[0, 0].double().chunk(2, -1), -1)
    exact = [[p * 10000.0 ** (-2 * j / D) for j in range(D // 2)] for p in frames]
    want = torch.tensor([[(math.cos(a), math.sin(a)) for a in row] for row in exact], dtype=torch.float64)
    assert (q - want).abs().max() < 2**-22


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_start_and_copies_are_positions(impl):
    """A layout is the explicit positions of its frames; both orders and all copies have those of the clean stream."""
    generator = torch.Generator().manual_seed(0)
    for K in (0, 1, 3):
        for noisy_first in (False, True):
            layout = FrameLayout(3, 2, noisy_copies=K, noisy_first=noisy_first)
            q = torch.randn(1, 2, layout.sequence_length, 8, generator=generator)
            frame = (10**6 + torch.arange(3)).repeat_interleave(2).repeat(1 + K)
            got = qk_prepare(q, q[:, :1], None, layout, start=10**6, impl=impl)
            want = qk_prepare(q, q[:, :1], None, frame.int(), impl=impl)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["frames", "grid interleaved", "odd head dim"])
def test_bad_values_stay_in_their_heads(name, impl):
    *_, positions, options = CASES[name]
    inputs, _ = make(name)
    want = qk_prepare(*inputs, positions, impl=impl, **options)
    inputs[0][0, 1, 5, 3] = math.nan
    inputs[1][1, 0, 2, 0] = math.inf
    got = qk_prepare(*inputs, positions, impl=impl, **options)
    assert got[0][0, 1, 5].isnan().all() and not got[1][1, 0, 2].isfinite().all()
    got[0][0, 1, 5], got[1][1, 0, 2] = want[0][0, 1, 5], want[1][1, 0, 2]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zeros_stay_zeros_and_their_gradient_is_that_of_dividing_by_eps(impl):
    q = torch.zeros(1, 1, 24, 16, requires_grad=True)
    grad = torch.randn(1, 1, 24, 16)
    out, _ = qk_prepare(q, q.detach(), None, LAYOUT, impl=impl)
    (got,) = torch.autograd.grad(out, q, grad)
    assert torch.equal(out, torch.zeros_like(out))
    turned = torch.zeros(1, 1, 24, 16, requires_grad=True)
    plain, _ = qk_prepare(turned, q.detach(), None, LAYOUT, normalize=False, impl=impl)
    (want,) = torch.autograd.grad(plain, turned, grad)
    torch.testing.assert_close(got, want * 1e4)


def test_v_that_nothing_is_asked_of_is_returned_itself():
    (q, k, v), _ = make("frames")
    assert qk_prepare(q, k, v, LAYOUT)[2] is v
    assert len(qk_prepare(q, k, None, LAYOUT)) == 2
    _, _, copy = qkv_prepare(torch.cat((q, k, v), 1).transpose(1, 2), LAYOUT)
    assert torch.equal(copy, v)


def test_little_is_kept_for_backward():
    """Outputs, which attention keeps too, and one number a head; nothing where there is only a rotation."""
    kept = {}
    inputs, _ = make("frames", inside=True)
    for normalize in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t) or t, lambda t: t):
            q, k, _ = qk_prepare(*[x.requires_grad_() for x in inputs], LAYOUT, normalize=normalize)
        own = {t.untyped_storage().data_ptr() for t in (q, k)}
        kept[normalize] = sum(t.numel() for t in sizes if t.untyped_storage().data_ptr() not in own)
    assert kept == {False: 0, True: 2 * 4 * 24}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["frames", "positions by batch", "grid"])
def test_empty_batch(name, impl):
    *_, positions, options = CASES[name]
    positions = positions[:0] if name == "positions by batch" else positions
    inputs = [x.requires_grad_() for x in make(name, B=0)[0]]
    outs = qk_prepare(*inputs, positions, impl=impl, **options)
    grads = torch.autograd.grad([o.sum() for o in outs], inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs] and [o.shape for o in outs] == [
        x.shape for x in inputs
    ]
    qkv = torch.empty(0, 24, 6, 16, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(o.sum() for o in qkv_prepare(qkv, LAYOUT, impl=impl)), qkv)
    assert grad.shape == qkv.shape


@pytest.mark.parametrize("name", ["frames", "grid interleaved", "positions on two axes by batch"])
@pytest.mark.parametrize("impl", REGISTERED)
def test_deterministic_and_deaf_to_autocast(name, impl):
    inputs, grads = make(name)
    first, second = (run(name, inputs, grads, torch.float32, impl=impl) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        third = run(name, inputs, grads, torch.float32, impl=impl)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("impl", REGISTERED)
def test_the_rest_of_the_batch_does_not_matter(impl):
    inputs, grads = make("grid")
    both = run("grid", inputs, grads, torch.float32, impl=impl)
    alone = run("grid", [x[1:] for x in inputs], [g[1:] for g in grads], torch.float32, impl=impl)
    assert all(torch.equal(a, b[1:]) for a, b in zip(alone, both, strict=True))


def test_gradients_that_are_missing_or_expanded():
    inputs, _ = make("frames")
    results = {}
    for impl in ("reference", "composed", "auto"):
        tensors = [x.clone().requires_grad_() for x in inputs]
        q, _, v = qk_prepare(*tensors, LAYOUT, normalize_v=True, impl=impl)
        (q.sum() + 2 * v.sum()).backward()
        results[impl] = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
    for impl in ("composed", "auto"):
        for got, want in zip(results[impl], results["reference"], strict=True):
            torch.testing.assert_close(got, want)


@given(
    D=st.integers(4, 40),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    geometry=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0, 1, 3]), st.booleans()),
    start=st.sampled_from([0, 3, 10**6, 2**40]),
    share=st.floats(0, 1),
    grid=st.booleans(),
    interleaved=st.booleans(),
    normalize=st.booleans(),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    dtype=st.sampled_from(LOW),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_geometry(D, heads, geometry, start, share, grid, interleaved, normalize, scale, dtype, seed):
    T, Y, X, K, noisy_first = geometry
    layout = FrameLayout(T, Y * X, noisy_copies=K, noisy_first=noisy_first)
    turned = max(2, int(share * D) // 2 * 2)
    axes = (turned - 4 * (turned // 6), *[2 * (turned // 6)] * 2) if grid else (turned,)
    options = {"start": start, "axes": axes, "interleaved": interleaved, "normalize": normalize, "normalize_v": True}
    if grid:
        options["grid"] = (Y, X)
    CASES["any"] = (*heads, D, layout, options)
    try:
        inputs, grads = make("any", seed=seed)
        inputs = [(scale * x).to(dtype) for x in inputs]
        for impl in ("composed", *["cpp"] * (_extension.library("cpu") is None)):
            compare("any", inputs, [g.to(dtype) for g in grads], impl=impl, function=run_packed if seed % 2 else run)
    finally:
        del CASES["any"]


def op_arguments(positions, packed, **changes):
    q, k, v = (torch.randn(2, h, 24, 8) for h in (4, 2, 2))
    options = {
        "place": (3, 4, 4, 5) if positions is None else (0, 1, 1, 0), "axes": [8], "base": 1e4, "interleaved": False,
        "normalize": True, "normalize_v": True, "eps": 1e-4, "impl": "composed",
    } | changes  # fmt: skip
    place, *rest = options.values()
    tensors = (
        (torch.cat((q, k, v), 1).transpose(1, 2).contiguous().transpose(1, 2), None, None) if packed else (q, k, v)
    )
    return tensors, positions, [4, 2, 2], (*place, *rest)


OPCHECKS = {
    "layout": {"positions": None, "packed": False},
    "packed": {"positions": None, "packed": True, "interleaved": True},
    "positions": {"positions": explicit(2, 24, 2), "packed": False, "axes": [4, 2], "normalize": False},
    "rotation alone": {"positions": explicit(1, 24, 1), "packed": True, "normalize": False, "normalize_v": False},
}


@pytest.mark.parametrize("impl", REGISTERED[:2])
@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(name, impl):
    tensors, positions, heads, options = op_arguments(**OPCHECKS[name], impl=impl)
    grad = [t if t is None else t.requires_grad_() for t in tensors]
    torch.library.opcheck(ops.qk_prepare_fwd, (*grad, positions, heads, *options))
    with torch.no_grad():
        *outs, rms = ops.qk_prepare_fwd(*tensors, positions, heads, *options)
    packed, (normalize, normalize_v) = tensors[1] is None, options[7:9]
    kept = [o if n else None for o, n in zip(outs, (normalize, normalize, normalize_v), strict=True)]
    grads = [torch.randn_like(o) for o in outs]
    torch.library.opcheck(ops.qk_prepare_bwd, (*grads, *kept, rms, positions, packed, packed, *options))


def test_opcheck_without_v():
    (q, k, _), _, _, options = op_arguments(None, False, normalize_v=False)
    torch.library.opcheck(ops.qk_prepare_fwd, (q.requires_grad_(), k.requires_grad_(), None, None, [4, 2, 0], *options))


def test_compile_fullgraph_without_recompiling():
    def step(qkv, other, layout, positions, start):
        q, k, v = qkv_prepare(qkv, layout, start=start, normalize_v=True)
        x, y = qk_prepare(q, other, None, positions, interleaved=True)
        return (q * k).sum() + v.square().sum() + (x * y).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for index, (B, T, P, H, D, start) in enumerate(((7, 3, 4, 2, 8, 5), (3, 5, 2, 4, 16, 9), (4, 2, 7, 3, 12, 1000))):
        layout = FrameLayout(T, P)
        S = layout.sequence_length
        qkv = torch.randn(B, S, 3 * H, D, requires_grad=True)
        other = torch.randn(B, H, S, D, requires_grad=True)
        positions = torch.arange(S) + start
        want = torch.autograd.grad(step(qkv, other, layout, positions, start), (qkv, other))
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(qkv, other, layout, positions, start), (qkv, other))
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
            assert g.stride() == w.stride()


Q = torch.ones(2, 2, 24, 8)
BAD = [
    (lambda: qk_prepare(Q[0], Q), ValueError, r"q: must have shape \(B, Hq, S, D\), got .*\(2, 24, 8\)"),
    (lambda: qk_prepare(Q.int(), Q), TypeError, "q: dtype must be float32.* got int32"),
    (lambda: qk_prepare(Q, None), TypeError, "k: must be a tensor of shape .* got NoneType"),
    (lambda: qk_prepare(Q, Q.half()), TypeError, "k: must have the dtype of q"),
    (lambda: qk_prepare(Q, Q[:, :, :3]), ValueError, "k: length must be length of q = 24, got 3"),
    (lambda: qk_prepare(Q, Q, Q[:, :1]), ValueError, "v: heads must be heads of k = 2, got 1"),
    (lambda: qk_prepare(Q, Q, None, FrameLayout(3, 5)), ValueError, "q: length must be layout.sequence_length = 30, got 24"),
    (lambda: qk_prepare(Q, Q, None, 3), TypeError, "positions: must be a FrameLayout, a tensor or None, got int 3"),
    (lambda: qk_prepare(Q, Q, None, torch.ones(24)), TypeError, "positions: dtype must be int64 or int32, got float32"),
    (lambda: qk_prepare(Q, Q, None, explicit(23)), ValueError, r"positions: must have shape \(24,\) or \(2, 24\), got .*\(23,\)"),
    (lambda: qk_prepare(Q, Q, None, explicit(24), axes=(4, 4)), ValueError, r"positions: must have shape \(24, 2\) or \(2, 24, 2\)"),
    (lambda: qk_prepare(Q, Q, None, explicit(24).to("meta")), ValueError, "positions: must be on the device of q"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, axes=(3,)), ValueError, r"axes: must be even numbers .* head dim = 8, got \(3,\)"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, axes=(6, 6)), ValueError, r"axes: must be even numbers .* got \(6, 6\)"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, axes=(4, 4)), ValueError, r"axes: must be one for a layout without a grid, got \(4, 4\)"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, grid=(2, 2), axes=(4,)), ValueError, "axes: must be three"),
    (lambda: qk_prepare(Q, Q, axes=(8,)), ValueError, "axes, grid: must be None without positions"),
    (lambda: qk_prepare(Q[..., :7], Q[..., :7], None, LAYOUT), ValueError, r"axes: must be even .* head dim = 7, got \(7,\)"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, grid=(2, 3)), ValueError, r"grid: must be \(Y, X\) .* = 4, got \(2, 3\)"),
    (lambda: qk_prepare(Q, Q, None, explicit(24), start=3), ValueError, r"grid, start: must be None and 0 unless positions is a FrameLayout, .* and 3"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, start=0.5), TypeError, "start: must be an integer, got float 0.5"),
    (lambda: qk_prepare(Q, Q, eps=0.0), ValueError, "eps: must be finite and > 0, got 0.0"),
    (lambda: qk_prepare(Q, Q, base="x"), TypeError, "base: must be a number, got str 'x'"),
    (lambda: qk_prepare(Q, Q, None, LAYOUT, base=0.5), ValueError, "base: must be finite and >= 1, got 0.5"),
    (lambda: qk_prepare(Q[..., :0], Q[..., :0]), ValueError, "q: head dim must be >= 1, got 0"),
    (lambda: qk_prepare(Q, Q, impl="cuda"), ValueError, "impl: qk_prepare cannot run 'cuda' on cpu: there is no C"),
    (lambda: qk_prepare(Q.double(), Q.double(), impl="triton"), ValueError, "impl: qk_prepare cannot run 'triton' on cpu: it"),
    (lambda: qkv_prepare(Q.transpose(1, 2)), ValueError, "qkv: heads must be a positive multiple of 3 without kv_heads, got 2"),
    (lambda: qkv_prepare(Q, LAYOUT, kv_heads=8), ValueError, "qkv: length must be layout.sequence_length = 24, got 2"),
    (lambda: qkv_prepare(Q, kv_heads=12), ValueError, r"kv_heads: must be in \[1, 11\] with 24 heads, got 12"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_names_argument_rule_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


FAULTS = {
    "norm, not RMS": ("mul_(x.shape[-1] ** -0.5)", "mul_(1)"),
    "eps forgotten": (".add(eps)", ".add(0)"),
    "eps forgotten in backward": ("addcmul_(some, 1 / (scale + eps))", "addcmul_(some, 1 / scale)"),
    "norm treated as a constant": ("torch.mul(out, slope)", "torch.mul(out, 0 * slope)"),
    "turned the other way": ("interleaved, 1, factor", "interleaved, -1, factor"),
    "gradient turned forwards": ("interleaved, -1, None", "interleaved, 1, None"),
    "angles of the first piece": ("cut(sin, tokens, -2)", "sin[..., : cut(sin, tokens, -2).shape[-2], :]"),
    "v turned": ("if angles is None or part == 2", "if angles is None"),
    "start forgotten": ("(start if axis == 0 else 0)", "0"),
    "start on every axis": ("(start if axis == 0 else 0)", "start"),
    "frames two apart share a position": ("at = torch.arange(sizes[axis], device=device)", "at = torch.arange(sizes[axis], device=device) % 2"),
    "backwards": ("at = torch.arange(sizes[axis], device=device)", "at = torch.arange(sizes[axis], device=device).flip(0)"),
    "first sequence's positions": ("positions[:, None, :, axis] for", "positions[:1, None, :, axis] for"),
    "first axis for all": ("positions[:, None, :, axis] for", "positions[:, None, :, 0] for"),
    "frequencies of the whole head": ("dtype=torch.float64, device=at.device) / max(channels, 1)", "dtype=torch.float64, device=at.device) / 16"),
    "pairs of the other kind": ("    if interleaved:\n        return x", "    if not interleaved:\n        return x"),
    "last channels left out": ("work[..., 2 * pairs :] = x", "work[..., 2 * pairs :] = 0 * x"),
    "sine of another sign": ("addcmul_(a, sin, value=sign)", "addcmul_(a, sin, value=-sign)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault, seed_fault):
    """Each fault, put into the source of the composed route, makes the comparison fail."""
    seed_fault(ops, *FAULTS[fault])
    ops.composed.PIECE = 200

    def compare_all():
        for name in CASES:
            compare(name, *make(name))

    with pytest.raises(AssertionError):
        compare_all()
