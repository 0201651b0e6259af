"""The comparison that tests/gpu makes between devices, made on CPU: in half precision, and through the kernels."""

import pytest
import torch

from fairseq_moe.fused import launch
from fairseq_moe.modules import RouterMode, experts
from fairseq_moe.modules.kernels.table import Kernel
from tests.helpers.layer_cases import (
    LAYER_CASES,
    MODES,
    RECOMPUTED,
    assert_same_layer,
    layer_of,
    layer_results,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("name", LAYER_CASES)
def test_half_precision_is_near_float32(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layer, mode = layer_of(**LAYER_CASES[name]), MODES.get(name, RouterMode.TRAIN)
    expected, decision = layer_results(layer, dtype=torch.float32, device=CPU, rounded=dtype, mode=mode)
    found, _ = layer_results(layer, dtype=dtype, device=CPU, rounded=dtype, mode=mode, decision=decision)
    assert_same_layer(found, expected, tolerance=tolerance)
    with pytest.raises(AssertionError):
        assert_same_layer(found, expected, tolerance=1e-5)


@pytest.mark.parametrize("name", RECOMPUTED)
def test_layers_that_recompute_themselves_are_compared_with_those_that_do_not(name: str) -> None:
    results = [
        layer_results(
            layer_of(**LAYER_CASES[name] | {"recompute": recompute}), dtype=torch.float32, device=CPU
        )
        for recompute in (False, True)
    ]
    assert_same_layer(results[1][0], results[0][0], tolerance=1e-6)


@pytest.mark.parametrize("kernel", [Kernel.GROUPED, Kernel.TRITON])
@pytest.mark.parametrize(
    "name", ["branch, two experts", "capacity by probability", "swiglu experts and shared ones"]
)
def test_the_kernels_of_a_gpu_compute_the_same(
    name: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    layer = layer_of(**LAYER_CASES[name])
    expected, _ = layer_results(layer, dtype=torch.float32, device=CPU)
    monkeypatch.setattr(launch, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(experts, "choose_kernel", lambda *args, **kwargs: kernel)
    found, _ = layer_results(layer, dtype=torch.float32, device=CPU)
    assert_same_layer(found, expected, tolerance=1e-5)
