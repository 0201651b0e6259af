"""Every fused kernel, compiled, against its twin in plain torch on the same device, at real and at odd sizes."""

import pytest
import torch

from tests.helpers.kernel_cases import CASES
from tests.helpers.kernel_comparison import SIZES, TINY, Make, assert_as_twin

# Of the largest value of a result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_as_its_twin(name: str, size: str, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cpu" and name in ("nll", "half_adam"):
        pytest.skip("these take no twin by themselves")
    sizes = SIZES[size] if device.type == "cuda" else TINY
    assert_as_twin(CASES[name](Make(device, dtype), sizes), tolerance=TOLERANCE[dtype])
