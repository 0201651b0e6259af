"""Write a plan as text for a terminal."""

from collections.abc import Sequence

from fairseq_moe.planner.plan import Plan, Sent, StagePlan

__all__ = ["bytes_text", "table_of", "text_table"]

_GIB = 1 << 30
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_COLUMNS = (
    "stage", "layers", "parameters", "weights", "gradients", "optimizer", "gathered", "activations", "passes",
    "logits", "exchange", "margin", "total",
)  # fmt: skip


def bytes_text(count: int) -> str:
    """Write a number of bytes with a unit."""
    for name, size in _UNITS:
        if count >= size:
            return f"{count / size:.2f} {name}"
    return f"{count} B"


def text_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Align columns: numbers to the right, the first column and words to the left."""
    lines = (header, *rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    are_numbers = [column > 0 and rows[0][column][:1].isdigit() for column in range(len(header))]
    aligned = [
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, are_numbers, strict=True)
        ).rstrip()
        for line in lines
    ]
    return [aligned[0], "-" * max(map(len, aligned)), *aligned[1:]]


def table_of(plan: Plan) -> str:
    """Write the whole plan: memory by stage, bytes by axis, arithmetic, time, and what to know."""
    parts = [
        f"{plan.arch}: {plan.total_parameters:,} parameters, {plan.active_parameters:,} per token",
        f"{plan.num_ranks} x {plan.device.name}, {plan.mapping}, counted as {plan.like}",
        "",
        "Memory of the fullest rank of each stage, GiB",
        *text_table(_COLUMNS, [_stage_line(stage) for stage in _shown(plan.stages)]),
        "",
        *_sent_lines(plan.sent),
        *_step_lines(plan),
        _verdict(plan),
        *(f"- {change}" for change in plan.changes),
        *(f"Note: {note}" for note in plan.notes),
    ]
    return "\n".join(parts)


def _shown(stages: tuple[StagePlan, ...]) -> list[StagePlan]:
    """Leave out stages that are as the one before them."""
    shown: list[StagePlan] = []
    for stage in stages:
        is_last = stage.pipe == len(stages) - 1
        if not shown or is_last or _numbers(stage) != _numbers(stages[stage.pipe - 1]):
            shown.append(stage)
    return shown


def _numbers(stage: StagePlan) -> tuple[int, ...]:
    return (stage.layers, stage.num_parameters, stage.total)


def _stage_line(stage: StagePlan) -> tuple[str, ...]:
    sizes = (stage.parameters, stage.gradients, stage.optimizer, stage.gathered, stage.activations)
    rest = (stage.logits, stage.exchange, stage.margin, stage.total)
    return (
        f"{stage.pipe} (rank {stage.rank})",
        str(stage.layers),
        f"{stage.num_parameters / 1e9:.4f} B",
        *(f"{size / _GIB:.2f}" for size in sizes),
        str(stage.passes),
        *(f"{size / _GIB:.2f}" for size in rest),
    )


def _sent_lines(sent: tuple[Sent, ...]) -> list[str]:
    if not sent:
        return []
    rows = [
        (
            each.axis,
            each.what,
            bytes_text(each.sent_bytes),
            "between nodes" if each.crosses_nodes else "in a node",
        )
        for each in sent
    ]
    header = ("axis", "what", "bytes", "link")
    return ["Sent by a rank in an update, at most", *text_table(header, rows), ""]


def _step_lines(plan: Plan) -> list[str]:
    fast, slow = plan.time.fast_sec, plan.time.slow_sec
    per_token = plan.flops_per_token / 1e9
    rate = plan.update_tokens * plan.flops_per_token / plan.num_ranks / 1e12
    return [
        f"Work: {per_token:.6f} GFLOP per token, with what is computed again "
        f"{plan.hardware_flops_per_token / 1e9:.3f}; {plan.update_tokens:,} tokens per update",
        f"Idle: {plan.bubble_frac:.2%} of an update",
        f"Update: {fast:.3g} to {slow:.3g} s, {plan.update_tokens / slow:,.0f} to {plan.update_tokens / fast:,.0f} "
        f"words/s, {rate / slow:.1f} to {rate / fast:.1f} TFLOPS per rank",
    ]


def _verdict(plan: Plan) -> str:
    peak, memory = plan.peak_bytes / _GIB, plan.device.memory_bytes / _GIB
    if plan.fits:
        return f"Fits: {peak:.2f} of {memory:.2f} GiB."
    more = " What would make it fit, cheapest first:" if plan.changes else ""
    return f"Does not fit: {peak:.2f} of {memory:.2f} GiB.{more}"
