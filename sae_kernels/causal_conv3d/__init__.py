"""Causal 3D convolution whose past taps are computed once and shared by the clean and all noisy streams.

What is not fused, and why. E are the bytes of one activation; the first convolution of a residual block stands between
two activations, `mp_silu(x)` before it and `mp_silu(y * scale)` (`modulated_silu`, one pass) behind it.

| activation               | passes over memory              | separate | fused | saved |
|--------------------------|---------------------------------|----------|-------|-------|
| before, forward          | read x, write a; read a         | 3 E      | 1 E   | 2 E   |
| before, backward         | write da; read da, x, write dx  | 4 E      | 2 E   | 2 E   |
| behind, sampling         | write y; read y, write z        | 3 E      | 1 E   | 2 E   |
| behind, training forward | the same; backward needs y      | 3 E      | 2 E   | 1 E   |
| behind, backward         | write dz; read dz, y, write dy  | 4 E      | 2 E   | 2 E   |

Before: a pixel is read once for each of 9 to 27 taps and each tile of output channels, and would be activated as often.
A step of 128 x 128 x 64 products takes an H100's multiprocessor 512 cycles, its 8192 activations, two special functions
each at 16 a cycle, 1024: twice the products to save 2 E. It also ends the way of operands from the copy engine to the
tensor cores, which is not through registers. In encoder blocks the activation costs but its own write, 1 E, because
`pixel_norm_silu` makes it from what it has read.

Behind, training: at 128 channels, 16 x 16 pixels, 8 clips of 16 frames in bf16, E is 16.8 MB, 3.9 us at 4.3 TB/s, and
one of the block's two convolutions 3 x 38.7 GFLOP, 193 us at 600 TFLOP/s: 3 E are 3 % of the block, for which the data
gradient would carry the activation's derivative and the sum of its scale's gradient beside 128 accumulators a thread.
Behind, sampling: past terms are computed once a frame, so an evaluation is a library conv2d of the last taps, which has
no such epilogue. One frame is 65 KB: there launches count and not bytes.
"""

from .api import causal_conv3d, past_term

__all__ = ["causal_conv3d", "past_term"]
