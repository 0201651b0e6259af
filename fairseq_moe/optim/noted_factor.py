"""Note a factor of all gradients, which the next step applies as it reads them.

Stock scales gradients (by the sample size, by the loss scale, to clip them) by rewriting all of them. An optimizer
whose step multiplies while it reads needs the factor alone: a gradient is then read by its norm and by the step, and
never written.
"""

import torch
from torch import Tensor

__all__ = ["NotedFactor"]


class NotedFactor(torch.optim.Optimizer):
    """Hold the factor of a torch optimizer's gradients, on the host as long as all that made it is there.

    The norm is multiplied by it, and stock's trainer asks for that again and again: on a device, each time is a wait.
    Instances may be made by changing the class of another optimizer's, so there is no attribute from the start.
    """

    _factor: Tensor | float | None = None

    @property
    def applies_factor(self) -> bool:
        """Whether the step multiplies gradients by what was noted; else nothing may be noted."""
        return True

    @property
    def factor(self) -> Tensor | float | None:
        """Factor that was noted since the last step; None: 1."""
        return self._factor

    def scale_gradients(self, factor: Tensor | float) -> None:
        """Note that all gradients are to be multiplied by ``factor``; nothing is written or waited for."""
        self._factor = factor if self._factor is None else self._factor * factor

    def take_factor(self) -> Tensor | None:
        """Return the factor for a step that applies it, float32 scalar on the device, and forget it."""
        factor, self._factor = self._factor, None
        if factor is None:
            return None
        device = self.param_groups[0]["params"][0].device
        if isinstance(factor, Tensor) and factor.device.type != "cpu":
            return factor.to(device, torch.float32)
        # A number that a kernel is given, rather than a copy from the host.
        return torch.full((), float(factor), dtype=torch.float32, device=device)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the factor noted for them."""
        self._factor = None
        super().zero_grad(set_to_none)
