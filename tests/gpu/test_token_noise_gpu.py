"""token_noise by Triton on a GPU: its numbers, sizes beyond 32 bits, graphs and streams."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from test_token_noise import compare, make, normals_of

from sae_kernels import token_noise, token_noise_eps

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rest", [(4, 8), (3, 5), (7, 9, 11)])
@pytest.mark.parametrize("K", [0, 1, 3])
@pytest.mark.parametrize("per", ["frame", "last", "channel", "element", "clip"])
def test_triton_is_the_reference(per, K, rest, dtype):
    tensors, layout = make(2, 5, K, rest, per=per, dtype=dtype, noisy_first=K == 3)
    compare([t.cuda() for t in tensors], layout, impls=("triton",), seed=-7, offset=2**40 + 1)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_normals_are_those_of_the_cpu(seed):
    """Within 4 ulp: the words are the same, logarithm and cosine are the compiler's."""
    cpu = token_noise_eps((1 << 20,), seed=seed, offset=seed, device="cpu")
    gpu = token_noise_eps((1 << 20,), seed=seed, offset=seed, device="cuda", impl="triton").cpu()
    ulp = torch.finfo(torch.float32).eps * 2.0 ** cpu.abs().log2().floor().clamp(min=-20)
    assert ((cpu - gpu).abs() <= 4 * ulp).all()


@pytest.mark.xdist_group("large")  # one process at a time
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_elements_beyond_32_bits(impl):
    """2^31 + 64 elements in bf16 are 4 GiB."""
    count = 2**31 + 64
    eps = token_noise_eps((count,), seed=5, offset=9, device="cuda", dtype=torch.bfloat16, impl=impl)
    want = normals_of(range(count - 64, count), 5, 9)
    assert (eps[-64:].double().cpu() - want).abs().max() <= 2**-8 * want.abs().max()


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_graph_and_side_stream(impl):
    (x, signal, noise, _), layout = make(2, 3, 1, (512,))
    x, signal, noise = x.cuda(), signal.cuda(), noise.cuda()
    want = token_noise(x, signal, noise, layout, seed=1, impl=impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = token_noise(x, signal, noise, layout, seed=1, impl=impl)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(other, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = token_noise(x, signal, noise, layout, seed=1, impl=impl)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_1000_launches_are_bitwise_equal(impl):
    tensors, layout = make(2, 7, 2, (33, 65), per="channel")
    x, signal, noise, grad = (t.cuda().requires_grad_() for t in tensors)
    out = token_noise(x, signal, noise, layout, seed=3, impl=impl)
    want = (out.detach(), *torch.autograd.grad(out, (x, signal, noise), grad))
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        out = token_noise(x, signal, noise, layout, seed=3, impl=impl)
        got = (out.detach(), *torch.autograd.grad(out, (x, signal, noise), grad))
        for a, b in zip(got, want, strict=True):
            differing += (a != b).any()
    assert differing.item() == 0
