"""The compiled kernels of frame_attention on a GPU: numerics, races, sizes beyond 32 bits, graphs, streams, peers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from attention_cases import NAMES, STRIDES, compare, make, restride

from sae_kernels import FrameLayout, frame_attention
from sae_kernels.frame_attention import configs
from sae_kernels.testing import assert_within_budget

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = (
    FrameLayout(16, 16),
    FrameLayout(16, 64),
    FrameLayout(5, 300),
    FrameLayout(7, 130, frames_per_block=3, noisy_copies=2),
    FrameLayout(64, 4, noisy_first=True),
    FrameLayout(12, 100, window=2, sink=1, noisy_first=True),
    FrameLayout(9, 77, noisy_copies=0, window=3),
)


def on_gpu(tensors):
    return [x.cuda() for x in tensors]


def run(tensors, layout, **options):
    """([out, dq, dk, dv], lse)"""
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = frame_attention(*inputs, layout, return_lse=True, impl="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)], lse


@pytest.fixture(autouse=True)
def true_float32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture(params=["shipped", "pointers", "descriptors"])
def path(request, monkeypatch):
    """How tiles are read: as the configuration says, or the shipped tiles by one of the two ways."""
    if request.param == "descriptors" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the copy engine needs compute capability 9.0")
    choose = configs.attention_config
    if request.param != "shipped":
        monkeypatch.setattr(
            configs,
            "attention_config",
            lambda *key: dataclasses.replace(choose(*key), descriptors=request.param == "descriptors"),
        )
    return request.param


@pytest.mark.parametrize("D", [16, 72, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_descriptors_give_the_bits_of_pointers(layout, D, monkeypatch):
    if torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the copy engine needs compute capability 9.0")
    tensors = on_gpu(make(layout, heads=(4, 2), B=2, D=D, dtype=torch.bfloat16))
    choose, results = configs.attention_config, []
    for descriptors in (False, True):
        monkeypatch.setattr(
            configs, "attention_config", lambda *key, d=descriptors: dataclasses.replace(choose(*key), descriptors=d)
        )
        results.append(run(tensors, layout))
    (want, want_lse), (got, lse) = results
    assert torch.equal(lse, want_lse)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_a_row_does_not_see_cannot_reach_it(value, path):
    """Blocks that share tiles with a poisoned one keep their bits, where tiles are read through descriptors."""
    if path != "descriptors":
        pytest.skip("through a pointer a masked tile's rows share what any of them sees")
    layout = FrameLayout(16, 16, noisy_copies=2, window=6, sink=1)
    tensors = on_gpu(make(layout, heads=(4, 2), D=64, dtype=torch.bfloat16))
    want, want_lse = run(tensors, layout)
    poisoned = slice(9 * 16, 10 * 16)
    for tensor in tensors:
        tensor[:, :, poisoned] = value
    got, lse = run(tensors, layout)
    mask = layout.dense_mask("cuda")
    spoiled_rows = mask[:, poisoned].any(1)
    spoiled_keys = mask[spoiled_rows].any(0)
    assert torch.equal(lse[:, :, ~spoiled_rows], want_lse[:, :, ~spoiled_rows])
    for name, a, b in zip(NAMES, got, want, strict=True):
        kept = ~(spoiled_rows if name in ("out", "dq") else spoiled_keys)
        assert kept.any() and torch.equal(a[:, :, kept], b[:, :, kept]), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("noisy_queries_only", [False, True])
def test_forward_and_gradients(layout, dtype, D, noisy_queries_only):
    noisy_queries_only = noisy_queries_only and layout.noisy_copies > 0
    tensors = make(layout, heads=(4, 2), B=2, D=D, dtype=dtype, noisy_queries_only=noisy_queries_only)
    tensors = restride(on_gpu(tensors), STRIDES[(D // 16 + DTYPES.index(dtype)) % len(STRIDES)])
    result = run(tensors, layout, noisy_queries_only=noisy_queries_only)
    compare(*result, tensors, layout, D**-0.5, noisy_queries_only)


def test_10000_backwards_are_bitwise_equal(path):
    """Races show as a rare wrong launch: other kernels of this kind have had one in a thousand."""
    layout = FrameLayout(8, 100, noisy_copies=2, window=3, sink=1)
    tensors = on_gpu(make(layout, heads=(8, 4), D=64, dtype=torch.bfloat16))
    *inputs, grad = tensors
    inputs = [x.requires_grad_() for x in inputs]
    out = frame_attention(*inputs, layout, impl="triton")
    want = torch.autograd.grad(out, inputs, grad, retain_graph=True)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(10_000):
        for got, first in zip(torch.autograd.grad(out, inputs, grad, retain_graph=True), want, strict=True):
            differing += (got != first).any()
    assert differing.item() == 0


def test_1000_forwards_are_bitwise_equal(path):
    layout = FrameLayout(16, 64, noisy_first=True)
    q, k, v, _ = on_gpu(make(layout, heads=(16, 16), D=128, dtype=torch.float16))
    want = frame_attention(q, k, v, layout, impl="triton")
    assert all(torch.equal(frame_attention(q, k, v, layout, impl="triton"), want) for _ in range(1000))


def rows_in_float64(q, k, v, layout, rows, scale):
    """Rows of the specification without the S x S mask: mask_mod on those rows alone; one head."""
    mask = layout.mask_mod()(0, 0, rows[:, None], torch.arange(layout.sequence_length, device=q.device)[None])
    scores = (q[:, :, rows].double() @ k.double().transpose(-2, -1) * scale).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v.double()


@pytest.mark.parametrize("layout", [FrameLayout(21, 1560), FrameLayout(7, 4680), FrameLayout(21, 3600)], ids=str)
def test_sequences_whose_square_passes_32_bits(layout, path):
    """S = 65,520 and 151,200: S^2 overflows int32 from 46,341 on."""
    assert layout.sequence_length > 46_340
    tensors = on_gpu(make(layout, D=128, dtype=torch.bfloat16))
    (out, dq, dk, dv), _ = run(tensors, layout)
    q, k, v, grad = tensors
    rows = torch.randint(layout.sequence_length, (64,), device="cuda")
    gold = rows_in_float64(q, k, v, layout, rows, 128**-0.5)
    assert_within_budget(out[:, :, rows], gold, gold.bfloat16(), "out")
    # sum over rows of dq . q = scale sum ds s = sum over keys of dk . k: one number checks every tile of both passes.
    by_query = (dq.double() * q.double()).sum()
    by_key = (dk.double() * k.double()).sum()
    size = (dq.double() * q.double()).abs().sum()
    assert (by_query - by_key).abs() < 1e-3 * size
    # Probabilities of a row sum to one, so dv sums to the sum of grad.
    got, want = dv.double().sum(2), grad.double().sum(2)
    assert (got - want).abs().max() < 1e-2 * want.abs().max() + 1e-2 * layout.sequence_length**0.5


def test_more_than_2_to_the_31_elements(path):
    """(B, S, H, D) with B S H D > 2^31; the last batch entry lies beyond the reach of 32-bit offsets."""
    layout = FrameLayout(4, 512)
    B, H, D = 2**31 // (layout.sequence_length * 64 * 128) + 1, 64, 128
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of device memory")
    q, k, v = (
        torch.randn(B, layout.sequence_length, H, D, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    assert q.numel() > 2**31
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = frame_attention(*inputs, layout, impl="triton")
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    small = [x.detach()[-1:].requires_grad_() for x in inputs]
    alone = frame_attention(*small, layout, impl="triton")
    assert torch.equal(out[-1:], alone)
    for got, want in zip(grads, torch.autograd.grad(alone, small, torch.ones_like(alone)), strict=True):
        assert torch.equal(got[-1:], want)


ADOPTERS = {
    "Self-Forcing 1.3B": (FrameLayout(21, 1560), 1, (12, 12), 128),
    "Self-Forcing 14B, 3 frames": (FrameLayout(21, 1560, frames_per_block=3), 1, (40, 40), 128),
    "BD3-LM block 4": (FrameLayout(256, 4, noisy_first=True), 8, (12, 12), 64),
    "BD3-LM block 8": (FrameLayout(128, 8, noisy_first=True), 8, (12, 12), 64),
    "BD3-LM block 16": (FrameLayout(64, 16, noisy_first=True), 8, (16, 16), 64),
    "Fast-dLLM v2": (FrameLayout(64, 32, noisy_first=True), 2, (28, 4), 128),
    "SDAR": (FrameLayout(1024, 4, noisy_first=True), 1, (32, 8), 128),
    "ACDiT": (FrameLayout(4, 256), 8, (12, 12), 64),
    "U-Net 16x64": (FrameLayout(16, 64), 8, (8, 8), 64),
    "U-Net 16x16": (FrameLayout(16, 16), 8, (8, 8), 64),
}


@pytest.mark.parametrize("name", ADOPTERS)
def test_adopters_against_compiled_flex_attention(name, path):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, B, heads, D = ADOPTERS[name]
    tensors = on_gpu(make(layout, heads=heads, B=B, D=D, dtype=torch.bfloat16))
    got, _ = run(tensors, layout)
    S = layout.sequence_length
    mask = create_block_mask(layout.mask_mod(), None, None, S, S, device="cuda", _compile=True)
    *inputs, grad = tensors
    inputs = [x.requires_grad_() for x in inputs]
    out = torch.compile(flex_attention)(*inputs, block_mask=mask, enable_gqa=heads[0] != heads[1])
    want = [out.detach(), *torch.autograd.grad(out, inputs, grad)]
    for label, a, b in zip(NAMES, got, want, strict=True):
        # Both round to bfloat16 in other orders: 2^-8 of the largest value on each side, thrice for three products.
        assert (a.float() - b.float()).abs().max() <= 6 * 2**-8 * b.float().abs().max(), label
        cosine = torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
        assert cosine > 1 - 1e-3, label


def test_cuda_graph(path):
    layout = FrameLayout(6, 100, noisy_copies=2)
    *inputs, grad = on_gpu(make(layout, heads=(4, 2), D=64, dtype=torch.bfloat16))
    inputs = [x.requires_grad_() for x in inputs]

    def step():
        out = frame_attention(*inputs, layout, impl="triton")
        return [out, *torch.autograd.grad(out, inputs, grad)]

    want = [x.clone() for x in step()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x in got:
        x.detach().fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_runs_on_the_current_stream(path):
    """A kernel on another stream would read q before the delayed write and give the old result."""
    layout = FrameLayout(8, 200)
    q, k, v, _ = on_gpu(make(layout, heads=(8, 8), D=64, dtype=torch.bfloat16))
    want = frame_attention(q, k, v, layout, impl="triton")
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(q)
        got = frame_attention(late, k, v, layout, impl="triton")
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_tensors_device():
    layout = FrameLayout(4, 50)
    tensors = make(layout, D=64, dtype=torch.bfloat16)
    first, second = (run([x.to(device) for x in tensors], layout) for device in ("cuda:0", "cuda:1"))
    assert all(b.device.index == 1 and torch.equal(a, b.to(a.device)) for a, b in zip(first[0], second[0], strict=True))


def test_allocates_nothing_but_results_and_one_number_a_row():
    layout = FrameLayout(21, 400)
    *inputs, grad = on_gpu(make(layout, heads=(4, 4), D=64, dtype=torch.bfloat16))
    inputs = [x.requires_grad_() for x in inputs]
    torch.autograd.grad(frame_attention(*inputs, layout, impl="triton"), inputs, grad)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = frame_attention(*inputs, layout, impl="triton")
    grads = torch.autograd.grad(out, inputs, grad)
    row_numbers = 2 * 4 * 4 * layout.sequence_length  # lse and delta, fp32
    expected = sum(x.numel() * x.element_size() for x in (out, *grads)) + row_numbers
    assert torch.cuda.max_memory_allocated() - before <= expected + (1 << 16)


def test_other_sizes_do_not_compile_again(path):
    from sae_kernels.frame_attention.triton.forward_kernels import frame_attention_fwd_kernel

    compiled = frame_attention_fwd_kernel.device_caches

    def binaries():
        return sum(len(cache[0]) for cache in compiled.values())

    counts = []
    for frames, tokens, B in ((5, 200, 2), (1, 129, 1), (16, 333, 3)):
        layout = FrameLayout(frames, tokens)
        run(on_gpu(make(layout, heads=(3, 3), B=B, D=72, dtype=torch.bfloat16)), layout)
        counts.append(binaries())
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_inductor(mode):
    layout = FrameLayout(6, 100)
    *inputs, grad = on_gpu(make(layout, heads=(4, 2), D=64, dtype=torch.bfloat16))
    inputs = [x.requires_grad_() for x in inputs]
    attend = torch.compile(lambda *a: frame_attention(*a, layout) * 2, fullgraph=True, mode=mode)
    for _ in range(3):
        out = attend(*inputs)
        got = [x.clone() for x in (out.detach(), *torch.autograd.grad(out, inputs, grad))]
    want = frame_attention(*inputs, layout, impl="triton") * 2
    wanted = [want.detach(), *torch.autograd.grad(want, inputs, grad)]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_auto_is_triton_but_not_for_float64():
    layout = FrameLayout(3, 20)
    q, k, v, _ = on_gpu(make(layout, D=16))
    assert torch.equal(frame_attention(q, k, v, layout), frame_attention(q, k, v, layout, impl="triton"))
    assert frame_attention(*(x.double() for x in (q, k, v)), layout).dtype == torch.float64
