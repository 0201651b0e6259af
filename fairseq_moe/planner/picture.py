"""Draw a plan: memory of each stage, and the pipeline's passes over time with the bubbles between them."""

from pathlib import Path
from typing import Any

from fairseq_moe.parallel.schedule import Action, actions, with_dummies
from fairseq_moe.planner.plan import Plan, StagePlan

__all__ = ["draw", "timeline"]

_GIB = 1 << 30
_FORWARD, _BACKWARD = 1.0, 2.0  # units of time of a pass through all chunks of a rank
_MAX_ROUNDS = 4  # of P micro-batches that are drawn; later ones repeat them
_PARTS = ("parameters", "gradients", "optimizer", "gathered", "activations", "logits", "exchange", "margin")
_COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb", "#dddddd")


def timeline(pipe: int, virtual: int, micro_batches: int) -> list[tuple[int, Action, float, float]]:
    """Time every pass of an update if all stages take equally long and nothing waits for transfers.

    Returns:
        (pipeline rank, pass, begin, end), in units of a forward pass through a rank's layers.
    """
    orders = [actions(pipe, virtual, micro_batches, rank) for rank in range(pipe)]
    ends: dict[tuple[str, int, int], float] = {}
    done, free, found = [0] * pipe, [0.0] * pipe, []
    while any(count < len(order) for count, order in zip(done, orders, strict=True)):
        for rank, order in enumerate(orders):
            while done[rank] < len(order):
                action = order[done[rank]]
                ready = _ready(ends, action, action.chunk * pipe + rank, pipe * virtual - 1)
                if ready is None:
                    break
                begin = max(free[rank], ready)
                free[rank] = begin + (_FORWARD if action.kind == "F" else _BACKWARD) / virtual
                ends[action.kind, action.micro_batch, action.chunk * pipe + rank] = free[rank]
                found.append((rank, action, begin, free[rank]))
                done[rank] += 1
    return found


def _ready(ends: dict[tuple[str, int, int], float], action: Action, stage: int, last: int) -> float | None:
    """Find when a pass has what it needs; None: not timed yet."""
    if action.kind == "F":
        return 0.0 if stage == 0 else ends.get(("F", action.micro_batch, stage - 1))
    if stage == last:
        return ends.get(("F", action.micro_batch, stage))
    return ends.get(("B", action.micro_batch, stage + 1))


def draw(path: Path, plan: Plan, *, pipe: int, virtual: int, micro_batches: int) -> None:
    """Draw memory by stage, and the first rounds of the schedule.

    Args:
        path: of the picture; its suffix says which kind.
        plan: what to draw.
        pipe: P.
        virtual: V.
        micro_batches: m.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    memory, schedule = figure.subplots(2, 1)
    _draw_memory(memory, plan)
    shown = with_dummies(pipe, virtual, min(micro_batches, _MAX_ROUNDS * pipe))
    _draw_schedule(schedule, timeline(pipe, virtual, shown), pipe, virtual)
    schedule.set_title(
        f"{shown} of {micro_batches} micro-batches; white is idle: {plan.bubble_frac:.1%} of an update"
    )
    figure.savefig(path)


def _draw_memory(axes: Any, plan: Plan) -> None:
    numbers = [stage.pipe for stage in plan.stages]
    below = [0.0] * len(numbers)
    for part, colour in zip(_PARTS, _COLOURS, strict=True):
        sizes = [_gib_of(stage, part) for stage in plan.stages]
        axes.bar(numbers, sizes, bottom=below, label=part, color=colour)
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    axes.axhline(plan.device.memory_bytes / _GIB, color="black", linestyle="--", label=plan.device.name)
    axes.set_xlabel("stage")
    axes.set_ylabel("GiB of its fullest rank")
    axes.set_title(f"{plan.arch} on {plan.num_ranks} x {plan.device.name}: {plan.mapping}")
    axes.legend(fontsize="small", ncols=3)


def _gib_of(stage: StagePlan, part: str) -> float:
    return float(getattr(stage, part) / _GIB)


def _draw_schedule(
    axes: Any, passes: list[tuple[int, Action, float, float]], pipe: int, virtual: int
) -> None:
    for rank, action, begin, end in passes:
        shade = 0.45 + 0.5 * (action.chunk + 1) / virtual
        colour = (
            (0.27 * shade, 0.47 * shade, 0.67) if action.kind == "F" else (0.93, 0.4 * shade, 0.47 * shade)
        )
        axes.barh(rank, end - begin, left=begin, height=0.9, color=colour, edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(pipe))
    axes.invert_yaxis()
    axes.set_ylabel("pipeline rank")
    axes.set_xlabel("time, in forward passes (blue; backward passes red)")
