"""Every launch configuration the package ships, as launches on meta tensors: what the compile gate compiles.

An op takes part by a function (architecture) -> {name: Launch} in OPS. Names must differ; configurations that two
sizes share need only be listed once.
"""

from __future__ import annotations

import torch

from sae_kernels import FrameLayout
from sae_kernels._launch import Launch


def frame_attention(architecture: int) -> dict[str, Launch]:
    from sae_kernels.frame_attention import triton as kernels

    cases = [(torch.bfloat16, D, P, None) for D in (64, 128, 256) for P in (200, 16)]
    if architecture == 90:
        cases += [(torch.bfloat16, 128, 200, 2), (torch.float16, 64, 200, None), (torch.float32, 64, 200, None)]
    launches, seen = {}, set()
    for dtype, D, P, window in cases:
        layout = FrameLayout(3, P, window=window)
        q = torch.empty(1, 4, layout.sequence_length, D, dtype=dtype, device="meta")
        k = torch.empty(1, 2, layout.sequence_length, D, dtype=dtype, device="meta")
        lse = torch.empty(q.shape[:3], device="meta")
        plan = kernels.plan_forward(q, k, k, q, lse, layout, D**-0.5, False, architecture)
        plan += kernels.plan_backward(q, q, k, k, q, lse, lse, q, k, k, layout, D**-0.5, False, architecture)
        for launch in plan:
            tile = launch.args["BM"], launch.args.get("BN"), launch.num_warps, launch.num_stages
            key = (launch.kernel.__name__, dtype, D, window, tile)
            if key in seen or (dtype == torch.float16 and "fwd" not in launch.kernel.__name__):
                continue
            seen.add(key)
            name = (
                f"{launch.kernel.__name__}-{str(dtype)[6:]}-D{D}-{'x'.join(map(str, tile[:2]))}-w{tile[2]}-s{tile[3]}"
            )
            launches[name + ("-window" if window is not None else "")] = launch
    return launches


OPS = {"frame_attention": frame_attention}
