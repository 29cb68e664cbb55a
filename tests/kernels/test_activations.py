"""Magnitude-preserving functions: the references against EDM2's equations, composed against the references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import (
    _extension,
    _launch,
    modulated_silu,
    mp_cat,
    mp_silu,
    mp_sum,
    normalize_weight,
    normalize_weights,
    normalize_weights_,
    pixel_norm,
    pixel_norm_silu,
)
from sae_kernels.activations import ops as activations
from sae_kernels.testing import assert_within_budget, noncontiguous
from sae_kernels.weight_norm import ops as weight_norm

LOW = [torch.float32, torch.bfloat16, torch.float16]
CL3D = torch.channels_last_3d

# name: (function of the tensors, their shapes)
VIDEO = (2, 6, 3, 4, 5)


def away_from(limit, t):
    """mp_sum to the limit, of inputs so changed that no sum is within rounding of the limit."""

    def function(a, b, **options):
        total = ((1 - t) * a.detach().double() + t * b.detach().double()) / math.hypot(1 - t, t)
        far = (total.abs() - limit).abs() > 0.05 * limit
        return mp_sum(a * far, b * far, t, limit=limit, **options)

    return function


def normed_and_activated(x, *options, **keywords):
    return torch.cat(pixel_norm_silu(x, *options, **keywords))


CASES = {
    "mp_silu": (mp_silu, [VIDEO]),
    "modulated_silu": (modulated_silu, [VIDEO, (2, 3, 6)]),
    "modulated_silu images": (modulated_silu, [(3, 5, 4), (3, 4, 5)]),
    "mp_sum to a limit": (away_from(0.8, 0.3), [VIDEO, VIDEO]),
    "pixel_norm_silu": (normed_and_activated, [VIDEO]),
    "pixel_norm_silu last": (lambda x, **o: normed_and_activated(x, -1, 1e-3, **o), [(3, 4, 16)]),
    "mp_sum": (lambda a, b, **o: mp_sum(a, b, 0.3, **o), [VIDEO, VIDEO]),
    "mp_sum t=0": (lambda a, b, **o: mp_sum(a, b, 0, **o), [VIDEO, VIDEO]),
    "mp_sum t=1": (lambda a, b, **o: mp_sum(a, b, 1, **o), [VIDEO, VIDEO]),
    "mp_sum per frame": (mp_sum, [VIDEO, VIDEO, (2, 1, 3, 1, 1)]),
    "mp_sum per channel": (mp_sum, [VIDEO, VIDEO, (6, 1, 1, 1)]),
    "mp_sum scalar tensor": (mp_sum, [VIDEO, VIDEO, ()]),
    "mp_sum per element": (mp_sum, [VIDEO, VIDEO, VIDEO]),
    "mp_cat": (lambda a, b, **o: mp_cat(a, b, **o), [VIDEO, (2, 9, 3, 4, 5)]),
    "mp_cat t": (lambda a, b, **o: mp_cat(a, b, -1, 0.2, **o), [VIDEO, (2, 6, 3, 4, 1)]),
    "mp_cat images": (lambda a, b, **o: mp_cat(a, b, 1, 0.7, **o), [(2, 3, 4, 5), (2, 8, 4, 5)]),
    "pixel_norm": (pixel_norm, [VIDEO]),
    "pixel_norm last": (lambda x, **o: pixel_norm(x, -1, 1e-3, **o), [(3, 4, 16)]),
    "normalize_weight": (normalize_weight, [(8, 4, 3, 3)]),
    "normalize_weight number": (lambda w, **o: normalize_weight(w, 0.7, **o), [(8, 4, 2, 3, 3)]),
    "normalize_weight gain": (normalize_weight, [(8, 12), ()]),
    "normalize_weight gain of shape 1": (normalize_weight, [(8, 4, 3, 3), (1,)]),
}
# What the C++ kernels leave to others: tensors of weights, and the op of another room.
WITHOUT_CPP = [name for name in CASES if name.startswith(("mp_sum per", "mp_sum scalar", "normalize_weight"))]
VIDEO_CASES = [name for name, (_, shapes) in CASES.items() if shapes[0] == VIDEO]


def make(name, dtype=torch.float32, seed=0):
    """(inputs, upstream gradient)"""
    function, shapes = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    out = function(*inputs, impl="reference")
    return inputs, torch.randn(out.shape, generator=generator).to(dtype)


def channels_last_of(x):
    return x.contiguous(memory_format=CL3D) if x.ndim == 5 else x


def run(function, inputs, grad, dtype, **options):
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


def compare(function, inputs, grad, name, impl="composed"):
    dtype = inputs[0].dtype
    actual = run(function, inputs, grad, dtype, impl=impl)
    gold = run(function, inputs, grad, torch.float64, impl="reference")
    eager = run(function, inputs, grad, dtype, impl="reference")
    for index, results in enumerate(zip(actual, gold, eager, strict=True)):
        assert results[0].dtype == dtype
        assert_within_budget(*results, f"{name}: {f'gradient {index}' if index else 'out'}")


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_composed_is_the_reference(name, dtype):
    inputs, grad = make(name, dtype)
    compare(CASES[name][0], inputs, grad, name)


needs_cpp = pytest.mark.skipif(_extension.library("cpu") is not None, reason=str(_extension.library("cpu")))
needs_triton = pytest.mark.skipif(
    _launch.why_not(torch.device("cpu")) is not None, reason=str(_launch.why_not(torch.device("cpu")))
)


@needs_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("mp_sum per channel", "mp_sum per element")])
def test_triton_is_the_reference(name, channels_last, dtype):
    inputs, grad = make(name, dtype)
    inputs[0].flatten()[:: max(1, inputs[0][0].numel() // 3)] *= 30
    if channels_last and grad.ndim == 5:
        inputs, grad = [channels_last_of(x) for x in inputs], channels_last_of(grad)
    compare(CASES[name][0], inputs, grad, name, impl="triton")
    # Mixed orders of memory, and a slice of a larger tensor.
    mixed = [noncontiguous(inputs[0], inputs[0].ndim - 1), *[x.contiguous() for x in inputs[1:]]]
    compare(CASES[name][0], mixed, grad.contiguous(), name, impl="triton")


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 5000), 1), ((3, 4100, 2), 1), ((5, 4, 7), 1), ((6, 3, 2), 0), ((4,), 0)]
)
def test_triton_pixel_norm_of_any_width(shape, dim):
    x, grad = torch.randn(shape), torch.randn(shape)
    compare(lambda x, **o: pixel_norm(x, dim, **o), [x], grad, "pixel_norm", impl="triton")
    permuted = torch.randn(4, 3, 2, 5).permute(2, 0, 3, 1)
    compare(lambda x, **o: pixel_norm(x, 1, **o), [permuted], torch.randn(permuted.shape), "permuted", impl="triton")


@needs_triton
def test_triton_of_zeros_and_nothing():
    x = torch.zeros(2, 8, 3, requires_grad=True)
    pixel_norm(x, impl="triton").sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 1e4))
    with pytest.raises(ValueError, match=r"cannot run 'triton' on cpu: its t must be a number or one value for each"):
        mp_sum(x, x, torch.ones(8, 1), impl="triton")
    for function in (mp_silu, pixel_norm):
        assert function(torch.empty(0, 4), impl="triton").shape == (0, 4)
    w = torch.zeros(3, 4, requires_grad=True)
    normalize_weight(w, impl="triton").sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 0.5e4))
    nothing, scale = torch.empty(2, 4, 3, 0, requires_grad=True), torch.ones(2, 3, 4, requires_grad=True)
    modulated_silu(nothing, scale, impl="triton").sum().backward()
    assert torch.equal(scale.grad, torch.zeros_like(scale))
    t = torch.ones(2, 1, 3, 1, requires_grad=True)
    mp_sum(nothing, nothing, t, impl="triton").sum().backward()
    assert torch.equal(t.grad, torch.zeros_like(t))


@needs_triton
@pytest.mark.parametrize(
    "name", ["modulated_silu", "mp_sum per frame", "mp_cat", "mp_cat t", "normalize_weight", "mp_sum"]
)
def test_triton_where_sizes_pass_a_tile(name):
    """More channels, pixels and rows than one program takes, and sizes that 16 does and does not divide."""
    generator = torch.Generator().manual_seed(3)
    for sizes in ((1, 80, 2, 9, 11), (2, 5, 1, 48, 50), (1, 130, 2, 6, 8)):
        B, C, F = sizes[:3]
        shapes = [sizes, *CASES[name][1][1:]]
        if name == "modulated_silu":
            shapes[1] = (B, F, C)
        elif name.startswith("mp_sum"):
            shapes[1:] = [sizes, (B, 1, F, 1, 1)][: len(shapes) - 1]
        elif name == "mp_cat":
            shapes[1] = (B, 48, *sizes[2:])
        elif name == "mp_cat t":
            shapes[1] = (*sizes[:4], 3)
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        grad = torch.randn(CASES[name][0](*inputs, impl="reference").shape, generator=generator)
        for order in (lambda x: x, channels_last_of):
            compare(CASES[name][0], [order(x) for x in inputs], order(grad), name, impl="triton")


@needs_triton
def test_launches_fit_a_grid():
    """Beside the first, axes of a CUDA grid end at 65535: frames of 8192 x 8192, a million frames, 2^30 channels-last."""
    from sae_kernels.activations import triton as kernels

    for shape in ((1, 3, 1, 8192, 8192), (1000, 8, 1000, 1, 1), (1, 4096, 64, 64, 64)):
        for memory_format in (torch.contiguous_format, CL3D):
            x = torch.empty(shape, device="meta", memory_format=memory_format)
            twice = torch.empty((shape[0], 2 * shape[1], *shape[2:]), device="meta", memory_format=memory_format)
            plan = kernels.plan_frames(kernels.mp_sum_frames_fwd_kernel, x, ("out_ptr",), out_ptr=x)
            plan += kernels.plan_frames(kernels.modulated_silu_bwd_kernel, x, ("grad_x_ptr",), walk=True, grad_x_ptr=x)
            plan += kernels.plan_cat(x, x, 1, 1.0, 1.0, twice, False)
            plan += kernels.plan_norm(kernels.pixel_norm_fwd_kernel, 1, 1e-4, out_ptr=x, x_ptr=x)
            plan += kernels.plan_elementwise(kernels.mp_silu_fwd_kernel, x, x_ptr=x, out_ptr=x)
            assert all(axis <= 65535 for launch in plan for axis in launch.grid[1:])
            assert all(launch.grid[0] < 2**31 for launch in plan)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("mp_sum per channel", "mp_sum per element")])
def test_gpu_is_the_reference(name, dtype):
    function, (inputs, grad) = CASES[name][0], make(name, dtype)
    for order in (lambda x: x, channels_last_of):
        cuda = [order(x).cuda() for x in inputs]
        compare(function, cuda, order(grad).cuda(), name, impl="triton")
        first, second = (run(function, cuda, grad.cuda(), dtype, impl="triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_gpu_in_a_graph_on_a_side_stream():
    x, scale = torch.randn(2, 64, 4, 8, 8, device="cuda"), torch.randn(2, 4, 64, device="cuda")

    def block():
        normed, y = pixel_norm_silu(x)
        return mp_sum(normed, modulated_silu(y, scale), 0.3, limit=1.0)

    want, stream, graph = block(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        block()
        with torch.cuda.graph(graph, stream=stream):
            got = block()
        got.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, -3e-45, 1e37])
@pytest.mark.parametrize(
    "impl", ["composed", pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)]
)
def test_bad_values_have_the_effect_they_have_in_the_reference(impl, value):
    """NaN, infinities, denormals, squares that overflow: equal results, and gradients finite in the same places."""
    for name, (function, _) in CASES.items():
        if impl == "triton" and name in ("mp_sum per channel", "mp_sum per element"):
            continue
        if impl == "cpp" and name in WITHOUT_CPP:
            continue
        inputs, grad = make(name)
        inputs[0].flatten()[7] = value
        got, want = (run(function, inputs, grad, torch.float32, impl=i) for i in (impl, "reference"))
        torch.testing.assert_close(got[0], want[0], equal_nan=True)
        for g, w in zip(got[1:], want[1:], strict=True):
            g, w = (x.masked_fill(~x.isfinite(), math.nan) for x in (g, w))
            torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-4, atol=1e-5)


@given(
    name=st.sampled_from(
        [
            "mp_silu",
            "mp_sum",
            "mp_sum per frame",
            "mp_cat",
            "pixel_norm",
            "pixel_norm_silu",
            "modulated_silu",
            "normalize_weight",
        ]
    ),
    # A norm of few elements takes nearly the whole gradient away: what is left is rounding, of any implementation.
    shape=st.tuples(*[st.integers(low, 9) for low in (1, 4, 1, 1, 4)]),
    scale=st.sampled_from([1e-2, 1.0, 30.0]),
    dtype=st.sampled_from(LOW),
    channels_last=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(name, shape, scale, dtype, channels_last, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = 1 + name.startswith("mp_sum") + (name == "mp_cat")
    inputs = [(torch.randn(shape, generator=generator) * scale).to(dtype) for _ in range(tensors)]
    grad_shape = {"mp_cat": (shape[0], 2 * shape[1], *shape[2:]), "pixel_norm_silu": (2 * shape[0], *shape[1:])}
    grad_shape = grad_shape.get(name, shape)
    inputs.append(torch.randn(grad_shape, generator=generator).to(dtype))
    if channels_last:
        inputs = [x.contiguous(memory_format=CL3D) for x in inputs]
    *inputs, grad = inputs
    if name == "mp_sum per frame":
        inputs.append(torch.rand((shape[0], 1, shape[2], 1, 1), generator=generator).to(dtype))
    if name == "modulated_silu":
        inputs.append(torch.randn((shape[0], shape[2], shape[1]), generator=generator).to(dtype))
    compare(CASES[name][0], inputs, grad, name)
    if name not in WITHOUT_CPP and _extension.library("cpu") is None:
        compare(CASES[name][0], inputs, grad, name, impl="cpp")


@pytest.mark.parametrize("impl", ["reference", "composed"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name, impl):
    inputs, _ = make(name)
    part = 2 if name[:9] != "modulated" else None
    inputs = [x[..., :part].double().requires_grad_() if x.ndim else x.double().requires_grad_() for x in inputs]
    function = CASES[name][0]
    assert torch.autograd.gradcheck(lambda *a: function(*a, impl=impl), inputs, fast_mode=True)


@pytest.mark.parametrize("name", CASES)
def test_fp64(name):
    inputs, grad = make(name, torch.float64)
    function = CASES[name][0]
    got, want = (run(function, inputs, grad, torch.float64, impl=impl) for impl in ("composed", "reference"))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-12, atol=1e-12)


def test_equations_by_hand():
    x = torch.tensor([[0.7, -1.2, 2.0]], dtype=torch.float64)
    y = torch.tensor([[0.1, 0.4, -3.0]], dtype=torch.float64)
    for impl in ("reference", "composed"):
        for i in range(3):
            a, b = x[0, i].item(), y[0, i].item()
            assert mp_silu(x, impl=impl)[0, i].item() == pytest.approx(a / (1 + math.exp(-a)) / 0.596, rel=1e-14)
            for t in (0.3, torch.tensor(0.3, dtype=torch.float64)):
                want = (0.7 * a + 0.3 * b) / math.sqrt(0.7**2 + 0.3**2)
                assert mp_sum(x, y, t, impl=impl)[0, i].item() == pytest.approx(want, rel=1e-14)
            rms = math.sqrt((0.7**2 + 1.2**2 + 2.0**2) / 3)
            assert pixel_norm(x, impl=impl)[0, i].item() == pytest.approx(a / (1e-4 + rms), rel=1e-14)
            want = a / (1e-4 + rms) * 1.5 / math.sqrt(3)
            assert normalize_weight(x, 1.5, impl=impl)[0, i].item() == pytest.approx(want, rel=1e-14)
        got = mp_cat(x, y[:, :1], 1, 0.2, impl=impl)
        c = math.sqrt(4 / (0.8**2 + 0.2**2))
        want = [*(c * 0.8 / math.sqrt(3) * x[0]).tolist(), c * 0.2 * 0.1]
        assert got[0].tolist() == pytest.approx(want, rel=1e-14)


def rms(x, dim=None):
    return x.double().square().mean(dim=dim).sqrt()


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_unit_magnitude_in_unit_magnitude_out(impl):
    n = 400_000
    a, b = torch.randn(4, n // 4), torch.randn(4, n // 4)
    error = 5 / math.sqrt(2 * n) * 2  # five standard errors of an RMS, doubled for the heavier tail of silu
    assert abs(rms(mp_silu(a, impl=impl)) - 1) < error + 2e-4  # 0.596 has three digits
    for t in (0.0, 0.3, 0.5, 1.0, torch.tensor([[0.1], [0.4], [0.5], [0.9]])):
        assert abs(rms(mp_sum(a, b, t, impl=impl)) - 1) < error
    for t in (0.2, 0.5):
        joined = mp_cat(a, b[:, :1000], 1, t, impl=impl)
        assert abs(rms(joined) - 1) < 0.02
        # t is the share of b in the whole, however few its channels: energies (1 - t)^2 : t^2.
        part = rms(joined[:, -1000:]) ** 2 * 1000 / (rms(joined) ** 2 * joined.shape[1])
        assert part.item() == pytest.approx(t**2 / ((1 - t) ** 2 + t**2), rel=0.1)
    x = 7 * torch.randn(3, 64, 5, 5)
    torch.testing.assert_close(rms(pixel_norm(x, impl=impl), 1), torch.ones(3, 5, 5).double(), rtol=0, atol=1e-4)
    w = normalize_weight(0.3 * torch.randn(16, 8, 3, 3), impl=impl)
    torch.testing.assert_close(rms(w, (1, 2, 3)), torch.full((16,), 72**-0.5).double(), rtol=1e-3, atol=0)
    # Hence unit-variance input gives unit-variance output.
    assert abs(rms(torch.nn.functional.conv2d(torch.randn(8, 8, 34, 34), w)) - 1) < 0.05


def test_scale_invariance():
    x, w = torch.randn(2, 32, 4).double(), torch.randn(4, 20).double()
    torch.testing.assert_close(pixel_norm(x), pixel_norm(1000 * x), rtol=1e-3, atol=0)
    torch.testing.assert_close(normalize_weight(w, 2.0), 2 * normalize_weight(50 * w), rtol=1e-3, atol=0)
    # A gradient of a normalised tensor is orthogonal to it (eps aside).
    x.requires_grad_()
    (grad,) = torch.autograd.grad((pixel_norm(x) * torch.randn_like(x)).sum(), x)
    assert ((grad * x).sum(1).abs() < 1e-3 * grad.norm(dim=1) * x.norm(dim=1)).all()


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_nothing_passes_where_the_limit_is_reached(impl):
    """At the limit exactly, beyond it, and in dtypes that do not hold it: 0.8 is 0.7998 in float16."""
    for dtype in LOW:
        a = torch.tensor([0.5, 1.0, -1.0, -3.0, 1e4, float("nan")], dtype=dtype, requires_grad=True)
        out = mp_sum(a, a, 0, limit=1.0, impl=impl)
        assert out[:5].tolist() == [0.5, 1.0, -1.0, -1.0, 1.0] and out[5].isnan()
        assert torch.autograd.grad(out.sum(), a)[0][:5].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
        out = mp_sum(a, a, 0, limit=0.8, impl=impl)
        assert torch.autograd.grad(out.sum(), a)[0][:5].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_zero_vectors(impl):
    x = torch.zeros(2, 4, 3, requires_grad=True)
    out = pixel_norm(x, impl=impl)
    assert torch.equal(out, torch.zeros_like(x))
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e4))
    w = torch.zeros(3, 4, requires_grad=True)
    normalize_weight(w, impl=impl).sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, 0.5e4))


@pytest.mark.parametrize("name", CASES)
def test_strided_inputs_with_poisoned_neighbours(name):
    function, inputs, grad = CASES[name][0], *make(name)
    want = run(function, inputs, grad, torch.float32, impl="composed")
    for dim in range(inputs[0].ndim):
        strided = [noncontiguous(x, dim) if x.ndim > dim else x for x in inputs]
        leaves = [x.requires_grad_() for x in strided]
        out = function(*leaves, impl="composed")
        got = [out, *torch.autograd.grad(out, leaves, noncontiguous(grad, dim))]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VIDEO_CASES)
def test_channels_last_is_preserved(name, dtype):
    function, inputs, grad = CASES[name][0], *make(name, dtype)
    want = run(function, inputs, grad, dtype, impl="composed")
    inputs = [x.contiguous(memory_format=CL3D) if x.ndim == 5 else x for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    out = function(*leaves, impl="composed")
    got = [out, *torch.autograd.grad(out, leaves, grad.contiguous(memory_format=CL3D))]
    for g, w in zip(got[:3], want, strict=False):
        if g.ndim < 5:
            continue
        assert g.is_contiguous(memory_format=CL3D) and not g.is_contiguous()
        torch.testing.assert_close(g, w)


def test_types_are_promoted():
    a, b = torch.randn(2, 3, 4).bfloat16().requires_grad_(), torch.randn(2, 3, 4, requires_grad=True)
    for out in (mp_sum(a, b, 0.5), mp_cat(a, b), mp_sum(b, a, torch.tensor(0.5))):
        assert out.dtype == torch.float32
        grads = torch.autograd.grad(out.sum(), (a, b))
        assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32]
    t = torch.rand(2, 1, 1, requires_grad=True)
    out = mp_sum(a, a, t)
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), t)[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["mp_silu", "modulated_silu", "mp_sum", "mp_sum per frame", "mp_cat"])
def test_bad_values_stay_in_their_elements(name):
    function, inputs, _ = CASES[name][0], *make(name)
    want = function(*inputs)
    bad = inputs[0].clone()
    bad[0, 1, 2, 3, 4], bad[1, 0, 0, 0, 0] = float("nan"), float("inf")
    got = function(bad, *inputs[1:])
    assert got[0, 1, 2, 3, 4].isnan() and not got[1, 0, 0, 0, 0].isfinite()
    touched = torch.zeros_like(got, dtype=torch.bool)
    touched[0, 1, 2, 3, 4] = touched[1, 0, 0, 0, 0] = True
    assert torch.equal(got[~touched], want[~touched])


@pytest.mark.parametrize("impl", ["reference", "composed", pytest.param("cpp", marks=needs_cpp)])
def test_bad_values_stay_in_their_pixels(impl):
    x = torch.randn(2, 5, 3, 4)
    want = pixel_norm(x, impl=impl)
    x[0, 2, 1, 1] = float("nan")
    got = pixel_norm(x, impl=impl)
    assert got[0, :, 1, 1].isnan().all()
    got[0, :, 1, 1] = want[0, :, 1, 1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", [n for n in VIDEO_CASES if "channel" not in n])
def test_empty_batch(name):
    function, inputs, _ = CASES[name][0], *make(name)
    inputs = [(x[:0] if x.ndim >= 3 else x).clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    assert out.shape[0] == 0
    for x, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == x.shape and torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("name", CASES)
def test_deterministic_and_deaf_to_autocast(name):
    inputs, grad = make(name)
    first, second = (run(CASES[name][0], inputs, grad, torch.float32) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        third = run(CASES[name][0], inputs, grad, torch.float32)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_only_wanted_gradients_are_made():
    a, b, t = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2, 1)
    for needed in (a, b, t):
        needed.requires_grad_()
        mp_sum(a, b, t).sum().backward()
        assert needed.grad is not None
        needed.requires_grad_(False)
    for index in (0, 1):
        x = torch.randn(2, 8, 3, requires_grad=True)
        impls = ("auto", "composed", "reference")
        *grads, want = [torch.autograd.grad(pixel_norm_silu(x, impl=i)[index].sum(), x)[0] for i in impls]
        for grad in grads:
            torch.testing.assert_close(grad, want)
    b.requires_grad_().grad = None
    mp_sum(a, b, 0.5).sum().backward()
    assert a.grad is not None and torch.equal(b.grad, torch.full_like(b, 0.5**0.5))


def opcheck_cases():
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape, grad=True):
        return torch.randn(shape, generator=generator).requires_grad_(grad)

    a, b, wide = tensor(*VIDEO), tensor(*VIDEO), tensor(2, 2, 3, 4, 5)
    last = tensor(*VIDEO).detach().contiguous(memory_format=CL3D).requires_grad_()
    c = "composed"
    return {
        "mp_silu": (activations.mp_silu, (last, c)),
        "mp_silu_bwd": (activations.mp_silu_bwd, (a.detach(), last.detach(), c)),
        "mp_sum": (activations.mp_sum, (a, b, 0.3, None, c)),
        "mp_sum limit": (activations.mp_sum, (a, last, 0.3, 1.0, c)),
        "mp_sum_bwd": (activations.mp_sum_bwd, (a.detach(), None, 0.3, None, True, False, c)),
        "mp_sum_bwd limit": (activations.mp_sum_bwd, (a.detach(), b.detach(), 0.3, 1.0, False, True, c)),
        "modulated_silu": (activations.modulated_silu, (last, tensor(2, 3, 6), c)),
        "modulated_silu_bwd": (
            activations.modulated_silu_bwd,
            (a.detach(), last.detach(), tensor(2, 3, 6, grad=False), True, True, c),
        ),
        "pixel_norm_silu": (activations.pixel_norm_silu, (last, 1, 1e-4, c)),
        "pixel_norm_silu_bwd": (
            activations.pixel_norm_silu_bwd,
            (a.detach(), b.detach(), last.detach(), tensor(2, 1, 3, 4, 5, grad=False).abs(), 1, 1e-4, c),
        ),
        "mp_sum_tensor": (activations.mp_sum_tensor, (last, b, tensor(2, 1, 3, 1, 1), c)),
        "mp_sum_tensor_bwd": (
            activations.mp_sum_tensor_bwd,
            (a.detach(), a.detach(), b.detach(), tensor(3, 1, 1, grad=False), True, True, True, c),
        ),
        "mp_cat": (activations.mp_cat, (last, wide, 1, 0.8, 1.2, c)),
        "mp_cat_bwd": (activations.mp_cat_bwd, (last.detach(), 4, 1, 0.8, 1.2, c)),
        "pixel_norm": (activations.pixel_norm, (last, 1, 1e-4, c)),
        "pixel_norm_bwd": (
            activations.pixel_norm_bwd,
            (a.detach(), last.detach(), tensor(2, 1, 3, 4, 5, grad=False).abs(), 1, 1e-4, c),
        ),
        "normalize_weight": (weight_norm.normalize_weight, (a, tensor(), 1.0, c)),
        "normalize_weight number": (weight_norm.normalize_weight, (a, None, 0.4, c)),
        "normalize_weight_bwd": (
            weight_norm.normalize_weight_bwd,
            (a.detach(), b.detach(), tensor(grad=False), 1.0, tensor(2, 1, 1, 1, 1, grad=False), True, True, c),
        ),
    }


@pytest.mark.parametrize("name", opcheck_cases())
def test_opcheck(name):
    op, (*arguments, impl) = opcheck_cases()[name]
    torch.library.opcheck(op, (*arguments, impl))
    if name.startswith(("mp_sum_tensor", "normalize_weight")) or _extension.library("cpu") is not None:
        return
    torch.library.opcheck(op, (*arguments, "cpp"))


def test_compile_fullgraph_without_recompiling():
    def step(x, skip, t, w, gain):
        x, y = pixel_norm_silu(x)
        y = modulated_silu(mp_silu(pixel_norm(y)), t[:, 0, :, :, 0] * x.mean(dim=(3, 4)).transpose(1, 2))
        x = mp_sum(x, mp_sum(y, skip, t), 0.3, limit=1.0)
        x = mp_cat(x, skip)
        return (x.mean(dim=(0, 2, 3, 4)) @ normalize_weight(w, gain).mean(0)).square() + x.square().mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for index, (B, C, F, Y, X) in enumerate(((2, 4, 3, 5, 6), (3, 8, 7, 9, 10), (5, 6, 4, 12, 11))):
        x, skip = (torch.randn(B, C, F, Y, X).contiguous(memory_format=CL3D) for _ in range(2))
        inputs = [x, skip, torch.rand(B, 1, F, 1, 1), torch.randn(7, 2 * C), torch.tensor(0.8)]
        inputs = [i.requires_grad_() for i in inputs]
        want = torch.autograd.grad(step(*inputs), inputs)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*inputs), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
            assert g.stride() == w.stride()


ONE = torch.ones(2, 3, 4)
BAD = [
    (lambda: mp_silu(3), TypeError, "x: must be a tensor, got int 3"),
    (lambda: mp_silu(ONE.int()), TypeError, "x: dtype must be float32.* got int32"),
    (lambda: mp_silu(ONE, impl="cuda"), ValueError, "impl: mp_silu cannot run 'cuda' on cpu: "),
    (lambda: mp_silu(ONE, impl="magic"), ValueError, "impl: must be one of .*, got 'magic'"),
    (lambda: mp_sum(ONE, ONE[:1], 0.5), ValueError, r"b: must have the shape of a \(2, 3, 4\), got .*\(1, 3, 4\)"),
    (lambda: mp_sum(ONE, None, 0.5), TypeError, "b: must be a tensor, got NoneType"),
    (lambda: mp_sum(ONE, ONE.to("meta"), 0.5), ValueError, "b: must be on the device of a"),
    (lambda: mp_sum(ONE, ONE, "x"), TypeError, "t: must be a number, got str 'x'"),
    (lambda: mp_sum(ONE, ONE, float("nan")), ValueError, "t: must be finite, got nan"),
    (lambda: mp_sum(ONE, ONE, torch.ones(2, 3)), ValueError, r"t: must broadcast to the shape of a .* \(2, 3\)"),
    (lambda: mp_sum(ONE[:1], ONE[:1], ONE), ValueError, r"t: must broadcast to the shape of a \(1, 3, 4\)"),
    (lambda: mp_sum(ONE, ONE, torch.ones(1, dtype=torch.int64)), TypeError, "t: dtype must be float32"),
    (lambda: mp_sum(ONE, ONE, 0.5, limit=0), ValueError, "limit: must be > 0, got 0"),
    (lambda: mp_sum(ONE, ONE, ONE, limit=1.0), ValueError, "limit: must be None with a tensor t, got 1.0"),
    (lambda: modulated_silu(ONE, ONE), ValueError, r"scale: must have shape \(B, F, C\) = \(2, 4, 3\), got"),
    (lambda: modulated_silu(ONE[0], ONE), ValueError, r"x: must have shape \(B, C, F, ...\), got"),
    (lambda: modulated_silu(ONE, 2.0), TypeError, "scale: must be a tensor, got float 2.0"),
    (lambda: modulated_silu(ONE, ONE.mT.to("meta")), ValueError, "scale: must be on the device of x"),
    (lambda: pixel_norm_silu(ONE, 1, -1.0), ValueError, "eps: must be > 0, got -1.0"),
    (lambda: mp_cat(ONE, ONE[:1]), ValueError, r"b: must have the shape of a \(2, 3, 4\) except in dim 1, got"),
    (lambda: mp_cat(ONE, ONE[:, :0]), ValueError, "b: size along dim 1 must be >= 1, got 0"),
    (lambda: mp_cat(ONE, ONE, 3), ValueError, r"dim: must be an integer in \[-3, 3\), got 3"),
    (lambda: pixel_norm(ONE, -4), ValueError, r"dim: must be an integer in \[-3, 3\), got -4"),
    (lambda: pixel_norm(ONE, 1, 0.0), ValueError, "eps: must be > 0, got 0.0"),
    (lambda: pixel_norm(ONE[:, :0]), ValueError, "x: size along dim 1 must be >= 1"),
    (lambda: normalize_weight(ONE[0, 0]), ValueError, r"w: must have shape \(Cout, ...\) with a fan-in of at least 1"),
    (lambda: normalize_weight(ONE, torch.ones(2)), ValueError, r"gain: must be one element .* \(2,\)"),
    (lambda: normalize_weight(ONE, None), TypeError, "gain: must be a number, got NoneType"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_names_argument_rule_and_value(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_nothing_is_rounded_before_the_end():
    """Neither in the dtype of t or gain, nor in that of a weight whose result is wanted in a finer one."""
    generator = torch.Generator().manual_seed(0)
    a, b, w = (torch.randn(5, 7, generator=generator) for _ in range(3))
    for impl in ("reference", "composed"):
        for dtype in LOW[1:]:
            t, gain = torch.rand(5, 1, generator=generator).to(dtype), torch.tensor(1.7).to(dtype)
            for x in (t, t[0, 0]):
                assert torch.equal(mp_sum(a, b, x, impl=impl), mp_sum(a, b, x.float(), impl=impl))
            assert torch.equal(normalize_weight(w, gain, impl=impl), normalize_weight(w, gain.float(), impl=impl))
    for dtype in LOW[1:]:
        low = w.to(dtype)
        for impl in ("reference", "composed"):
            (got,) = normalize_weights([low], [1.7], dtype=torch.float32, impl=impl)
            assert torch.equal(got, normalize_weight(low.float(), 1.7, impl=impl))
        copy = torch.empty_like(w)
        normalize_weights_([low], copies=[copy], gains=[1.7])
        assert torch.equal(copy, normalize_weight(low.float(), 1.7))


FAULTS = {
    "silu gain": ("SILU_GAIN = 1 / 0.596", "SILU_GAIN = 1 / 0.6"),
    "silu gain twice": ("grad_input=grad_x).mul_(SILU_GAIN)", "grad_input=grad_x)"),
    "limit forgotten": ("out.clamp_(-limit, limit)", "pass"),
    "gradient beyond the limit": ("hardtanh_backward.grad_input(grad_out, out, -limit, limit", "hardtanh_backward.grad_input(grad_out, out, -9 * limit, 9 * limit"),
    "limit on one side": ("clamp_(-limit, limit)", "clamp_max_(limit)"),
    "modulation of the wrong frame": ("scale = scale.to(compute_dtype(x.dtype)).transpose(1, 2)", "scale = scale.to(compute_dtype(x.dtype)).flip(1).transpose(1, 2)"),
    "modulation's gradient without the scale": ("torch.mul(grad, scale * SILU_GAIN, out=work)", "torch.mul(grad, SILU_GAIN, out=work)"),
    "scale's gradient without the data": ("grad.mul_(x).sum_to_size", "grad.sum_to_size"),
    "slope of the modulation at x": ("z = x * scale", "z = x * 1.0"),
    "activation of the input": ("mp_silu(out, act)", "mp_silu(x, act)"),
    "activation without its gain": ("silu_backward(up(grad_act), out).mul_(SILU_GAIN)", "silu_backward(up(grad_act), out)"),
    "main path lost in backward": (".mul_(SILU_GAIN).add_(grad)", ".mul_(SILU_GAIN)"),
    "parts of cat swapped in backward": ("torch.mul(grad_out.narrow(dim, 0, grad_a.shape[dim]), weight_a", "torch.mul(grad_out.narrow(dim, 0, grad_a.shape[dim]), weight_b"),
    "sum not normalised": ("norm = math.hypot(1 - t, t)\n    torch.mul", "norm = 1.0\n    torch.mul"),
    "sum swapped": ("torch.mul(up(a), (1 - t) / norm, out=work).addcmul_(up(b), t / norm)", "torch.mul(up(b), (1 - t) / norm, out=work).addcmul_(up(a), t / norm)"),
    "slope of the sum ignores the norm": ("slope.sum_to_size(t.shape) / norm**3", "slope.sum_to_size(t.shape) / norm"),
    "slope of t = 1 - t": ("addcmul_(up(a), t, value=-1)", "addcmul_(up(a), t)"),
    "norm, not RMS": ("mul_(x.shape[dim] ** -0.5)", "mul_(1)"),
    "eps forgotten in backward": ("addcmul_(grad, 1 / (rms + eps))", "addcmul_(grad, 1 / rms)"),
    "norm treated as a constant": ("torch.mul(out, slope, out=work)", "torch.mul(out, 0 * slope, out=work)"),
}  # fmt: skip
WEIGHT_FAULTS = {
    "fan-in forgotten": ("scale = factor * fan_in**-0.5", "scale = factor"),
    "gain of the last channel only": ("dot.sum() *", "dot[-1].sum() *"),
    "weight gradient not projected": ("torch.mul(w32, slope, out=work)", "torch.mul(w32, 0 * slope, out=work)"),
    "gain left out of backward": ("over_d = _scale(gain, factor, fan_in, rms) / d", "over_d = _scale(None, factor, fan_in, rms) / d"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS, *WEIGHT_FAULTS])
def test_seeded_fault_is_caught(fault, seed_fault):
    """Each fault, put into the source of the composed route, makes the comparison fail."""
    ops, faults = (activations, FAULTS) if fault in FAULTS else (weight_norm, WEIGHT_FAULTS)
    seed_fault(ops, *faults[fault])

    def compare_all():
        for name, (function, _) in CASES.items():
            compare(function, *make(name), name)

    with pytest.raises(AssertionError):
        compare_all()
