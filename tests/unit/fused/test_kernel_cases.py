"""The comparison that tests/gpu makes of every kernel and its twin, made in small by the interpreter."""

import pkgutil
from dataclasses import replace

import pytest
import torch

import fairseq_moe.fused
from tests.helpers.kernel_cases import CASES
from tests.helpers.kernel_comparison import TINY, KernelCase, Make, assert_as_twin

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# What is no operation: the door to Triton, and kernels that the module of their operation calls.
NO_OPERATION = {"launch", "top_k_kernels", "weighted_activation_kernels"}


def test_every_operation_has_a_case() -> None:
    operations = {found.name for found in pkgutil.iter_modules(fairseq_moe.fused.__path__)} - NO_OPERATION
    assert {name for name in operations if not any(case.startswith(name) for case in CASES)} == set()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_its_twin(name: str, dtype: torch.dtype) -> None:
    assert_as_twin(CASES[name](Make(CPU, dtype), TINY), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_result_is_seen(name: str) -> None:
    case = CASES[name](Make(CPU, torch.float32), TINY)

    def wrong(index: int) -> KernelCase:
        def run() -> tuple[torch.Tensor | None, ...]:
            found = list(case.run())
            result = found[index]
            assert result is not None
            found[index] = result * 1.2 if result.is_floating_point() else result + 1
            return tuple(found)

        return replace(case, run=run, twin=case.twin or case.run)

    for index, result in enumerate(case.run()):
        if result is not None:
            with pytest.raises(AssertionError):
                assert_as_twin(wrong(index), tolerance=1e-5)
