"""The compiled kernels of causal_conv3d on a GPU: numerics, races, sizes beyond 32 bits, graphs, streams, compilation."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from test_causal_conv3d import arrange, compare, make, run

from sae_kernels import FrameLayout, causal_conv3d, past_term
from sae_kernels.causal_conv3d import configs
from sae_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (resolution, Cin, Cout): the reference network's convolutions, and channels that no tile divides.
SHAPES = (
    (32, 5, 64), (32, 64, 64), (32, 192, 64), (32, 64, 4), (16, 128, 128), (16, 192, 128), (16, 256, 128),
    (8, 128, 128), (8, 384, 128), (8, 256, 256), (4, 256, 256), (4, 512, 256), (6, 3, 1), (5, 33, 100), (7, 96, 320),
)  # fmt: skip


def on_gpu(tensors, grad):
    return {k: None if v is None else v.to(DEVICE) for k, v in tensors.items()}, grad.to(DEVICE)


@pytest.fixture(autouse=True)
def true_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", ["both", "none"])
def test_forward_and_gradients(shape, dtype, scales):
    resolution, Cin, Cout = shape
    layout = FrameLayout(5, 1, noisy_copies=1 + Cin % 2, noisy_first=Cout == 128)
    tensors, grad = make(
        layout, Cin=Cin, Cout=Cout, size=(resolution, resolution), dtype=dtype, scales=scales, history=scales == "none"
    )
    compare(*on_gpu(tensors, grad), layout, 1.0, impl="triton")


@pytest.mark.parametrize("kernel", [(1, 3, 3), (2, 1, 1), (4, 5, 3), (5, 1, 5), (3, 3, 5)], ids=str)
@pytest.mark.parametrize("copies", [0, 1, 3, 5])
def test_kernel_sizes_and_copies(kernel, copies):
    layout = FrameLayout(4, 1, noisy_copies=copies)
    tensors, grad = make(layout, Cin=40, Cout=72, size=(9, 14), kernel=kernel, dtype=torch.bfloat16)
    compare(*on_gpu(tensors, grad), layout, impl="triton")


ROUTES = {  # (boxes, parts, spread)
    "pointers": (False, 0, False),
    "boxes": (True, 0, False),
    "parts": (False, 2, False),
    "parts, spread": (False, 2, True),
    "boxes, parts": (True, 2, False),
    "boxes, parts, spread": (True, 2, True),
}


def use_route(monkeypatch, route):
    boxes, parts, spread = ROUTES[route]
    choose = configs.conv_config

    def changed(*given):
        taken = boxes and torch.cuda.get_device_capability()[0] >= 9
        return dataclasses.replace(choose(*given), boxes=taken, parts=parts)

    monkeypatch.setattr(configs, "conv_config", changed)
    monkeypatch.setattr(configs, "conv_spread", lambda *given: spread)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 512, 256), (8, 128, 192), (16, 64, 128), (12, 72, 64)], ids=str)
def test_every_route(shape, dtype):
    """Boxes, pointers and parts against the reference; bitwise alike whether one program sums the parts or many."""
    size, Cin, Cout = shape
    layout = FrameLayout(5, 1)
    results = {}
    for route in ROUTES:
        tensors, grad = on_gpu(*make(layout, Cin=Cin, Cout=Cout, size=(size, size), dtype=dtype))
        with pytest.MonkeyPatch.context() as monkeypatch:
            use_route(monkeypatch, route)
            compare(tensors, grad, layout, 0.5, impl="triton")
            results[route] = run(tensors, grad, layout, dtype, "triton", 0.5)
    for route in ("parts", "boxes, parts"):
        together, spread = results[route], results[f"{route}, spread"]
        for index, (a, b) in enumerate(zip(together, spread, strict=True)):
            # The dot products of last_scale's gradient add up a row's columns in an order of each kernel's own.
            assert torch.equal(a, b) or index == 4, (route, index)


@pytest.mark.parametrize("memory", ["contiguous_format", "strided", "channels_last_strided"])
@pytest.mark.parametrize("Cin", [64, 20])
def test_memory_orders(memory, Cin):
    layout = FrameLayout(3, 1)
    tensors, grad = make(layout, Cin=Cin, Cout=32, size=(8, 8), dtype=torch.bfloat16)
    tensors, grad = on_gpu(tensors, grad)
    tensors["x"], grad = arrange(tensors["x"], memory), arrange(grad, memory)
    compare(tensors, grad, layout, impl="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "size"), [(128, 8), (512, 4)])
def test_repeatable_and_independent_of_the_batch(channels, size, dtype):
    """Bitwise, over many runs: a race would show; the weight's gradient alone sums over the batch."""
    layout = FrameLayout(16, 1)
    tensors, grad = on_gpu(*make(layout, B=3, Cin=channels, Cout=192, size=(size, size), dtype=dtype))
    first = run(tensors, grad, layout, dtype, "triton", 0.0)
    for _ in range(30):
        again = run(tensors, grad, layout, dtype, "triton", 0.0)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    alone = {k: v if k == "weight" else v[1:2] for k, v in tensors.items()}
    one = run(alone, grad[1:2], layout, dtype, "triton", 0.0)
    for index in (0, 1, 3, 4, 5):
        assert torch.equal(first[index][1:2], one[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_in_chunks_is_one_pass_bitwise(dtype):
    layout = FrameLayout(7, 1, noisy_copies=0)
    tensors, grad = make(layout, Cin=64, Cout=64, size=(8, 8), dtype=dtype)
    tensors, _ = on_gpu(tensors, grad)
    want = causal_conv3d(layout=layout, **tensors, impl="triton")
    history, start, got = tensors["history"], 0, []
    for n in (1, 4, 2):
        part = {k: tensors[k][:, start : start + n] for k in ("past_scale", "last_scale")}
        x = tensors["x"][:, :, start : start + n]
        chunk = FrameLayout(n, 1, noisy_copies=0)
        got.append(causal_conv3d(x, tensors["weight"], chunk, history=history, **part, impl="triton"))
        seen = torch.cat([history, x], 2)
        history, start = seen[:, :, seen.shape[2] - 2 :], start + n
    assert torch.equal(torch.cat(got, 2), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_past_term(dtype):
    tensors, grad = on_gpu(*make(FrameLayout(1, 1), Cin=128, Cout=64, size=(16, 16), dtype=dtype))

    def past(dtype, impl):
        leaves = [tensors[k].detach().to(dtype).requires_grad_() for k in ("history", "weight")]
        y = past_term(*leaves, impl=impl)
        return [y, *torch.autograd.grad(y, leaves, grad[:, :, 0].to(dtype))]

    results = past(dtype, "triton"), past(torch.float64, "reference"), past(dtype, "reference")
    for label, *tensors_of in zip(("y", "dhistory", "dweight"), *results, strict=True):
        assert_within_budget(*tensors_of, label, roundings=8)


def test_auto_is_triton_except_in_blocks_of_several_frames():
    tensors, _ = on_gpu(*make(FrameLayout(4, 1), Cin=32, Cout=32, size=(8, 8), dtype=torch.bfloat16))
    for f, impl in ((1, "triton"), (2, "composed")):
        layout = FrameLayout(4, 1, frames_per_block=f)
        y = causal_conv3d(layout=layout, **tensors)
        assert torch.equal(y, causal_conv3d(layout=layout, **tensors, impl=impl))


def test_elements_beyond_32_bits():
    """The last frames of a video of more than 2^31 elements, against the same frames alone behind their history."""
    T, C, size = 66, 64, 512
    x = torch.empty(
        (1, C, 2 * T, size, size), dtype=torch.bfloat16, device=DEVICE, memory_format=torch.channels_last_3d
    )
    assert x.numel() > 2**31
    x.zero_()
    x[:, :, T - 4 : T].normal_()
    x[:, :, -2:].normal_()
    weight = torch.randn(16, C, 3, 3, 3, device=DEVICE, dtype=torch.bfloat16) / 40
    y = causal_conv3d(x, weight, FrameLayout(T, 1), impl="triton")
    few = torch.cat([x[:, :, T - 2 : T], x[:, :, -2:]], 2)
    want = causal_conv3d(few, weight, FrameLayout(2, 1), history=x[:, :, T - 4 : T - 2], impl="triton")
    assert torch.equal(y[:, :, T - 2 : T], want[:, :, :2])
    assert torch.equal(y[:, :, -2:], want[:, :, 2:])


def test_captured_in_a_graph_and_on_another_stream():
    layout = FrameLayout(4, 1)
    tensors, _ = on_gpu(*make(layout, Cin=64, Cout=64, size=(8, 8), dtype=torch.bfloat16))
    want = causal_conv3d(layout=layout, **tensors, impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        elsewhere = causal_conv3d(layout=layout, **tensors, impl="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(elsewhere, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = causal_conv3d(layout=layout, **tensors, impl="triton")
    x = tensors["x"].clone()
    tensors["x"].mul_(2)
    graph.replay()
    assert torch.equal(captured, causal_conv3d(layout=layout, **tensors, impl="triton"))
    tensors["x"].copy_(x)
    graph.replay()
    assert torch.equal(captured, want)


def test_compiled_without_recompiling():
    def step(x, weight, past_scale, last_scale, history, frames):
        layout = FrameLayout(frames, 1, noisy_copies=2)
        scales = {"past_scale": past_scale, "last_scale": last_scale}
        return causal_conv3d(x, weight, layout, **scales, history=history).float().square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    # Sizes that are equal by chance, or one apart, would be taken for related.
    for index, (T, B, Cin, Cout, size) in enumerate(((6, 5, 16, 32, (8, 10)), (9, 7, 24, 40, (12, 14)))):
        layout = FrameLayout(T, 1, noisy_copies=2)
        tensors, grad = make(layout, B=B, Cin=Cin, Cout=Cout, size=size, dtype=torch.bfloat16)
        tensors, _ = on_gpu(tensors, grad)
        leaves = [t.requires_grad_() for t in tensors.values()]
        expected = torch.autograd.grad(step(*leaves, T), leaves)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*leaves, T), leaves)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_tf32_is_used_where_it_is_allowed():
    layout = FrameLayout(3, 1)
    tensors, _ = on_gpu(*make(layout, Cin=128, Cout=64, size=(16, 16)))
    exact = causal_conv3d(layout=layout, **{k: v.double() for k, v in tensors.items()}, impl="reference")
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.conv.fp32_precision = precision
        y = causal_conv3d(layout=layout, **tensors, impl="triton")
        errors[precision] = ((y - exact).abs().mean() / exact.abs().mean()).item()
    assert errors["ieee"] < 2**-20 < errors["tf32"] < 2**-10
