"""What every test has: deterministic kernels, under which unloaded memory reads as NaN."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import diffusers  # noqa: F401
import pytest
import torch

import diffusers_offload  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly on a busy machine
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param
