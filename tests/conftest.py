"""Shared test set-up: the Triton interpreter where there is no GPU, poisoned memory, one thread, the `gpu` mark."""

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


def _global_state() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "folder": os.getcwd(),
    }


def _restore(state: dict[str, object]) -> None:
    torch.set_num_threads(state["threads"])
    torch.set_default_dtype(state["dtype"])
    torch.set_grad_enabled(state["gradients"])
    os.chdir(state["folder"])


@pytest.fixture(autouse=True)
def poison():
    """Deterministic mode fills torch.empty with NaN, so an element that nobody writes cannot pass for a zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    before = _global_state()
    yield
    torch.use_deterministic_algorithms(False)
    after = _global_state()
    _restore(before)
    assert after == before, f"the test leaves behind {after}, found {before}: others would depend on the order"
    if torch.cuda.is_available():  # several processes share the GPU
        torch.cuda.empty_cache()
