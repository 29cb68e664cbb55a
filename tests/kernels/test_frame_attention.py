"""frame_attention: the reference against SDPA with the dense mask, every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_layouts import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout, _extension, frame_attention
from sae_kernels.frame_attention import composed, ops
from sae_kernels.testing import assert_within_budget, noncontiguous

NAMES = ("out", "dq", "dk", "dv")

# (P, T, frames_per_block, K, noisy_first, window, sink)
LAYOUTS = [
    (P, T, f, K, noisy_first, window, sink)
    for P, T in ((1, 9), (3, 17), (16, 9), (49, 5), (64, 5), (100, 4), (130, 4), (300, 2))
    for f, K, noisy_first, window, sink in (
        (1, 0, False, None, 0),
        (1, 1, False, None, 0),
        (1, 1, True, None, 0),
        (1, 3, False, 2, 0),
        (3, 1, False, None, 0),
        (3, 3, True, 1, 1),
        (1, 1, False, 1, 2),
        (1, 1, True, 0, 0),
    )
]


def make(layout, *, heads=(2, 2), D=16, B=1, dtype=torch.float32, noisy_queries_only=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    S = layout.sequence_length
    rows = S - layout.frames * layout.tokens_per_frame if noisy_queries_only else S
    shapes = ((B, heads[0], rows, D), (B, heads[1], S, D), (B, heads[1], S, D), (B, heads[0], rows, D))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(tensors, layout, dtype, **options):
    *inputs, grad = tensors
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out, lse = frame_attention(*inputs, layout, return_lse=True, **options)
    assert not lse.requires_grad
    out.backward(grad.to(dtype))
    return [out, *(x.grad for x in inputs)], lse


def compare(tensors, layout, **options):
    dtype = tensors[0].dtype
    actual, lse = run(tensors, layout, dtype, **options, impl="composed")
    gold, gold_lse = run(tensors, layout, torch.float64, **options, impl="reference")
    eager, _ = run(tensors, layout, dtype, **options, impl="reference")
    # dq = sum p (dp - delta) k: terms of this size cancel to zero where every row sees one key.
    q, k, v, grad = tensors
    terms = (grad.norm(dim=-1).max() * v.norm(dim=-1).max() * torch.maximum(q.abs().max(), k.abs().max())).item()
    # Parts are joined with weights exp(lse_part - lse): the rounding of an fp32 lse is relative to its own size.
    lse_ulps = gold_lse.abs().max().item() * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps
    roundings = 4 + lse_ulps
    for name, *results in zip(NAMES, actual, gold, eager, strict=True):
        assert_within_budget(*results, f"{name} of {layout}", terms=terms, roundings=roundings)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), gold_lse, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize(("P", "T", "f", "K", "noisy_first", "window", "sink"), LAYOUTS)
def test_reference_is_sdpa_with_the_dense_mask_and_composed_is_the_reference(P, T, f, K, noisy_first, window, sink):
    layout = FrameLayout(T, P, f, K, noisy_first, window, sink)
    tensors = make(layout)
    compare(tensors, layout)

    *inputs, grad = [x.double() for x in tensors]
    inputs = [x.requires_grad_() for x in inputs]
    sdpa = F.scaled_dot_product_attention(*inputs, attn_mask=layout.dense_mask())
    sdpa.backward(grad)
    expected = [sdpa, *(x.grad for x in inputs)]
    for impl in ("reference", "composed"):
        for got, want in zip(run(tensors, layout, torch.float64, impl=impl)[0], expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@given(
    layout=layouts(12, tokens=40, blocks=5),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    D=st.sampled_from([8, 16, 24]),
    B=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    noisy_queries_only=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_layout(layout, heads, D, B, dtype, noisy_queries_only, seed):
    noisy_queries_only = noisy_queries_only and layout.noisy_copies > 0
    tensors = make(layout, heads=heads, D=D, B=B, dtype=dtype, noisy_queries_only=noisy_queries_only, seed=seed)
    compare(tensors, layout, noisy_queries_only=noisy_queries_only)


def test_draws_of_layouts_have_window_and_sink_together():
    drawn = []

    @given(layouts(12, tokens=40, blocks=5))
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    def draw(layout):
        drawn.append(layout)

    draw()
    both = [x for x in drawn if x.window is not None and x.sink]
    # In some of them a gap lies between the sink and the window of the last block.
    gaps = [x for x in both if x.num_blocks - 1 - x.window > x.sink]
    assert len(both) >= len(drawn) // 3 and len(gaps) >= 3


def test_reference_gradcheck():
    layout = FrameLayout(3, 2, noisy_copies=2, window=1)
    inputs = [x.double().requires_grad_() for x in make(layout, D=4)[:3]]
    assert torch.autograd.gradcheck(lambda *a: frame_attention(*a, layout, impl="reference"), inputs)
    assert torch.autograd.gradcheck(lambda *a: frame_attention(*a, layout, impl="composed"), inputs)


def test_strided_inputs_with_poisoned_neighbours():
    layout = FrameLayout(5, 30, noisy_copies=1)
    tensors = make(layout, heads=(4, 2))
    want, _ = run(tensors, layout, torch.float32, impl="composed")
    for dim in (0, 1, 2):
        *inputs, grad = [noncontiguous(x, dim) for x in tensors]
        inputs = [x.requires_grad_() for x in inputs]
        out = frame_attention(*inputs, layout)
        got = [out, *torch.autograd.grad(out, inputs, grad)]
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=2e-6)
    q, k, v, _ = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    out = frame_attention(q, k, v, layout)
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, want[0], rtol=0, atol=2e-6)


def test_causality_is_exact():
    layout = FrameLayout(6, 40, noisy_copies=2, noisy_first=True)
    q, k, v, _ = make(layout)
    before = frame_attention(q, k, v, layout)
    frame = 3
    rows = slice((layout.clean_start + frame) * 40, (layout.clean_start + frame + 1) * 40)
    for tensor in (k, v):
        tensor[:, :, rows] += 1.0
    clean, noisy = layout.split(frame_attention(q, k, v, layout) - before, 2)
    changed_clean = clean.unflatten(2, (6, 40)).abs().amax(dim=(0, 1, 3, 4))
    changed_noisy = noisy.unflatten(2, (2, 6, 40)).abs().amax(dim=(0, 1, 2, 4, 5))
    assert (changed_clean[:frame] == 0).all() and (changed_clean[frame:] > 0).all()
    assert (changed_noisy[: frame + 1] == 0).all() and (changed_noisy[frame + 1 :] > 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("generic", [False, True])
def test_what_a_row_does_not_see_cannot_reach_it(generic, stream, value, monkeypatch):
    """q, k, v and grad of one block hold NaN, infinities, or numbers whose products overflow: what does not see it
    keeps its bits, in every product."""
    layout = FrameLayout(12, 6, frames_per_block=2, noisy_copies=2, window=2, sink=1, noisy_first=True)
    tensors = make(layout, heads=(4, 2))
    if generic:
        monkeypatch.setattr(composed, "_flash_cpu", lambda q: False)
    want, want_lse = run(tensors, layout, torch.float32, impl="composed")
    start = (layout.noisy_start if stream else layout.clean_start) * 6 + 3 * 12
    for tensor in tensors:
        tensor[:, :, start : start + 12] = value
    got, lse = run(tensors, layout, torch.float32, impl="composed")
    mask = layout.dense_mask()
    spoiled_rows = mask[:, start : start + 12].any(1)
    spoiled_keys = mask[spoiled_rows].any(0)
    assert torch.equal(lse[:, :, ~spoiled_rows], want_lse[:, :, ~spoiled_rows])
    for name, a, b in zip(NAMES, got, want, strict=True):
        kept = ~(spoiled_rows if name in ("out", "dq") else spoiled_keys)
        assert kept.any() and torch.equal(a[:, :, kept], b[:, :, kept]), name
    assert value == 3e38 or not got[0][:, :, spoiled_rows].isfinite().any()


def unseen(layout, start, end):
    """(rows that see nothing of tokens [start, end), keys that none of the others sees)."""
    rows = ~layout.dense_mask()[:, start:end].any(1)
    return rows, ~layout.dense_mask()[~rows].any(0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("impl", ["reference", "composed", "cpp", "triton"])
@pytest.mark.parametrize("which", range(4))
def test_products_that_overflow_stay_where_they_are_seen(which, impl):
    """One of q, k, v and grad is 3e38 or -3e38 in one block, of a group and a tile with others; the rest of it too is
    large, so that one factor alone overflows the product."""
    layout = FrameLayout(6, 4, noisy_copies=2, window=2, sink=1)
    tensors = [100 * x for x in make(layout, heads=(2, 1))]
    want, want_lse = run(tensors, layout, torch.float32, impl=impl)
    for start in ((2, 8, 13)[i] * 4 for i in range(3)):
        changed = [x.clone() for x in tensors]
        changed[which][:, :, start : start + 4] = torch.tensor([3e38, -3e38]).repeat(8)
        got, lse = run(changed, layout, torch.float32, impl=impl)
        rows, keys = unseen(layout, start, start + 4)
        if which in (0, 3):  # a row of its own sees what it sees: other rows, and keys that it does not see
            rows = torch.ones_like(rows)
            rows[start : start + 4] = False
            keys = ~layout.dense_mask()[start : start + 4].any(0)
        assert torch.equal(lse[:, :, rows], want_lse[:, :, rows])
        for name, a, b in zip(NAMES, got, want, strict=True):
            kept = rows if name in ("out", "dq") else keys
            assert kept.any() and torch.equal(a[:, :, kept], b[:, :, kept]), f"{name}, block at token {start}"


def test_nothing_of_size_s_squared_is_built():
    """The largest tensor made in forward and backward stays far below S x S elements."""
    layout = FrameLayout(64, 16)
    S = layout.sequence_length
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes() // t.element_size())
            return result

    q, k, v, grad = make(layout, heads=(1, 1))
    out, lse = (torch.empty_like(q), q.new_empty(q.shape[:3]))
    with Watch():
        composed.forward(q, k, v, out, lse, layout, 0.25, False)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        composed.backward(grad, q, k, v, out, lse, *grads, layout, 0.25, False)
    assert S * 16 <= largest <= S * S / 16


def test_empty_batch():
    layout = FrameLayout(3, 5)
    tensors = [x.requires_grad_() for x in make(layout, B=0)[:3]]
    out = frame_attention(*tensors, layout)
    assert out.shape == (0, 2, 30, 16)
    out.sum().backward()
    assert tensors[0].grad.shape == (0, 2, 30, 16)
    q, k, v, _ = make(FrameLayout(3, 5, noisy_copies=0), noisy_queries_only=True)
    k.requires_grad_()
    out = frame_attention(q, k, v, FrameLayout(3, 5, noisy_copies=0), noisy_queries_only=True)
    assert out.shape == (1, 2, 0, 16)
    out.sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))


def test_deterministic():
    layout = FrameLayout(9, 20, noisy_copies=2)
    tensors = make(layout, dtype=torch.bfloat16, heads=(4, 2))
    first, second = (run(tensors, layout, torch.bfloat16)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_the_batch_around_it():
    layout = FrameLayout(4, 33)
    q, k, v, _ = make(layout, B=3)
    whole = frame_attention(q, k, v, layout)
    assert torch.equal(whole[1:2], frame_attention(q[1:2], k[1:2], v[1:2], layout))


def test_generic_device_route_is_the_same_function(monkeypatch):
    """The matmul route that other devices take, run here on the CPU."""
    layout = FrameLayout(7, 18, frames_per_block=2, window=2, sink=1)
    tensors = make(layout, heads=(4, 2))
    want, _ = run(tensors, layout, torch.float32, impl="composed")
    monkeypatch.setattr(composed, "_flash_cpu", lambda q: False)
    got, _ = run(tensors, layout, torch.float32, impl="composed")
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-5)


# Of the CPU; Triton's interpreter has its own file.
REGISTERED = ["composed"] if _extension.library("cpu") else ["composed", "cpp"]


@pytest.mark.parametrize("impl", REGISTERED)
@pytest.mark.parametrize("layout", [FrameLayout(3, 5), FrameLayout(4, 6, 2, 2, True, 1, 1)], ids=str)
def test_opcheck(layout, impl):
    options = (
        layout.frames, layout.tokens_per_frame, layout.frames_per_block, layout.noisy_copies, layout.noisy_first,
        layout.window, layout.sink, 0.25, False, impl,
    )  # fmt: skip
    q, k, v, grad = make(layout, heads=(2, 1))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.frame_attention_fwd, (*inputs, *options))
    with torch.no_grad():
        out, lse = ops.frame_attention_fwd(q, k, v, *options)
        torch.library.opcheck(ops.frame_attention_bwd, (grad, q, k, v, out, lse, *options))


@pytest.mark.parametrize("impl", REGISTERED)
def test_compile_fullgraph_without_recompiling(impl):
    def step(q, k, v, frames, tokens):
        layout = FrameLayout(frames, tokens, noisy_copies=2, window=3)
        return frame_attention(q, k, v, layout, impl=impl).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for index, (frames, tokens, B) in enumerate(((4, 7, 3), (6, 11, 5), (9, 130, 7))):
        layout = FrameLayout(frames, tokens, noisy_copies=2, window=3)
        tensors = [x.requires_grad_() for x in make(layout, B=B)[:3]]
        expected = torch.autograd.grad(step(*tensors, frames, tokens), tensors)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            got = torch.autograd.grad(compiled(*tensors, frames, tokens), tensors)
        assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_autocast_lowers_the_inputs():
    layout = FrameLayout(3, 5)
    q, k, v, _ = make(layout)
    with torch.autocast("cpu", torch.bfloat16):
        out = frame_attention(q, k, v, layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, frame_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout))


def test_selective_checkpointing_can_save_it():
    """A policy that names the op sees it run once, not twice."""
    from torch.utils import checkpoint

    layout = FrameLayout(3, 5)
    tensors = [x.requires_grad_() for x in make(layout)[:3]]
    calls = 0
    original = composed.forward

    def counted(*args):
        nonlocal calls
        calls += 1
        return original(*args)

    context = lambda: checkpoint.create_selective_checkpoint_contexts([ops.frame_attention_fwd])  # noqa: E731
    composed.forward = counted
    try:
        checkpoint.checkpoint(
            lambda *a: frame_attention(*a, layout, impl="composed").sin(),
            *tensors,
            use_reentrant=False,
            context_fn=context,
        ).sum().backward()
    finally:
        composed.forward = original
    assert calls == 1


class Attend(torch.nn.Module):
    """A projection to q, k and v, and attention."""

    def __init__(self, layout, impl):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.layout, self.impl = layout, impl

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(2)
        return frame_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.layout, impl=self.impl)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "impl", [i for i in ("composed", "cpp", "triton") if i in ops.implementations(torch.device("cpu"))[0]]
)
def test_ddp_and_fsdp_give_the_plain_gradients(impl, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layout = FrameLayout(3, 5)
    x, plain = torch.randn(2, layout.sequence_length, 16), Attend(layout, impl)
    plain(x).square().sum().backward()
    want = [p.grad for p in plain.parameters()]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        state = plain.state_dict()
        sharded, parallel = Attend(layout, impl), Attend(layout, impl)
        for module in (sharded, parallel):
            module.load_state_dict(state)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        parallel = torch.nn.parallel.DistributedDataParallel(parallel)
        for module in (sharded, parallel):
            module(x).square().sum().backward()
            for p, w in zip(module.parameters(), want, strict=True):
                got = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                assert torch.equal(got, w)
    finally:
        dist.destroy_process_group()


BAD = {
    "q: must be a tensor": lambda q, k, v: ("q", None, TypeError),
    r"q: must have shape \(B, Hq, S, D\), got float32": lambda q, k, v: ("q", q[0], ValueError),
    "q: dtype must be float32": lambda q, k, v: ("q", q.int(), TypeError),
    r"k: must have the dtype of q \(torch.float32\), got bfloat16": lambda q, k, v: ("k", k.bfloat16(), TypeError),
    "v: length must be layout.sequence_length = 30, got 29": lambda q, k, v: ("v", v[:, :, 1:], ValueError),
    "k: batch must be batch of q = 1, got 2": lambda q, k, v: ("k", k.repeat(2, 1, 1, 1), ValueError),
    "v: heads must be heads of k = 2, got 1": lambda q, k, v: ("v", v[:, :1], ValueError),
    "q: heads must be a multiple of the heads of k = 2, got 3": lambda q, k, v: ("q", q[:, [0, 0, 0]], ValueError),
    "k: head dim must be head dim of q = 16, got 8": lambda q, k, v: ("k", k[..., :8], ValueError),
    "layout: must be a FrameLayout, got int 3": lambda q, k, v: ("layout", 3, TypeError),
    "impl: must be one of .*, got 'magic'": lambda q, k, v: ("impl", "magic", ValueError),
    "impl: frame_attention cannot run 'cuda' on cpu: ": lambda q, k, v: ("impl", "cuda", ValueError),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_argument_rule_and_value(message):
    q, k, v, _ = make(FrameLayout(3, 5))
    name, value, error = BAD[message](q, k, v)
    arguments = {"q": q, "k": k, "v": v, "layout": FrameLayout(3, 5)} | {name: value}
    with pytest.raises(error, match=message):
        frame_attention(**arguments)


FAULTS = {
    "mask off by one block": ("first * unit,", "max(first - 1, 0) * unit,"),
    "noisy sees its own clean frame": ("past = index[None] < row", "past = index[None] <= row"),
    "window one too wide": ("past &= (index[None] >= row - layout.window)", "past &= (index[None] >= row - layout.window - 1)"),
    "window edge dropped": ("partial = old[None] >= row - layout.window", "partial = old[None] > row - layout.window"),
    "past one block short": ("full: list[tuple[int, int]] = [(0, first)]", "full: list[tuple[int, int]] = [(0, max(first - 1, 0))]"),
    "copies see each other": ("own = x[:, :, self.key_memory, group", "own = x[:, :, self.key_memory[-1:] * len(self.key_memory), group"),
    "wrong stream order": ("memory = [order[-1], *order[:-1]]", "memory = order"),
    "sink ignored": ("sink = min(layout.sink, first)", "sink = 0"),
    "past gradient dropped": ("dk_clean[:, :, a:b] += dk_part", "pass"),
    "shared edge gradient taken once": ("shared = shared.sum(dim=2)", "shared = shared[:, :, 0]"),
    "parts not reweighted": ("weights = (stacked - lse).exp_()", "weights = torch.ones_like(stacked)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_seeded_fault_is_caught(fault, seed_fault):
    """Each fault, put into the source of the composed route, makes the comparison fail."""
    seed_fault(ops, *FAULTS[fault])
    caught = 0
    for layout in (
        FrameLayout(20, 16, noisy_copies=2, noisy_first=True, window=3, sink=2),
        FrameLayout(20, 16, noisy_copies=2, noisy_first=True),
        FrameLayout(4, 130, noisy_copies=2),
    ):
        try:
            compare(make(layout), layout)
        except AssertionError:
            caught += 1
    assert caught, f"{fault}: not caught"
