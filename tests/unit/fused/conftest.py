"""Kernels on CPU: Triton's interpreter, or what is compiled where a GPU is."""

import pytest

from fairseq_moe.fused import launch


@pytest.fixture(autouse=True)
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels take CPU tensors, as Triton's interpreter does."""
    pytest.importorskip("triton")
    monkeypatch.setattr(launch, "DEVICES", {"cpu", "cuda"})
    return
