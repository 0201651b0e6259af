"""The clock of bench_gpu.py's parts: medians by CUDA events, until a part's time is used up."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bench", "Step", "device_events"]

Step = Callable[[], Any]


@dataclass
class Bench:
    """Time steps on one device until the part's seconds are used up."""

    device: torch.device
    quick: bool
    seconds: float
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.deadline = time.perf_counter() + self.seconds

    @property
    def is_small(self) -> bool:
        """Whether sizes are tiny, because there is no GPU."""
        return self.device.type == "cpu"

    @property
    def seconds_left(self) -> float:
        """How long this part may go on."""
        return max(self.deadline - time.perf_counter(), 0.0)

    def has_time(self, name: str) -> bool:
        """Whether to measure one more; notes what is left out."""
        if time.perf_counter() < self.deadline:
            return True
        self.left_out.append(name)
        return False

    def ms(self, step: Step, *, repeats: int = 20) -> float:
        """The median time of a step: CUDA events on a GPU."""
        repeats = 2 if self.is_small else 5 if self.quick else repeats
        for _ in range(1 if self.is_small else 3):
            step()
        if self.is_small:
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                step()
                times.append(1000 * (time.perf_counter() - start))
            return statistics.median(times)
        # The host does not wait in between, so that it runs ahead of the device as it does in training.
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        torch.cuda.synchronize(self.device)
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize(self.device)
        return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    def host_ms(self, step: Step, *, repeats: int = 20) -> float:
        """The time that the host takes to launch a step."""
        step()
        if not self.is_small:
            torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repeats):
            step()
        return 1000 * (time.perf_counter() - start) / repeats

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal values of deviation 0.1."""
        return torch.randn(shape, device=self.device, dtype=torch.float32).mul_(0.1).to(dtype)


def device_events(profile: Any) -> Iterator[Any]:
    """What ran on the device, by name: kernels and copies, without the spans that operators and users mark."""
    for event in profile.key_averages():
        is_marked = getattr(event, "is_user_annotation", False)
        if event.device_type == torch.autograd.DeviceType.CUDA and not is_marked:
            yield event
