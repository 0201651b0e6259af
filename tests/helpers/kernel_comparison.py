"""Compare what a fused kernel computes with what its twin does, on inputs of one size on one device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fairseq_moe.fused import launch

__all__ = ["SIZES", "TINY", "Found", "KernelCase", "Make", "Sizes", "assert_as_twin", "without_kernels"]

Found = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Sizes:
    """T tokens with K choices, of width D; L experts of hidden width F; V words."""

    tokens: int
    top_k: int
    width: int
    hidden: int
    experts: int
    words: int

    @property
    def rows(self) -> int:
        """Rows of the experts."""
        return self.tokens * self.top_k


# A layer as it is trained, and one whose sizes no block divides.
SIZES = {
    "real": Sizes(8192, 8, 2048, 768, 64, 51_200),
    "odd": Sizes(777, 3, 1000, 360, 9, 50_257),
}
TINY = Sizes(5, 2, 12, 20, 3, 70)


class Make:
    """Draw tensors on a device, other ones at each call."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, device=self.device, generator=self.generator)
        return values.to(dtype or self.dtype)

    def below(self, high: int, *shape: int) -> Tensor:
        """Draw whole numbers."""
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def rows_of_tokens(self, size: Sizes) -> Tensor:
        """Give most of the choices a row, each another: int64 (T, K)."""
        row_A = torch.randperm(size.rows, device=self.device, generator=self.generator)
        return row_A.view(size.tokens, size.top_k).masked_fill(
            self.below(5, size.tokens, size.top_k) == 0, -1
        )

    def counts(self, size: Sizes) -> Tensor:
        """Share the rows but for a tenth, which are nobody's, among the experts; one has none: int64 (L,)."""
        shares = torch.rand(size.experts, device=self.device, generator=self.generator)
        shares[size.experts // 2] = 0
        return (shares / shares.sum() * (size.rows * 9 // 10)).long()

    def experts_of_rows(self, size: Sizes) -> Tensor:
        """Spread the rows over the experts evenly, in order: int64 (R,)."""
        return torch.arange(size.rows, device=self.device) * size.experts // size.rows


@dataclass(frozen=True)
class KernelCase:
    """Run a kernel, and its twin.

    Args:
        run: the function that takes a kernel where it can.
        twin: what it is compared with; None: the same function, which then takes no kernel.
        loose: results of which a share of the values may be off by more than rounding: by the index of the result, how
            far, as a share of the largest value, and which share.
    """

    run: Callable[[], Found]
    twin: Callable[[], Found] | None = None
    loose: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let every function compute in plain torch."""
    devices = launch.DEVICES
    launch.DEVICES = set()
    try:
        yield
    finally:
        launch.DEVICES = devices


def assert_as_twin(case: KernelCase, *, tolerance: float) -> None:
    """Compare each result with the twin's: off by at most ``tolerance`` of the largest value, and finite alike."""
    found = case.run()
    with without_kernels():
        expected = (case.twin or case.run)()
    assert len(found) == len(expected)
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        assert a.shape == b.shape and a.dtype is b.dtype and a.device == b.device
        step, share = case.loose.get(index, (0.0, 0.0))
        if not a.is_floating_point():
            assert float((a != b).double().mean()) <= share, f"result {index} differs"
            continue
        off, largest = (a.double() - b.double()).abs(), float(b.double().abs().max()) if b.numel() else 0.0
        bad = float((~(off <= tolerance * largest)).double().mean()) if b.numel() else 0.0
        assert bad <= share, f"result {index}: {bad:.1e} of the values are off, {float(off.max()):.2e}"
        assert b.numel() == 0 or float(off.max()) <= (tolerance + step) * largest
