"""causal_conv3d: the per-frame reference against conv3d, every implementation against the reference."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from sae_kernels import FrameLayout, _extension, causal_conv3d, past_term
from sae_kernels.causal_conv3d import composed, ops
from sae_kernels.testing import assert_within_budget, noncontiguous

NAMES = ("x", "weight", "past_scale", "last_scale", "history")


def make(
    layout, *, B=2, Cin=3, Cout=4, kernel=(3, 3, 3), size=(4, 5), scales="both", history=True,
    dtype=torch.float32, memory="channels_last_3d", seed=0,
):  # fmt: skip
    """{argument: tensor or None} and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    kt, ky, kx = kernel

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    frames = layout.total_frames
    tensors = {
        "x": arrange(normal(B, Cin, frames, *size), memory),
        "weight": normal(Cout, Cin, kt, ky, kx) / (Cin * kt * ky * kx) ** 0.5,
        "past_scale": normal(B, frames) if scales in ("both", "past") else None,
        "last_scale": normal(B, frames) if scales in ("both", "last") else None,
        "history": normal(B, Cin, kt - 1, *size) if history else None,
    }
    return tensors, arrange(normal(B, Cout, frames, *size), memory)


def need(impl):
    reason = _extension.library("cpu") if impl == "cpp" else None
    if reason is not None:
        pytest.skip(reason)


def arrange(x, memory):
    if memory == "strided":
        return noncontiguous(x, 2)
    if memory == "channels_last_strided":
        return noncontiguous(x.permute(0, 2, 3, 4, 1), 3).permute(0, 4, 1, 2, 3)
    return x.contiguous(memory_format=getattr(torch, memory))


def run(tensors, grad, layout, dtype, impl, pad_value):
    """[y, and the gradient of every argument that is there]."""
    leaves = {k: None if v is None else v.detach().to(dtype).requires_grad_() for k, v in tensors.items()}
    y = causal_conv3d(layout=layout, **leaves, pad_value=pad_value, impl=impl)
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    grads = torch.autograd.grad(y, inputs, grad.to(dtype), allow_unused=True)
    return [y, *(torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True))]


def compare(tensors, grad, layout, pad_value=0.0, impl="composed"):
    dtype = tensors["x"].dtype
    actual = run(tensors, grad, layout, dtype, impl, pad_value)
    gold = run(tensors, grad, layout, torch.float64, "reference", pad_value)
    eager = run(tensors, grad, layout, dtype, "reference", pad_value)
    # With absolute values throughout, each result is the sum of the absolute terms of the true one: an fp32 sum in
    # another order may differ by ulps of that, however far the terms cancel.
    absolute = {k: None if v is None else v.abs() for k, v in tensors.items()}
    terms = run(absolute, grad.abs(), layout, torch.float64, "reference", abs(pad_value))
    names = ["y", *("d" + k for k, v in tensors.items() if v is not None)]
    for name, a, g, e, t in zip(names, actual, gold, eager, terms, strict=True):
        assert a.dtype == dtype
        if g.numel() == 0:
            assert a.shape == g.shape
            continue
        cancellation = t.mean().item() / max(g.abs().mean().item(), 1e-30)
        ulps = min(cancellation, 1e4) * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
        assert_within_budget(a, g, e, f"{name} of {layout}", roundings=4 + ulps)


def case(n):
    draw = random.Random(n)
    kt = 1 + n % 5
    return {
        "layout": FrameLayout(
            frames=draw.choice((1, 2, 3, 5)),
            tokens_per_frame=7,
            frames_per_block=draw.choice((1, 1, 1, 2, 3)),
            noisy_copies=draw.choice((0, 1, 1, 3)),
            noisy_first=draw.random() < 0.5,
        ),
        "kernel": (kt, draw.choice((1, 3, 3, 5)), draw.choice((1, 3, 3, 5))),
        "Cin": draw.choice((1, 3, 4, 5, 16, 33)),
        "Cout": draw.choice((1, 3, 4, 5, 16, 33)),
        "size": draw.choice(((2, 2), (1, 1), (3, 7), (8, 5), (5, 1), (6, 6))),
        "scales": draw.choice(("both", "both", "past", "last", "none")),
        "history": draw.random() < 0.5,
        "pad_value": draw.choice((0.0, 1.0, -0.7)),
        "memory": draw.choice(("channels_last_3d", "contiguous_format", "strided", "channels_last_strided")),
    }


def name(n):
    c = case(n)
    y = c["layout"]
    order = "noisy-first" if y.noisy_first else "clean-first"
    return (
        f"T{y.frames}-K{y.noisy_copies}-f{y.frames_per_block}-{order}-k{'x'.join(map(str, c['kernel']))}"
        f"-C{c['Cin']}-{c['Cout']}-{'x'.join(map(str, c['size']))}-{c['scales']}-{c['memory']}"
        f"-{'history' if c['history'] else c['pad_value']}"
    )


@pytest.mark.parametrize("n", range(90), ids=name)
def test_composed_is_the_reference(n):
    options = case(n)
    layout, pad_value = options["layout"], options.pop("pad_value")
    tensors, grad = make(**options, seed=n)
    compare(tensors, grad, layout, pad_value)


@given(n=st.integers(90, 10**6), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_shape_and_dtype(n, dtype):
    options = case(n)
    layout, pad_value = options["layout"], options.pop("pad_value")
    tensors, grad = make(**options, dtype=dtype, seed=n)
    compare(tensors, grad, layout, pad_value)


@pytest.mark.parametrize("impl", ["reference", "composed"])
@pytest.mark.parametrize("kernel", [(1, 3, 3), (2, 3, 1), (3, 3, 3), (4, 1, 5), (5, 5, 3)], ids=str)
def test_is_conv3d_of_each_stream_with_its_clean_past(kernel, impl):
    """The two-pass form: conv3d over the padded clean stream, and over each noisy frame behind its clean past."""
    T, K, kt = 4, 2, kernel[0]
    padding = (0, kernel[1] // 2, kernel[2] // 2)
    layout = FrameLayout(T, 20, noisy_copies=K)
    tensors, _ = make(layout, kernel=kernel, history=False, scales="none", dtype=torch.float64)
    x, weight = tensors["x"], tensors["weight"]
    clean, noisy = layout.split(x, 2)
    padded = torch.cat([torch.full_like(x[:, :, : kt - 1], 0.3), clean], 2)
    want = [F.conv3d(padded, weight, padding=padding)]
    for f in range(K * T):
        past = padded[:, :, f % T : f % T + kt - 1]
        want.append(F.conv3d(torch.cat([past, noisy[:, :, f : f + 1]], 2), weight, padding=padding))
    got = causal_conv3d(x, weight, layout, pad_value=0.3, impl=impl)
    torch.testing.assert_close(got, torch.cat(want, 2), rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_a_block_of_frames_reads_its_own_copy(impl):
    """One block of all frames: the noisy stream is an ordinary causal convolution of itself."""
    layout = FrameLayout(4, 20, frames_per_block=4)
    tensors, _ = make(layout, scales="none", dtype=torch.float64)
    history, weight = tensors["history"], tensors["weight"]
    got = causal_conv3d(tensors["x"], weight, layout, history=history, impl=impl)
    for stream, y in zip(layout.split(tensors["x"], 2), layout.split(got, 2), strict=True):
        want = F.conv3d(torch.cat([history, stream], 2), weight, padding=(0, 1, 1))
        torch.testing.assert_close(y, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("f", [1, 2])
@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_gradcheck(impl, f):
    layout = FrameLayout(3, 4, frames_per_block=f, noisy_copies=2)
    options = {"B": 1, "Cin": 2, "Cout": 2, "kernel": (3, 1, 3), "size": (2, 2), "dtype": torch.float64}
    tensors, _ = make(layout, **options)
    inputs = [t.requires_grad_() for t in tensors.values()]

    def op(*inputs):
        return causal_conv3d(layout=layout, **dict(zip(NAMES, inputs, strict=True)), impl=impl)

    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradcheck(lambda h, w: past_term(h, w, impl=impl), [inputs[4], inputs[1]])


@pytest.mark.parametrize("f", [1, 2])
def test_each_gradient_alone(f):
    """What nobody asks for is not needed by what somebody does."""
    layout = FrameLayout(4, 20, frames_per_block=f, noisy_first=True)
    tensors, grad = make(layout, dtype=torch.float64)
    everything = run(tensors, grad, layout, torch.float64, "composed", 0.0)[1:]
    for name, want in zip(NAMES, everything, strict=True):
        leaf = tensors[name].detach().requires_grad_()
        y = causal_conv3d(layout=layout, **tensors | {name: leaf})
        torch.testing.assert_close(torch.autograd.grad(y, leaf, grad)[0], want, rtol=0, atol=1e-12)


def test_past_scale_gradient_without_a_kept_past():
    """The raw op, differentiated without keep_past, computes the past again."""
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout)
    want = run(tensors, grad, layout, torch.float32, "composed", 0.0)[3]
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    y, _ = ops.causal_conv3d_fwd(*leaves, 0.0, 3, 1, 1, False, False, "composed")
    torch.testing.assert_close(torch.autograd.grad(y, leaves[2], grad)[0], want)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(("T", "K", "kt"), [(6, 1, 3), (5, 3, 4), (7, 0, 2), (3, 1, 1), (2, 1, 5)])
def test_tap_passes_are_those_of_the_contract(T, K, kt):
    """(kt - 1) T + (1 + K) T passes forward, twice that backward, half of it where one side asks; counted in FLOPs."""
    layout = FrameLayout(T, 20, noisy_copies=K)
    tensors, grad = make(layout, kernel=(kt, 3, 3), history=False)
    x, w, past_scale, last_scale, _ = tensors.values()
    taps = 2 * 2 * 3 * 4 * 20 * 9  # one tap pass: 2 FLOPs x B x Cin x Cout x pixels x spatial taps
    passes = (kt - 1) * T + (1 + K) * T
    rest = (past_scale, last_scale, None)
    assert flops(lambda: composed.forward(x, w, *rest, 0.0, layout)) == passes * taps
    past = composed.forward(x, w, *rest, 0.0, layout)[1]

    def backward(*mask):
        return flops(lambda: composed.backward(grad, x, w, *rest, past, 0.0, layout, mask)) / taps

    assert backward(True, True, True, True, False) == 2 * passes
    assert backward(True, False, False, False, False) == passes
    assert backward(False, True, False, False, False) == passes
    assert backward(False, False, True, False, False) == 0
    assert backward(False, False, False, True, False) == (1 + K) * T


@pytest.mark.parametrize("noisy_first", [False, True])
def test_causality_is_exact(noisy_first):
    T, frame, K = 6, 2, 2
    layout = FrameLayout(T, 20, noisy_copies=K, noisy_first=noisy_first)
    tensors, _ = make(layout, dtype=torch.float32)
    before = causal_conv3d(layout=layout, **tensors)
    changed = tensors["x"].clone()
    changed[:, :, layout.clean_start + frame] += 1.0
    difference = causal_conv3d(layout=layout, **tensors | {"x": changed}) - before
    clean, noisy = layout.split(difference, 2)
    clean = clean.abs().amax((0, 1, 3, 4))
    noisy = noisy.unflatten(2, (K, T)).abs().amax((0, 1, 2, 4, 5))
    assert [bool(v > 0) for v in clean] == [False, False, True, True, True, False]
    assert [bool(v > 0) for v in noisy] == [False, False, False, True, True, False]

    changed = tensors["x"].clone()
    changed[:, :, layout.noisy_start + frame] += 1.0
    difference = causal_conv3d(layout=layout, **tensors | {"x": changed}) - before
    affected = difference.abs().amax((0, 1, 3, 4)).nonzero().flatten().tolist()
    assert affected == [layout.noisy_start + frame]


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [1, 4, 2], [3, 3, 1]], ids=str)
@pytest.mark.parametrize("kt", [1, 2, 3, 5])
def test_streaming_in_chunks_is_one_pass(chunks, kt):
    layout = FrameLayout(7, 20, noisy_copies=0)
    tensors, _ = make(layout, kernel=(kt, 3, 3), dtype=torch.float64)
    want = causal_conv3d(layout=layout, **tensors)
    history, start, got = tensors["history"], 0, []
    for n in chunks:
        part = {k: tensors[k][:, start : start + n] for k in ("past_scale", "last_scale")}
        x = tensors["x"][:, :, start : start + n]
        got.append(causal_conv3d(x, tensors["weight"], FrameLayout(n, 20, noisy_copies=0), history=history, **part))
        seen = torch.cat([history, x], 2)
        history, start = seen[:, :, seen.shape[2] - (kt - 1) :], start + n
    torch.testing.assert_close(torch.cat(got, 2), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "composed"])
@pytest.mark.parametrize("kt", [1, 2, 3, 5])
def test_past_term_completes_a_frame_to_the_op(kt, impl):
    layout = FrameLayout(5, 20)
    tensors, _ = make(layout, kernel=(kt, 3, 3), dtype=torch.float64)
    want = layout.split(causal_conv3d(layout=layout, **tensors), 2)[1]
    weight = tensors["weight"]
    clean, noisy = layout.split(tensors["x"], 2)
    past_scale, last_scale = (layout.split(tensors[k], 1)[1] for k in ("past_scale", "last_scale"))
    seen = torch.cat([tensors["history"], clean], 2)
    for i in range(5):
        past = past_term(seen[:, :, i : i + kt - 1], weight, impl=impl)
        last = F.conv2d(noisy[:, :, i], weight[:, :, -1], padding=1)
        y = last_scale[:, i, None, None, None] * last + past_scale[:, i, None, None, None] * past
        torch.testing.assert_close(y, want[:, :, i], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kt", "B"), [(2, 0), (3, 3), (5, 1)])
def test_past_term_is_the_reference(kt, B, dtype):
    layout = FrameLayout(1, 20)
    tensors, grad = make(layout, B=B, Cin=5, Cout=3, kernel=(kt, 5, 3), dtype=dtype)

    def past(dtype, impl):
        leaves = [tensors[k].detach().to(dtype).requires_grad_() for k in ("history", "weight")]
        y = past_term(*leaves, impl=impl)
        assert y.dtype == dtype
        return [y, *torch.autograd.grad(y, leaves, grad[:, :, 0].to(dtype))]

    results = past(dtype, "composed"), past(torch.float64, "reference"), past(dtype, "reference")
    for label, *tensors_of in zip(("y", "dhistory", "dweight"), *results, strict=True):
        assert_within_budget(*tensors_of, label, roundings=8)


def test_memory_format_of_x_is_kept_and_neighbours_are_not_read():
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout, memory="contiguous_format")
    want = run(tensors, grad, layout, torch.float32, "composed", 0.0)
    assert want[0].is_contiguous()
    for memory in ("channels_last_3d", "strided", "channels_last_strided"):
        arranged = tensors | {"x": arrange(tensors["x"], memory)}
        got = run(arranged, arrange(grad, memory), layout, torch.float32, "composed", 0.0)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=2e-5)
        channels_last = memory.startswith("channels_last")
        wanted = torch.channels_last_3d if channels_last else torch.contiguous_format
        assert causal_conv3d(layout=layout, **arranged).is_contiguous(memory_format=wanted)
    for key in ("weight", "history", "past_scale"):
        arranged = tensors | {key: noncontiguous(tensors[key], 1)}
        torch.testing.assert_close(causal_conv3d(layout=layout, **arranged), want[0], rtol=0, atol=2e-5)


def test_empty_batch():
    layout = FrameLayout(3, 20)
    tensors, _ = make(layout, B=0)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = causal_conv3d(layout=layout, **leaves)
    assert y.shape == (0, 4, 6, 4, 5)
    y.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())
    assert torch.equal(leaves["weight"].grad, torch.zeros_like(leaves["weight"]))


def test_deterministic():
    layout = FrameLayout(6, 64, noisy_copies=2)
    tensors, grad = make(layout, Cin=16, Cout=33, size=(8, 8), dtype=torch.bfloat16)
    first, second = (run(tensors, grad, layout, torch.bfloat16, "composed", 0.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("impl", "f"), [("composed", 1), ("composed", 2), ("cpp", 1)])
@pytest.mark.parametrize("keep_past", [False, True])
@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(impl, f, keep_past, optional):
    need(impl)
    layout = FrameLayout(3, 20, frames_per_block=f, noisy_first=True)
    scales = "both" if optional else "none"
    memory = "channels_last_3d" if optional else "contiguous_format"
    tensors, grad = make(layout, scales=scales, history=optional, memory=memory)
    options = (0.5, 3, f, 1, True)
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(ops.causal_conv3d_fwd, (*leaves, *options, keep_past, impl))
    with torch.no_grad():
        _, past = ops.causal_conv3d_fwd(*leaves, *options, keep_past, impl)
        mask = [True, True, optional, optional, optional]
        torch.library.opcheck(ops.causal_conv3d_bwd, (grad, *leaves, past, *options, mask, impl))


@pytest.mark.parametrize("impl", ["composed", "cpp"])
def test_opcheck_past_term(impl):
    need(impl)
    tensors, grad = make(FrameLayout(1, 20))
    history, weight = (tensors[k].requires_grad_() for k in ("history", "weight"))
    torch.library.opcheck(ops.causal_conv3d_past_fwd, (history, weight, impl))
    with torch.no_grad():
        arguments = (grad[:, :, 0], history, weight, [True, True], impl)
        torch.library.opcheck(ops.causal_conv3d_past_bwd, arguments)


@pytest.mark.parametrize("impl", ["composed", "cpp"])
@pytest.mark.parametrize("memory", ["channels_last_3d", "contiguous_format"])
def test_compile_fullgraph_without_recompiling(memory, impl):
    need(impl)

    def step(x, weight, past_scale, last_scale, history, frames):
        layout = FrameLayout(frames, 1, noisy_copies=2)
        y = causal_conv3d(x, weight, layout, past_scale=past_scale, last_scale=last_scale, history=history, impl=impl)
        return y.square().sum() + past_term(history, weight, impl=impl).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    # Sizes that are equal by chance would be taken for one and the same.
    for index, (T, B, Cin, Cout, size) in enumerate(((6, 5, 7, 4, (8, 9)), (7, 2, 3, 3, (4, 4)))):
        layout = FrameLayout(T, 1, noisy_copies=2)
        tensors, _ = make(layout, B=B, Cin=Cin, Cout=Cout, size=size, memory=memory)
        leaves = [t.requires_grad_() for t in tensors.values()]
        expected = torch.autograd.grad(step(*leaves, T), leaves)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*leaves, T), leaves)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_autocast_lowers_every_tensor():
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors.items()}
    mixed = leaves | {"x": leaves["x"].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        y = causal_conv3d(layout=layout, **mixed)
        p = past_term(leaves["history"], leaves["weight"])
    low = {k: v.detach().bfloat16() for k, v in tensors.items()}
    assert torch.equal(y, causal_conv3d(layout=layout, **low))
    assert torch.equal(p, past_term(low["history"], low["weight"]))
    want = run(low, grad, layout, torch.bfloat16, "composed", 0.0)[1:]
    got = torch.autograd.grad(y, list(leaves.values()), grad.bfloat16())
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w.float(), rtol=0, atol=0)


BAD = {
    "layout: must be a FrameLayout, got int 3": ("layout", lambda t: 3, TypeError),
    "x: must be a tensor": ("x", lambda t: None, TypeError),
    r"x: must have shape \(B, Cin, F, Y, X\), got float32": ("x", lambda t: t["x"][0], ValueError),
    "x: dtype must be float32": ("x", lambda t: t["x"].int(), TypeError),
    "x: frames must be layout.total_frames = 6, got 5": ("x", lambda t: t["x"][:, :, 1:], ValueError),
    "x: Y and X must be >= 1": ("x", lambda t: t["x"][:, :, :, :0], ValueError),
    r"weight: must have shape \(Cout, Cin, kt": ("weight", lambda t: t["weight"][0], ValueError),
    r"weight: must have the dtype of x \(torch.float32\)": ("weight", lambda t: t["weight"].half(), TypeError),
    "weight: input channels must be channels of x = 3, got 2": (
        "weight",
        lambda t: t["weight"][:, 1:],
        ValueError,
    ),
    "weight: ky and kx must be odd, got 2 and 3": ("weight", lambda t: t["weight"][:, :, :, 1:], ValueError),
    "weight: every size must be >= 1": ("weight", lambda t: t["weight"][:, :, :0], ValueError),
    r"past_scale: must have shape \(B, F\) = \(2, 6\), got": (
        "past_scale",
        lambda t: t["past_scale"][:, 1:],
        ValueError,
    ),
    r"last_scale: must have shape \(B, F\), got": ("last_scale", lambda t: t["last_scale"][0], ValueError),
    "last_scale: must have the dtype of x": ("last_scale", lambda t: t["last_scale"].double(), TypeError),
    r"history: must have shape \(B, Cin, kt - 1, Y, X\) = \(2, 3, 2, 4, 5\), got": (
        "history",
        lambda t: t["history"][:, :, 1:],
        ValueError,
    ),
    "pad_value: must be a number, got str 'ones'": ("pad_value", lambda t: "ones", TypeError),
    "impl: must be one of .*, got 'magic'": ("impl", lambda t: "magic", ValueError),
    "impl: causal_conv3d cannot run 'cuda' on cpu: ": ("impl", lambda t: "cuda", ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_argument_rule_and_value(message):
    argument, change, error = BAD[message]
    tensors, _ = make(FrameLayout(3, 20))
    with pytest.raises(error, match=message):
        causal_conv3d(**{"layout": FrameLayout(3, 20), **tensors, argument: change(tensors)})


def test_past_term_bad_input():
    tensors, _ = make(FrameLayout(3, 20))
    with pytest.raises(ValueError, match="history: frames must be kt - 1 of weight = 2, got 1"):
        past_term(tensors["history"][:, :, 1:], tensors["weight"])
    with pytest.raises(TypeError, match="weight: must have the dtype of history"):
        past_term(tensors["history"], tensors["weight"].double())
    with pytest.raises(ValueError, match="impl: past_term cannot run 'cuda' on cpu: "):
        past_term(tensors["history"], tensors["weight"], impl="cuda")


FAULTS = {
    "wrong tap order": ("weight[:, :, :-1].transpose(1, 2)", "weight[:, :, :-1].flip(2).transpose(1, 2)"),
    "last tap is the first": ("return weight[:, :, -1].contiguous", "return weight[:, :, 0].contiguous"),
    "past taps read a noisy stream": ("clean = layout.clean_start //", "clean = layout.noisy_start //"),
    "wrong pad value": ("rows[:, :, :early] = pad_value", "rows[:, :, :early] = 0"),
    "scales swapped": ("out.mul_(_per_frame(last_scale))", "out.mul_(_per_frame(past_scale))"),
    "history shifted by a frame": ("history[:, :, tap : tap + early].permute", "history.roll(1, 2)[:, :, tap : tap + early].permute"),
    "spatial border off by one": ("out = F.conv2d(images, kernel, padding=_padding(kernel))", "out = F.conv2d(images.roll(1, 2), kernel, padding=_padding(kernel))"),
    "spatial border not zero": ("out = F.conv2d(images, kernel, padding=_padding(kernel))", "out = F.conv2d(F.pad(images, (1, 1, 1, 1), value=1.0), kernel, padding=_padding(kernel))[:, :, 1:-1, 1:-1]"),
    "past gradient of one stream only": ("total.addcmul_(group, scale)", "pass"),
    "past gradient not scaled": ("total = first * scale", "total = first.clone()"),
    "data gradient not scaled": ("grad_x.mul_(_per_frame(last_scale))", "pass"),
    "weight gradient not scaled": ("else grad * _per_frame(last_scale)", "else grad"),
    "past scale gradient of another frame": ("(groups * past.unsqueeze(2))", "(groups * past.roll(1, 2).unsqueeze(2))"),
    "past gradient to the wrong frame": ("+= rows[:, :, early:]", "+= rows[:, :, early:].roll(1, 2)"),
    "history gradient to the wrong frame": ("grad_history[:, :, tap : tap + early] +=", "grad_history[:, :, :early] +="),
    "own copy of the block not read": ("if start + lag < end:", "if False:"),
    "own gradient counted twice": ("own.zero_()", "pass"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault, seed_fault):
    """Each fault, put into the source of the composed route, makes the comparison fail."""
    seed_fault(ops, *FAULTS[fault])
    caught = 0
    for layout, history in (
        (FrameLayout(5, 20, noisy_copies=2), True),
        (FrameLayout(5, 20, noisy_copies=2), False),
        (FrameLayout(5, 20, frames_per_block=2, noisy_first=True), True),
    ):
        try:
            compare(*make(layout, history=history), layout, pad_value=0.5)
        except AssertionError:
            caught += 1
    assert caught, f"{fault}: not caught"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("f", [1, 2])
def test_composed_on_cuda(dtype, f):
    layout = FrameLayout(5, 64, frames_per_block=f, noisy_copies=2)
    tensors, grad = make(layout, Cin=32, Cout=48, size=(8, 8), dtype=dtype)
    tensors = {k: v.cuda() for k, v in tensors.items()}
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        compare(tensors, grad.cuda(), layout)
        first, second = (run(tensors, grad.cuda(), layout, dtype, "composed", 0.0) for _ in range(2))
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
