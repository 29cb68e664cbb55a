"""The C++ kernels of the small steps on the CPU: sizes around vectors and tiles, orders of memory, threads, refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_activations as small
import test_qk_prepare as heads
import torch

from sae_kernels import (
    FrameLayout,
    _extension,
    modulated_silu,
    mp_cat,
    mp_silu,
    mp_sum,
    pixel_norm,
    qkv_prepare,
)
from sae_kernels.activations import ops as activations
from sae_kernels.qk_prepare import ops as qk
from sae_kernels.testing import noncontiguous

if _extension.library("cpu") is not None:
    pytest.skip(str(_extension.library("cpu")), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = [name for name in small.CASES if name not in small.WITHOUT_CPP]
CL3D = torch.channels_last_3d


def orders(tensors):
    """The same values contiguous, channels-last, in an order of neither kind, and with gaps."""
    yield tensors
    yield [small.channels_last_of(x) for x in tensors]
    yield [x.mT.contiguous().mT for x in tensors]
    yield [noncontiguous(x, x.ndim - 1) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_the_reference(name, dtype):
    inputs, grad = small.make(name, dtype)
    for tensors in orders([*inputs, grad]):
        small.compare(small.CASES[name][0], tensors[:-1], tensors[-1], name, impl="cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", heads.CASES)
def test_heads_are_the_reference(name, dtype):
    for inside in (False, True):
        inputs, grads = heads.make(name, dtype, inside=inside)
        heads.compare(name, inputs, grads, impl="cpp", function=heads.run_packed if inside else heads.run)
        inputs, grads = [noncontiguous(x, 2) for x in inputs], [noncontiguous(g, 3) for g in grads]
        heads.compare(name, inputs, grads, impl="cpp")


# (B, C, F, Y, X): less than a vector, whole vectors and not, more than a block of 64 channels or pixels, a tile of 256
# pixels and of 16, and more than a row whose sum is of one section.
SIZES = [
    (1, 16, 2, 8, 8),
    (1, 64, 1, 4, 65),
    (2, 70, 1, 3, 7),
    (1, 130, 2, 5, 13),
    (1, 33, 1, 1, 300),
    (1, 2100, 1, 1, 3),
    (1, 5003, 1, 1, 17),
    (1, 3, 1, 64, 66),
]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_around_vectors_and_tiles(sizes, channels_last):
    generator = torch.Generator().manual_seed(1)
    B, C, F = sizes[:3]
    shapes = {"modulated_silu": [(B, F, C)], "mp_cat": [(B, 48, *sizes[2:])], "mp_sum to a limit": [sizes]}
    for name in ("mp_silu", "pixel_norm", "pixel_norm_silu", *shapes):
        inputs = [torch.randn(shape, generator=generator) for shape in (sizes, *shapes.get(name, []))]
        function = small.CASES[name][0]
        grad = torch.randn(function(*inputs, impl="reference").shape, generator=generator)
        if channels_last:
            inputs, grad = [small.channels_last_of(x) for x in inputs], small.channels_last_of(grad)
        small.compare(function, inputs, grad, name, impl="cpp")


@pytest.mark.parametrize(("D", "S"), [(64, 40), (128, 17), (6, 9), (256, 9), (96, 23), (5000, 2)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_real_widths_and_ragged_groups_of_tokens(D, S, interleaved):
    case = (5, 1, D, torch.arange(S), {"interleaved": interleaved, "normalize_v": True})
    generator = torch.Generator().manual_seed(0)
    inputs, grads = ([torch.randn(1, h, S, D, generator=generator) for h in (5, 1, 1)] for _ in range(2))
    heads.CASES["any"] = case
    try:
        heads.compare("any", inputs, grads, impl="cpp")
    finally:
        del heads.CASES["any"]


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 8, 1, 1)])
def test_zeros_stay_zeros_and_their_gradient_is_that_of_dividing_by_eps(shape):
    x, grad = torch.zeros(shape, requires_grad=True), torch.randn(shape)
    out = pixel_norm(x, impl="cpp")
    assert torch.equal(out, torch.zeros_like(out))
    torch.testing.assert_close(torch.autograd.grad(out, x, grad)[0], grad * 1e4)


def same(got, want, what):
    assert len(got) == len(want)
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(g, w), f"{what}: result {index}"


def every_step(B, C, F, size, dtype=torch.float32, seed=0):
    """Name, function, its inputs and the gradient of its result, all channels-last."""
    generator = torch.Generator().manual_seed(seed)

    def video(channels=C, batch=B):
        return small.channels_last_of(torch.randn(batch, channels, F, size, size, generator=generator).to(dtype))

    scale = torch.randn(B, F, C, generator=generator)
    return [
        ("mp_silu", mp_silu, [video()], video()),
        ("mp_sum", lambda a, b, **o: mp_sum(a, b, 0.3, limit=1.0, **o), [video(), video()], video()),
        ("mp_cat", mp_cat, [video(), video()], video(2 * C)),
        ("modulated_silu", modulated_silu, [video(), scale], video()),
        ("pixel_norm", pixel_norm, [video()], video()),
        ("pixel_norm_silu", small.normed_and_activated, [video()], video(batch=2 * B)),
    ]


def run(function, inputs, grad, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_written_past_the_caches_are_the_same(channels_last, dtype):
    """From 8 MiB on; a batch of two halves has the bits of the halves, and so has one that nothing is aligned in."""
    F, size = (9, 32) if dtype == torch.float32 else (17, 33)
    for name, function, inputs, grad in every_step(2, 128 if dtype == torch.float32 else 144, F, size, dtype):
        assert inputs[0].nbytes >= 8 << 20
        if not channels_last:
            inputs, grad = [x.contiguous() for x in inputs], grad.contiguous()
        whole = run(function, inputs, grad, impl="cpp")
        for b in range(2):
            part = [x[b : b + 1] for x in inputs]
            some = grad[[b, b + 2]] if name == "pixel_norm_silu" else grad[b : b + 1]
            want = [w[[b, b + 2]] if w.shape[0] == 4 else w[b : b + 1] for w in whole]
            same(run(function, part, some, impl="cpp"), want, name)


def test_heads_written_past_the_caches_are_the_same():
    layout = FrameLayout(4, 200)
    qkv, grad = (torch.randn(3, 1600, 12, 64) for _ in range(2))

    def prepare(x, g):
        x = x.detach().requires_grad_()
        outs = qkv_prepare(x, layout, kv_heads=2, normalize_v=True, impl="cpp")
        return [*outs, *torch.autograd.grad(outs, x, g.transpose(1, 2).split([8, 2, 2], dim=1))]

    assert qkv.nbytes >= 8 << 20
    whole = prepare(qkv, grad)
    for b in range(3):
        same(prepare(qkv[b : b + 1], grad[b : b + 1]), [w[b : b + 1] for w in whole], f"batch {b}")


def test_bits_do_not_depend_on_the_number_of_threads():
    threads, results = torch.get_num_threads(), []
    x, layout = torch.randn(2, 300, 9, 32), FrameLayout(50, 3)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = [t for _, f, inputs, grad in every_step(2, 40, 5, 19) for t in run(f, inputs, grad, impl="cpp")]
            for _, f, inputs, grad in every_step(1, 40, 5, 19):
                found += run(f, [i.contiguous() for i in inputs], grad.contiguous(), impl="cpp")
            leaf = x.detach().requires_grad_()
            outs = qkv_prepare(leaf, layout, normalize_v=True, impl="cpp")
            results.append([*found, *outs, *torch.autograd.grad([o.square().sum() for o in outs], leaf)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        same(other, results[0], "threads")


def test_it_is_what_auto_takes_on_the_cpu():
    device, x = torch.device("cpu"), torch.ones(2, 3, 4)
    for ops in (activations, qk):
        assert ops.implementations(device)[0][:2] == ["cpp", "composed"]
        available, why_not = ops.implementations(device, torch.float64)
        assert available[0] == "composed" and "float64 is for composed" in why_not["cpp"]
    with pytest.raises(ValueError, match="mp_silu cannot run 'cpp' on cpu: it computes in float32; float64 is for"):
        mp_silu(x.double(), impl="cpp")
    with pytest.raises(
        ValueError, match="mp_sum cannot run 'cpp' on cpu: its t must be a number, got float32 tensor of"
    ):
        mp_sum(x, x, x, impl="cpp")
    assert torch.equal(mp_silu(x), mp_silu(x, impl="cpp"))


def test_native_ops_refuse_what_they_cannot_read():
    n, x, y = torch.ops.sae_kernels_native, torch.zeros(4, 6), torch.zeros(4, 6)
    ones, four = torch.ones(24), torch.zeros(2, 3, 4, 8)
    place = ([2, 2, 2], [4], [2])
    for call, message in (
        (lambda: n.mp_silu(x, None, y[:, :3]), "out: must be dense with 24 elements"),
        (lambda: n.mp_silu(x[:, ::2], None, y[:, :3]), "x: must be dense with 12 elements"),
        (lambda: n.mp_silu(x[:1].expand(4, 6), None, y), "x: must have positive strides"),
        (lambda: n.mp_silu(x.double(), None, y), "x: dtype must be float32, bfloat16 or float16"),
        (lambda: n.mp_silu(x, y.bfloat16(), y), "grad_out: must have the dtype of the other tensors"),
        (lambda: n.mp_sum(x, x[:2], y, 1.0, 1.0, None), "b: must be dense with 24 elements"),
        (lambda: n.mp_sum_bwd(x, None, y, None, 1.0, 1.0, 2.0), "out: must be given with a limit"),
        (lambda: n.mp_cat([x, x[:2]], y, [1.0, 1.0], 1, False), "parts: must make up whole, in 1 rows"),
        (lambda: n.mp_cat([x[:2], x[2:]], y, [1.0, 1.0], 5, False), "parts: must make up whole, in 5 rows"),
        (lambda: n.modulated_silu(x, ones[:5], y, 1), "scale: must hold one number for each group and channel"),
        (lambda: n.modulated_silu(x, ones[:6], y, 4), "scale: must hold one number for each group and channel"),
        (lambda: n.pixel_norm(x, y, ones[:5], None, 6, 1, 1e-4), "rms: must be dense with 4 elements"),
        (lambda: n.pixel_norm(x, y, ones[:4], None, 5, 1, 1e-4), "x: must hold vectors of 5 elements, 1 side by side"),
        (
            lambda: n.qk_prepare_fwd([four], [four[..., :4]], [], 0, None, [], [], [], False, 1e-4),
            "outs: must have shape",
        ),
        (lambda: n.qk_prepare_fwd([four], [four], [], 1, None, [], [], [], False, 1e-4), "rms: must be one of each"),
        (lambda: n.qk_prepare_fwd([four.mT], [four.mT], [], 0, None, [], [], [], False, 1e-4), "contiguous last dim"),
        (
            lambda: n.qk_prepare_fwd([four], [four], [], 0, torch.zeros(15), *place, False, 1e-4),
            "table: must be dense with 16 elements",
        ),
        (
            lambda: n.qk_prepare_fwd([four], [four], [], 0, torch.zeros(16), [3, 2, 2], *place[1:], False, 1e-4),
            "sizes: must reach every place",
        ),
        (
            lambda: n.qk_prepare_fwd([four], [four], [], 0, torch.zeros(16), [0, 1, 1], *place[1:], False, 1e-4),
            "sizes: must be those of the tokens",
        ),
        (
            lambda: n.qk_prepare_fwd([four], [four], [], 0, torch.zeros(24), [2, 2, 2], [6], [2], False, 1e-4),
            "axes: must be of even sums, at most D = 8",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


LESSER = """
import sys
sys.path.insert(0, "tests/kernels")
import test_steps_cpp as t
for name in t.NAMES[::2]:
    for dtype in t.DTYPES:
        t.test_activations_are_the_reference(name, dtype)
for name in list(t.heads.CASES)[::4]:
    t.test_heads_are_the_reference(name, t.torch.float32)
for sizes in t.SIZES[1:4]:
    t.test_sizes_around_vectors_and_tiles(sizes, True)
print("same")
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets_keep_the_budget(capability):
    root = Path(__file__).parents[2]
    environment = os.environ | {"SAE_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", LESSER], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr[-3000:]
