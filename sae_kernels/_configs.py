"""What the launch configurations of all ops share. The configurations are data: a pure function in an op's `configs.py`
picks one; nothing is timed at run time.

Timing at first use would let ranks of one job pick different tilings, and so round differently. Measured tables come
from `python -m sae_kernels.tune` and are read from the file that SAE_KERNELS_CONFIGS names. No choice depends on the
batch size, so a row's result does not depend on what else is in the batch.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

# Bytes of shared memory that a program may use, by compute capability times ten.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

# Multiprocessors of a device of each compute capability: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
MULTIPROCESSORS = {80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 120: 170}


def check_powers_of_two(config: object, *names: str) -> None:
    """Check sizes of tiles and numbers of warps."""
    for name in names:
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}: must be a power of two, got {value}")


def measured(table: str) -> list[dict]:
    """The entries of a table in the file that SAE_KERNELS_CONFIGS names; none without such a file or table."""
    path = os.environ.get("SAE_KERNELS_CONFIGS")
    return json.loads(Path(path).read_text()).get(table, []) if path else []
