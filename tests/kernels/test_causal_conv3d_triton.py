"""The Triton kernels of causal_conv3d in the CPU interpreter, against the per-frame reference in fp64."""

from __future__ import annotations

import dataclasses
import random
import sys

import pytest
import torch
from faults import load_with_fault, unload
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_conv3d import NAMES, arrange, compare, make, run

from sae_kernels import FrameLayout, _configs, _interpreter, causal_conv3d, past_term
from sae_kernels.causal_conv3d import configs, ops
from sae_kernels.causal_conv3d.configs import ConvConfig
from sae_kernels.testing import assert_within_budget, noncontiguous

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the gpu tests run the compiled kernels", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from sae_kernels.causal_conv3d import triton as kernels  # noqa: E402
from sae_kernels.causal_conv3d.triton import plan, primitives  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def unchecked_integers(request, monkeypatch):
    """The interpreter's overflow checks take two thirds of its time; one test keeps them."""
    if "checked_integers" not in request.fixturenames:
        options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def checked_integers():
    pass


def use_tiles(monkeypatch, tile):
    """(rows, columns, reduced[, boxes, parts]) for every kernel but the weight gradient's (columns, columns, rows)."""
    if tile is None:
        return
    m, n, k, *options = tile

    def choose(architecture, dtype, reduced, produced, pixels, direction):
        return ConvConfig(n, n, m, 4, 1, *options[:1]) if direction == "wgrad" else ConvConfig(m, n, k, 4, 1, *options)

    monkeypatch.setattr(configs, "conv_config", choose)
    if options:
        monkeypatch.setattr(plan, "BOX_WASTE", 100)


# (resolution, Cin, Cout) of every 3x3x3 convolution of the reference network; the tests divide resolutions by 8 and
# channels by 8, except the image channels.
NETWORK = [
    (32, 5, 64), (32, 64, 64), (32, 128, 64), (32, 192, 64), (32, 128, 128), (32, 64, 4),
    (16, 64, 64), (16, 128, 128), (16, 192, 128), (16, 256, 128),
    (8, 128, 128), (8, 256, 128), (8, 384, 128), (8, 256, 256),
    (4, 128, 128), (4, 256, 256), (4, 384, 256), (4, 512, 256),
]  # fmt: skip


@pytest.mark.parametrize(("resolution", "Cin", "Cout"), NETWORK, ids=str)
def test_network_shapes(resolution, Cin, Cout):
    Cin, Cout = (c if c < 8 else c // 8 for c in (Cin, Cout))
    size = (max(resolution // 8, 1),) * 2
    dtype = DTYPES[(Cin + resolution) % 3]
    gated = Cin % 3 > 0
    layout = FrameLayout(2, 1, noisy_first=resolution == 8)
    tensors, grad = make(
        layout, B=1, Cin=Cin, Cout=Cout, size=size, dtype=dtype, history=False, scales="both" if gated else "none"
    )
    compare(tensors, grad, layout, 1.0, impl="triton")


TILES = (
    None, None, (16, 16, 16), (32, 16, 16), (64, 32, 16), (16, 32, 32),
    (32, 16, 16, True), (64, 16, 32, True, 1), (32, 32, 16, False, 2),
)  # fmt: skip


def case(n):
    """The n-th description of a shape: every kernel size, map, order, scale, source of the past and memory order."""
    draw = random.Random(n)
    kernels = ("133", "231", "213", "311", "331", "333", "413", "511", "251", "155")
    T = draw.choice((1, 2, 3, 3))
    K = draw.choice((0, 1, 1, 1, 2, 3))
    return {
        "layout": FrameLayout(T, 7, 1 if K else draw.choice((1, 2)), noisy_copies=K, noisy_first=draw.random() < 0.5),
        "kernel": tuple(map(int, kernels[n % len(kernels)])),
        "B": draw.choice((1, 1, 2)),
        "Cin": draw.choice((1, 3, 4, 5, 8, 16, 33)),
        "Cout": draw.choice((1, 3, 4, 5, 8, 16, 33)),
        "size": draw.choice(((2, 2), (1, 1), (3, 7), (4, 4), (5, 1), (2, 5))),
        "scales": draw.choice(("both", "both", "past", "last", "none")),
        "history": draw.random() < 0.5,
        "pad_value": draw.choice((0.0, 1.0, -0.7)),
        "memory": draw.choice(("channels_last_3d", "contiguous_format", "strided", "channels_last_strided")),
        "dtype": DTYPES[n // len(kernels) % 3],
        "tile": draw.choice(TILES),
    }


def name(n):
    c = case(n)
    y = c["layout"]
    return (
        f"T{y.frames}-K{y.noisy_copies}-{'noisy' if y.noisy_first else 'clean'}-k{'x'.join(map(str, c['kernel']))}"
        f"-C{c['Cin']}-{c['Cout']}-{'x'.join(map(str, c['size']))}-{c['scales']}-{c['memory']}"
        f"-{'history' if c['history'] else c['pad_value']}-{c['tile']}-{str(c['dtype'])[6:]}"
    )


def compare_case(n, monkeypatch):
    options = case(n)
    layout, pad_value = options["layout"], options.pop("pad_value")
    use_tiles(monkeypatch, options.pop("tile"))
    tensors, grad = make(**options, seed=n)
    compare(tensors, grad, layout, pad_value, impl="triton")


@pytest.mark.parametrize("n", range(90), ids=name)
def test_triton_is_the_reference(n, monkeypatch):
    compare_case(n, monkeypatch)


@given(n=st.integers(90, 10**6))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_shape_and_dtype(n):
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare_case(n, monkeypatch)


ROUTES = {  # (boxes, parts, spread)
    "pointers": (False, 0, False),
    "boxes": (True, 0, False),
    "parts": (False, 2, False),
    "parts, spread": (False, 2, True),
    "boxes, parts": (True, 2, False),
    "boxes, parts, spread": (True, 2, True),
}


def use_route(monkeypatch, route, tile=(32, 16, 16)):
    boxes, parts, spread = ROUTES[route]
    use_tiles(monkeypatch, (*tile, boxes, parts))
    monkeypatch.setattr(configs, "conv_spread", lambda *given: spread)


def ordered_dot(self, a, b, acc, *options):
    """One product after the other: a matrix library rounds by where in a tile an element lies."""

    def numbers(handle):
        bits = handle.dtype.scalar == triton.language.bfloat16
        return (handle.data.astype("uint32") << 16).view("float32") if bits else handle.data.astype("float32")

    left, right, total = numbers(a), numbers(b), acc.data
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return interpreter.TensorHandle(total, acc.dtype.scalar)


@pytest.mark.parametrize(
    ("T", "K", "kernel", "channels", "size", "history", "dtype"),
    [
        (3, 1, (3, 1, 3), (24, 16), (4, 4), True, torch.bfloat16),  # tails of channels; frames of a box part in history
        (2, 1, (4, 3, 1), (8, 16), (3, 4), False, torch.float16),  # boxes over the border of every dimension
        (2, 0, (2, 3, 3), (16, 8), (8, 2), True, torch.float32),
        (1, 1, (1, 3, 3), (16, 16), (4, 8), False, torch.bfloat16),  # no past
    ],
    ids=str,
)
def test_every_route_gives_the_same_numbers(T, K, kernel, channels, size, history, dtype, monkeypatch):
    """Bitwise: pointers or boxes; parts summed by one program or by many. The last one against the reference."""
    _interpreter.correct()
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", ordered_dot)
    layout = FrameLayout(T, 1, noisy_copies=K, noisy_first=T == 3)
    Cin, Cout = channels
    tensors, grad = make(
        layout, B=1 + T % 2, Cin=Cin, Cout=Cout, size=size, kernel=kernel, history=history, dtype=dtype
    )
    used, results = [], {}
    launch = plan._launch

    def recorded(kernel, grid, args, config):
        used.append((kernel, args.get("BX", 0) > 0, args.get("SPREAD", False)))
        return launch(kernel, grid, args, config)

    monkeypatch.setattr(plan, "_launch", recorded)
    for route in ("pointers", "boxes", "parts", "boxes, parts, spread"):
        boxes, _, spread = ROUTES[route]
        used.clear()
        use_route(monkeypatch, route)
        results[route] = run(tensors, grad, layout, dtype, "triton", 0.5)
        assert {(boxes, spread)} == {u[1:] for u in used if u[0] is plan.causal_conv3d_kernel}
        assert {boxes} == {u[1] for u in used if u[0] is plan.causal_conv3d_weight_kernel}
    for route, got in results.items():
        same_as = "parts" if "parts" in route else "pointers"
        for index, (a, b) in enumerate(zip(got, results[same_as], strict=True)):
            if index == 2 and "boxes" in route:
                b = results["boxes"][index]  # a box of pixels is another order of the weight's gradient
            assert torch.equal(a, b), (route, index)
    compare(tensors, grad, layout, 0.5, impl="triton")


@pytest.mark.parametrize("route", ["pointers", "boxes"])
@pytest.mark.parametrize("size", [(2, 256), (256, 3)], ids=str)
def test_long_and_narrow_maps(size, route, monkeypatch):
    use_route(monkeypatch, route, (128, 16, 16))
    layout = FrameLayout(1, 1)
    tensors, grad = make(layout, B=1, Cin=4, Cout=8, size=size, kernel=(2, 3, 3))
    compare(tensors, grad, layout, 0.5, impl="triton")


def test_boxes_only_where_a_descriptor_can_address_the_video_and_tiles_are_not_mostly_border(monkeypatch):
    """Strides of 16 bytes that move on, channels in whole 16 bytes, maps that boxes cover: else pointers."""

    def boxed(x, weight, T=16, K=0):
        launches, _, _ = kernels.plan_forward(x, weight, None, None, None, 0.0, FrameLayout(T, 1, noisy_copies=K), 90)
        return launches[0].args["BX"] > 0

    weight = meta((128, 64, 3, 3, 3))
    assert boxed(meta((2, 64, 16, 16, 16)), weight)
    assert boxed(meta((2, 128, 16, 16, 16))[:, :64], weight)
    assert boxed(meta((2, 64, 16, 12, 16)), weight)
    assert not boxed(meta((2, 64, 16, 9, 9)), weight)
    assert not boxed(meta((2, 68, 16, 16, 16))[:, :64], weight)
    assert not boxed(meta((1, 64, 16, 16, 16)).expand(2, 64, 16, 16, 16), weight)
    assert not boxed(meta((2, 60, 16, 16, 16)), meta((128, 60, 3, 3, 3)))
    assert not boxed(meta((2, 64, 16, 16, 16)), meta((4, 64, 3, 3, 3)))
    # A weight in the middle of a flat buffer, off the 16 bytes that descriptors begin at.
    x, aligned = (
        torch.zeros(t.shape, dtype=t.dtype).as_strided(t.shape, t.stride()) for t in (meta((1, 64, 2, 16, 16)), weight)
    )
    shifted = torch.zeros(weight.numel() + 1, dtype=weight.dtype).as_strided(weight.shape, weight.stride(), 1)
    assert boxed(x, aligned, T=2) and not boxed(x, shifted, T=2)
    # One frame of 4 x 4 pixels in a box of four frames; the batch does not matter.
    for B in (1, 3):
        assert boxed(meta((B, 64, 4, 4, 4)), weight, T=4) and not boxed(meta((B, 64, 1, 4, 4)), weight, T=1)


def test_boxes_of_pixels():
    """The network's maps without waste; powers of two whose product is the tile."""
    assert [configs.conv_box(64, n, n) for n in (2, 4, 8)] == [(16, 2, 2), (4, 4, 4), (1, 8, 8)]
    assert [configs.conv_box(128, n, n) for n in (16, 32, 256)] == [(1, 16, 8)] * 3
    assert configs.conv_box(128, 6, 24) == (8, 2, 8)
    assert configs.conv_box(128, 1, 300) == (8, 1, 16)


def test_parts_are_spread_while_multiprocessors_are_idle():
    assert configs.conv_spread(90, 131, 16, 4, False) and not configs.conv_spread(90, 132, 16, 4, False)
    assert not configs.conv_spread(90, 8, 16, 1, False)
    # What the map alone decides is no matter of the batch.
    assert configs.conv_spread(90, 8, 16, 4, True) == configs.conv_spread(90, 800, 16, 4, True) is True
    assert configs.conv_spread(90, 8, 64, 4, True) == configs.conv_spread(90, 800, 64, 4, True) is False
    for channels, parts in ((64, 0), (128, 1), (256, 2), (512, 4), (1024, 4)):
        assert configs.conv_config(90, torch.bfloat16, channels, 256, 16, "fwd").parts == parts
        assert configs.conv_config(90, torch.bfloat16, channels, 256, 256, "fwd").parts == 0


@pytest.mark.usefixtures("checked_integers")
@pytest.mark.parametrize("n", [21, 36])
def test_wide_offsets_are_the_same_numbers_and_narrow_ones_do_not_overflow(n, monkeypatch):
    options = case(n) | {"kernel": (2, 1, 3), "size": (2, 3)}
    layout, pad_value, _ = options["layout"], options.pop("pad_value"), options.pop("tile")
    tensors, grad = make(**options, seed=n)
    narrow = run(tensors, grad, layout, tensors["x"].dtype, "triton", pad_value)
    monkeypatch.setattr(plan, "_wide", lambda *tensors: True)
    wide = run(tensors, grad, layout, tensors["x"].dtype, "triton", pad_value)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_each_gradient_alone_and_without_a_kept_past():
    """What nobody asks for is not needed by what somebody does."""
    layout = FrameLayout(3, 4, noisy_first=True)
    tensors, grad = make(layout, kernel=(3, 1, 3), size=(2, 3), B=1)
    everything = run(tensors, grad, layout, torch.float32, "triton", 0.0)[1:]
    for label, want in zip(NAMES, everything, strict=True):
        leaf = tensors[label].detach().requires_grad_()
        y = causal_conv3d(layout=layout, **tensors | {label: leaf}, impl="triton")
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], want), label
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    y, _ = ops.causal_conv3d_fwd(*leaves, 0.0, 3, 1, 1, True, False, "triton")
    torch.testing.assert_close(torch.autograd.grad(y, leaves[2], grad)[0], everything[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kt", "B"), [(2, 0), (3, 2), (5, 1)])
def test_past_term_is_the_reference(kt, B, dtype):
    layout = FrameLayout(1, 20)
    tensors, grad = make(layout, B=B, Cin=5, Cout=3, kernel=(kt, 1, 3), dtype=dtype)

    def past(dtype, impl):
        leaves = [tensors[k].detach().to(dtype).requires_grad_() for k in ("history", "weight")]
        y = past_term(*leaves, impl=impl)
        assert y.dtype == dtype
        grads = torch.autograd.grad(y, leaves, grad[:, :, 0].to(dtype))
        return [y, *grads]

    results = past(dtype, "triton"), past(torch.float64, "reference"), past(dtype, "reference")
    for label, *tensors_of in zip(("y", "dhistory", "dweight"), *results, strict=True):
        assert_within_budget(*tensors_of, label, roundings=8)


def test_memory_order_is_kept_and_neighbours_are_not_read():
    layout = FrameLayout(2, 20)
    tensors, grad = make(layout, kernel=(2, 3, 1), memory="contiguous_format", B=1, Cin=8, Cout=8, size=(2, 3))
    want = run(tensors, grad, layout, torch.float32, "triton", 0.0)
    assert want[0].is_contiguous()
    for memory in ("channels_last_3d", "strided", "channels_last_strided"):
        arranged = tensors | {"x": arrange(tensors["x"], memory)}
        got = run(arranged, arrange(grad, memory), layout, torch.float32, "triton", 0.0)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        channels_last = memory.startswith("channels_last")
        assert got[0].is_contiguous(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)
    for key in ("weight", "history", "past_scale", "last_scale"):
        arranged = tensors | {key: noncontiguous(tensors[key], 1)}
        assert torch.equal(causal_conv3d(layout=layout, **arranged, impl="triton"), want[0]), key


def test_repeatable_and_independent_of_the_batch(monkeypatch):
    """Bitwise: two runs, and a sample alone; the weight's gradient is split into several parts here."""
    use_tiles(monkeypatch, (16, 16, 16))
    monkeypatch.setattr(plan, "SPLIT_BLOCKS", 1)
    layout = FrameLayout(3, 12)
    tensors, grad = make(layout, B=3, Cin=5, kernel=(2, 1, 3), size=(3, 4), dtype=torch.bfloat16)
    launches = kernels.plan_backward(
        grad, tensors["x"], tensors["weight"], None, None, None, None, 0.0, layout, [False, True] + 3 * [False], 0
    )
    assert [launch.args["part_ptr"].shape[0] for launch in launches[0] if "part_ptr" in launch.args] == [7, 14]
    first, second = (run(tensors, grad, layout, torch.bfloat16, "triton", 0.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = {k: v if k == "weight" else v[1:2] for k, v in tensors.items()}
    one = run(alone, grad[1:2], layout, torch.bfloat16, "triton", 0.0)
    for index in (0, 1, 3, 4, 5):
        assert torch.equal(first[index][1:2], one[index]), NAMES[index - 1]


@pytest.mark.parametrize("kt", [2, 3])
def test_streaming_in_chunks_is_one_pass_bitwise(kt):
    layout = FrameLayout(5, 4, noisy_copies=0)
    tensors, _ = make(layout, kernel=(kt, 3, 1), size=(2, 2), B=2)
    tensors = {k: (4 * v).round() for k, v in tensors.items()}  # whole numbers: sums are exact in any order
    want = causal_conv3d(layout=layout, **tensors, impl="triton")
    history, start, got = tensors["history"], 0, []
    for n in (1, 3, 1):
        part = {k: tensors[k][:, start : start + n] for k in ("past_scale", "last_scale")}
        x = tensors["x"][:, :, start : start + n]
        chunk = FrameLayout(n, 4, noisy_copies=0)
        got.append(causal_conv3d(x, tensors["weight"], chunk, history=history, **part, impl="triton"))
        seen = torch.cat([history, x], 2)
        history, start = seen[:, :, seen.shape[2] - (kt - 1) :], start + n
    assert torch.equal(torch.cat(got, 2), want)


def test_empty_batch():
    layout = FrameLayout(3, 20)
    tensors, _ = make(layout, B=0)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = causal_conv3d(layout=layout, **leaves, impl="triton")
    assert y.shape == (0, 4, 6, 4, 5)
    y.sum().backward()
    assert torch.equal(leaves["weight"].grad, torch.zeros_like(leaves["weight"]))


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional):
    layout = FrameLayout(2, 4, noisy_first=True)
    scales = "both" if optional else "none"
    memory = "channels_last_3d" if optional else "contiguous_format"
    tensors, grad = make(layout, scales=scales, history=optional, memory=memory, kernel=(2, 1, 1), size=(2, 2), B=1)
    options = (0.5, 2, 1, 1, True)
    leaves = [None if t is None else t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(ops.causal_conv3d_fwd, (*leaves, *options, optional, "triton"))
    with torch.no_grad():
        _, past = ops.causal_conv3d_fwd(*leaves, *options, optional, "triton")
        mask = [True, True, optional, optional, optional]
        torch.library.opcheck(ops.causal_conv3d_bwd, (grad, *leaves, past, *options, mask, "triton"))


def test_opcheck_past_term():
    tensors, grad = make(FrameLayout(1, 4), kernel=(2, 1, 1), size=(2, 2), B=1)
    history, weight = (tensors[k].requires_grad_() for k in ("history", "weight"))
    torch.library.opcheck(ops.causal_conv3d_past_fwd, (history, weight, "triton"))
    with torch.no_grad():
        arguments = (grad[:, :, 0], history, weight, [True, True], "triton")
        torch.library.opcheck(ops.causal_conv3d_past_bwd, arguments)


def test_compile_fullgraph_without_recompiling():
    def step(x, weight, past_scale, last_scale, history, frames):
        layout = FrameLayout(frames, 1, noisy_copies=2)
        scales = {"past_scale": past_scale, "last_scale": last_scale}
        return causal_conv3d(x, weight, layout, **scales, history=history, impl="triton").square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    # Sizes that are equal by chance, or one apart, would be taken for related.
    for index, (T, B, Cin, Cout, size) in enumerate(((6, 5, 7, 9, (4, 8)), (4, 3, 5, 2, (2, 7)))):
        layout = FrameLayout(T, 1, noisy_copies=2)
        tensors, _ = make(layout, B=B, Cin=Cin, Cout=Cout, size=size, kernel=(3, 1, 1))
        leaves = [t.requires_grad_() for t in tensors.values()]
        expected = torch.autograd.grad(step(*leaves, T), leaves)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*leaves, T), leaves)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


def meta(shape, dtype=torch.bfloat16):
    channels_last = {"memory_format": torch.channels_last_3d} if len(shape) == 5 else {}
    return torch.empty(shape, dtype=dtype, device="meta", **channels_last)


def plans(
    B=2, T=6, K=1, kt=3, C=(64, 128), size=(8, 8), scales=True, mask=(True,) * 5, dtype=torch.bfloat16,
    architecture=80,
):  # fmt: skip
    """(forward launches, backward launches) for an A100 or an H100 (90), without a GPU or memory."""
    layout = FrameLayout(T, 1, noisy_copies=K)
    F = layout.total_frames
    x, grad = (meta((B, c, F, *size), dtype) for c in C)
    weight = meta((C[1], C[0], kt, 3, 3), dtype)
    history = meta((B, C[0], kt - 1, *size), dtype) if mask[4] else None
    scale = meta((B, F), dtype) if scales else None
    forward, _, past = kernels.plan_forward(
        x, weight, scale, scale, history, 1.0, layout, architecture, keep_past=scales
    )
    backward = kernels.plan_backward(grad, x, weight, scale, scale, history, past, 1.0, layout, mask, architecture)[0]
    return forward, backward


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("T", "K", "kt"), [(6, 1, 3), (5, 3, 4), (7, 0, 2), (3, 1, 1), (2, 1, 5)])
def test_tap_passes_and_bytes_are_those_of_the_contract(T, K, kt, architecture):
    """(kt - 1) T + (1 + K) T tap passes forward and for each gradient; every operand from memory once."""
    B, (Cin, Cout), pixels = 2, (64, 128), 256
    options = {"size": (16, 16), "architecture": architecture}
    passes = B * ((kt - 1) * T + (1 + K) * T)
    per_pass = 9 * pixels * Cin * Cout
    F = (1 + K) * T
    frame_in, frame_out, weight = 2 * B * pixels * Cin, 2 * B * pixels * Cout, 2 * kt * 9 * Cin * Cout
    pad_row = 2 * Cin if kt > 1 else 0

    forward, backward = plans(B, T, K, kt, scales=False, mask=(True, False, False, False, False), **options)
    done = kernels.work(forward)
    assert (done.tap_passes, done.multiply_adds) == (passes, passes * per_pass)
    assert done.bytes == F * (frame_in + frame_out) + weight + pad_row

    done = kernels.work(backward)
    assert (done.tap_passes, done.multiply_adds) == (passes, passes * per_pass)
    # Without scales the sum over streams is the only extra traffic, and with one stream there is none.
    sums = (F + 2 * T) * frame_out if K > 0 and kt > 1 else 0
    assert done.bytes == F * (frame_in + frame_out) + weight + sums

    done = kernels.work(plans(B, T, K, kt, scales=False, mask=(False, True, False, False, False), **options)[1])
    assert (done.tap_passes, done.multiply_adds) == (passes, passes * per_pass)

    # With history, scales and the kept past, all gradients: history's own taps are the rest.
    forward, backward = plans(B, T, K, kt, **options)
    done = kernels.work(forward)
    assert done.tap_passes == passes
    kept = T * frame_out if kt > 1 else 0
    scale_bytes = 2 * B * F  # the meta tensors of both scales are one
    assert done.bytes == F * (frame_in + frame_out) + weight + (kt - 1) * frame_in + kept + scale_bytes
    assert kernels.work(backward).tap_passes == 2 * passes + B * (kt - 1) ** 2


@pytest.mark.parametrize("architecture", [80, 90])
def test_parts_that_are_spread_add_their_sums_to_the_bytes_and_nothing_else(architecture):
    """Written once and read once in fp32, for each tap pass of a frame as many as the configuration says."""
    B, T, K, kt, C = 2, 4, 1, 3, 512
    options = {"C": (C, C), "size": (4, 4), "scales": False, "architecture": architecture}
    launches, _ = plans(B, T, K, kt, mask=(False,) * 5, **options)
    config = configs.conv_config(architecture, torch.bfloat16, C, C, 16, "fwd")
    assert [launch.kernel for launch in launches] == [
        plan.causal_conv3d_kernel,
        plan.causal_conv3d_combine_kernel,
    ]
    passes = B * ((kt - 1) * T + (1 + K) * T)
    done, frame = kernels.work(launches), 16 * C
    assert (done.tap_passes, done.multiply_adds) == (passes, passes * 9 * 16 * C * C)
    sums = passes * config.parts * frame * 4
    assert done.bytes == 2 * 2 * B * (1 + K) * T * frame + 2 * kt * 9 * C * C + 2 * C + 2 * sums
    tiles, units = launches[0].grid
    assert tiles < _configs.MULTIPROCESSORS[architecture] and units == sums // (B * T * frame * 4)
    assert [launch.kernel for launch in plans(32, 16, **options)[0]] == [plan.causal_conv3d_kernel]


def test_products_computed_are_those_planned(monkeypatch):
    """Counted where the interpreter multiplies: one tile holds the whole shape, so a tap pass is ky * kx products."""
    use_tiles(monkeypatch, (64, 16, 16))
    _interpreter.correct()
    count = 0
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(*args):
        nonlocal count
        count += 1
        return dot(*args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    T, K, kt = 4, 2, 3
    layout = FrameLayout(T, 6, noisy_copies=K)
    tensors, grad = make(layout, kernel=(kt, 3, 1), size=(2, 3), B=1, scales="none", history=False)
    # The weight gradient's tile reduces 64 pixels at a time.
    weight_products = 3 * (kt - 1 + triton.cdiv((1 + K) * T * 6, 64))
    for key, products in (("x", 3 * (kt - 1 + 1 + K)), ("weight", weight_products)):
        leaf = tensors[key].detach().requires_grad_()
        count = 0
        y = causal_conv3d(layout=layout, **tensors | {key: leaf}, impl="triton")
        assert count == 3 * (kt - 1 + 1 + K)
        count = 0
        torch.autograd.grad(y, leaf, grad)
        assert count == products


@pytest.mark.parametrize(("architecture", "size"), [(80, (16, 24)), (90, (16, 16))])
def test_sizes_select_no_other_binary(architecture, size):
    """What a launch compiles for, its constants and options, is the same whatever the sizes; of boxes, but the map."""

    def binaries(**options):
        return [
            (
                launch.options,
                {
                    k: v
                    for k, v in launch.args.items()
                    if k not in primitives.INTEGERS and not k.endswith(("_ptr", "_box"))
                },
                [v.block_shape for k, v in launch.args.items() if hasattr(v, "block_shape")],
            )
            for part in plans(**options, architecture=architecture)
            for launch in part
        ]

    assert len(binaries(size=(16, 16))) == 6
    assert any(blocks for *_, blocks in binaries(size=(16, 16))) == (architecture == 90)
    assert binaries(size=(16, 16)) == binaries(B=5, T=9, K=3, C=(192, 256), size=size)


def test_offsets_beyond_32_bits():
    """A video of more than 2^31 elements takes wide offsets, a small one does not; too many pixels are refused."""
    assert not any(launch.args["WIDE"] for part in plans() for launch in part)
    large = plans(B=64, T=32, C=(512, 512), size=(64, 64))
    assert all(launch.args["WIDE"] for part in large for launch in part)
    with pytest.raises(ValueError, match=r"x: B \* F \* Y \* X must be below 2\*\*31 - 1024 .* = 2147483648"):
        plans(B=2**13, T=32, size=(64, 64))


def test_offsets_of_what_is_written_are_wide_too():
    """Outputs of 2^30 elements, parts of whose offsets may reach twice beyond them, from inputs that are small."""
    video, scale = meta((1, 1, 4, 128, 128)), meta((1, 4))
    for Cout, wide in ((2**16, True), (2**13, False)):
        weight = meta((Cout, 1, 3, 3, 3))
        assert kernels.plan_past_term(video[:, :, :2], weight, 90)[0][0].args["WIDE"] == wide
        layout, mask = FrameLayout(2, 1), [False, False, True, False, False]
        grad = meta((1, Cout, 4, 128, 128))
        (past, _), *_ = kernels.plan_backward(grad, video, weight, scale, None, None, None, 0.0, layout, mask, 90)
        assert past.args["STORE_PAST"] and past.args["WIDE"] == wide
    # One channel, a gradient expanded over the batch: the sum over streams and last_scale * grad have all entries.
    for B, wide in ((512, True), (64, False)):
        video, scale = meta((1, 1, 2, 1024, 1024)).expand(B, 1, 2, 1024, 1024), meta((B, 2))
        weight, layout, mask = meta((1, 1, 2, 3, 3)), FrameLayout(1, 1), [False, True, False, False, False]
        launches = kernels.plan_backward(video, video, weight, None, scale, None, None, 0.0, layout, mask, 90)[0]
        assert launches[0].args["SCALED"] and launches[0].args["WIDE"] == wide


def test_alignment_is_promised_only_where_it_holds():
    video = meta((2, 64, 4, 6, 6))
    assert plan._unit(64, video) == 8
    assert plan._unit(60, video) == 1
    assert plan._unit(56, meta((2, 60, 4, 6, 6))[:, :56]) == 1
    assert plan._unit(64, meta((2, 64, 4, 6, 6), torch.float32)) == 4
    assert plan._unit(64, meta((1, 64, 1, 1, 1)).expand(2, 64, 3, 4, 4)) == 8


def test_choice_of_implementation(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    available, why_not = ops.implementations(cpu)
    assert available[0] == "cpp" and "triton" in available
    assert "own copy" in why_not["triton with frames_per_block > 1"]
    layout = FrameLayout(3, 20, frames_per_block=2)
    tensors, _ = make(layout)
    with pytest.raises(ValueError, match="cannot run 'triton' on cpu: noisy frames of a block of several read"):
        causal_conv3d(layout=layout, **tensors, impl="triton")
    assert causal_conv3d(layout=layout, **tensors).shape == (2, 4, 6, 4, 5)
    with pytest.raises(ValueError, match="cannot run 'triton' on cpu: it computes in float32"):
        causal_conv3d(tensors["x"].double(), tensors["weight"].double(), FrameLayout(3, 1), impl="triton")

    monkeypatch.setattr(ops._launch, "why_not", lambda device: None)
    assert ops.implementations(cuda, torch.bfloat16)[0] == ["triton", "composed", "reference"]
    assert ops.implementations(cuda, torch.bfloat16, 2, 1)[0] == ["composed", "reference"]
    assert ops.implementations(cuda, torch.bfloat16, 2, 0)[0][0] == "triton"
    assert ops.implementations(cuda, torch.float64)[0] == ["composed", "reference"]
    monkeypatch.undo()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    available, why_not = ops.implementations(cpu)
    assert available == ["cpp", "composed", "reference"] and "TRITON_INTERPRET=1" in why_not["triton"]


def test_configurations():
    with pytest.raises(ValueError, match="block_m: must be a power of two, got 96"):
        ConvConfig(96, 64, 32, 4, 3)
    with pytest.raises(ValueError, match="direction: must be one of"):
        configs.conv_config(90, torch.bfloat16, 64, 64, 64, "sideways")
    for channels in (1, 5, 64, 96, 128, 192, 256, 384, 512):
        config = configs.conv_config(90, torch.bfloat16, channels, channels, 1024, "fwd")
        assert channels <= config.block_n or config.block_n == (64 if channels % 128 else 128)


FAULTS = {
    "wrong tap order": ("        lag = KT - 1 - tap // (KY * KX)\n        dy", "        lag = 1 + tap // (KY * KX) if PAST else 0\n        dy"),
    "last tap is the first": ("0 if PAST else (KT - 1) * KY * KX\n    blocks", "0\n    blocks"),
    "past taps read a noisy stream": ('"fwd", x.narrow(2, layout.clean_start, T)', '"fwd", x.narrow(2, layout.noisy_start, T)'),
    "wrong pad value": ("1, 1, 1), pad_value)", "1, 1, 1), 0.0)"),
    "pad value in the spatial border": ("mask=ok[:, None] & (c[None, :] < K * UNIT_K), other=0.0)", "mask=ok[:, None] & (c[None, :] < K * UNIT_K), other=0.5)"),
    "scales swapped": ("acc, past, past_scale_ptr, batch", "acc, past, last_scale_ptr, batch"),
    "history shifted by a frame": ("history = pixel_offsets(batch, past_frame + KT - 1, y", "history = pixel_offsets(batch, past_frame + KT - 2, y"),
    "history one frame longer": ("offset = choose(frame >= lag,", "offset = choose(frame > lag,"),
    "spatial border off by one": ("(y + dy < Y) & (x + dx >= 0) & (x + dx < X)\n        offset", "(y + dy < Y) & (x + dx >= 0) & (x + dx <= X)\n        offset"),
    "no spatial border": ("ok = row_ok & (y + dy >= 0) & (y + dy < Y)", "ok = row_ok & (y + dy < Y)"),
    "rows and columns exchanged": ("return image // frames, image % frames, pixel // X, pixel % X", "return image // frames, image % frames, pixel // Y, pixel % Y"),
    "mirror forgotten": ("            dy = -dy\n", ""),
    "time not mirrored": ("            lag = -lag\n", ""),
    "past gradient reads beyond the clip": (" & (frame - lag < source_frames)", ""),
    "past gradient to every stream": ("tl.where(stream == clean, past_parts, 0), past_parts", "past_parts, past_parts"),
    "past gradient to a noisy stream": ("clean=layout.clean_start // T", "clean=layout.noisy_start // T"),
    "past gradient not scaled": ("g *= tl.load(past_scale_ptr", "g *= 1.0 + 0.0 * tl.load(past_scale_ptr"),
    "sum of streams forgets one": ("            total += g\n", "            total = g\n"),
    "data gradient not scaled": ("stream, row_ok, HAS_LAST_SCALE)", "stream, row_ok, HAS_LAST_SCALE and DIRECTION == BACK)"),
    "last scale's gradient already scaled": ("            if DOT:\n                _store_dot(", "            if DOT:\n                acc = _times_scale(acc, last_scale_ptr, batch, i, frames, streams, stream, row_ok, HAS_LAST_SCALE)\n                _store_dot("),
    "history gradient shifted": ("first_frame=1 - kt", "first_frame=2 - kt"),
    "weight gradient of unscaled streams": ("_weight_gradient(scaled, x, None", "_weight_gradient(grad, x, None"),
    "weight gradient loses the last pixel": ("row_ok = m < end", "row_ok = m < end - 1"),
    "weight gradient without history": ("x_rows = choose(i >= lag,", "x_rows = choose(i >= 0,"),
}  # fmt: skip
BOX_FAULTS = {
    "box shifted by a column": ("y + dy, x + dx, first])", "y + dy, x + dx + 1, first])"),
    "box of another frame": ("video.load([batch, frame - lag,", "video.load([batch, frame - lag - 1,"),
    "box of the first batch item": ("video.load([batch,", "video.load([batch * 0,"),
    "rows of a box in another order": ("x = box_x + r % BX", "x = box_x + r // BY % BX"),
    "mirror of boxes forgotten": ("            dx = -dx\n        a = tl", "        a = tl"),
    "channels go on in the next tap": ("tap += (first >= channels).to(tl.int32)", "tap += (first >= BK).to(tl.int32)"),
    "weights of another tap": ("weight.load([n, tap * columns + first])", "weight.load([n, (tap - 1) * columns + first])"),
    "history ends a tap early": ("tl.maximum(KT - 1 - box_frame, 0)", "tl.maximum(KT - 2 - box_frame, 0)"),
    "history of frames that have none": ("ok = ok & (frame < lag)", "ok = ok & (frame <= lag)"),
    "clip begins a tap late": ("(KT - box_frame - BF)", "(KT - box_frame - BF + 1)"),
    "weight gradient of another frame": ("box_i - lag, box_y + dy", "box_i, box_y + dy"),
    "weight gradient's boxes skip frames": ("box_i += tl.where(box_y >= Y, BF, 0)", "box_i += tl.where(box_y >= Y, 2 * BF, 0)"),
    "weight gradient's boxes stay in the first batch item": ("box_b += (box_i >= frames).to(tl.int32)", "box_b += 0"),
    "weight gradient counts a frame twice": ("tl.minimum(lag, frames) if PAST", "tl.minimum(lag + 1, frames) if PAST"),
    "weight gradient of history in the first part only": ("share = tl.cdiv(tl.cdiv(history_rows, BK), splits)", "share = tl.cdiv(tl.cdiv(history_rows, BK), 2 * splits)"),
    "descriptor of exchanged rows and columns": ("order = (0, 2, 3, 4)", "order = (0, 2, 4, 3)"),
}  # fmt: skip
PART_FAULTS = {
    "a stream loses its last part": ("part_ptr, offset, ok, plane, unit, unit + last_parts)", "part_ptr, offset, ok, plane, unit, unit + last_parts - 1)"),
    "the past loses its first part": ("_sum_stored(past, part_ptr, offset, ok, plane, 0, past_parts)", "_sum_stored(past, part_ptr, offset, ok, plane, 1, past_parts)"),
    "parts overlap by a step": ("        end = tl.minimum(begin + chunk, steps)\n        summed", "        end = tl.minimum(begin + chunk + 1, steps)\n        summed"),
    "a stream's parts taken for the past's": ("unit = past_parts + stream * last_parts", "unit = stream * last_parts"),
    "a part of another stream": ("stream = own // last_parts", "stream = own * 0"),
    "past gradient of the parts to every stream": ("end = tl.where(stream == clean, past_parts, 0)", "end = past_parts"),
    "parts beside each other": ("unit.to(tl.int64) * rows * (N", "unit.to(tl.int64) * (rows - 1) * (N"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, *BOX_FAULTS, *PART_FAULTS])
def test_seeded_fault_is_caught(fault, monkeypatch, tmp_path):
    """Each fault, put into the source of the kernels, makes the comparison fail."""
    old, new = (FAULTS | BOX_FAULTS | PART_FAULTS)[fault]
    # Beyond a clip lies another one, not whatever the memory holds.
    shape = {"B": 1 + ("beyond" in fault), "Cin": 2, "Cout": 3, "size": (2, 3), "kernel": (3, 3, 3)}
    if fault not in FAULTS:
        use_route(monkeypatch, "boxes" if fault in BOX_FAULTS else "parts, spread")
        # Boxes of two frames of 4 x 4, the last one beyond the clip; channels of a step and a half.
        shape = {"B": 2, "Cin": 24, "Cout": 8, "size": (4, 4), "kernel": (3, 1, 3)}
    module = load_with_fault(kernels, old, new, tmp_path, "faulty")
    module.plan.BOX_WASTE = plan.BOX_WASTE
    monkeypatch.setattr(sys.modules["sae_kernels.causal_conv3d"], "triton", module)
    caught = 0
    for history in (True, False):
        layout = FrameLayout(3, 6, noisy_copies=1)
        tensors, grad = make(layout, history=history, **shape)
        try:
            compare(tensors, grad, layout, pad_value=0.5, impl="triton")
        except (AssertionError, FloatingPointError):
            caught += 1
            break
    unload(module)
    assert caught, f"{fault}: not caught"
