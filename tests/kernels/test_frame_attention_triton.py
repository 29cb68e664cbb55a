"""The Triton kernels of frame_attention in the CPU interpreter, against the reference in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
from attention_cases import STRIDES, compare, launch, make, restride
from attention_layouts import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_kernels import FrameLayout, _interpreter, frame_attention
from sae_kernels.frame_attention import configs, ops
from sae_kernels.frame_attention.configs import AttentionConfig

triton = pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the gpu tests run the compiled kernels", allow_module_level=True)

import triton.language as tl  # noqa: E402

from sae_kernels.frame_attention import triton as kernels  # noqa: E402
from sae_kernels.frame_attention.triton import plan, primitives  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Tiles (rows, keys) as large as the sequences, smaller than a block, and of either shape.
TILES = ((16, 16), (32, 16), (16, 32), (64, 32), (32, 64))

# (T, P, frames_per_block, K, noisy_first, window, sink): blocks of less than, as much as and more than a tile; streams
# that tiles do not divide; short last blocks; every kind of window.
LAYOUTS = [
    (1, 1, 1, 1, False, None, 0),
    (1, 37, 1, 1, False, None, 0),
    (9, 1, 1, 1, True, None, 0),
    (40, 1, 4, 1, True, None, 0),
    (17, 3, 1, 1, False, None, 0),
    (17, 3, 1, 2, True, None, 0),
    (4, 16, 1, 1, False, None, 0),
    (4, 16, 1, 1, True, None, 0),
    (4, 16, 1, 0, False, None, 0),
    (3, 32, 1, 1, False, None, 0),
    (2, 33, 1, 1, False, None, 0),
    (3, 47, 1, 1, True, None, 0),
    (2, 80, 1, 1, False, None, 0),
    (5, 7, 1, 3, False, None, 0),
    (5, 7, 1, 3, True, None, 0),
    (6, 5, 2, 1, False, None, 0),
    (7, 5, 3, 1, False, None, 0),
    (7, 6, 3, 2, True, None, 0),
    (8, 4, 5, 1, False, None, 0),
    (3, 9, 9, 1, False, None, 0),
    (11, 5, 1, 0, False, None, 0),
    (11, 5, 2, 0, False, 2, 0),
    (13, 3, 1, 1, False, 0, 0),
    (9, 9, 1, 1, False, 0, 1),
    (9, 9, 1, 1, False, 1, 0),
    (9, 9, 1, 1, True, 2, 0),
    (9, 9, 1, 2, False, 2, 1),
    (3, 40, 1, 1, False, 1, 0),
    (4, 24, 1, 1, True, 1, 1),
    (13, 3, 2, 1, True, 1, 5),
    (13, 3, 2, 2, False, 3, 1),
    (12, 4, 1, 1, False, 3, 3),
    (12, 4, 1, 1, True, 100, 0),
    (12, 4, 3, 1, False, 0, 2),
    (10, 6, 1, 1, False, 4, 100),
    (20, 2, 1, 3, True, 5, 2),
    (5, 20, 2, 1, False, 1, 1),
    (16, 4, 1, 1, False, None, 0),
    (6, 11, 1, 2, False, None, 3),
    (2, 50, 1, 2, True, 1, 0),
]
CASES = [
    (
        layout,
        dtype,
        STRIDES[(i + j) % len(STRIDES)],
        TILES[(i + 2 * j) % len(TILES)],
        (i + j) % 3 == 0,
        1 + (i + j) % 4 // 3,
    )
    for i, layout in enumerate(LAYOUTS)
    for j, dtype in enumerate(DTYPES)
]


def identify(case) -> str:
    layout, dtype, strides, (BM, BN), noisy_queries_only, group = case
    numbers = "-".join(f"{n}{v}" for n, v in zip(("T", "P", "f", "K", "nf", "w", "s"), layout, strict=True))
    return f"{numbers}-{str(dtype)[6:]}-{strides.replace(' ', '_')}-{BM}x{BN}-G{group}{'-noisy' if noisy_queries_only else ''}"


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_forward_and_gradients(case):
    fields, dtype, strides, tiles, noisy_queries_only, group = case
    layout = FrameLayout(*fields)
    noisy_queries_only = noisy_queries_only and layout.noisy_copies > 0
    tensors = make(layout, heads=(group, 1), dtype=dtype, noisy_queries_only=noisy_queries_only)
    tensors = restride(tensors, strides)
    result = launch(kernels, tensors, layout, 0.25, noisy_queries_only, AttentionConfig(*tiles, 4, 1))
    compare(*result, tensors, layout, 0.25, noisy_queries_only)


@given(
    layout=layouts(9, tokens=9, blocks=4),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    D=st.sampled_from([8, 16, 24, 40]),
    dtype=st.sampled_from(DTYPES),
    strides=st.sampled_from(STRIDES),
    noisy_queries_only=st.booleans(),
    tiles=st.sampled_from(TILES),
    descriptors=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_layout(layout, heads, D, dtype, strides, noisy_queries_only, tiles, descriptors, seed):
    noisy_queries_only = noisy_queries_only and layout.noisy_copies > 0
    tensors = make(layout, heads=heads, D=D, dtype=dtype, noisy_queries_only=noisy_queries_only, seed=seed)
    tensors = restride(tensors, strides)
    config = AttentionConfig(*tiles, 4, 1, descriptors)
    result = launch(kernels, tensors, layout, D**-0.5, noisy_queries_only, config)
    compare(*result, tensors, layout, D**-0.5, noisy_queries_only)


@pytest.mark.parametrize("D", [4, 33, 64, 80, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims(D, dtype):
    layout = FrameLayout(3, 9, window=1)
    tensors = make(layout, heads=(1, 1), D=D, dtype=dtype)
    compare(*launch(kernels, tensors, layout, D**-0.5, False), tensors, layout, D**-0.5, False)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    layout = FrameLayout(4, 9, noisy_copies=2)
    tensors = make(layout)
    compare(*launch(kernels, tensors, layout, scale, False), tensors, layout, scale, False)


def run(tensors, layout, **options):
    *inputs, grad = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = frame_attention(*inputs, layout, return_lse=True, impl="triton", **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)], lse


@pytest.mark.parametrize("noisy_queries_only", [False, True])
def test_public_function(noisy_queries_only):
    layout = FrameLayout(4, 9, noisy_first=True)
    tensors = make(layout, heads=(4, 2), B=2, noisy_queries_only=noisy_queries_only)
    result = run(tensors, layout, noisy_queries_only=noisy_queries_only)
    compare(*result, tensors, layout, 0.25, noisy_queries_only)


def test_expanded_gradient():
    layout = FrameLayout(3, 9)
    q, k, v, grad = make(layout)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    got = torch.autograd.grad(frame_attention(*inputs, layout, impl="triton").sum(), inputs)
    want = torch.autograd.grad(frame_attention(*inputs, layout, impl="reference"), inputs, torch.ones_like(grad))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=2e-6)


def test_batch_does_not_change_a_sequence():
    layout = FrameLayout(3, 9)
    tensors = make(layout, heads=(2, 1), B=3)
    together, lse = run(tensors, layout)
    for b in range(3):
        alone, alone_lse = run([x[b : b + 1] for x in tensors], layout)
        assert torch.equal(alone_lse, lse[b : b + 1])
        assert all(torch.equal(a, t[b : b + 1]) for a, t in zip(alone, together, strict=True))


@triton.jit
def place_kernel(slots_ptr, heads_ptr, slots, all_heads, section):
    program = tl.program_id(0)
    slot, head = primitives.place_of(program, slots, all_heads, section)
    tl.store(slots_ptr + program, slot)
    tl.store(heads_ptr + program, head)


@pytest.mark.parametrize(("heads", "section"), [(5, 1), (5, 2), (6, 3), (4, 4)])
def test_heaviest_programs_start_first(heads, section):
    slots = 4
    slot, head = (torch.empty(slots * heads, dtype=torch.int32) for _ in range(2))
    place_kernel[(slots * heads,)](slot, head, slots, heads, section)
    order = list(zip(slot.tolist(), head.tolist(), strict=True))
    assert sorted(order) == [(s, h) for s in range(slots) for h in range(heads)]
    for start in range(0, heads, section):
        width = min(section, heads - start)
        part = order[start * slots : (start + width) * slots]
        assert [s for s, _ in part] == [s for s in range(slots) for _ in range(width)]
        assert {h for _, h in part} == set(range(start, start + width))


@pytest.mark.parametrize("section_heads", [1, 2, 3])
def test_order_of_programs_does_not_change_results(section_heads, monkeypatch):
    layout = FrameLayout(2, 9)
    tensors = make(layout, heads=(5, 5), D=16)
    want, lse = run(tensors, layout)
    monkeypatch.setattr(plan, "SECTION_BYTES", section_heads * 2 * layout.sequence_length * 16 * 4)
    got, got_lse = run(tensors, layout)
    assert torch.equal(lse, got_lse)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_further_apart_than_32_bits_reach(monkeypatch):
    layout = FrameLayout(3, 9, window=1)
    tensors = make(layout)
    want, _ = run(tensors, layout)
    monkeypatch.setattr(plan, "MAX_TILE", 2**31)
    assert all(torch.equal(a, b) for a, b in zip(run(tensors, layout)[0], want, strict=True))


def test_tensor_of_more_than_2_to_the_31_elements():
    layout = FrameLayout(2, 9)
    small = make(layout, heads=(1, 1), B=2, dtype=torch.bfloat16)
    torch.utils.deterministic.fill_uninitialized_memory = False  # only the pages that are written get memory
    far = []
    for x in small[:3]:
        view = torch.empty(2**31 + x[0].numel(), dtype=x.dtype).as_strided(x.shape, (2**31, *x.stride()[1:]))
        far.append(view.copy_(x))
    out = frame_attention(*far, layout, impl="triton")
    assert torch.equal(out, frame_attention(*small[:3], layout, impl="triton"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinities_and_nans_stay_where_the_mask_keeps_them():
    """What a row does not see cannot reach it, not even as 0 * nan; tiles read past a stream's end all the same."""
    layout = FrameLayout(4, 9, noisy_copies=2)
    q, k, v, _ = make(layout)
    clean = frame_attention(q, k, v, layout, impl="triton")
    last = slice(layout.sequence_length - 9, None)  # the last block of copy 2
    k[:, :, last], v[:, :, last] = float("inf"), float("nan")
    spoiled = frame_attention(q, k, v, layout, impl="triton")
    # Rows of one tile share products with masked keys, so what is asked is that other streams' rows are untouched.
    assert torch.equal(spoiled[:, :, : layout.sequence_length - 36], clean[:, :, : layout.sequence_length - 36])


def test_opcheck():
    layout = FrameLayout(3, 5, window=1, sink=1)
    q, k, v, grad = make(layout)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    options = (3, 5, 1, 1, False, 1, 1, 0.25, False, "triton")
    torch.library.opcheck(ops.frame_attention_fwd, (*inputs, *options))
    with torch.no_grad():
        out, lse = ops.frame_attention_fwd(q, k, v, *options)
    torch.library.opcheck(ops.frame_attention_bwd, (grad, q.detach(), k.detach(), v.detach(), out, lse, *options))


def test_compiled_without_recompiling_for_other_sizes():
    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def attend(q, k, v, layout):
        return frame_attention(q, k, v, layout, impl="triton")

    def step(layout, B):
        *inputs, grad = make(layout, heads=(2, 1), B=B)
        inputs = [x.requires_grad_() for x in inputs]
        got = attend(*inputs, layout)
        want = frame_attention(*inputs, layout, impl="triton")
        assert torch.equal(got, want)
        for g, w in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
            assert torch.equal(g, w)

    step(FrameLayout(3, 5), 3)
    with torch.compiler.set_stance("fail_on_recompile"):
        step(FrameLayout(4, 6), 5)


def test_saved_by_selective_checkpointing():
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    layout = FrameLayout(3, 5)
    *inputs, grad = make(layout)
    inputs = [x.requires_grad_() for x in inputs]
    want = torch.autograd.grad(frame_attention(*inputs, layout, impl="triton"), inputs, grad)
    runs = []

    def policy(context, op, *args, **kwargs):
        if op is ops.frame_attention_fwd:
            runs.append(context.is_recompute)
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    out = checkpoint(
        lambda *a: frame_attention(*a, layout, impl="triton"),
        *inputs,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(out, inputs, grad), want, strict=True))
    assert False in runs


def test_autocast():
    layout = FrameLayout(3, 5)
    q, k, v, _ = make(layout)
    with torch.autocast("cpu", torch.bfloat16):
        out = frame_attention(q, k, v, layout, impl="triton")
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, frame_attention(*low, layout, impl="triton"))


def test_empty_batch():
    layout = FrameLayout(3, 5)
    q = torch.randn(0, 2, 30, 16, requires_grad=True)
    out = frame_attention(q, q, q, layout, impl="triton")
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


def test_what_cannot_run_says_why(monkeypatch):
    layout = FrameLayout(3, 5)
    q, k, v, _ = make(layout, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cannot run 'triton' on cpu: it computes in float32"):
        frame_attention(q, k, v, layout, impl="triton")
    q, k, v, _ = make(layout, D=264)
    with pytest.raises(ValueError, match="head dims up to 256"):
        frame_attention(q, k, v, layout, impl="triton")
    q, k, v, _ = make(layout)
    with pytest.raises(ValueError, match="k: the kernels need a contiguous last dimension"):
        launch(kernels, [q, torch.empty(1, 1, 30, 32)[..., ::2], v, q], layout, 0.25, False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a CUDA device, or TRITON_INTERPRET=1"):
        frame_attention(q, k, v, layout, impl="triton")


def test_tf32_only_where_pytorch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, allowed in (("ieee", False), ("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            for dtype in (torch.float32, torch.bfloat16):
                q = make(FrameLayout(2, 3), dtype=dtype)[0]
                args = kernels.plan_forward(q, q, q, q, q, FrameLayout(2, 3), 1.0, False, 90)[0].args
                assert (args["PRECISION"] == "tf32") == (allowed and dtype == torch.float32)
    finally:
        matmul.fp32_precision = before


def test_configurations_depend_on_what_they_say():
    for architecture, dtype, D, block, direction in itertools.product(
        (80, 86, 89, 90, 100, 120), DTYPES, (16, 64, 72, 128, 256), (1, 64, 1560), configs.ATTENTION_DIRECTIONS
    ):
        config = configs.attention_config(architecture, dtype, D, block, direction)
        assert max(config.block_m, config.block_n) <= plan.MAX_TILE
        assert config == configs.attention_config(architecture, dtype, D, block, direction)
    with pytest.raises(ValueError, match="direction: must be one of"):
        configs.attention_config(90, torch.float16, 64, 64, "sideways")
    with pytest.raises(ValueError, match="block_m: must be a power of two, got 96"):
        AttentionConfig(96, 64, 4, 2)


def test_sizes_pick_no_other_binary():
    """Everything that Triton compiles for is the same at other sizes, batches and alignments of them."""
    keys = set()
    for frames, tokens, copies, B, D in ((21, 1560, 1, 1, 72), (1, 200, 0, 3, 72), (3, 401, 2, 7, 72)):
        layout = FrameLayout(frames, tokens, noisy_copies=copies)
        q = torch.empty(B, 4, layout.sequence_length, D, dtype=torch.bfloat16, device="meta")
        lse = torch.empty(q.shape[:3], device="meta")
        launches = kernels.plan_forward(q, q, q, q, lse, layout, 0.1, False, 90)
        given = kernels.Gradients(q, q, q, q, q, lse, lse, q, q, q)
        launches += kernels.plan_backward(given, layout, 0.1, False, 90)
        keys.add(
            tuple(
                (
                    x.kernel.__name__,
                    x.num_warps,
                    x.num_stages,
                    *((n, v) for n, v in x.args.items() if n.isupper() and n not in "NUW"),
                )
                for x in launches
            )
        )
    assert len(keys) == 1


def test_bfloat16_rounding_of_the_interpreter():
    x = torch.cat(
        [torch.randn(4096), torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.3e38, 1e-40, 1.00390625])]
    )
    want = x.bfloat16().view(torch.int16).numpy().view("uint16")
    assert (_interpreter.round_to_bfloat16(x.numpy()) == want).all()
    assert _interpreter.round_to_bfloat16(torch.tensor([float("nan")]).numpy())[0] & 0x7FFF > 0x7F80
