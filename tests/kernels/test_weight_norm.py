"""Weight normalisation of a whole model in one pass, forced and in use, against normalize_weight of each."""

from __future__ import annotations

import math

import pytest
import torch

from sae_kernels import _extension, normalize_weight, normalize_weights, normalize_weights_
from sae_kernels.testing import assert_within_budget
from sae_kernels.weight_norm import ops

LOW = [torch.float32, torch.bfloat16, torch.float16]
WEIGHT_SHAPES = [(8, 4, 3, 3, 3), (5, 7), (1, 1), (3, 2000, 3, 3), (300, 513)]
FORCED = ("composed",) if _extension.library("cpu") else ("composed", "cpp")


def weights_of(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    weights = [3 * torch.randn(shape, generator=generator) + 0.2 for shape in WEIGHT_SHAPES]
    weights[0][3] = 0
    weights[1][2] = 1e-6
    return [w.to(dtype) for w in weights]


@pytest.mark.parametrize("impl", FORCED)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_forced_normalisation_is_normalize_weight_twice(impl, dtype):
    """The master is w over its RMS; the copy is what normalize_weight then makes of it."""
    gains = [0.5, 1.0, 2.0, 1.0, -3.0]
    weights, want64, eager = weights_of(), weights_of(torch.float64), weights_of()
    versions = [w._version for w in weights]
    copies = [torch.full_like(w, math.nan, dtype=dtype) for w in weights]
    normalize_weights_(weights, copies=copies, gains=gains, impl=impl)
    for w, copy, gold, plain, gain, version in zip(weights, copies, want64, eager, gains, versions, strict=True):
        gold, plain = (normalize_weight(x, math.sqrt(x[0].numel()), impl="reference") for x in (gold, plain))
        assert_within_budget(w, gold, plain, "master")
        gold, plain = (normalize_weight(x, gain, impl="reference") for x in (gold, plain))
        assert_within_budget(copy, gold.to(torch.float64), plain.to(dtype), "copy")
        assert w._version > version
    alone = weights_of()
    normalize_weights_(alone, impl=impl)
    assert all(torch.equal(a, w) for a, w in zip(alone, weights, strict=True))
    for a in alone:
        normalize_weights_([a], impl=impl)


def test_forced_normalisation_of_other_dtypes_strides_and_parameters():
    weights = [
        *weights_of(torch.bfloat16),
        *weights_of(torch.float64),
        weights_of()[3].contiguous(memory_format=torch.channels_last),
    ]
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    normalize_weights_(parameters)
    for p, w in zip(parameters, weights, strict=True):
        assert p.grad_fn is None and p.stride() == w.stride()
        assert_within_budget(
            p.detach(),
            normalize_weight(w.double(), math.sqrt(w[0].numel()), impl="reference"),
            normalize_weight(w, math.sqrt(w[0].numel()), impl="reference"),
            "master",
        )
    normalize_weights_([])
    normalize_weights_([torch.empty(0, 3)])


@pytest.mark.parametrize("impl", FORCED)
def test_a_tied_weight_is_normalised_once(impl):
    """Whatever its place in the list; each copy is made of the new weight."""
    want, alone = weights_of(), weights_of()
    normalize_weights_(want, impl=impl)
    weights = [alone[0], alone[3], alone[3].view_as(alone[3]), *alone[1:], alone[0]]
    normalize_weights_(weights, impl=impl)
    assert all(torch.equal(w, x) for w, x in zip(alone, want, strict=True))

    alone = weights_of()
    weights, gains = [alone[3], alone[1], alone[3], alone[3]], [2.0, 1.0, 2.0, -3.0]
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in weights]
    copies[2] = copies[0]
    normalize_weights_(weights, copies=copies, gains=gains, impl=impl)
    assert torch.equal(alone[3], want[3]) and torch.equal(alone[1], want[1])
    for copy, w, gain in zip(copies, weights, gains, strict=True):
        assert torch.equal(copy, normalize_weights([w], [gain], dtype=torch.bfloat16, impl=impl)[0])


@pytest.mark.parametrize("impl", FORCED)
def test_forced_normalisation_refuses_tensors_that_share_memory(impl):
    """One thread would read what another writes."""
    w, flat = torch.ones(4, 6), torch.ones(60)
    overlap = [flat[:24].view(4, 6), torch.ones(2, 2), flat[20:44].view(4, 6)]
    for weights, copies, message in (
        (overlap, None, r"weights\[0\], weights\[2\]: must not share memory"),
        ([w, w.view(6, 4)], None, r"weights\[0\], weights\[1\]: must not share memory"),
        ([w], [w], r"weights\[0\], copies\[0\]: must not share memory"),
        ([w, w.clone()], [torch.empty(4, 6)] * 2, r"copies\[0\], copies\[1\]: must not share memory"),
    ):
        before = [x.clone() for x in weights]
        with pytest.raises(ValueError, match=message):
            normalize_weights_(weights, copies=copies, impl=impl)
        assert all(torch.equal(x, b) for x, b in zip(weights, before, strict=True))
    twice = torch.empty(4, 6)
    with pytest.raises(ValueError, match=r"copies\[0\], copies\[1\]: must not share memory"):
        normalize_weights_([w, w], copies=[twice, twice], gains=[1.0, 2.0], impl=impl)


def test_forced_normalisation_of_views_of_one_tensor():
    """Parts of a fused weight, even interleaved ones, share no memory; a tensor that is expanded does."""
    fused = weights_of()[4]
    parts = [fused[:100], fused[100:, :200], fused[100:, 200::2], fused[100:, 201::2]]
    before = [part.clone() for part in parts]
    normalize_weights_(parts, impl="composed")
    for part, w in zip(parts, before, strict=True):
        gold, eager = (normalize_weight(x, math.sqrt(x[0].numel()), impl="reference") for x in (w.double(), w))
        assert_within_budget(part, gold, eager, "part")
    with pytest.raises(ValueError, match=r"weights\[1\]: must not overlap itself, got strides \(0, 1\) of \(4, 7\)"):
        normalize_weights_([torch.ones(2, 2), torch.ones(7).expand(4, 7)])


@pytest.mark.gpu
def test_forced_normalisation_on_the_gpu_agrees():
    cpu, gpu = weights_of(), [w.cuda() for w in weights_of()]
    copies = [torch.empty_like(w, dtype=torch.bfloat16) for w in gpu]
    normalize_weights_(cpu, impl="composed")
    normalize_weights_(gpu, copies=copies, impl="cuda")
    for c, g, copy in zip(cpu, gpu, copies, strict=True):
        torch.testing.assert_close(g.cpu(), c)
        torch.testing.assert_close(copy.cpu(), normalize_weight(c).bfloat16())
    for dtype in LOW:

        def run(device, impl, dtype=dtype):
            weights = [w.to(device) for w in weights_of()]
            outs, grads = normalized_and_gradients(
                weights, [1.0] * 5, dtype, lambda w, gains: normalize_weights(w, gains, dtype=dtype, impl=impl)
            )
            return [*outs, *grads]

        for c, g in zip(run("cpu", "composed"), run("cuda", "cuda"), strict=True):
            torch.testing.assert_close(g.cpu(), c, rtol=1e-4, atol=1e-5)


def normalized_and_gradients(weights, gains, dtype, normalize):
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    outs = normalize(parameters, gains)
    upstream = [g.to(o) for g, o in zip(upstream_of(weights, dtype), outs, strict=True)]
    return [o.detach() for o in outs], torch.autograd.grad(outs, parameters, upstream)


@pytest.mark.parametrize("impl", FORCED)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("offset", [0.2, 2.0])  # 2.0: weights whose gradient has a large part along them
def test_weights_of_a_model_in_one_pass(impl, dtype, offset):
    """Results and gradients are those of normalize_weight for each."""
    gains = [0.5, 1.0, 2.0, 1.0, -3.0]
    weights = [w + offset * (w != 0) for w in weights_of()]
    got = normalized_and_gradients(weights, gains, dtype, lambda w, g: normalize_weights(w, g, dtype=dtype, impl=impl))

    def one_by_one(weights, gains):
        return [normalize_weight(w, g, impl="reference") for w, g in zip(weights, gains, strict=True)]

    gold = normalized_and_gradients([w.double() for w in weights], gains, dtype, one_by_one)
    eager = normalized_and_gradients(weights, gains, dtype, lambda w, g: [x.to(dtype) for x in one_by_one(w, g)])
    for name, *results in zip(("weight", "gradient"), got, gold, eager, strict=True):
        for i, (actual, exact, plain) in enumerate(zip(*results, strict=True)):
            assert actual.dtype == plain.dtype and actual.is_contiguous()
            if name == "gradient" and i == 2:
                # One input: w / |w| does not depend on w, so two terms of this size cancel but for eps.
                terms = abs(gains[2] * upstream_of(weights, dtype)[2].double() / weights[2].double())
                assert (actual - exact).abs() <= 4 * torch.finfo(torch.float32).eps * terms
            elif not (name == "gradient" and i == 0):
                assert_within_budget(actual, exact, plain, f"{name} {i}")
    # Output channel 3 of weight 0 is zero: its gradient is that of w / eps.
    actual, plain = got[1][0], eager[1][0]
    rows = [0, 1, 2, 4, 5, 6, 7]
    assert_within_budget(actual[rows], gold[1][0][rows], plain[rows], "gradient 0")
    torch.testing.assert_close(actual[3], 0.5 / math.sqrt(108) / 1e-4 * upstream_of(weights, dtype)[0][3].float())


def upstream_of(weights, dtype):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(w.shape, generator=generator).to(dtype) for w in weights]


@pytest.mark.parametrize("impl", FORCED)
def test_weights_in_one_pass_whatever_is_used_and_how(impl):
    weights = [torch.nn.Parameter(w) for w in weights_of()]
    outs = normalize_weights(weights, impl=impl)
    (outs[1].sum() + outs[4].T.contiguous().square().sum()).backward()
    assert [w.grad is None for w in weights] == [True, False, True, True, False]
    alone = [torch.nn.Parameter(w.detach().clone()) for w in (weights[1], weights[4])]
    (normalize_weight(alone[0]).sum() + normalize_weight(alone[1]).square().sum()).backward()
    for a, b in zip(alone, (weights[1], weights[4]), strict=True):
        torch.testing.assert_close(b.grad, a.grad)
    frozen = [w.requires_grad_(i == 2) for i, w in enumerate(weights)]
    for w in frozen:
        w.grad = None
    sum(o.square().mean() for o in normalize_weights(frozen, impl=impl)).backward()
    assert [w.grad is None for w in frozen] == [True, True, False, True, True]
    mixed = [*weights_of(torch.float64), weights_of()[3].contiguous(memory_format=torch.channels_last)]
    for w, out in zip(mixed, normalize_weights(mixed), strict=True):
        torch.testing.assert_close(out, normalize_weight(w, impl="reference"))
    assert normalize_weights([]) == []


@pytest.mark.parametrize("impl", FORCED)
def test_weights_in_one_pass_opcheck_compile_and_errors(impl):
    weights = [torch.nn.Parameter(w) for w in weights_of()[:2]]
    torch.library.opcheck(ops.normalize_weights, (weights, [1.0, 2.0], torch.bfloat16, impl))
    plain = [w.detach() for w in weights]
    torch.library.opcheck(ops.normalize_weights_bwd, (plain, plain, [1.0, 2.0], impl))

    def loss(weights):
        return sum(w.square().sum() * i for i, w in enumerate(normalize_weights(weights, [0.5, 2.0], impl=impl)))

    want = torch.autograd.grad(loss(weights), weights)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(weights), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for arguments, error, message in (
        (([torch.ones(3)],), ValueError, "weights: must have shape"),
        (([torch.ones(3, 2, dtype=torch.int32)],), TypeError, "weights: dtype"),
        ((plain, [1.0]), ValueError, "gains: must be as many as weights = 2, got 1"),
    ):
        with pytest.raises(error, match=message):
            normalize_weights(*arguments, impl=impl)
    with pytest.raises(TypeError, match="dtype: must be float32"):
        normalize_weights(plain, dtype=torch.int8)
    with pytest.raises(ValueError, match="cannot run 'cpp' on cpu: it"):
        normalize_weights([plain[0].bfloat16()], impl="cpp")


@pytest.mark.skipif(_extension.library("cpu") is not None, reason=str(_extension.library("cpu")))
def test_extension_checks_what_it_is_given():
    native = torch.ops.sae_kernels_native
    w, grad_w = torch.ones(3, 4), torch.empty(3, 4)
    native.normalize_weights_bwd([w], [w], [grad_w], [1.0], 1e-4)
    for arguments, message in (
        (([], [w], [grad_w], [1.0]), "must be as many as weights = 1"),
        (([w.T], [w], [grad_w], [1.0]), "grads: must be contiguous"),
        (([w[:2]], [w], [grad_w], [1.0]), r"must have the shapes of the weights, got \(2, 4\)"),
        (([w], [w], [grad_w.bfloat16()], [1.0]), "dtype must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.normalize_weights_bwd(*arguments, 1e-4)
    with pytest.raises(RuntimeError, match="copies: must be as many as weights = 1, got 0"):
        native.normalize_weights([w], [], [], 1e-4, False)


@pytest.mark.parametrize("impl", FORCED)
def test_forced_normalisation_opcheck_and_errors(impl):
    w = weights_of()[:2]
    torch.library.opcheck(ops.normalize_weights_, (w, [torch.empty_like(x) for x in w], [1.0, 2.0], impl))
    for arguments, error, message in (
        (([torch.ones(3)],), ValueError, "weights: must have shape"),
        (([torch.ones(3, 2, dtype=torch.int32)],), TypeError, "weights: dtype"),
        ((["a"],), TypeError, "weights: must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            normalize_weights_(*arguments, impl=impl)
    with pytest.raises(ValueError, match="copies: must have the shapes"):
        normalize_weights_(w, copies=w[:1], impl=impl)
    with pytest.raises(ValueError, match="gains: must be as many as copies = 2, got 1"):
        normalize_weights_(w, copies=[x.clone() for x in w], gains=[1.0], impl=impl)
    with pytest.raises(ValueError, match="cannot run 'cpp' on cpu: it"):
        normalize_weights_([w[0].bfloat16()], impl="cpp")
