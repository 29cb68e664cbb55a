"""token_noise: the generator against published words and plain integers, its statistics, and every gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sae_kernels import FrameLayout, _extension, _launch, token_noise, token_noise_eps
from sae_kernels.testing import assert_within_budget, noncontiguous
from sae_kernels.token_noise import composed, ops, reference

WHY_NOT = _extension.library("cpu")
FP64_IMPLS = ("composed",) if WHY_NOT else ("composed", "cpp")
IMPLS = FP64_IMPLS if _launch.why_not(torch.device("cpu")) else (*FP64_IMPLS, "triton")
needs_extension = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
NAMES = ("out", "dx", "dsignal", "dnoise")
WORD = 0xFFFFFFFF
WORD_64 = [-(2**63), -(2**32) - 1, -1, 0, 1, 2**32, 2**63 - 1]

# Random123, kat_vectors, philox4x32 with 10 rounds: (counter, key, words).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_words(counter, key):
    """Philox4x32-10 in Python integers, written from the paper's S-box form: (L, R) -> (mullo, mulhi ^ key ^ other)."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for round_ in range(10):
        high = [(0xD2511F53 * left[0]) // 2**32, (0xCD9E8D57 * left[1]) // 2**32]
        low = [(0xD2511F53 * left[0]) % 2**32, (0xCD9E8D57 * left[1]) % 2**32]
        keys = [(key[0] + round_ * 0x9E3779B9) % 2**32, (key[1] + round_ * 0xBB67AE85) % 2**32]
        left, right = [high[1] ^ right[0] ^ keys[0], high[0] ^ right[1] ^ keys[1]], [low[1], low[0]]
    return left[0], right[0], left[1], right[1]


def normals_of(elements, seed, offset):
    """The contract's numbers in double precision from integers; u is rounded to fp32 as the contract says."""
    values = []
    for e in elements:
        g = e // 4
        counter = (g % 2**32, g // 2**32, offset % 2**32, offset % 2**64 // 2**32)
        w = philox_words(counter, (seed % 2**32, seed % 2**64 // 2**32))
        u = ((torch.tensor(w, dtype=torch.float32) + 0.5) * 2.0**-32).double().tolist()
        pair = e % 4 // 2 * 2
        turn = math.cos if e % 2 == 0 else math.sin
        values.append(math.sqrt(-2 * math.log(u[pair])) * turn(2 * math.pi * u[pair + 1]))
    return torch.tensor(values, dtype=torch.float64)


def make(B=2, T=3, K=1, rest=(4, 5), *, per="frame", dtype=torch.float32, noisy_first=False, seed=0):
    """(x, signal_scale, noise_scale, upstream gradient), layout."""
    generator = torch.Generator().manual_seed(seed)
    layout = FrameLayout(T, 1, noisy_copies=K, noisy_first=noisy_first)
    F = layout.total_frames
    scale = {
        "frame": (B, F),
        "frame of any clip": (1, F),
        "clip": (B, 1),
        "all": (),
        "first": (B, F, *rest[:1], *(1,) * len(rest[1:])),
        "last": (B, F, *(1,) * len(rest[:-1]), *rest[-1:]),
        "channel": (1, 1, *rest[:1], *(1,) * len(rest[1:])),
        "element": (B, F, *rest),
    }[per]
    shapes = ((B, T, *rest), scale, scale, (B, F, *rest))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes], layout


def run(tensors, layout, dtype, **options):
    *inputs, grad = tensors
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = token_noise(*inputs, layout, **options)
    return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]


def compare(tensors, layout, *, impls=FP64_IMPLS, **options):
    options = {"seed": 11, "offset": 5} | options
    dtype = tensors[0].dtype
    gold = run(tensors, layout, torch.float64, **options, impl="reference")
    eager = run(tensors, layout, dtype, **options, impl="reference")
    for impl in impls:
        actual = run(tensors, layout, dtype, **options, impl=impl)
        for name, *results in zip(NAMES, actual, gold, eager, strict=True):
            assert_within_budget(*results, f"{name} by {impl} of {layout}")


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_words_are_the_published_ones(counter, key, words):
    tensors = [torch.full((3,), c, dtype=torch.int64) for c in counter]
    assert philox_words(counter, key) == words
    assert all(w.tolist() == [want] * 3 for w, want in zip(reference.philox(tensors, key), words, strict=True))
    got = composed.philox(*[t.clone() for t in tensors], *key)
    assert all(w.tolist() == [want] * 3 for w, want in zip(got, words, strict=True))


def test_words_against_plain_integers():
    generator = torch.Generator().manual_seed(3)
    counters = torch.randint(0, 2**32, (4, 200), generator=generator)
    for key in ((1, 2), (WORD, 0), (0x80000000, 0x7FFFFFFF)):
        want = torch.tensor([philox_words(c, key) for c in counters.T.tolist()]).T
        assert torch.equal(torch.stack(reference.philox(list(counters), key)), want)
        assert torch.equal(torch.stack(composed.philox(*counters.clone(), *key)), want)


@pytest.mark.parametrize("seed", WORD_64)
@pytest.mark.parametrize("offset", WORD_64)
def test_normals_against_plain_integers(seed, offset):
    want = normals_of(range(21), seed, offset)
    for impl in ("reference", *IMPLS):
        got = token_noise_eps((3, 7), seed=seed, offset=offset, impl=impl).double().flatten()
        # The angle 2 pi u is rounded to fp32: half an ulp of at most 2 pi, times a radius of at most 6.8.
        torch.testing.assert_close(got, want, rtol=1e-6, atol=6.8 * 2**-22)


@pytest.mark.parametrize("start", [4 * 2**32 - 6, 4 * 2**32 + 1, 2**61 + 3])
def test_counters_beyond_32_bits(start):
    """Element indices past 2^34 reach the second counter word."""
    got = composed.normals(start, 13, 7, 9, torch.device("cpu")).double()
    torch.testing.assert_close(got, normals_of(range(start, start + 13), 7, 9), rtol=1e-6, atol=6.8 * 2**-22)


def test_extreme_words_give_finite_normals():
    """u never reaches 0; it may round to 1, where the radius is exactly 0."""
    u = (torch.tensor([0, WORD]).float() + 0.5) * 2.0**-32
    assert u[0] > 0 and u[1] == 1
    radius = (-2 * u.log()).sqrt()
    assert radius[1] == 0 and 6.7 < radius[0] < 6.8


@pytest.fixture(scope="module")
def million():
    return token_noise_eps((1_000_003,), seed=2024, offset=1).double().numpy()


def test_moments_and_distribution(million):
    n = len(million)
    # Standard errors of the moments of n normal draws; five of them.
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        assert abs((million**power).mean() - want) < 5 * math.sqrt(variance / n), power
    assert stats.kstest(million, "norm").pvalue > 1e-3
    # Each of the four numbers of a group has its own formula.
    for lane in range(4):
        assert stats.kstest(million[lane::4], "norm").pvalue > 1e-3, lane


def test_neighbours_and_streams_do_not_correlate(million):
    def correlation(a, b):
        return (a * b).mean() * math.sqrt(len(a))  # in standard errors

    for lag in (1, 2, 3, 4, 5, 8, 1024):
        assert abs(correlation(million[:-lag], million[lag:])) < 5, lag
        assert abs(correlation(million[:-lag] ** 2 - 1, million[lag:] ** 2 - 1)) < 10, lag
    layout = FrameLayout(4, 1, noisy_copies=3)
    _, noise = token_noise(torch.zeros(5, 4, 2500), 1, 1, layout, seed=9, return_noise=True)
    streams = noise.unflatten(1, (4, 4)).transpose(0, 1).flatten(1).double().numpy()
    for other in (
        token_noise_eps((50_000,), seed=9, offset=1),
        token_noise_eps((50_000,), seed=10),
        token_noise_eps((50_000,), seed=9 + 2**32),
        token_noise_eps((50_000,), seed=9, offset=2**32),
    ):
        streams = [*streams, other.double().numpy()]
    for i in range(len(streams)):
        for j in range(i):
            assert abs(correlation(streams[i], streams[j])) < 5, (i, j)


STREAMS, BINS = 4, 4096


def deviations(draw, pieces):
    """How far `draw(piece)`, (STREAMS, n) normals, are from what they should be, in standard errors.

    Moments and correlations of streams and of neighbours over all pieces; and the Kolmogorov-Smirnov statistic on a
    grid of the distribution function, over its critical value at p = 1e-6, which bounds it from above.
    """
    count, powers, histogram = 0, torch.zeros(6, dtype=torch.float64), torch.zeros(BINS, dtype=torch.float64)
    products, lags = torch.zeros(STREAMS, STREAMS, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for piece in range(pieces):
        x = draw(piece)
        u = torch.special.ndtr(x).mul_(BINS).clamp_(max=BINS - 0.5)
        histogram += torch.bincount(u.flatten().int(), minlength=BINS)
        square = x * x
        for i, power in enumerate((x, square, square * x, square * square)):
            powers[i] += power.sum(dtype=torch.float64)
        powers[5] += (square * square * square).sum(dtype=torch.float64)
        for i in range(STREAMS):
            for j in range(i):
                products[i, j] += (x[i] * x[j]).sum(dtype=torch.float64)
        for i, lag in enumerate((1, 2, 3, 4)):
            lags[i] += (x[:, lag:] * x[:, :-lag]).sum(dtype=torch.float64)
        count += x.numel()
    found = {}
    for power, want, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10395 - 225)):
        found[f"moment {power}"] = (powers[power - 1] / count - want).abs() / math.sqrt(variance / count)
    distance = (histogram.cumsum(0) / count - torch.arange(1, BINS + 1) / BINS).abs().max()
    found["distribution"] = 5 * distance * math.sqrt(count) / stats.kstwobign.isf(1e-6)
    found["streams"] = products.abs().max() / math.sqrt(count / STREAMS)
    found["neighbours"] = lags.abs().max() / math.sqrt(count)
    return {name: float(value) for name, value in found.items()}


def streams_of(piece):
    layout = FrameLayout(1, 1, noisy_copies=STREAMS - 1)
    _, noise = token_noise(
        torch.zeros(1, 1, 250_000), 1, 1, layout, seed=-(2**63) + 77, offset=piece, return_noise=True
    )
    return noise[0]


def test_statistics_of_a_hundred_million_draws():
    """A tenth of them where only the slow routes are; the extension takes four seconds."""
    found = deviations(streams_of, 10 if _extension.library("cpu") else 100)
    assert max(found.values()) < 5, found


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (lambda x: x * 1.003, "moment 2"),
        (lambda x: x + 0.005, "moment 1"),
        (lambda x: x.where(x.abs() < 3.8, 0.0), "moment 6"),
        (lambda x: x + 0.004 * x.square(), "distribution"),
        (lambda x: torch.cat([x[:3], 0.01 * x[:1] + x[3:]]), "streams"),
        (lambda x: x + 0.01 * x.roll(3, 1), "neighbours"),
    ],
)
def test_statistics_see_faults(fault, name):
    assert deviations(lambda piece: fault(torch.randn(STREAMS, 10**6 // 2)), 1)[name] > 3
    assert deviations(lambda piece: torch.randn(STREAMS, 10**6 // 2), 1)[name] < 5


def test_seed_and_offset_change_everything():
    seeds = torch.stack([token_noise_eps((4000,), seed=s) for s in WORD_64])
    offsets = torch.stack([token_noise_eps((4000,), seed=1, offset=o) for o in WORD_64])
    for draws in (seeds, offsets):
        same = (draws[:, None] == draws[None]).float().mean(dim=-1)
        assert (same - torch.eye(len(WORD_64))).max() < 2e-3


@pytest.mark.parametrize("piece", [4, 13, 64, 1 << 20])
def test_result_does_not_depend_on_the_piece(piece, monkeypatch):
    tensors, layout = make(3, 5, 2, (3, 7), per="first")
    want = run(tensors, layout, torch.float64, seed=1, impl="reference")
    monkeypatch.setattr(composed, "PIECE", piece)
    got = run(tensors, layout, torch.float64, seed=1, impl="composed")
    for name, g, w in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6, msg=name)
    eps = token_noise_eps((5, 9, 11), seed=1)
    monkeypatch.undo()
    assert torch.equal(eps, token_noise_eps((5, 9, 11), seed=1))


def test_pieces_cover_a_tensor_once_in_order():
    for shape in ((1,), (7,), (2, 3, 4), (3, 1, 5, 2), (1, 1, 9), (4, 2, 3, 3, 2)):
        index = torch.arange(math.prod(shape)).view(shape)
        for limit in (1, 2, 5, 6, 16, 1000):
            seen = []
            for first, start, size in composed.pieces(shape, limit):
                box = composed.take(index, start, size).flatten()
                assert box[0] == first and len(box) <= max(limit, 1)
                seen.append(box)
            assert torch.equal(torch.cat(seen), index.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per", ["frame", "frame of any clip", "clip", "all", "first", "last", "channel", "element"])
@pytest.mark.parametrize(("K", "noisy_first"), [(0, False), (1, False), (1, True), (3, True), (3, False)])
def test_composed_is_the_reference(per, K, noisy_first, dtype):
    tensors, layout = make(2, 3, K, (4, 5, 3), per=per, dtype=dtype, noisy_first=noisy_first)
    compare(tensors, layout)


@pytest.mark.skipif("triton" not in IMPLS, reason=str(_launch.why_not(torch.device("cpu"))))
@pytest.mark.parametrize(
    ("per", "K", "rest", "dtype"),
    [
        ("frame", 1, (4, 6), torch.float32),
        ("frame of any clip", 0, (7,), torch.float32),
        ("clip", 2, (3, 5), torch.bfloat16),
        ("all", 1, (2051,), torch.float16),
        ("first", 1, (4, 5, 3), torch.float32),
        ("channel", 3, (4, 5), torch.bfloat16),
        ("last", 1, (4, 16), torch.float16),
        ("element", 2, (1030,), torch.float32),
        ("frame", 1, (), torch.float32),
    ],
)
def test_triton_is_the_reference(per, K, rest, dtype):
    tensors, layout = make(2, 3, K, rest, per=per, dtype=dtype, noisy_first=K == 2)
    compare(tensors, layout, impls=("triton",), seed=-7, offset=2**40 + 1)


@given(
    B=st.integers(1, 3),
    T=st.integers(1, 5),
    K=st.integers(0, 3),
    rest=st.sampled_from([(), (1,), (7,), (4, 6), (2, 3, 5)]),
    per=st.sampled_from(["frame", "frame of any clip", "clip", "all"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(-(2**63), 2**63 - 1),
    offset=st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(B, T, K, rest, per, dtype, seed, offset):
    tensors, layout = make(B, T, K, rest, per=per, dtype=dtype)
    compare(tensors, layout, seed=seed, offset=offset)


def test_gradients_are_those_of_finite_differences():
    tensors, layout = make(1, 2, 2, (3,))
    inputs = [x.double().requires_grad_() for x in tensors[:3]]
    for impl in ("reference", *FP64_IMPLS):
        assert torch.autograd.gradcheck(lambda *a: token_noise(*a, layout, seed=3, impl=impl), inputs)  # noqa: B023


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_by_hand(impl):
    """Every element from the formula, frame by frame, with streams in the order of the layout."""
    for noisy_first in (False, True):
        (x, signal, noise, _), layout = make(2, 3, 2, (5,), noisy_first=noisy_first)
        out, eps = token_noise(x, signal, noise, layout, seed=-4, offset=2, return_noise=True, impl=impl)
        assert torch.equal(eps, token_noise_eps((2, 9, 5), seed=-4, offset=2, impl=impl))
        assert not eps.requires_grad
        for b in range(2):
            for f in range(9):
                want = signal[b, f] * x[b, f % 3] + noise[b, f] * eps[b, f]
                torch.testing.assert_close(out[b, f], want)
        # A clean stream without noise is the data, wherever it lies.
        noise = noise.clone()
        layout.split(noise, 1)[0].zero_()
        clean, noisy = layout.split(token_noise(x, 1, noise, layout, seed=1, impl=impl), 1)
        assert torch.equal(clean, x) and (noisy != torch.cat([x, x], dim=1)).all()


def test_number_scales_are_scalar_tensors():
    (x, *_), layout = make(dtype=torch.float64)
    want = token_noise(x, torch.tensor(0.3), torch.tensor(2.0), layout, seed=1)
    torch.testing.assert_close(token_noise(x, 0.3, 2, layout, seed=1), want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_strides_do_not_matter(dim, impl):
    (x, signal, noise, grad), layout = make(per="element")
    want = run([x, signal, noise, grad], layout, torch.float32, seed=1, impl=impl)
    tensors = [noncontiguous(t, dim) for t in (x, signal, noise, grad)]
    inputs = [t.requires_grad_() for t in tensors[:3]]
    out = token_noise(*inputs, layout, seed=1, impl=impl)
    assert out.is_contiguous()
    got = [out, *torch.autograd.grad(out, inputs, tensors[3])]
    for name, g, w in zip(NAMES, got, want, strict=True):
        assert torch.equal(g, w), name
    permuted = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(token_noise(permuted, signal, noise, layout, seed=1, impl=impl), want[0])


def test_expanded_data_gets_its_whole_gradient():
    layout = FrameLayout(3, 1)
    x = torch.randn(1, 3, 4, requires_grad=True)
    token_noise(x.expand(5, 3, 4), 1, 1, layout, seed=1).sum().backward()
    assert torch.equal(x.grad, torch.full((1, 3, 4), 10.0))


def test_dtypes():
    (x, signal, noise, _), layout = make(4, 4, 1, (64,))
    full = token_noise(x, signal, noise, layout, seed=1)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        out, eps = token_noise(x, signal, noise, layout, seed=1, dtype=dtype, return_noise=True)
        # Made in fp32 whatever the output, then rounded once: the noise does not depend on the dtype.
        assert out.dtype == eps.dtype == dtype
        assert torch.equal(out, full.to(dtype))
        assert torch.equal(eps, token_noise_eps(out.shape, seed=1).to(dtype))
        assert torch.equal(eps, token_noise_eps(out.shape, seed=1, dtype=dtype))
    low = token_noise(x.bfloat16(), signal, noise, layout, seed=1)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, token_noise(x.bfloat16().float(), signal, noise, layout, seed=1).bfloat16())


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_bad_values_stay_in_their_elements(impl):
    (x, signal, noise, _), layout = make(2, 3, 2, (40,))
    clean = token_noise(x, signal, noise, layout, seed=1, impl=impl)
    bad = x.clone()
    bad[0, 1, 7], bad[1, 2, 3], bad[1, 0, 0] = float("nan"), float("inf"), 1e-42
    out = token_noise(bad, signal, noise, layout, seed=1, impl=impl)
    touched = torch.zeros_like(out, dtype=torch.bool)
    for stream in range(3):
        for b, t, i in ((0, 1, 7), (1, 2, 3), (1, 0, 0)):
            touched[b, stream * 3 + t, i] = True
        assert out[0, stream * 3 + 1, 7].isnan() and out[1, stream * 3 + 2, 3].isinf()
        assert out[1, stream * 3, 0].isfinite()
    assert torch.equal(out[~touched], clean[~touched])
    tiny = torch.tensor([[[1e-40, -3e-45, 1e-38, 0.0]]])
    assert torch.equal(token_noise(tiny, 1, 0, FrameLayout(1, 1, noisy_copies=0), seed=1, impl=impl), tiny)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty(shape):
    layout = FrameLayout(3, 1)
    x = torch.randn(shape, requires_grad=True)
    scale = torch.ones(1, 6, requires_grad=True)
    out, eps = token_noise(x, scale, scale, layout, seed=1, return_noise=True)
    assert out.shape == eps.shape == (shape[0], 6, shape[2])
    out.sum().backward()
    assert x.grad.shape == shape and torch.equal(scale.grad, torch.zeros(1, 6))
    assert token_noise_eps((0, 3), seed=1).shape == (0, 3)
    assert torch.equal(token_noise_eps((), seed=1), token_noise_eps((1,), seed=1)[0])


def test_deterministic():
    tensors, layout = make(per="frame of any clip", dtype=torch.bfloat16)
    first, second = (run(tensors, layout, torch.bfloat16, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_wanted_gradients_are_made():
    (x, signal, noise, _), layout = make()
    signal.requires_grad_()
    token_noise(x, signal, noise, layout, seed=1).sum().backward()
    assert signal.grad is not None and x.grad is None and noise.grad is None


def test_temporaries_are_bounded(monkeypatch):
    """However long the clip, no tensor but data and output exceeds a piece."""
    monkeypatch.setattr(composed, "PIECE", 1 << 12)
    tensors, layout = make(1, 16, 1, (1 << 10,))
    x, signal, noise, grad = (t.unsqueeze(-1) if t.shape == (1, 32) else t for t in tensors)
    results = [torch.empty_like(t) for t in (grad, x, signal, noise)]
    known = {t.untyped_storage().data_ptr() for t in (x, signal, noise, grad, *results)}
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in known:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        composed.forward(x, signal, noise, results[0], None, layout.streams, 1, 0)
        composed.backward(grad, x, signal, *results[1:], 1, 0)
    assert largest == 4 * composed.PIECE


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("return_noise", [False, True])
def test_opcheck(return_noise, impl):
    (x, signal, noise, grad), _ = make(per="first")
    inputs = [t.requires_grad_() for t in (x, signal, noise)]
    torch.library.opcheck(ops.token_noise_fwd, (*inputs, 2, torch.bfloat16, return_noise, -3, 2**40, impl))
    with torch.no_grad():
        needs = (True, return_noise, True)
        torch.library.opcheck(ops.token_noise_bwd, (grad, x, signal, noise, *needs, -3, 2**40, impl))
        torch.library.opcheck(ops.token_noise_eps, (x.new_empty(0), (3, 5), -3, 2**40, impl))


def test_compile_fullgraph_without_recompiling():
    def step(x, scale, frames, seed, offset):
        layout = FrameLayout(frames, 1, noisy_copies=2)
        out, eps = token_noise(x, scale, scale, layout, seed=seed, offset=offset, return_noise=True)
        return out.square().sum() + (eps * token_noise_eps(out.shape, seed=seed, offset=offset)).sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for index, (B, T, C, seed, offset) in enumerate(
        ((3, 4, 7, 5, 2), (5, 6, 9, -(2**63), 77), (4, 9, 11, 2**63 - 1, 2**40))
    ):
        inputs = [torch.randn(B, T, C, requires_grad=True), torch.randn(B, 3 * T, requires_grad=True)]
        want = torch.autograd.grad(step(*inputs, T, seed, offset), inputs)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*inputs, T, seed, offset), inputs)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)


def test_autocast_changes_nothing():
    tensors, layout = make()
    want = run(tensors, layout, torch.float32, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(tensors, layout, torch.float32, seed=1)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


BAD = {
    "x: must be a tensor of shape": ({"x": None}, TypeError),
    r"x: must have shape \(B, T, ...\), got float32 tensor of shape \(3,\)": ({"x": torch.ones(3)}, ValueError),
    "x: dtype must be float32": ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError),
    "x: frames must be layout.frames = 3, got 4": ({"x": torch.ones(2, 4, 4)}, ValueError),
    "layout: must be a FrameLayout, got int 3": ({"layout": 3}, TypeError),
    r"signal_scale: must broadcast to \(B, F\) = \(2, 6\) .* got float32 tensor of shape \(2, 3\)": (
        {"signal_scale": torch.ones(2, 3)},
        ValueError,
    ),
    r"noise_scale: must broadcast .* \(2, 6, 4\), got float32 tensor of shape \(2, 6, 5\)": (
        {"noise_scale": torch.ones(2, 6, 5)},
        ValueError,
    ),
    r"noise_scale: must broadcast .* got float32 tensor of shape \(6,\)": ({"noise_scale": torch.ones(6)}, ValueError),
    "signal_scale: dtype must be float32": ({"signal_scale": torch.ones(2, 6, dtype=torch.int32)}, TypeError),
    "noise_scale: must be a number or a tensor, got str 'a'": ({"noise_scale": "a"}, TypeError),
    "noise_scale: must be on the device of x": ({"noise_scale": torch.ones(2, 6, device="meta")}, ValueError),
    "seed: must be an integer, got float 1.5": ({"seed": 1.5}, TypeError),
    r"seed: must be in \[-2\^63, 2\^63\), got 9223372036854775808": ({"seed": 2**63}, ValueError),
    r"offset: must be in \[-2\^63, 2\^63\), got -9223372036854775809": ({"offset": -(2**63) - 1}, ValueError),
    "dtype: must be float32, .*, got torch.int32": ({"dtype": torch.int32}, TypeError),
    "impl: must be one of .*, got 'magic'": ({"impl": "magic"}, ValueError),
    "impl: token_noise cannot run 'triton' on cpu: ": (
        {"impl": "triton", "x": torch.ones(2, 3, 4).double()},
        ValueError,
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_argument_rule_and_value(message):
    arguments = {
        "x": torch.ones(2, 3, 4),
        "signal_scale": 1.0,
        "noise_scale": torch.ones(2, 6),
        "layout": FrameLayout(3, 1),
        "seed": 0,
    }
    token_noise(**arguments)
    change, error = BAD[message]
    with pytest.raises(error, match=message):
        token_noise(**(arguments | change))


def test_bad_shape_of_eps():
    with pytest.raises(ValueError, match=r"shape: sizes must be >= 0, got \(3, -1\)"):
        token_noise_eps((3, -1), seed=0)
    with pytest.raises(TypeError, match=r"dtype: must be float32, .*, got torch.int64"):
        token_noise_eps((3,), seed=0, dtype=torch.int64)


@pytest.mark.parametrize("impl", [impl for impl in IMPLS if impl != "composed"])
def test_normals_are_within_four_ulp_of_the_reference(impl):
    """Relative to the number itself, also where the sine crosses zero."""
    count = 1 << 15 if impl == "triton" else 1 << 21
    for seed, offset in ((2, 1), (-(2**63), 2**63 - 1)):
        want = token_noise_eps((count,), seed=seed, offset=offset, impl="reference")
        got = token_noise_eps((count,), seed=seed, offset=offset, impl=impl)
        ulp = torch.ldexp(torch.ones_like(want), torch.frexp(want).exponent - 24)
        assert ((got - want).abs() / ulp).max() <= 4


@needs_extension
def test_extension_does_not_depend_on_threads_chunks_or_instruction_boundaries():
    """An element is the same wherever it lies: in the middle of a vector, at the end of a chunk, in another thread."""
    tensors, layout = make(2, 3, 1, (1201,), per="frame")
    want = run(tensors, layout, torch.float32, seed=3, impl="cpp")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        got = run(tensors, layout, torch.float32, seed=3, impl="cpp")
        long = token_noise_eps((300_001,), seed=3, impl="cpp")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.equal(long, token_noise_eps((300_001,), seed=3, impl="cpp"))
    for count in (1, 5, 63, 1023, 1025):
        assert torch.equal(token_noise_eps((count,), seed=3, impl="cpp"), long[:count])
    _, eps = token_noise(tensors[0], 1, 1, layout, seed=3, return_noise=True, impl="cpp")
    assert torch.equal(eps.flatten(), long[: eps.numel()])


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extension_rounds_every_kind_of_number_as_torch_does(dtype):
    """Subnormals, ties, overflow, infinities: each bit pattern of a 16-bit type goes in and out unchanged."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    layout = FrameLayout(1, 1, noisy_copies=0)
    out = token_noise(every.view(1, 1, -1), 1, 0, layout, seed=1, dtype=torch.float32, impl="cpp").flatten()
    assert torch.equal(
        out.nan_to_num(7.0, posinf=9e9, neginf=-9e9), every.float().nan_to_num(7.0, posinf=9e9, neginf=-9e9)
    )
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
    halfway = (every[every.isfinite()].float().view(torch.int32).to(torch.int64) & WORD).unsqueeze(1) + torch.tensor(
        [-1, 0, 1]
    ) * 0x1000
    values = torch.cat([bits, halfway.flatten() & WORD]).to(torch.int32).view(torch.float32)
    out = token_noise(values.view(1, 1, -1), 1, 0, layout, seed=1, dtype=dtype, impl="cpp").flatten()
    assert torch.equal(
        out.float().nan_to_num(7.0, posinf=9e9, neginf=-9e9),
        values.to(dtype).float().nan_to_num(7.0, posinf=9e9, neginf=-9e9),
    )


@needs_extension
def test_extension_ops_check_what_they_write_to():
    native = torch.ops.sae_kernels_native
    x, scale = torch.zeros(2, 3, 4), torch.zeros(2, 6, 1)
    native.token_noise_fwd(x, scale, scale, torch.empty(2, 6, 4), None, 2, 0, 0)
    for arguments, message in (
        ((x, scale, scale, torch.empty(2, 5, 4), None), r"out: dim 1 must be 6, got shape \(2, 5, 4\)"),
        ((x, scale, scale, torch.empty(2, 4, 6).transpose(1, 2), None), "out: must be contiguous"),
        ((x, scale[:, :3], scale, torch.empty(2, 6, 4), None), "signal_scale: dim 1 must be 6"),
        ((x, scale, scale[0], torch.empty(2, 6, 4), None), "noise_scale: must have the rank of x"),
        ((x.int(), scale, scale, torch.empty(2, 6, 4), None), "x: dtype must be"),
        ((x, scale, scale, torch.empty(2, 6, 4), torch.empty(2, 6, 3)), "noise: dim 2 must be 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.token_noise_fwd(*arguments, 2, 0, 0)
    torch.library.opcheck(
        native.token_noise_fwd.default, (x, scale, scale, torch.empty(2, 6, 4), torch.empty(2, 6, 4), 2, 1, 2)
    )
    torch.library.opcheck(native.token_noise_eps.default, (torch.empty(5), 1, 2))
    sums = torch.zeros(3, 2, 6, 1, dtype=torch.float64)
    torch.library.opcheck(
        native.token_noise_bwd.default, (torch.ones(2, 6, 4), x, scale, torch.empty(2, 3, 4), sums, None, 2, 1, 2)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rest", [(4, 8), (3, 5), (1 << 16,)])
@pytest.mark.parametrize("per", ["frame", "last", "channel", "element"])
def test_gpu_gives_the_numbers_of_the_cpu(per, rest, dtype):
    """Bit for bit: the same source, every fused multiply-add written out."""
    if per == "element" and len(rest) == 1:
        per = "frame of any clip"
    tensors, layout = make(2, 3, 2, rest, per=per, dtype=dtype)
    options = {"seed": -5, "offset": 2**40}
    devices = (("cpu", "cpp"), ("cuda", "cuda"))
    cpu, gpu = (run([t.to(d) for t in tensors], layout, dtype, **options, impl=impl) for d, impl in devices)
    assert torch.equal(cpu[0], gpu[0].cpu())
    for name, g, c in zip(NAMES[1:], gpu[1:], cpu[1:], strict=True):
        torch.testing.assert_close(g.cpu(), c, msg=name)
    eps = [token_noise_eps((5, 7, 1001), **options, dtype=dtype, device=d, impl=impl) for d, impl in devices]
    assert torch.equal(eps[0], eps[1].cpu())


@pytest.mark.gpu
def test_gpu_on_a_side_stream_and_in_a_graph():
    (x, signal, noise, _), layout = make(2, 3, 1, (512,))
    x, signal, noise = x.cuda(), signal.cuda(), noise.cuda()
    want = token_noise(x, signal, noise, layout, seed=1, impl="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(token_noise(x, signal, noise, layout, seed=1, impl="cuda"), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = token_noise(x, signal, noise, layout, seed=1, impl="cuda")
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


FAULTS = {
    "nine rounds": ("range(10)", "range(9)"),
    "key not advanced": ("k0, k1 = (k0 + KEY_STEP_0) & WORD", "k0, k1 = k0 & WORD"),
    "sign of the product kept": ("h0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD)", "h0.bitwise_xor_(c3).bitwise_xor_(k1)"),
    "words swapped": ("return c0, c1.bitwise_and_(WORD), c2, ", "return c2, c1.bitwise_and_(WORD), c0, "),
    "high word of the seed lost": ("seed & WORD, (seed >> 32) & WORD", "seed & WORD, 0"),
    "high word of the offset lost": ("torch.full_like(c0, (offset >> 32) & WORD)", "torch.zeros_like(c0)"),
    "start of a piece lost": ("narrow(0, start - 4 * first, count)", "narrow(0, 0, count)"),
    "cos and sin swapped": ("torch.mul(radius, angle.cos(), out=out[:, pair])", "torch.mul(radius, angle.sin(), out=out[:, pair])"),
    "scale of another stream": ("tensor.unflatten(1, (streams, -1))", "tensor.unflatten(1, (streams, -1)).flip(1)"),
    "gradient of the last stream only": ("total.addcmul_(take(grad_out", "total.zero_().addcmul_(take(grad_out"),
    "gradient of the last piece only": ("part.add_((grad * noise)", "part.copy_((grad * noise)"),
    "fresh noise in backward": ("normals(first, grad.numel(), seed, offset,", "normals(first, grad.numel(), seed, offset + 1,"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault, seed_fault):
    """Each fault, put into the source of the composed route, makes the comparison fail."""
    seed_fault(ops, *FAULTS[fault], "PIECE = 1 << 20", "PIECE = 30")

    def compare_both():
        for per in ("frame", "clip"):
            compare(*make(2, 3, 2, (7,), per=per), impls=("composed",), seed=2**40 + 5, offset=3 * 2**33 + 1)

    with pytest.raises(AssertionError):
        compare_both()
