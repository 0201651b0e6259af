"""Make a plan: read flags, count everything, and say what would help where it does not fit."""

from collections.abc import Sequence
from dataclasses import replace

from fairseq_moe.planner.activations import Activations
from fairseq_moe.planner.changes import cheapest_changes
from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.flops import active_parameters, flops_per_token, hardware_flops_per_token
from fairseq_moe.planner.mapping import States
from fairseq_moe.planner.megatron import megatron_stages
from fairseq_moe.planner.memory import MARGIN_FRAC, exchange_bytes
from fairseq_moe.planner.parameters import model_parts
from fairseq_moe.planner.plan import Like, Plan, Sent, StagePlan, StepTime
from fairseq_moe.planner.reading import Job, read_job
from fairseq_moe.planner.shape import ModelShape
from fairseq_moe.planner.states import state_bytes
from fairseq_moe.planner.time import idle_frac, step_time
from fairseq_moe.planner.traffic import sent_in_update

__all__ = ["plan", "plan_job", "stage_plans"]


def plan(
    argv: Sequence[str],
    *,
    num_ranks: int,
    device: Device,
    like: Like = "ours",
    num_words: int | None = None,
) -> Plan:
    """Plan a run from the flags of ``fairseq-train``: memory, traffic, arithmetic and time.

    Args:
        argv: flags, without the program's name; no data directory is needed.
        num_ranks: that take part.
        device: of each rank.
        like: whose numbers: ours, exact for what this package does; or Megatron's, as it would count.
        num_words: words of the dictionary; None: those of the data directory, or of the published model.

    Raises:
        ConfigError: the flags cannot be honoured; all sentences at once.
    """
    job = read_job(argv, num_ranks=num_ranks, device=device, num_words=num_words)
    return plan_job(job, device=device, like=like)


def plan_job(job: Job, *, device: Device, like: Like = "ours") -> Plan:
    """Plan a run whose flags were read."""
    shape, mapping = job.shape, job.mapping
    stages = (
        stage_plans(job, device)
        if like == "ours"
        else megatron_stages(shape, mapping, margin_frac=MARGIN_FRAC)
    )
    sent = sent_in_update(shape, mapping, job.precision, device)
    total, further = _numbers_of(shape)
    found = Plan(
        arch=str(job.args.arch),
        mapping=mapping.name,
        like=like,
        device=device,
        num_ranks=mapping.grid.world_size,
        total_parameters=total,
        active_parameters=active_parameters(shape, total),
        stages=stages,
        sent=sent,
        bubble_frac=idle_frac(mapping),
        flops_per_token=flops_per_token(shape, mapping.length),
        hardware_flops_per_token=hardware_flops_per_token(shape, mapping.length, mapping.recompute),
        update_tokens=mapping.update_tokens,
        time=time_of(job, device, sent, stages),
        notes=tuple(_notes(job, further, like)),
    )
    if found.fits or like != "ours":
        return found
    return replace(found, changes=cheapest_changes(job, device))


def time_of(job: Job, device: Device, sent: tuple[Sent, ...], stages: tuple[StagePlan, ...]) -> StepTime:
    """Estimate the seconds of an update."""
    return step_time(
        job.shape,
        job.mapping,
        device,
        sent,
        value_bytes=job.precision.gathered,
        state_bytes=max(stage.states for stage in stages),
    )


def activations_of(job: Job, device: Device) -> Activations:
    """Count what autograd keeps, on the path that the device takes."""
    return Activations(
        shape=job.shape,
        mapping=job.mapping,
        value_bytes=job.precision.gathered,
        on_gpu=device.runs_kernels,
        keeps_probabilities=str(job.args.criterion) != "moe_cross_entropy",
    )


def stage_plans(job: Job, device: Device) -> tuple[StagePlan, ...]:
    """Count what the fullest rank of every stage holds."""
    activations = activations_of(job, device)
    return tuple(_stage_plan(job, activations, pipe) for pipe in range(job.mapping.grid.pipe))


def _stage_plan(job: Job, activations: Activations, pipe: int) -> StagePlan:
    shape, mapping = job.shape, job.mapping
    states = state_bytes(shape, mapping, job.precision, pipe)
    kept = activations.stage(pipe)
    whole = states.steady + states.gathered + kept.kept + kept.at_work + kept.logits
    exchange = exchange_bytes(shape, mapping, job.precision.gathered)
    return StagePlan(
        pipe=pipe,
        rank=states.rank,
        layers=len(mapping.layers_of(pipe, shape.num_layers)),
        num_parameters=states.held.total,
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        gathered=states.gathered,
        activations=kept.kept + kept.at_work,
        passes=kept.passes,
        logits=kept.logits,
        exchange=exchange,
        margin=int((whole + exchange) * MARGIN_FRAC),
    )


def _numbers_of(shape: ModelShape) -> tuple[int, int]:
    """Count the model's parameters, and those of the blocks that guess further."""
    total = further = 0
    for part in model_parts(shape):
        numbers = sum(entry.numel for entry in part.entries)
        if part.name.startswith("mtp"):
            further += numbers
        else:
            total += numbers
    return total, further


def _notes(job: Job, further: int, like: Like) -> list[str]:
    found = []
    mapping = job.mapping
    if further:
        found.append(f"{further:,} more parameters are those of multi-token prediction.")
    if like == "megatron":
        found.append(
            "States and activations are counted as Megatron-Core does, in bfloat16 with its distributed optimizer."
        )
    if mapping.states is States.COPIED and mapping.grid.data * mapping.grid.context > 1 and like == "ours":
        found.append("No states are sharded; --use-distributed-optimizer shards those of the optimizer.")
    return found
