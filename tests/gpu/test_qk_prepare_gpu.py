"""The compiled kernels of qk_prepare on a GPU: numerics, exact angles, repeatability, 64-bit sizes, graphs, streams."""

from __future__ import annotations

import math

import pytest
import torch

from sae_kernels import FrameLayout, qk_prepare, qkv_prepare
from sae_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (Hq, Hkv, D, positions, options); sequences of 2 x 9 x 35 = 630 tokens.
LAYOUT = FrameLayout(9, 35)
CASES = {
    "network": (2, 2, 64, LAYOUT, {"normalize_v": True, "start": 1000}),
    "many heads": (12, 12, 128, LAYOUT, {"interleaved": True}),
    "grouped": (28, 4, 128, "tokens", {}),
    "wan": (12, 12, 128, LAYOUT, {"grid": (5, 7), "interleaved": True, "normalize": False}),
    "partial": (3, 1, 80, LAYOUT, {"axes": (20,)}),
    "odd": (2, 2, 37, LAYOUT, {"axes": (6,), "normalize_v": True}),
    "wide": (2, 2, 256, LAYOUT, {"normalize_v": True}),
    "widest": (1, 1, 1024, LAYOUT, {}),
    "three explicit axes": (4, 2, 96, "tokens of three axes", {"axes": (32, 32, 32)}),
    "norm alone": (4, 4, 64, None, {"normalize_v": True}),
}


def make(name, dtype):
    Hq, Hkv, D, positions, options = CASES[name]
    generator = torch.Generator("cuda").manual_seed(0)
    if isinstance(positions, str):
        shape = (2, 630, 3) if "three" in positions else (2, 630)
        positions = torch.randint(-(10**6), 10**6, shape, generator=generator, device="cuda")
    heads = (Hq, Hkv, Hkv)
    qkv = torch.randn(2, 630, sum(heads), D, generator=generator, device="cuda").to(dtype)
    grads = [torch.randn(2, 630, h, D, generator=generator, device="cuda").to(dtype).transpose(1, 2) for h in heads]
    return qkv, grads, positions, {"kv_heads": Hkv} | options


def run(qkv, grads, positions, options, dtype, impl):
    qkv = qkv.detach().to(dtype).requires_grad_()
    outs = qkv_prepare(qkv, positions, impl=impl, **options)
    return [o.detach() for o in outs] + [*torch.autograd.grad(outs, qkv, [g.to(dtype) for g in grads])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, dtype):
    arguments = make(name, dtype)
    actual = run(*arguments, dtype, "triton")
    gold, eager = run(*arguments, torch.float64, "reference"), run(*arguments, dtype, "reference")
    for what, *results in zip(("q", "k", "v", "grad"), actual, gold, eager, strict=True):
        assert_within_budget(*results, f"{name}: {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_that_are_not_multiples_of_16_bytes(dtype):
    qkv, grads, positions, options = make("network", dtype)
    odd = torch.empty(2, 630, 6, 65, dtype=dtype, device="cuda")[..., 1:]
    odd.copy_(qkv)
    for got, want in zip(
        run(odd, grads, positions, options, dtype, "triton"),
        run(qkv, grads, positions, options, dtype, "triton"),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_angles_are_exact_at_frame_a_million():
    frames = [0, 1, 1000, 10**6 - 1, 10**6, -(10**6)]
    x = torch.tensor([1.0] * 64 + [0.0] * 64, device="cuda").expand(1, 1, len(frames), 128)
    q, _ = qk_prepare(x, x, None, torch.tensor(frames, device="cuda"), normalize=False, impl="triton")
    exact = [[p * 10000.0 ** (-2 * j / 128) for j in range(64)] for p in frames]
    want = torch.tensor([[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in exact], dtype=torch.float64)
    assert (q[0, 0].double().cpu() - want).abs().max() < 2**-22


def test_1000_runs_are_bitwise_equal():
    arguments = make("network", torch.bfloat16)
    want = run(*arguments, torch.bfloat16, "triton")
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for got, first in zip(run(*arguments, torch.bfloat16, "triton"), want, strict=True):
            differing += (got != first).any()
    assert differing.item() == 0


def test_more_than_2_to_31_elements():
    S = 2**31 // (3 * 128) + 40
    qkv = torch.zeros(1, S, 3, 128, dtype=torch.bfloat16, device="cuda")
    qkv[:, -64:] = torch.randn(64, 3, 128, device="cuda")
    positions = torch.arange(S, device="cuda")
    q, k, v = qkv_prepare(qkv, positions, normalize_v=True, impl="triton")
    want = qkv_prepare(qkv[:, -64:], positions[-64:], normalize_v=True, impl="triton")
    for got, end in zip((q, k, v), want, strict=True):
        assert torch.equal(got[:, :, -64:], end) and not got[:, :, :-64].any()


def test_cuda_graph_and_side_stream():
    qkv, grads, positions, options = make("network", torch.bfloat16)
    want = run(qkv, grads, positions, options, torch.bfloat16, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = run(qkv, grads, positions, options, torch.bfloat16, "triton")
    stream.synchronize()
    assert all(torch.equal(a, w) for a, w in zip(aside, want, strict=True))
    static, graph = torch.zeros_like(qkv), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(static, grads, positions, options, torch.bfloat16, "triton")
    static.copy_(qkv)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_inductor_agrees():
    qkv, _, positions, options = make("network", torch.bfloat16)

    def step(x):
        return [t * 2 for t in qkv_prepare(x * 1.5, positions, **options)]

    want = step(qkv)
    for got, w in zip(torch.compile(step, fullgraph=True)(qkv), want, strict=True):
        torch.testing.assert_close(got, w)
