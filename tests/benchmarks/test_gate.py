"""A wrong kernel gives a red gate and no figure; a wrong peer is named and gives none either."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as cli
from benchmarks import attention, convolution, gate, naive, noise, registry, run, train_step
from benchmarks.registry import Case, Contender
from sae_kernels import FrameLayout, causal_conv3d, frame_attention, token_noise
from sae_kernels.causal_conv3d import ops as convolution_ops
from sae_kernels.causal_conv3d import reference as conv_reference
from sae_kernels.frame_attention import ops as attention_ops
from sae_kernels.frame_attention import reference

LIMITS = {"matmul_flops_per_s": {"fp32": 1e11}, "copy_bytes_per_s": 1e10}
DRY = run.Options(seconds=0.01, dry=True)


# What "auto" takes here: the C++ kernel where it is built.
default_attention = attention_ops._backend(attention_ops.implementations(torch.device("cpu"))[0][0])
default_convolution = getattr(convolution_ops, convolution_ops.implementations(torch.device("cpu"))[0][0])


def smoke(op: str, device: str = "cpu") -> Case:
    (case, *_) = registry.select("cpu", ops=[op], dry=True)
    return case


def run_smoke(op: str) -> dict:
    return run.run_case(smoke(op), "cpu", DRY, LIMITS)


def test_sound_kernels_are_green_and_timed():
    for op in ("attention", "convolution", "noise", "magnitude", "qk-prepare"):
        record = run_smoke(op)
        assert record["gate"] == {"ok": True, "reason": None}
        assert record["wrong"] == []
        assert {r["kind"] for r in record["results"]} >= {"ours", "peer"}
        assert all(r["median_s"] > 0 for r in record["results"])


@pytest.fixture
def broken_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward forgets that probabilities sum to one, by a thousandth."""
    sound = default_attention.forward

    def forward(q, k, v, out, lse, *options):
        sound(q, k, v, out, lse, *options)
        out.mul_(1.001)

    monkeypatch.setattr(default_attention, "forward", forward)


def test_broken_kernel_turns_the_gate_red_and_no_figure_is_printed(broken_attention, tmp_path, capsys):
    path = tmp_path / "result.json"
    status = cli.main(["--op", "attention", "--device", "cpu", "--dry", "--json", str(path), "--threads", "1"])
    printed = capsys.readouterr()
    assert status == 1
    assert "attention/smoke: RED, no figures: sae_kernels, fwd: out: " in printed.out
    assert "exceeds the budget" in printed.out
    assert "RED: attention/smoke" in printed.err
    assert " ms" not in printed.out and "µs" not in printed.out and "dense-mask" not in printed.out
    (record,) = json.loads(path.read_text())["cases"]
    assert not record["gate"]["ok"]
    assert record["results"] == []


def test_broken_backward_turns_the_gate_red(monkeypatch):
    sound = default_attention.backward

    def backward(grad_out, q, k, v, out, lse, dq, dk, dv, *options):
        sound(grad_out, q, k, v, out, lse, dq, dk, dv, *options)
        dk[..., 0, :] = 0

    monkeypatch.setattr(default_attention, "backward", backward)
    record = run_smoke("attention")
    assert not record["gate"]["ok"]
    assert record["gate"]["reason"].startswith("sae_kernels, fwd+bwd: dk: ")
    assert record["results"] == []


def test_broken_convolution_turns_the_gates_of_op_and_network_red(monkeypatch):
    sound = default_convolution.forward

    def forward(x, weight, *options):
        return sound(x, weight.flip(2), *options)

    monkeypatch.setattr(default_convolution, "forward", forward)
    for op in ("convolution", "train-step", "sampling"):
        record = run_smoke(op)
        assert not record["gate"]["ok"], op
        assert record["results"] == []


def test_broken_noise_turns_the_gate_red(monkeypatch):
    monkeypatch.setattr(noise, "token_noise", lambda *a, seed, **o: token_noise(*a, seed=seed + 1, **o))
    assert not run_smoke("noise")["gate"]["ok"]


def test_broken_weight_normalisation_turns_the_gate_red(monkeypatch):
    from sae_diffusion.model import Denoiser

    monkeypatch.setattr(Denoiser, "normalize_weights_", lambda self: None)
    case = next(c for c in registry.select("cpu", ops=["magnitude"], dry=True) if c.name == "smoke-weights")
    assert not run.run_case(case, "cpu", DRY, LIMITS)["gate"]["ok"]


def test_wrong_peer_is_named_without_a_figure(monkeypatch):
    monkeypatch.setattr(FrameLayout, "dense_mask", lambda self, device=None: torch.ones(30, 30, dtype=torch.bool))
    record = run_smoke("attention")
    assert record["gate"]["ok"]
    assert {(w["contender"], w["direction"]) for w in record["wrong"]} == {
        ("dense-mask SDPA", "fwd"),
        ("dense-mask SDPA", "fwd+bwd"),
    }
    assert "relative error" in record["wrong"][0]["reason"]
    timed = {r["contender"] for r in record["results"]}
    assert "dense-mask SDPA" not in timed and "sae_kernels" in timed


def test_peer_that_cannot_run_is_named_with_its_reason(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(convolution, "two_passes", fails)
    missing = run_smoke("convolution")["missing"]
    assert {
        "contender": "two passes",
        "direction": "fwd",
        "reason": "could not run: RuntimeError: no kernel for this",
    } in missing


def test_half_the_digits_refuses_nan_and_wrong_shapes():
    gold = torch.randn(4, dtype=torch.float64)
    gate.assert_half_the_digits(gold.float(), gold, "x")
    with pytest.raises(AssertionError, match="relative error nan"):
        gate.assert_half_the_digits(torch.full((4,), float("nan")), gold, "x")
    with pytest.raises(AssertionError, match="shape"):
        gate.assert_half_the_digits(torch.zeros(5), gold, "x")
    with pytest.raises(AssertionError, match="relative error"):
        gate.assert_half_the_digits(gold.float() * 1.001, gold, "x")


# --- the references and peers of the gate themselves

LAYOUTS = [
    FrameLayout(4, 3),
    FrameLayout(3, 5, noisy_copies=3),
    FrameLayout(5, 2, frames_per_block=2, noisy_first=True),
    FrameLayout(6, 2, window=1, sink=1),
    FrameLayout(3, 4, noisy_copies=0),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("rows", [7, 1 << 20])
def test_chunked_exact_attention_equals_the_reference(layout, rows):
    S, D, heads = layout.sequence_length, 8, 2
    q = torch.randn(1, heads, S, D, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 1, S, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    out, _ = reference.frame_attention(q, k, v, layout, D**-0.5, False)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    got = attention.exact(q.detach()[0], k.detach()[0, 0], v.detach()[0, 0], grad[0], layout, rows)
    for name, want in (("out", out[0]), ("dq", dq[0]), ("dk", dk[0, 0]), ("dv", dv[0, 0])):
        torch.testing.assert_close(got[name], want.detach(), msg=name)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_calls_are_the_mask(layout):
    def varlen(q, k, v, cu_rows, cu_keys, max_rows, max_keys):
        outs = []
        for i in range(len(cu_rows) - 1):
            rows, keys = slice(cu_rows[i], cu_rows[i + 1]), slice(cu_keys[i], cu_keys[i + 1])
            assert rows.stop - rows.start <= max_rows and keys.stop - keys.start <= max_keys
            outs.append(F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in (q[rows], k[keys], v[keys]))))
        return torch.cat(outs, dim=1).transpose(0, 1)

    q, k, v = (torch.randn(2, 2, layout.sequence_length, 8, dtype=torch.float64) for _ in range(3))
    calls = attention.packed_calls(layout, 2, "cpu")
    assert len(calls) == (2 if layout.noisy_copies else 1)
    got = attention.packed_attention(calls, varlen)(q, k, v)
    torch.testing.assert_close(got, frame_attention(q, k, v, layout, impl="reference"))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("copies", "noisy_first"), [(1, False), (3, True), (0, False)])
@pytest.mark.parametrize("with_history", [False, True])
@pytest.mark.parametrize("function", [convolution.two_passes, convolution.reference_sequence])
def test_library_convolutions_are_the_op(function, gated, copies, noisy_first, with_history):
    layout = FrameLayout(4, 9, noisy_copies=copies, noisy_first=noisy_first)
    x = torch.randn(2, 3, layout.total_frames, 3, 3, dtype=torch.float64)
    weight = torch.randn(5, 3, 3, 3, 3, dtype=torch.float64)
    scales = [torch.rand(2, layout.total_frames, dtype=torch.float64) if gated else None for _ in range(2)]
    history = torch.randn(2, 3, 2, 3, 3, dtype=torch.float64) if with_history else None
    got = function(x, weight, layout, *scales, history, convolution.PAD)
    want = conv_reference.causal_conv3d(x, weight, layout, *scales, history, convolution.PAD)
    torch.testing.assert_close(got, want)


def test_swapped_ops_are_put_back_after_an_error():
    before = (naive.model_conv.causal_conv3d, naive.model_attention.frame_attention)
    with naive.swapped(naive.TWO_PASSES, naive.dense_attention):
        assert naive.model_conv.causal_conv3d is naive.TWO_PASSES
    with pytest.raises(ZeroDivisionError), naive.swapped(naive.TWO_PASSES, naive.dense_attention):
        1 / 0  # noqa: B018
    assert (naive.model_conv.causal_conv3d, naive.model_attention.frame_attention) == before
    assert before == (causal_conv3d, frame_attention)


def test_counted_work():
    layout = FrameLayout(16, 256)
    assert attention.work(layout.attended_pairs, 64)["fwd"] == 4 * 64 * 16 * 17 * 256**2
    assert attention.work(10, 8)["fwd+bwd"] == 3.5 * attention.work(10, 8)["fwd"]
    shape = {"B": 2, "I": 3, "O": 5, "size": 4}
    # 36 T taps in 2 T frames of output.
    assert convolution.work(shape, layout)["fwd"] == 2 * 36 * 16 * 2 * 3 * 5 * 16
    model = train_step.network(train_step.NANO, "cpu")
    small, large = (
        train_step.work(model, train_step.clips(train_step.NANO, 1, 2, K, "cpu", 0), "fp32") for K in (1, 2)
    )
    # Convolutions, nearly all of it, grow as 18 + 9 + 9 K.
    assert 1.2 < large / small < 1.3


def test_moments_of_a_peers_noise():
    layout, x = FrameLayout(2, 1), torch.randn(2, 2, 50, 50)
    one = torch.ones(1, 1, 1, 1)
    noise.assert_moments(torch.cat([x, x], 1) + torch.randn(2, 4, 50, 50), x, one, one, layout)
    with pytest.raises(AssertionError, match="variance"):
        noise.assert_moments(torch.cat([x, x], 1) + 1.2 * torch.randn(2, 4, 50, 50), x, one, one, layout)
    with pytest.raises(AssertionError, match="mean"):
        noise.assert_moments(torch.cat([x, x], 1) + torch.randn(2, 4, 50, 50) + 0.3, x, one, one, layout)


def test_our_default_comes_first_and_no_interpreter():
    class Ops:
        @staticmethod
        def implementations(device):
            return ["triton", "composed", "reference"], {}

    def names(device):
        return [(c.name, c.launch["impl"], c.optional) for c in gate.ours(Ops, device, lambda impl: {"impl": impl})]

    assert names("cuda") == [("sae_kernels", "auto", False), ("sae_kernels (composed)", "composed", True)]
    assert names("cpu") == [("sae_kernels", "auto", False)]


def test_default_that_cannot_run_fails_and_another_of_ours_is_named(monkeypatch):
    def fails(inputs):
        raise ValueError("impl: cannot run here")

    build = attention.build

    def built(shape, device):
        problem = build(shape, device)
        problem.contenders.insert(1, Contender("sae_kernels (other)", {"fwd": fails}, kind="ours", optional=True))
        return problem

    monkeypatch.setattr(attention, "build", built)
    entry = {"contender": "sae_kernels (other)", "direction": "fwd"}
    assert entry | {"reason": "could not run: ValueError: impl: cannot run here"} in run_smoke("attention")["missing"]

    def first(shape, device):
        problem = built(shape, device)
        problem.contenders[1].optional = False
        return problem

    monkeypatch.setattr(attention, "build", first)
    with pytest.raises(ValueError, match="cannot run here"):
        run_smoke("attention")
