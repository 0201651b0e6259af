"""What needs a GPU: skipped, and counted, where there is none. ``make test-gpu`` runs it.

``FAIRSEQ_MOE_GPU_TESTS_ON=cpu`` runs it on CPU, in small, so that a machine without a GPU shows that the tests run.
"""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ON_CPU = os.environ.get("FAIRSEQ_MOE_GPU_TESTS_ON") == "cpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and skip it without a device."""
    skipped = not (torch.cuda.is_available() or ON_CPU)
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(skipped, reason="no CUDA device"))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The first device; sums of half-precision products are taken in float32 everywhere."""
    if ON_CPU:
        return torch.device("cpu")
    # The twins are torch's own products, which may add partial sums up in half precision.
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    return torch.device("cuda", 0)


@pytest.fixture
def cuda() -> torch.device:
    """The first device, for what cannot be shown on CPU."""
    if ON_CPU:
        pytest.skip("needs a GPU itself")
    return torch.device("cuda", 0)
