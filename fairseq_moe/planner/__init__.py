"""Will a model fit, on how many ranks, how fast, and by which mapping? Answered from the flags of ``fairseq-train``.

``plan`` reads flags as training does (``reading``): sizes of the model (``shape``) and how it is spread (``mapping``).
From these follow parameters (``parameters``) and a rank's part of them (``held``), the bytes of weights, gradients and
optimizer (``states``), of activations (``activations``), what travels (``traffic``), the arithmetic (``flops``) and a
range of time (``time``).
``megatron`` has the same numbers as Megatron counts them. Nothing is built and no process group is needed, but where
``built`` is asked to compare the plan with models on torch's meta device.

Tests: tests/unit/planner.
"""

from fairseq_moe.planner.devices import Device, device_named
from fairseq_moe.planner.making import plan
from fairseq_moe.planner.plan import Plan

__all__ = ["Device", "Plan", "device_named", "plan"]
