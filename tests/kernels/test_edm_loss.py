"""edm_loss: against EDM's equations and the denoising loss in pieces, forward and gradient, with seeded faults."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout, _extension, edm_loss, token_noise, token_noise_eps
from sae_kernels.edm_loss import ops
from sae_kernels.testing import assert_within_budget, noncontiguous

WHY_NOT = _extension.library("cpu")
IMPLS = ("composed",) if WHY_NOT else ("composed", "cpp")
NAMES = ("loss", "draw")


def make(B=2, T=3, K=2, rest=(3, 4, 5), *, noisy_first=False, dtype=torch.float32, seed=0):
    """(raw, x0, sigma, gradient of the loss), layout."""
    generator = torch.Generator().manual_seed(seed)
    layout = FrameLayout(T, 1, noisy_copies=K, noisy_first=noisy_first)
    raw = torch.randn(B, K * T, *rest, generator=generator).to(dtype)
    x0 = torch.randn(B, T, *rest, generator=generator).to(dtype)
    sigma = (2 * torch.randn(B, K * T, generator=generator)).exp()
    return (raw, x0, sigma, torch.randn(B, K * T, generator=generator)), layout


def run(tensors, layout, dtype, **options):
    raw, x0, sigma, grad = (t.detach().to(dtype) for t in tensors)
    raw.requires_grad_()
    loss = edm_loss(raw, x0, sigma.to(torch.float64 if dtype == torch.float64 else torch.float32), layout, **options)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    return [loss, torch.autograd.grad(loss, raw, grad.to(loss.dtype))[0]]


def compare(tensors, layout, *, impls=IMPLS, **options):
    options = {"seed": 11, "offset": 5, "sigma_data": 0.7} | options
    dtype = tensors[0].dtype
    tensors = [t.to(dtype) for t in tensors]
    gold = run(tensors, layout, torch.float64, **options, impl="reference")
    eager = run(tensors, layout, dtype, **options, impl="reference")
    for impl in impls:
        for name, *results in zip(NAMES, run(tensors, layout, dtype, **options, impl=impl), gold, eager, strict=True):
            assert_within_budget(*results, f"{name} by {impl} of {layout}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "noisy_first"), [(1, False), (1, True), (3, True), (3, False)])
def test_is_the_reference(K, noisy_first, dtype):
    compare(*make(2, 3, K, noisy_first=noisy_first, dtype=dtype))


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 4),
    K=st.integers(1, 3),
    rest=st.sampled_from([(1,), (7,), (4, 6), (3, 5, 2), (1030,)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_shape(B, T, K, rest, dtype, seed, offset):
    compare(*make(B, T, K, rest, dtype=dtype), seed=seed, offset=offset)


@pytest.mark.parametrize("noisy_first", [False, True])
@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_is_the_loss_of_the_noised_sequence(impl, noisy_first):
    """From the network's own input: D = c_skip x + c_out model_output, with x as token_noise made it."""
    (raw, x0, sigma, _), layout = make(noisy_first=noisy_first)
    raw, x0, sigma = raw.double(), x0.double(), sigma.double()
    clean = torch.zeros(2, 3, dtype=torch.float64)
    sigmas = torch.cat([sigma, clean] if noisy_first else [clean, sigma], dim=1)
    x = layout.split(token_noise(x0, 1, sigmas, layout, seed=-5, offset=9, impl="reference"), 1)[1]
    s, d = sigma[:, :, None, None, None], 0.5
    denoised = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * raw
    error = (denoised - torch.cat([x0, x0], dim=1)).square().mean(dim=(2, 3, 4))
    want = (sigma**2 + d**2) / (sigma * d) ** 2 * error
    got = edm_loss(raw, x0, sigma, layout, seed=-5, offset=9, sigma_data=d, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_gradient_is_that_of_finite_differences(impl):
    (raw, x0, sigma, _), layout = make(1, 2, 2, (3,))
    raw = raw.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: edm_loss(r, x0.double(), sigma.double(), layout, seed=3, impl=impl), raw)


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_noise_levels_stay_finite(impl):
    """The weight alone would be 1e12 or overflow in half precision; multiplied out nothing does."""
    (raw, x0, _, _), layout = make(1, 3, 1, dtype=torch.float16)
    loss = edm_loss(raw, x0, torch.tensor([[1e-6, 1.0, 1e4]]), layout, seed=1, impl=impl)
    assert loss.isfinite().all() and loss.max() < 10


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [0, 1, 2, 4])
def test_strides_do_not_matter(dim, impl):
    (raw, x0, sigma, grad), layout = make()
    want = run((raw, x0, sigma, grad), layout, torch.float32, seed=1, impl=impl)
    raw, x0 = noncontiguous(raw, dim).requires_grad_(), noncontiguous(x0, dim)
    loss = edm_loss(raw, x0, noncontiguous(sigma, 1), layout, seed=1, impl=impl)
    assert torch.equal(loss, want[0])
    assert torch.equal(torch.autograd.grad(loss, raw, grad)[0], want[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_deterministic_empty_and_per_clip(impl):
    tensors, layout = make(2, 3, 2, (1500,), dtype=torch.bfloat16)
    first, second = (run(tensors, layout, torch.bfloat16, seed=1, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for shape in ((0, 6, 4), (2, 6, 0)):
        raw = torch.zeros(shape, requires_grad=True)
        loss = edm_loss(raw, raw.detach()[:, :3], torch.ones(shape[:2]), layout, seed=1, impl=impl)
        assert loss.shape == shape[:2]
        loss.sum().backward()
        assert raw.grad.shape == shape
    bad, x0, sigma, _ = tensors
    bad = bad.clone()
    bad[0, 4, 7] = float("nan")
    loss = edm_loss(bad, x0, sigma, layout, seed=1, impl=impl)
    bad_rows = loss.isnan()
    assert bad_rows[0, 4] and bad_rows.sum() == 1


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_frames_without_elements_have_no_mean(monkeypatch, impl):
    monkeypatch.setattr(ops, "_empty_forward", lambda raw, *_: torch.zeros(raw.shape[:2]))  # memory as it may be
    raw = torch.zeros(2, 6, 0)
    assert (
        edm_loss(raw, raw[:, :3], torch.ones(2, 6), FrameLayout(3, 1, noisy_copies=2), seed=1, impl=impl).isnan().all()
    )


@pytest.mark.parametrize("value", [0.0, -0.0, -0.3, -1e4, math.inf, -math.inf, math.nan])
def test_noise_levels_that_are_none_have_the_effect_they_have_in_the_reference(value):
    """NaN in their own frame, where the formula is undefined; a negative one as the formula has it."""
    tensors, layout = make()
    tensors[2][1, 4] = value
    want = run(tensors, layout, torch.float64, seed=1, impl="reference")
    eager = run(tensors, layout, torch.float32, seed=1, impl="reference")
    for impl in IMPLS:
        loss, grad = got = run(tensors, layout, torch.float32, seed=1, impl=impl)
        assert loss.isnan().sum() == (not -math.inf < value < 0)
        assert loss[1, 4].isnan() == grad[1, 4].isnan().all() == want[0][1, 4].isnan()
        for name, *results in zip(NAMES, got, want, eager, strict=True):
            assert_within_budget(*(x.nan_to_num() for x in results), f"{name} by {impl}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sigma", [1e-200, 1e200, -1e308])
def test_noise_levels_without_a_square(impl, sigma):
    """The limits: all noise, or all data of the sign of the level."""
    (raw, x0, _, grad), layout = make(1, 1, 1, (500,), dtype=torch.float64)
    eps = token_noise_eps((1, 2, 500), seed=1, dtype=torch.float64, impl=impl)[:, 1:]
    raw, x0 = raw.double(), x0.double()
    error = raw + eps if abs(sigma) < 1 else raw - math.copysign(1, sigma) * x0 / 2
    got = run(
        (raw, x0, torch.tensor([[sigma]], dtype=torch.float64), grad),
        layout,
        torch.float64,
        seed=1,
        sigma_data=2.0,
        impl=impl,
    )
    torch.testing.assert_close(got, [error.square().mean(2), 2 / 500 * error * grad[..., None].double()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, -3e-45, 1e37])
@pytest.mark.parametrize("impl", IMPLS)
def test_bad_values_have_the_effect_they_have_in_the_reference(impl, value):
    """NaN, infinities, denormals, squares that overflow, in raw or data: finite in the same places, and equal there."""
    for place in (0, 1):
        tensors, layout = make()
        tensors[place].flatten()[7] = value
        got, want = (run(tensors, layout, torch.float32, seed=1, impl=i) for i in (impl, "reference"))
        for g, w in zip(got, want, strict=True):
            g, w = (x.masked_fill(~x.isfinite(), float("nan")) for x in (g, w))
            torch.testing.assert_close(g, w, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    (raw, x0, sigma, grad), _ = make()
    torch.library.opcheck(ops.edm_loss_fwd, (raw.requires_grad_(), x0, sigma, 3, True, 0.5, -3, 2**40, impl))
    with torch.no_grad():
        torch.library.opcheck(ops.edm_loss_bwd, (grad, raw, x0, sigma, 3, False, 0.5, -3, 2**40, impl))
    if impl == "cpp":
        native = torch.ops.sae_kernels_native.edm_loss.default
        torch.library.opcheck(native, (raw.detach(), x0, sigma.double(), torch.empty(2, 6), None, 3, 1, 0.5, 1, 2))
        for wrong, message in (
            ((raw.detach(), x0, sigma, torch.empty(2, 6), None), "sigma: must be float64 of 12"),
            ((raw.detach(), x0, sigma.double(), torch.empty(2, 5), None), "loss: must have 12 elements"),
            ((raw.detach()[:, :5], x0, sigma.double(), torch.empty(2, 6), None), "raw: dim 1 must be 6"),
        ):
            with pytest.raises(RuntimeError, match=message):
                native(*wrong, 3, 1, 0.5, 1, 2)


def test_compile_fullgraph_without_recompiling():
    def step(raw, x0, sigma, frames, seed):
        layout = FrameLayout(frames, 1, noisy_copies=2)
        return edm_loss(raw, x0, sigma, layout, seed=seed).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for index, (B, T, C, seed) in enumerate(((3, 4, 7, 5), (5, 6, 9, 77))):
        (raw, x0, sigma, _), _ = make(B, T, 2, (C,))
        raw.requires_grad_()
        want = torch.autograd.grad(step(raw, x0, sigma, T, seed), raw)[0]
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(raw, x0, sigma, T, seed), raw)[0]
        torch.testing.assert_close(got, want)


def test_autocast_changes_nothing():
    tensors, layout = make()
    want = run(tensors, layout, torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(tensors, layout, torch.float32, seed=1)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


BAD = {
    "model_output: must be a tensor": ({"model_output": 3}, TypeError),
    r"model_output: must have shape \(B, K T, ...\)": ({"model_output": torch.ones(2, 6)}, ValueError),
    "model_output: frames must be K T = 6, got 5": ({"model_output": torch.ones(2, 5, 4)}, ValueError),
    "model_output: dtype must be float32": ({"model_output": torch.ones(2, 6, 4, dtype=torch.int64)}, TypeError),
    r"x0: must have shape \(B, T, ...\) of model_output \(2, 6, 4\)": ({"x0": torch.ones(2, 3, 5)}, ValueError),
    r"sigma: must have shape \(B, K T\) = \(2, 6\)": ({"sigma": torch.ones(2, 3)}, ValueError),
    "sigma: must be on the device of model_output": ({"sigma": torch.ones(2, 6, device="meta")}, ValueError),
    "sigma_data: must be a number > 0, got 0": ({"sigma_data": 0}, ValueError),
    "layout: noisy_copies must be at least 1, got 0": ({"layout": FrameLayout(3, 1, noisy_copies=0)}, ValueError),
    "layout: must be a FrameLayout": ({"layout": 3}, TypeError),
    "seed: must be an integer": ({"seed": 1.5}, TypeError),
    r"offset: must be in \[-2\^63, 2\^63\)": ({"offset": 2**63}, ValueError),
    "impl: edm_loss cannot run 'triton' on cpu: ": ({"impl": "triton"}, ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_argument_rule_and_value(message):
    arguments = {
        "model_output": torch.ones(2, 6, 4),
        "x0": torch.ones(2, 3, 4),
        "sigma": torch.ones(2, 6),
        "layout": FrameLayout(3, 1, noisy_copies=2),
        "seed": 0,
    }
    edm_loss(**arguments)
    change, error = BAD[message]
    with pytest.raises(error, match=message):
        edm_loss(**(arguments | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gpu_agrees_with_the_cpu(dtype):
    tensors, layout = make(2, 3, 2, (3, 5, 7), dtype=dtype)
    cpu, gpu = (
        run([t.to(d) for t in tensors], layout, dtype, seed=-3, impl=impl)
        for d, impl in (("cpu", "cpp"), ("cuda", "cuda"))
    )
    for g, c in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(g.cpu(), c)


FAULTS = {
    "noise of the clean stream": ("0 if noisy_first else frames, model_output.shape[1]", "0, model_output.shape[1]"),
    "noise of another draw": ("shape, seed, offset, ", "shape, seed, offset + 1, "),
    "sign of the target": ("value=-1", "value=1"),
    "sigma_data forgotten": ("torch.full_like(s, sigma_data)", "torch.ones_like(s)"),
    "scale of the data": ("s / total / sigma_data", "s / total"),
    "scale of the noise": ("(sigma_data / total)", "(s / total)"),
    "sum instead of mean": ("mean(dim=3)", "sum(dim=3)"),
    "gradient without its two": ("(2 / n)", "(1 / n)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault, seed_fault):
    seed_fault(ops, *FAULTS[fault])
    with pytest.raises(AssertionError):
        compare(*make(), impls=("composed",))
