"""Derivatives of derivatives: right, or an error that names the op. Never zeros, never none, never someone else's error."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import sae_kernels
from sae_kernels import FrameLayout, _extension, _library
from sae_kernels.__main__ import OPS

LAYOUT = FrameLayout(2, 3)
DTYPE = torch.float64


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def squares(results) -> torch.Tensor:
    """A scalar whose gradient depends on the results, so that even linear ops have a second derivative to refuse."""
    results = [results] if isinstance(results, torch.Tensor) else results
    return sum(r.square().sum() for r in results if r.requires_grad)


# Registered op: (public name, call, arguments).
CASES = {
    "token_noise_fwd": (
        "token_noise",
        lambda x, s, n, **impl: sae_kernels.token_noise(x, s, n, LAYOUT, seed=1, **impl),
        lambda: (tensor(2, 2, 5), tensor(2, 4), tensor(1, 4, 5)),
    ),
    "edm_loss_fwd": (
        "edm_loss",
        lambda raw, **impl: sae_kernels.edm_loss(
            raw, torch.ones(2, 2, 5, dtype=DTYPE), torch.ones(2, 2, dtype=DTYPE), LAYOUT, seed=1, **impl
        ),
        lambda: (tensor(2, 2, 5),),
    ),
    "frame_attention_fwd": (
        "frame_attention",
        lambda q, k, v, **impl: sae_kernels.frame_attention(q, k, v, LAYOUT, **impl),
        lambda: (tensor(1, 2, 12, 4), tensor(1, 1, 12, 4), tensor(1, 1, 12, 4)),
    ),
    "causal_conv3d_fwd": (
        "causal_conv3d",
        lambda x, w, p, s, h, **impl: sae_kernels.causal_conv3d(
            x, w, LAYOUT, past_scale=p, last_scale=s, history=h, **impl
        ),
        lambda: (tensor(1, 2, 4, 3, 3), tensor(2, 2, 2, 3, 3), tensor(1, 4), tensor(1, 4), tensor(1, 2, 1, 3, 3)),
    ),
    "causal_conv3d_past_fwd": (
        "past_term",
        lambda h, w, **impl: sae_kernels.past_term(h, w, **impl),
        lambda: (tensor(1, 2, 1, 3, 3), tensor(2, 2, 2, 3, 3)),
    ),
    "qk_prepare_fwd": (
        "qk_prepare",
        lambda q, k, **impl: sae_kernels.qk_prepare(q, k, None, LAYOUT, **impl),
        lambda: (tensor(1, 2, 12, 4), tensor(1, 1, 12, 4)),
    ),
    "mp_silu": ("mp_silu", lambda x, **impl: sae_kernels.mp_silu(x, **impl), lambda: (tensor(2, 3),)),
    "modulated_silu": (
        "modulated_silu",
        lambda x, s, **impl: sae_kernels.modulated_silu(x, s, **impl),
        lambda: (tensor(2, 3, 2, 2), tensor(2, 2, 3)),
    ),
    "mp_sum": (
        "mp_sum",
        lambda a, b, **impl: sae_kernels.mp_sum(a, b, 0.3, limit=1.5, **impl),
        lambda: (tensor(2, 3), tensor(2, 3)),
    ),
    "mp_sum_tensor": (
        "mp_sum",
        lambda a, b, t, **impl: sae_kernels.mp_sum(a, b, t, **impl),
        lambda: (tensor(2, 3), tensor(2, 3), tensor(2, 1)),
    ),
    "mp_cat": ("mp_cat", lambda a, b, **impl: sae_kernels.mp_cat(a, b, **impl), lambda: (tensor(2, 3), tensor(2, 4))),
    "pixel_norm": ("pixel_norm", lambda x, **impl: sae_kernels.pixel_norm(x, **impl), lambda: (tensor(2, 3),)),
    "pixel_norm_silu": (
        "pixel_norm_silu",
        lambda x, **impl: sae_kernels.pixel_norm_silu(x, **impl),
        lambda: (tensor(2, 3),),
    ),
    "normalize_weight": (
        "normalize_weight",
        lambda w, g, **impl: sae_kernels.normalize_weight(w, g, **impl),
        lambda: (tensor(2, 3), tensor(1)),
    ),
    "normalize_weights": (
        "normalize_weights",
        lambda v, w, **impl: sae_kernels.normalize_weights([v, w], **impl),
        lambda: (tensor(2, 3), tensor(3, 2)),
    ),
}
TWICE = {"token_noise_fwd", "token_noise_bwd"}
# Functions without a gradient: they make random numbers, or write in place without one.
WITHOUT = {"token_noise_eps", "normalize_weights_"}


def test_every_registered_op_is_here():
    """A new op with a gradient needs a case above, and its backward the suffix by which it is known."""
    registered = {op._schema.name.split("::")[1] for op in _library.implementations}
    forward = {name for name in registered - WITHOUT if not name.endswith("_bwd")}
    assert forward == set(CASES)
    assert set(_library.differentiable) == forward | TWICE
    assert {name.removesuffix("_fwd") + "_bwd" for name in forward} == registered - forward - WITHOUT
    assert {_library.differentiable[name] for name in forward} == {name for name, _, _ in CASES.values()}
    assert len(OPS) == len({_library.implementations[op].__module__ for op in _library.implementations})


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("case", [name for name in CASES if name not in TWICE])
def test_second_derivative_is_refused_by_name(case):
    name, call, arguments = CASES[case]
    inputs = arguments()
    plain = torch.autograd.grad(squares(call(*inputs)), inputs)
    grads = torch.autograd.grad(squares(call(*inputs)), inputs, create_graph=True)
    assert all(torch.equal(g, p) for g, p in zip(grads, plain, strict=True))
    for grad, x in zip(grads, inputs, strict=True):
        with pytest.raises(RuntimeError, match=f'^{name} is differentiable only once; use impl="reference"'):
            torch.autograd.grad(grad.sum(), x, retain_graph=True, allow_unused=True)
    # The gradient arrives as any other where nobody differentiates it.
    for x in inputs:
        x.grad = None
    squares(call(*inputs)).backward(create_graph=True)
    for x, p in zip(inputs, plain, strict=True):
        assert torch.equal(x.grad, p)
        with torch.no_grad():
            x.grad.mul_(2)
        x.grad = None


@pytest.mark.parametrize("case", CASES)
def test_second_derivative_of_the_reference_is_right(case):
    _, call, arguments = CASES[case]
    inputs = arguments()
    assert torch.autograd.gradgradcheck(lambda *inputs: call(*inputs, impl="reference"), inputs)


@pytest.mark.parametrize("impl", ["composed"] if _extension.library("cpu") else ["composed", "cpp"])
@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, True), (False, False, True)]
)
@pytest.mark.parametrize("shapes", [((2, 4), (2, 4)), ((1, 4, 5), (2, 1, 1)), ((2, 4, 5), ())], ids=str)
def test_token_noise_is_differentiable_any_number_of_times(impl, wanted, shapes):
    inputs = [tensor(2, 2, 5), *(tensor(*shape) for shape in shapes)]
    inputs = [x.detach().requires_grad_(needed) for x, needed in zip(inputs, wanted, strict=True)]
    leaves = [x for x in inputs if x.requires_grad]

    def run(*inputs):
        return sae_kernels.token_noise(*inputs, LAYOUT, seed=3, offset=1, impl=impl)

    eps = sae_kernels.token_noise_eps((2, 4, 5), seed=3, offset=1, dtype=DTYPE, impl=impl)

    def plain(x, *scales):
        signal, noise = (s.reshape(s.shape + (1,) * (3 - s.ndim)) for s in scales)
        return signal * torch.cat([x, x], dim=1) + noise * eps

    def third(function):
        found = function(*inputs).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(found, leaves, create_graph=True, allow_unused=True)
            found = sum(g.pow(2).sum() for g in grads if g is not None)
        return found

    assert torch.autograd.gradgradcheck(run, inputs)
    torch.testing.assert_close(third(run), third(plain))


@pytest.mark.parametrize("case", CASES)
def test_forward_mode_is_refused_by_name(case):
    """PyTorch would hand on a result without its tangent: a derivative of zero."""
    name, call, arguments = CASES[case]
    inputs = [x.detach() for x in arguments()]
    message = f'^{name} has no forward-mode derivative; use impl="reference"$'
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(call, tuple(inputs), tuple(torch.ones_like(x) for x in inputs))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        with pytest.raises(RuntimeError, match=message):
            call(*duals)
        call(*inputs)
        results = call(*duals, impl="reference")
        results = [results] if isinstance(results, torch.Tensor) else results
        assert all(forward_ad.unpack_dual(r).tangent.abs().max() > 0 for r in results)
