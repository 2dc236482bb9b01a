"""What the tests on a GPU share.

`make test-gpu` runs them. To try them without a GPU, set GMPIPE_TEST_DEVICE=cpu: they then compare
the CPU with itself.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pipeline.tensors import computing_in

DEVICE = torch.device(os.environ.get("GMPIPE_TEST_DEVICE", "cuda"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that is compared with the CPU."""
    return DEVICE


@pytest.fixture(autouse=True)
def _on_a_gpu_in_float32(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip tests marked `cuda` where there is no GPU, and compute the others without TF32."""
    if request.node.get_closest_marker("cuda") is None:
        yield
        return
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with computing_in("float32"):
        yield
