"""The C++ kernels of causal_conv3d on the CPU, against the per-frame reference in fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_causal_conv3d import NAMES, arrange, case, compare, make, name, run

from sae_kernels import FrameLayout, _extension, causal_conv3d, past_term
from sae_kernels.causal_conv3d import cpp, ops
from sae_kernels.testing import assert_within_budget, noncontiguous

if _extension.library("cpu") is not None:
    pytest.skip(str(_extension.library("cpu")), allow_module_level=True)


def shared_past(n):
    """The n-th case, with a past that all streams share."""
    options = case(n)
    layout = options["layout"]
    if layout.frames_per_block > 1 and layout.noisy_copies > 0:
        options["layout"] = FrameLayout(layout.frames, 7, 1, layout.noisy_copies, layout.noisy_first)
    return options


@pytest.mark.parametrize("n", range(90), ids=name)
def test_it_is_the_reference(n):
    options = shared_past(n)
    layout, pad_value = options["layout"], options.pop("pad_value")
    tensors, grad = make(**options, seed=n)
    compare(tensors, grad, layout, pad_value, impl="cpp")


@given(n=st.integers(90, 10**6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(n):
    options = shared_past(n)
    layout, pad_value = options["layout"], options.pop("pad_value")
    tensors, grad = make(**options, seed=n)
    compare(tensors, grad, layout, pad_value, impl="cpp")


# Maps that several tasks share, in rows and in frames; more channels than a block, a pass over pixels and a task of the
# weight gradient hold; wide maps of one row; taps that reach over the whole map.
SHAPES = [
    {"layout": FrameLayout(2, 1), "size": (20, 33)},
    {"layout": FrameLayout(3, 1, noisy_copies=0), "size": (9, 300), "kernel": (2, 3, 3)},
    {"layout": FrameLayout(37, 1, noisy_copies=2, noisy_first=True), "size": (3, 4)},
    {"layout": FrameLayout(40, 1, noisy_copies=3), "size": (1, 1)},
    {"layout": FrameLayout(3, 1), "size": (4, 4), "Cin": 300, "Cout": 40},
    {"layout": FrameLayout(3, 1), "size": (4, 3), "Cin": 40, "Cout": 270},
    {"layout": FrameLayout(2, 1), "size": (3, 5), "Cin": 17, "Cout": 15, "kernel": (3, 7, 11)},
    {"layout": FrameLayout(5, 1, noisy_copies=0), "size": (6, 6), "Cin": 32, "Cout": 32, "kernel": (4, 1, 1)},
    {"layout": FrameLayout(5, 1), "size": (8, 8), "Cin": 5, "Cout": 64, "kernel": (1, 3, 3)},
]


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_how_work_is_shared_out_does_not_matter(shape, history):
    tensors, grad = make(**shape, history=history, memory="channels_last_strided", scales="both" if history else "none")
    compare(tensors, grad, shape["layout"], 1.0, impl="cpp")


def test_it_is_what_auto_takes_on_the_cpu():
    cpu = torch.device("cpu")
    assert ops.implementations(cpu)[0][:2] == ["cpp", "composed"]
    assert ops.implementations(cpu, torch.float32, 2, 0)[0][0] == "cpp"
    for dtype, block, reason in ((torch.bfloat16, 1, "float32 alone"), (torch.float32, 2, "reads? their own copy")):
        assert ops.implementations(cpu, dtype, block)[0][0] == "composed"
        x, weight = torch.zeros(1, 2, 8, 3, 3, dtype=dtype), torch.zeros(2, 2, 2, 3, 3, dtype=dtype)
        with pytest.raises(ValueError, match=f"cannot run 'cpp' on cpu: .*{reason}"):
            causal_conv3d(x, weight, FrameLayout(4, 1, block), impl="cpp")


def test_autocast_to_bf16_leaves_it_to_the_library():
    layout = FrameLayout(3, 20)
    tensors, _ = make(layout)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_conv3d(layout=layout, **tensors).dtype == torch.bfloat16
        assert past_term(tensors["history"], tensors["weight"]).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="float32 alone"):
            causal_conv3d(layout=layout, **tensors, impl="cpp")


WIDE = {"layout": FrameLayout(5, 1, noisy_copies=2, noisy_first=True), "size": (17, 18), "Cin": 40, "Cout": 70}


def test_bits_do_not_depend_on_the_number_of_threads():
    tensors, grad = make(**WIDE)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(run(tensors, grad, WIDE["layout"], torch.float32, "cpp", 0.5))
    finally:
        torch.set_num_threads(threads)
    want, *others = results
    for got in others:
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_bits_do_not_depend_on_the_batch_or_on_strides():
    tensors, grad = make(**WIDE, B=3)
    whole = run(tensors, grad, WIDE["layout"], torch.float32, "cpp", 0.5)
    one = {k: v if k == "weight" else v[1:2] for k, v in tensors.items()}
    got = run(one, grad[1:2], WIDE["layout"], torch.float32, "cpp", 0.5)
    for index, (g, w) in enumerate(zip(got, whole, strict=True)):
        if index != 1 + NAMES.index("weight"):
            assert torch.equal(g, w[1:2])
    for memory in ("contiguous_format", "strided", "channels_last_strided"):
        arranged = tensors | {k: arrange(tensors[k], memory) for k in ("x", "history")}
        again = run(arranged, arrange(grad, memory), WIDE["layout"], torch.float32, "cpp", 0.5)
        assert all(torch.equal(g, w) for g, w in zip(again, whole, strict=True))
    for key in ("weight", "past_scale", "last_scale"):
        arranged = tensors | {key: noncontiguous(tensors[key], 1)}
        again = run(arranged, grad, WIDE["layout"], torch.float32, "cpp", 0.5)
        assert all(torch.equal(g, w) for g, w in zip(again, whole, strict=True))


@pytest.mark.parametrize("order", ["channels_last_3d", "transposed"])
def test_the_weight_gradient_has_the_memory_order_of_the_weight(order):
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout)
    want = run(tensors, grad, layout, torch.float32, "cpp", 0.0)[2]
    weight = tensors["weight"]
    if order == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    else:
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
    got = run(tensors | {"weight": weight}, grad, layout, torch.float32, "cpp", 0.0)[2]
    assert got.stride() == weight.stride() and torch.equal(got, want)


@pytest.mark.parametrize("noisy_first", [False, True])
def test_causality_is_exact(noisy_first):
    """A frame that changes, to NaN even, changes what reads it and no bit of anything else, forward and backward."""
    T, frame, K = 6, 2, 2
    layout = FrameLayout(T, 20, noisy_copies=K, noisy_first=noisy_first)
    tensors, grad = make(layout)
    before = run(tensors, grad, layout, torch.float32, "cpp", 0.0)
    starts = {"clean": layout.clean_start, "noisy": layout.noisy_start}
    sees = {"clean": {s * T + t for s in range(1 + K) for t in (3, 4)} | {layout.clean_start + 2},
            "noisy": {layout.noisy_start + 2}}  # fmt: skip
    for stream, start in starts.items():
        changed = tensors["x"].clone()
        changed[:, :, start + frame] = float("nan")
        y = run(tensors | {"x": changed}, grad, layout, torch.float32, "cpp", 0.0)[0]
        differs = {f for f in range(layout.total_frames) if not torch.equal(y[:, :, f], before[0][:, :, f])}
        assert differs == sees[stream]

        # Backward the other way round: frames 0, 1, 2 of the clean stream and the frame itself feed frame 2.
        changed = grad.clone()
        changed[:, :, start + frame] = float("nan")
        dx = run(tensors, changed, layout, torch.float32, "cpp", 0.0)[1]
        differs = {f for f in range(layout.total_frames) if not torch.equal(dx[:, :, f], before[1][:, :, f])}
        assert differs == {layout.clean_start, layout.clean_start + 1, start + frame}


def test_memory_around_the_arguments_is_not_read():
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout, Cin=5, Cout=7)
    want = run(tensors, grad, layout, torch.float32, "cpp", 0.0)

    def surrounded(x):
        last = x.permute(0, 2, 3, 4, 1)
        room = last.new_full([n + 2 for n in last.shape], float("nan"))
        inside = room[tuple(slice(1, -1) for _ in last.shape)]
        return inside.copy_(last).permute(0, 4, 1, 2, 3)

    given = tensors | {k: surrounded(tensors[k]) for k in ("x", "history")}
    leaves = {k: v.detach().requires_grad_() for k, v in given.items()}
    assert leaves["x"].stride() == given["x"].stride()  # no copy heals it
    y = causal_conv3d(layout=layout, **leaves, impl="cpp")
    got = [y, *torch.autograd.grad(y, list(leaves.values()), surrounded(grad))]
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_each_gradient_alone():
    layout = FrameLayout(4, 20, noisy_first=True)
    tensors, grad = make(layout)
    everything = run(tensors, grad, layout, torch.float32, "cpp", 0.5)[1:]
    for key, want in zip(NAMES, everything, strict=True):
        leaf = tensors[key].detach().requires_grad_()
        y = causal_conv3d(layout=layout, **tensors | {key: leaf}, impl="cpp")
        assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], want), key


def test_past_scale_gradient_without_a_kept_past():
    layout = FrameLayout(3, 20)
    tensors, grad = make(layout)
    want = run(tensors, grad, layout, torch.float32, "cpp", 0.0)[3]
    leaves = [t.detach().requires_grad_() for t in tensors.values()]
    y, _ = ops.causal_conv3d_fwd(*leaves, 0.0, 3, 1, 1, False, False, "cpp")
    assert torch.equal(torch.autograd.grad(y, leaves[2], grad)[0], want)


@pytest.mark.parametrize("chunks", [[1] * 7, [1, 4, 2]], ids=str)
@pytest.mark.parametrize("kt", [1, 2, 3, 5])
def test_streaming_in_chunks_is_one_pass(chunks, kt):
    layout = FrameLayout(7, 20, noisy_copies=0)
    tensors, _ = make(layout, kernel=(kt, 3, 3))
    want = causal_conv3d(layout=layout, **tensors, impl="cpp")
    history, start, got = tensors["history"], 0, []
    for n in chunks:
        part = {k: tensors[k][:, start : start + n] for k in ("past_scale", "last_scale")}
        x, streamed = tensors["x"][:, :, start : start + n], FrameLayout(n, 20, noisy_copies=0)
        got.append(causal_conv3d(x, tensors["weight"], streamed, history=history, **part, impl="cpp"))
        seen = torch.cat([history, x], 2)
        history, start = seen[:, :, seen.shape[2] - (kt - 1) :], start + n
    assert torch.equal(torch.cat(got, 2), want)


@pytest.mark.parametrize("kt", [2, 3, 5])
def test_past_term_is_the_reference(kt):
    layout = FrameLayout(1, 20)
    tensors, grad = make(layout, B=3, Cin=5, Cout=19, kernel=(kt, 5, 3))

    def past(dtype, impl):
        leaves = [tensors[k].detach().to(dtype).requires_grad_() for k in ("history", "weight")]
        y = past_term(*leaves, impl=impl)
        return [y, *torch.autograd.grad(y, leaves, grad[:, :, 0].to(dtype))]

    results = past(torch.float32, "cpp"), past(torch.float64, "reference"), past(torch.float32, "reference")
    for label, *of in zip(("y", "dhistory", "dweight"), *results, strict=True):
        assert_within_budget(*of, label, roundings=8)


def test_past_term_completes_a_frame_to_the_op():
    layout = FrameLayout(4, 20)
    tensors, _ = make(layout, scales="none", Cin=20, Cout=20)
    want = layout.split(causal_conv3d(layout=layout, **tensors, impl="cpp"), 2)[1]
    clean, noisy = layout.split(tensors["x"], 2)
    seen, weight = torch.cat([tensors["history"], clean], 2), tensors["weight"]
    for i in range(4):
        last = F.conv2d(noisy[:, :, i].double(), weight[:, :, -1].double(), padding=1)
        got = past_term(seen[:, :, i : i + 2], weight, impl="cpp") + last
        torch.testing.assert_close(got, want[:, :, i].double(), rtol=0, atol=2e-6)


def test_empty_batch():
    layout = FrameLayout(3, 20)
    tensors, _ = make(layout, B=0)
    leaves = {k: v.requires_grad_() for k, v in tensors.items()}
    y = causal_conv3d(layout=layout, **leaves, impl="cpp")
    assert y.shape == (0, 4, 6, 4, 5)
    y.sum().backward()
    assert torch.equal(leaves["weight"].grad, torch.zeros_like(leaves["weight"]))


def measured(function):
    """(result, names of the operations inside, bytes that they allocate)"""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.no_grad(), torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.events() if e.name != "[memory]"]
    return result, {e.name for e in events}, sum(max(e.self_cpu_memory_usage, 0) for e in events)


@pytest.mark.parametrize("gated", [False, True])
def test_activations_are_not_copied(gated, monkeypatch):
    """Forward makes out, and past where it is asked; backward its results and one sum over the streams. Beside those
    there are the weights, laid out once in each direction."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    layout = FrameLayout(4, 1, noisy_copies=2)
    tensors, grad = make(layout, Cin=32, Cout=64, size=(8, 8), memory="channels_last_3d", history=False)
    x, weight, past_scale, last_scale, _ = tensors.values()
    scales = (past_scale, last_scale) if gated else (None, None)
    inside = {"aten::empty", "aten::new_empty", "aten::zeros", "aten::zero_", "aten::new_zeros"}
    small = 4096  # scales, and what begins at a multiple of 64 bytes

    (out, past), names, made = measured(lambda: cpp.forward(x, weight, *scales, None, 1.0, layout, gated))
    assert names <= inside | {"sae_kernels_native::causal_conv3d_fwd"}
    expected = out.nbytes + weight.nbytes + (past.nbytes if gated else 0)
    assert expected <= made <= expected + small

    mask = [True, True, gated, gated, False]
    _, names, made = measured(lambda: cpp.backward(grad, x, weight, *scales, None, past, 1.0, layout, mask))
    assert names <= inside | {"sae_kernels_native::causal_conv3d_bwd"}
    expected = x.nbytes + 2 * weight.nbytes + out.nbytes // 3
    assert expected <= made <= expected + small

    # With one stream and no scale its gradient is the sum.
    clean = FrameLayout(4, 1, noisy_copies=0)
    x, grad = x[:, :, :4], grad[:, :, :4]
    arguments = (grad, x, weight, None, None, None, None, 1.0, clean, [True, True, False, False, False])
    _, names, made = measured(lambda: cpp.backward(*arguments))
    assert names <= inside | {"sae_kernels_native::causal_conv3d_bwd"}
    expected = x.nbytes + 2 * weight.nbytes
    assert expected <= made <= expected + small


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set(capability):
    """The loops of processors older than this one."""
    tests = "shared_out or not_read"
    environment = os.environ | {"SAE_CPU_CAPABILITY": capability}
    if "SAE_CPU_CAPABILITY" in os.environ:
        pytest.skip("inside of this test")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_wrong_tensors_are_refused():
    """By the C++ code itself, which reads memory."""
    native = torch.ops.sae_kernels_native.causal_conv3d_fwd
    x, weight = torch.zeros(1, 3, 4, 5, 5), torch.zeros(2, 3, 3, 3, 3)
    good = x.contiguous(memory_format=torch.channels_last_3d)
    out = torch.zeros(1, 2, 4, 5, 5).contiguous(memory_format=torch.channels_last_3d)

    def call(x=good, weight=weight, scale=None, out=out, frames=2):
        native(x, weight, scale, None, None, out, None, 0.0, frames, 1, False)

    call()
    for change, message in (
        ({"x": x}, "x: must have contiguous channels"),
        ({"x": good[:, :2]}, "x: must have shape"),
        ({"x": good.double()}, "x: dtype must be float32"),
        ({"weight": weight.transpose(0, 1)}, "weight: must be contiguous"),
        ({"weight": weight[:, :, :, :2].contiguous()}, "weight: must have odd ky and kx"),
        ({"scale": torch.zeros(3)}, "past_scale: must be float32 of 4 elements"),
        ({"out": out[:, :, 1:]}, "out: must have shape"),
        ({"out": None}, "out: must be there with x"),
        ({"frames": 0}, "frames, copies: must be at least"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**change)
