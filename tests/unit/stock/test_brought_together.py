"""Numbers for the log come to the host together: the same values and dtypes, in one copy."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe.stock.step.expert_load import brought_together


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_values_and_dtypes_are_kept_and_one_copy_is_made() -> None:
    logs = [
        {"loss": torch.tensor(1.25), "ntokens": 7, "load": torch.arange(6.0).view(1, 2, 3)},
        {"loss": torch.tensor(0.1, dtype=torch.float64), "count": torch.tensor(2**40), "name": "x"},
    ]
    with Copies() as copies:
        found = brought_together(logs, source="cpu")
    assert copies.names.count("cat") == 1
    assert [list(log) for log in found] == [list(log) for log in logs]
    for log, moved in zip(logs, found, strict=True):
        for name, value in log.items():
            if not isinstance(value, torch.Tensor):
                assert moved[name] == value
                continue
            assert moved[name].dtype is value.dtype and torch.equal(moved[name], value)
            assert moved[name].data_ptr() != value.data_ptr()
    assert brought_together(logs, source="cuda") is logs


def test_counts_are_not_rounded_to_the_float32_of_the_losses_beside_them() -> None:
    logs = [{"loss": torch.tensor(0.1), "correct": torch.tensor(2**40 + 1)}]
    (found,) = brought_together(logs, source="cpu")
    assert int(found["correct"]) == 2**40 + 1 and torch.equal(found["loss"], logs[0]["loss"])
