"""Throughput of ops, train step and sampling against their peers in one run. See `python -m benchmarks --help`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The profiler that counts memory and launches announces each start and stop; both are read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# A machine with a GPU may have the checkout and torch, and nothing installed.
for source in (ROOT / "python", ROOT):
    if str(source) not in sys.path:
        sys.path.insert(0, str(source))
