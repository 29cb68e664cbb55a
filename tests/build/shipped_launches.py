"""Every launch configuration the package ships, as launches on meta tensors: what the compile gate compiles.

An op takes part by a function (architecture) -> {name: Launch} in OPS. Names must differ; configurations that two
sizes share need only be listed once.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from sae_kernels import FrameLayout
from sae_kernels._launch import Launch


def frame_attention(architecture: int) -> dict[str, Launch]:
    from sae_kernels.frame_attention import configs
    from sae_kernels.frame_attention import triton as kernels

    cases = [(torch.bfloat16, D, P, None) for D in (64, 128, 256) for P in (200, 16)]
    cases += [(torch.float32, D, 200, None) for D in (64, 128, 256)]
    if architecture == 90:
        cases += [(torch.bfloat16, 128, 200, 2), (torch.float16, 64, 200, None)]
    launches: dict[str, Launch] = {}
    for dtype, D, P, window in cases:
        layout = FrameLayout(3, P, window=window)
        q = torch.empty(1, 4, layout.sequence_length, D, dtype=dtype, device="meta")
        k = torch.empty(1, 2, layout.sequence_length, D, dtype=dtype, device="meta")
        lse = torch.empty(q.shape[:3], device="meta")
        plan = kernels.plan_forward(q, k, k, q, lse, layout, D**-0.5, False, architecture)
        tensors = kernels.Gradients(q, q, k, k, q, lse, lse, q, k, k)
        plan += kernels.plan_backward(tensors, layout, D**-0.5, False, architecture)
        if architecture == 90 and (D, P) == (128, 16):
            # Not shipped, but a measured table may choose it.
            config = replace(configs.attention_config(90, dtype, D, P, "dkdv"), descriptors=True)
            configured = (None, config, None)
            plan.append(kernels.plan_backward(tensors, layout, D**-0.5, False, architecture, configured)[1])
        # What a descriptor cannot address goes through pointers, in the same tiles.
        plan += [_through_pointers(launch) for launch in plan if launch.args.get("TMA")]
        for launch in plan:
            tile = launch.args["BM"], launch.args.get("BN"), launch.num_warps, launch.num_stages
            name = (
                f"{launch.kernel.__name__}-{str(dtype)[6:]}-D{D}-{'x'.join(map(str, tile[:2]))}-w{tile[2]}-s{tile[3]}"
            )
            name += ("-boxes" if launch.args.get("TMA") else "") + ("-window" if window is not None else "")
            if name in launches or (dtype == torch.float16 and "fwd" not in launch.kernel.__name__):
                continue
            launches[name] = launch
    return launches


def _through_pointers(launch: Launch) -> Launch:
    args = {name: getattr(value, "base", value) for name, value in launch.args.items()}
    return replace(launch, args=args | {"TMA": False})


def causal_conv3d(architecture: int) -> dict[str, Launch]:
    from sae_kernels.causal_conv3d import triton as kernels

    # (dtype, Cin, Cout, Y and X, scales): with scales dgrad makes last_scale's gradient too.
    # No box tiles 17 x 17 pixels; 256 channels at 4 x 4 are summed in parts, by programs of their own. At 8 x 8, 2048
    # produced channels make tiles enough for one program to sum its parts.
    cases = [(torch.bfloat16, 128, 128, 16, True), (torch.bfloat16, 128, 128, 16, False)]
    cases += [(torch.bfloat16, 256, 256, 4, True)]
    if architecture >= 90:
        cases += [(torch.bfloat16, 128, 128, 17, False)]
    if architecture == 90:
        cases += [(torch.bfloat16, 128, 128, 17, True), (torch.bfloat16, 256, 2048, 8, True)]
        cases += [(torch.bfloat16, 64, 64, 8, False), (torch.bfloat16, 5, 64, 32, False)]
        cases += [(torch.bfloat16, 64, 4, 32, False), (torch.float32, 64, 64, 16, True)]
    layout = FrameLayout(4, 1)
    launches, seen = {}, set()
    for dtype, Cin, Cout, size, scales in cases:
        video = functools.partial(_video, size, dtype)
        weight = torch.empty(Cout, Cin, 3, 3, 3, dtype=dtype, device="meta")
        history = video(Cin, 2) if architecture == 90 and Cin == Cout else None
        scale = torch.empty(2, 8, dtype=dtype, device="meta") if scales else None
        operands = (video(Cin, 8), weight, scale, scale, history)
        plan, _, past = kernels.plan_forward(*operands, 1.0, layout, architecture, keep_past=scales)
        # An odd number of image channels is the network's first layer: nothing asks for its data gradient.
        mask = (Cin > 5, True, scales, scales, history is not None)
        plan += kernels.plan_backward(video(Cout, 8), *operands, past, 1.0, layout, mask, architecture)[0]
        for launch in plan:
            args = launch.args
            direction = {0: "fwd", 1: "dgrad"}.get(args.get("DIRECTION"), "")
            direction += (
                "_dot" if args.get("DOT") and direction else "_history" if direction and not args["LAST"] else ""
            )
            tile = "x".join(str(args[key]) for key in ("BM", "BN", "BK") if key in args)
            if "BX" in args:
                direction = direction or str(args["PAST"])
                direction += "_boxes" * (args["BX"] > 0)
            if "PARTS" in args:
                direction += "_parts" * args["PARTS"] + "_spread" * args["SPREAD"]
            # Without products there is nothing to ask of the matrix instructions.
            label = str(dtype)[6:] if "BK" in args or "SUM" in args else "combine"
            name = f"{launch.kernel.__name__}-{direction or args.get('PAST')}-{label}-{tile}"
            name += f"-w{launch.num_warps}-s{launch.num_stages}"
            # One pass over streams, one of history and one wide pair of weight gradients stand for all.
            whole = "DIRECTION" in args and "history" not in name
            twin = (
                name
                if whole
                else (dtype, launch.kernel.__name__, args.get("PAST"), args.get("DIRECTION"), args.get("BX", 0) > 0)
            )
            if twin in seen:
                continue
            seen.add(twin)
            if dtype == torch.float32 and "PRECISION" in args:
                # Without TF32, products are FMAs of registers.
                launch = replace(launch, args=args | {"PRECISION": "ieee"})
            launches[name + ("" if Cin > 5 and Cout > 5 else "-unaligned")] = launch
    return launches


def _video(size: int, dtype: torch.dtype, channels: int, frames: int) -> torch.Tensor:
    shape = (2, channels, frames, size, size)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last_3d)


def least_copies(op: str, launch: Launch, architecture: int) -> int:
    """16-byte asynchronous copies that a thread issues if every tile of a loop with matrix products is pipelined."""
    args = launch.args
    if op != "causal_conv3d":
        return 0 if args.get("TMA") else 1
    if "BK" not in args:
        return 0
    size = args["w_ptr" if "w_ptr" in args else "g_ptr"].element_size()
    # Before wgmma, a first operand that lies transposed goes through registers.
    lines = args["BN"] if "g_ptr" in args and architecture != 90 else args["BM"] + args["BN"]
    one_stage = lines * args["BK"] * size // (16 * 32 * launch.num_warps)
    loops = int(args["PAST"]) + int(args["LAST"]) if "LAST" in args else 1
    if args["BX"] > 0:
        # Only history goes through pointers.
        loops = int(args.get("HAS_HISTORY", args["PAST"]))
    return one_stage * loops * launch.num_stages


def least_boxes(op: str, launch: Launch) -> int:
    """Bulk copies of tiles by the copy engine: of two operands, in each stage of each loop."""
    args = launch.args
    if op == "frame_attention" and args.get("TMA"):
        # Loops over full and over masked tiles, and both again for results that are NaN.
        return 2 * launch.num_stages * 4
    if op != "causal_conv3d" or args.get("BX", 0) == 0:
        return 0
    return 2 * launch.num_stages * (int(args["PAST"]) + int(args["LAST"]) if "LAST" in args else 1)


def token_noise(architecture: int) -> dict[str, Launch]:
    from sae_kernels.token_noise import triton as kernels

    launches = {}
    for label, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = torch.empty(2, 6, 4096, dtype=dtype, device="meta")
        (launches[f"token_noise_eps_kernel-{label}"],) = kernels.plan_eps(out, 1, 2)
        for inner, per_pixel in ((4096, False), (4095, True)):
            x = torch.empty(2, 3, inner, dtype=dtype, device="meta")
            scale = torch.empty(1, 6, inner if per_pixel else 1, device="meta")
            out = torch.empty(2, 6, inner, dtype=dtype, device="meta")
            (launch,) = kernels.plan_forward(x, scale, scale, out, out if per_pixel else None, 2, 1, 2)
            launches[f"token_noise_fwd_kernel-{label}{'-unaligned' if per_pixel else ''}"] = launch
    return launches


def activations(architecture: int) -> dict[str, Launch]:
    from sae_kernels.activations import triton as kernels

    launches = {}

    def add(label: str, plan: list[Launch]) -> None:
        for launch in plan:
            launches[f"{launch.kernel.__name__}-{label}"] = launch

    # One architecture stands for all in fp32: nothing here but the width of accesses depends on the dtype.
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for label in dtypes if architecture == 90 else ("bf16",):
        dtype = dtypes[label]
        x = _video(8, dtype, 256, 4)
        weights = {"weight_a": 1.0, "weight_b": 1.0, "limit": 1.0}
        needs = {"NEEDS_A": True, "NEEDS_B": True}
        to_both = {"grad_a_ptr": x, "grad_b_ptr": x} | needs
        add(label, kernels.plan_elementwise(kernels.mp_silu_fwd_kernel, x, x_ptr=x, out_ptr=x, gain=1.0))
        add(label, kernels.plan_elementwise(kernels.mp_silu_bwd_kernel, x, grad_ptr=x, x_ptr=x, out_ptr=x, gain=1.0))
        for clip in (False, True):
            forward = {"a_ptr": x, "b_ptr": x, "out_ptr": x, "CLIP": clip} | weights
            backward = {"grad_ptr": x, "y_ptr": x, "CLIP": clip} | to_both | weights
            name = f"{label}{'-clip' if clip else ''}"
            add(name, kernels.plan_elementwise(kernels.mp_sum_fwd_kernel, x, **forward))
            add(name, kernels.plan_elementwise(kernels.mp_sum_bwd_kernel, x, **backward))
        wide = _video(8, dtype, 512, 4)
        for backward in (False, True):
            name = f"{label}-{'backward' if backward else 'forward'}"
            add(name, kernels.plan_cat(x, x, 1, 1.0, 1.0, wide, backward))
        for order, x in (
            ("last", _video(8, dtype, 256, 4)),
            ("first", torch.empty(2, 20, 4, 8, 8, dtype=dtype, device="meta")),
        ):
            name, scale = f"{label}-{order}", torch.empty(2, 4, x.shape[1], dtype=dtype, device="meta")
            t, walk = torch.empty(2, 4, device="meta"), {"walk": True, "NEEDS_X": True, "NEEDS_SCALE": True}
            kernel, args = kernels.modulated_silu_fwd_kernel, {"x_ptr": x, "scale_ptr": scale, "gain": 1.0}
            add(name, kernels.plan_frames(kernel, x, ("out_ptr",), out_ptr=x, **args))
            args |= {"grad_ptr": x, "grad_x_ptr": x, "grad_scale_ptr": scale} | walk
            add(name, kernels.plan_frames(kernels.modulated_silu_bwd_kernel, x, ("grad_x_ptr",), **args))
            kernel, args = kernels.mp_sum_frames_fwd_kernel, {"a_ptr": x, "b_ptr": x, "t_ptr": t}
            add(name, kernels.plan_frames(kernel, x, ("out_ptr",), out_ptr=x, **args))
            args |= {"grad_ptr": x, "grad_a_ptr": x, "grad_b_ptr": x, "part_ptr": t, "NEEDS_T": True} | needs
            add(name, kernels.plan_frames(kernels.mp_sum_frames_bwd_kernel, x, ("grad_a_ptr",), **args))
        channels_last, first = torch.channels_last_3d, torch.contiguous_format
        sizes = ((512, channels_last), (5000, first)) if label == "fp32" else ((64, channels_last), (512, first))
        for channels, memory_format in sizes:
            x = torch.empty(2, channels, 4, 8, 8, dtype=dtype, device="meta", memory_format=memory_format)
            rms = torch.empty(2, 1, 4, 8, 8, device="meta")
            for kernel, inputs in (
                (kernels.pixel_norm_fwd_kernel, {"x_ptr": x}),
                (kernels.pixel_norm_bwd_kernel, {"grad_ptr": x, "y_ptr": x}),
                (kernels.pixel_norm_fwd_kernel, {"x_ptr": x, "act_ptr": x}),
                (kernels.pixel_norm_bwd_kernel, {"grad_ptr": x, "y_ptr": x, "grad_act_ptr": x}),
            ):
                silu = "-silu" if {"act_ptr", "grad_act_ptr"} & set(inputs) else ""
                order = "first" if memory_format == first else "last"
                plan = kernels.plan_norm(kernel, 1, 1e-4, out_ptr=x, rms_ptr=rms, **inputs)
                add(f"{label}-{channels}-{order}{silu}", plan)
    return launches


def weight_norm(architecture: int) -> dict[str, Launch]:
    from sae_kernels.weight_norm import triton as kernels

    launches = {}
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    for label in dtypes if architecture == 90 else ("bf16",):
        w = torch.empty(256, 128, 3, 3, 3, dtype=dtypes[label], device="meta")
        column = torch.empty(256, device="meta")
        backward = {"grad_ptr": w, "grad_w_ptr": w, "part_ptr": column, "NEEDS_W": True, "NEEDS_GAIN": True}
        plan = kernels.plan_weight(kernels.normalize_weight_fwd_kernel, w, column, 1.0, out_ptr=w, rms_ptr=column)
        plan += kernels.plan_weight(kernels.normalize_weight_bwd_kernel, w, column, 1.0, rms_ptr=column, **backward)
        launches |= {f"{launch.kernel.__name__}-{label}": launch for launch in plan}
    return launches


def is_wide(op: str, name: str) -> bool:
    """Whether a memory-bound kernel must write 16 bytes at a time (and read so, if it reads)."""
    if op == "token_noise":
        return not name.endswith("-unaligned")
    # Channels that lie apart are not read together.
    return op in ("activations", "weight_norm") and not (name.startswith("pixel_norm") and "-first" in name)


def qk_prepare(architecture: int) -> dict[str, Launch]:
    from sae_kernels.qk_prepare import triton as kernels

    # (dtype, D, channels of each axis, heads of q and of k, explicit positions, interleaved pairs)
    cases = [
        (torch.bfloat16, 64, (64,), 4, 4, False, False),
        (torch.bfloat16, 128, (44, 42, 42), 12, 12, False, True),
        (torch.bfloat16, 128, (128,), 28, 4, True, False),
        (torch.float32, 256, (128,), 2, 2, False, False),
        (torch.float32, 128, (44, 42, 42), 2, 2, True, True),
        (torch.float16, 80, (), 8, 8, False, False),
        (torch.float16, 1024, (1024,), 1, 1, False, True),
    ]
    launches = {}
    for dtype, D, axes, q_heads, k_heads, explicit, interleaved in cases:
        heads = (q_heads, k_heads, k_heads)
        packed = torch.empty(2, 96, sum(heads), D, dtype=dtype, device="meta").transpose(1, 2)
        parts = packed.split(heads, dim=1)
        outs = [torch.empty(2, 96, h, D, dtype=dtype, device="meta").transpose(1, 2) for h in heads]
        rms = torch.empty(2, sum(heads), 96, device="meta").split(heads, dim=1)
        positions = torch.empty(2, 96, len(axes), dtype=torch.int64, device="meta") if explicit else None
        options = (positions, (3, 16, 4, 0), axes, 1e4, interleaved, 1e-4)
        plan = kernels.plan_forward(parts, outs, rms, *options)
        plan += kernels.plan_backward(outs, outs, rms, parts, *options)
        for launch in plan:
            name = f"{launch.kernel.__name__}-{_LABELS[dtype]}-D{D}-axes{len(axes)}"
            launches[f"{name}{'-positions' * explicit}{'-interleaved' * interleaved}"] = launch
    return launches


# Not torch's names: "float16" in a name asks the gate for matrix instructions.
_LABELS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
OPS = {
    "frame_attention": frame_attention,
    "causal_conv3d": causal_conv3d,
    "token_noise": token_noise,
    "activations": activations,
    "weight_norm": weight_norm,
    "qk_prepare": qk_prepare,
}
