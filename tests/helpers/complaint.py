"""Say in what an update on several ranks differs from that of one process."""

from typing import Any

import pytest
import torch

__all__ = ["complaint"]


def complaint(found: Any, expected: dict[str, Any]) -> str:
    """What differs from one process; empty if nothing does."""
    if isinstance(found, str):
        return found
    for name, value in expected["logged"].items():
        if name != "gnorm" and found["logged"][name] != pytest.approx(value, rel=2e-6, abs=2e-6):
            return f"logged {name}"
    norm = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    for name, gradient in expected["gradients"].items():
        difference = float((found["gradients"][name] - gradient).norm())
        if difference > 1e-12 * float(gradient.norm()) + 1e-14 * float(norm):
            return f"gradient of {name}"
    return ""
