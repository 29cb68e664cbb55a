"""Shared test set-up: the Triton interpreter where there is no GPU, poisoned memory, fixed threads, the `gpu` mark."""

from __future__ import annotations

import os

if "TRITON_INTERPRET" not in os.environ:
    import torch

    # Triton decides when it is imported; the interpreter runs its kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # Two test processes on two cores: one thread each is faster than four threads.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def poison():
    """Deterministic mode fills torch.empty with NaN, so an element that nobody writes cannot pass for a zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():  # several processes share the GPU
        torch.cuda.empty_cache()
