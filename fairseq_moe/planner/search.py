"""Find mappings of a model for so many ranks: all that our own checks admit, the best with reasons.

The words of an update, the model and the precision stay what the flags say; axes, what is sharded, what is computed
again and the size of a micro-batch are tried. Of recomputation the least that fits is taken. A candidate is judged as
a plan is, by its fullest rank; the flags of those that are listed go through the checks of ``fairseq-train``.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from fairseq_moe.parallel.experts import layout_problem
from fairseq_moe.parallel.ranks import RankGrid
from fairseq_moe.parallel.stages import stage_problem
from fairseq_moe.planner.activations import Activations
from fairseq_moe.planner.devices import Device
from fairseq_moe.planner.mapping import Mapping, States
from fairseq_moe.planner.memory import MARGIN_FRAC, exchange_bytes
from fairseq_moe.planner.plan import StepTime
from fairseq_moe.planner.reading import Job
from fairseq_moe.planner.shape import ModelShape
from fairseq_moe.planner.states import StateBytes, state_bytes
from fairseq_moe.planner.time import idle_frac, step_time
from fairseq_moe.planner.traffic import distinct_stages, sent_in_update, spans_nodes

__all__ = ["RECOMPUTE", "Candidate", "Found", "flags_of", "judge", "mappings", "reasons_of", "search"]

_MAX_TENSOR = 8  # within a node
_MAX_CONTEXT = 8
_MAX_VIRTUAL = 8
_MAX_SEQUENCES = 4
RECOMPUTE: tuple[frozenset[str], ...] = (
    frozenset(),
    frozenset({"experts"}),
    frozenset({"moe"}),
    frozenset({"layers"}),
)
_STATES_FLAGS = {
    States.COPIED: ["--ddp-backend", "legacy_ddp"],
    States.ZERO_1: ["--use-distributed-optimizer"],
    States.ZERO_3: ["--use-torch-fsdp2"],
    States.FAIRSCALE: ["--ddp-backend", "fully_sharded"],
}
_MIN_LENGTH = 4096  # of a context rank's part; shorter ones cost more messages than they save


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hold one mapping that was judged.

    Args:
        mapping: of the run.
        peak_bytes: of its fullest rank.
        state_bytes: of them, those of weights, gradients and optimizer.
        time: of an update; None where it does not fit.
    """

    mapping: Mapping
    peak_bytes: int
    state_bytes: int
    time: StepTime | None

    @property
    def seconds(self) -> float:
        """Seconds of an update between the fast and the slow end of the range: their geometric mean."""
        assert self.time is not None
        return float((self.time.fast_sec * self.time.slow_sec) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Hold what a search has found.

    Args:
        num_mappings: that our checks admit.
        num_fitting: of them, those that fit with some recomputation.
        best: the fastest, one for each set of axes.
    """

    num_mappings: int
    num_fitting: int
    best: tuple[Candidate, ...]


def _divisors(number: int, *, at_most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, at_most or number) + 1) if number % n == 0]


def _stage_splits(num_layers: int, pipe: int) -> Iterator[tuple[int, int | None, int | None]]:
    """Yield (V, first, last) by which layers can be cut for a pipeline: equal shares, or as equal as can be."""
    for virtual in range(1, (_MAX_VIRTUAL if pipe > 1 else 1) + 1):
        if stage_problem(num_layers=num_layers, pipe=pipe, virtual=virtual) is None:
            yield virtual, None, None
        elif pipe > 2 and num_layers % virtual == 0:
            share = num_layers // virtual // pipe
            for middle in (share, share + 1):
                rest = num_layers // virtual - middle * (pipe - 2)
                first, last = (rest + 1) // 2 * virtual, rest // 2 * virtual
                problem = stage_problem(
                    num_layers=num_layers, pipe=pipe, virtual=virtual, first=first, last=last
                )
                if problem is None:
                    yield virtual, first, last


def _is_cut_evenly(shape: ModelShape, tensor: int, parts: int) -> bool:
    """Tell whether heads and widths divide, as ``flags.parallel_checks`` asks."""
    dense = [] if all(shape.is_moe) else [shape.ffn_dim]
    heads = [shape.num_heads, shape.num_kv_heads]
    return all(size % tensor == 0 for size in (*heads, *dense)) and shape.expert_dim % parts == 0


def mappings(shape: ModelShape, start: Mapping) -> Iterator[Mapping]:
    """Yield the mappings of a model on as many ranks, with as many words in an update.

    Args:
        shape: of the model.
        start: the mapping that the flags give.
    """
    world = start.grid.world_size
    if (
        not shape.has_experts or start.states is States.FAIRSCALE
    ):  # which have no axes, or none but the experts'
        yield start
        return
    may_split = not shape.trains_mtp
    for pipe in _divisors(world, at_most=shape.num_layers):
        splits = list(_stage_splits(shape.num_layers, pipe))
        for tensor in _divisors(world // pipe, at_most=_MAX_TENSOR if may_split else 1):
            longest = max(1, min(_MAX_CONTEXT, start.length // _MIN_LENGTH)) if may_split else 1
            for context in _divisors(world // pipe // tensor, at_most=longest):
                for grid in _expert_grids(shape, world, pipe, tensor, context):
                    for split in splits:
                        yield from _of_grid(start, grid, *split)


def _expert_grids(shape: ModelShape, world: int, pipe: int, tensor: int, context: int) -> Iterator[RankGrid]:
    for parts in sorted({1, tensor}):
        if not _is_cut_evenly(shape, tensor, parts):
            continue
        for expert in _divisors(shape.num_experts):
            problem = layout_problem(
                num_experts=shape.num_experts,
                world_size=world,
                ep_size=expert,
                expert_tensor=parts,
                tensor=tensor,
                context=context,
                pipe=pipe,
            )
            if problem is None:
                yield RankGrid(
                    data=world // (pipe * tensor * context),
                    pipe=pipe,
                    context=context,
                    tensor=tensor,
                    expert=expert,
                    expert_tensor=parts,
                )


def _of_grid(
    start: Mapping, grid: RankGrid, virtual: int, first: int | None, last: int | None
) -> Iterator[Mapping]:
    """Yield mappings with this grid: micro-batches of each size, states of each kind."""
    sequences = start.update_tokens // start.length
    for each in _divisors(_MAX_SEQUENCES):
        if sequences % (each * grid.data):
            continue
        for states in (States.COPIED, States.ZERO_1, States.ZERO_3):
            if states is not States.COPIED and grid.data * grid.context == 1:
                continue
            yield dataclasses.replace(
                start,
                grid=grid,
                virtual=virtual,
                first=first,
                last=last,
                states=states,
                sequences=each,
                micro_batches=sequences // (each * grid.data),
                recompute=frozenset(),
            )


def judge(job: Job, mapping: Mapping, device: Device) -> Candidate:
    """Judge one mapping, as it is."""
    return _judged(job, mapping, device, _states(job, mapping))


def _states(job: Job, mapping: Mapping) -> dict[int, StateBytes]:
    """Count the states of one stage of each kind."""
    size = mapping.grid.stage_size
    return {
        pipe: state_bytes(job.shape, mapping, job.precision, pipe, rank=pipe * size)
        for pipe in distinct_stages(job.shape, mapping)
    }


def _judged(job: Job, mapping: Mapping, device: Device, states: dict[int, StateBytes]) -> Candidate:
    shape, value_bytes = job.shape, job.precision.gathered
    activations = Activations(
        shape=shape, mapping=mapping, value_bytes=value_bytes, on_gpu=device.runs_kernels
    )
    exchange = exchange_bytes(shape, mapping, value_bytes)
    peak = 0
    for pipe, own in states.items():
        kept = activations.stage(pipe)
        whole = own.steady + own.gathered + kept.kept + kept.at_work + kept.logits + exchange
        peak = max(peak, int(whole * (1 + MARGIN_FRAC)))
    held = max(own.steady for own in states.values())
    time = None
    if peak <= device.memory_bytes:
        sent = sent_in_update(shape, mapping, job.precision, device)
        time = step_time(shape, mapping, device, sent, value_bytes=value_bytes, state_bytes=held)
    return Candidate(mapping=mapping, peak_bytes=peak, state_bytes=held, time=time)


def _least_recompute(job: Job, mapping: Mapping, device: Device) -> Candidate | None:
    """Find the least recomputation with which a mapping fits; None: with none."""
    states = _states(job, mapping)
    # Nothing that is computed again makes up for states that do not fit.
    if max(own.steady + own.gathered for own in states.values()) * (1 + MARGIN_FRAC) > device.memory_bytes:
        return None
    for recompute in RECOMPUTE:
        found = _judged(job, dataclasses.replace(mapping, recompute=recompute), device, states)
        if found.time is not None:
            return found
    return None


def search(job: Job, device: Device, *, count: int = 5) -> Found:
    """Judge all mappings for as many ranks, and list the fastest that fit.

    Args:
        job: the model, and the words of an update.
        device: of each rank.
        count: how many to list; of those with the same axes, the best alone.
    """
    num_mappings, fitting = 0, []
    for mapping in mappings(job.shape, job.mapping):
        num_mappings += 1
        found = _least_recompute(job, mapping, device)
        if found is not None:
            fitting.append(found)
    best: dict[tuple[RankGrid, int], Candidate] = {}
    for candidate in sorted(fitting, key=lambda each: (each.seconds, each.peak_bytes)):
        best.setdefault((candidate.mapping.grid, candidate.mapping.virtual), candidate)
    return Found(num_mappings=num_mappings, num_fitting=len(fitting), best=tuple(list(best.values())[:count]))


def flags_of(mapping: Mapping) -> list[str]:
    """Write the flags that give a mapping."""
    grid = mapping.grid
    sizes = {
        "--pipeline-model-parallel-size": grid.pipe,
        "--num-virtual-stages-per-pipeline-rank": mapping.virtual,
        "--decoder-first-pipeline-num-layers": mapping.first,
        "--decoder-last-pipeline-num-layers": mapping.last,
        "--tensor-model-parallel-size": grid.tensor,
        "--context-parallel-size": grid.context,
    }
    found = [
        part
        for flag, size in sizes.items()
        if size not in (None, 1) or (size == 1 and "layers" in flag)
        for part in (flag, str(size))
    ]
    found += ["--sequence-parallel"] if grid.tensor > 1 else []
    found += ["--expert-model-parallel-size", str(grid.expert)]
    found += (
        ["--expert-tensor-parallel-size", str(grid.expert_tensor)]
        if grid.tensor * grid.expert_tensor > 1
        else []
    )
    found += _STATES_FLAGS[mapping.states]
    if "layers" in mapping.recompute:
        found.append("--checkpoint-activations")
    elif mapping.recompute:
        found += ["--moe-recompute-modules", " ".join(sorted(mapping.recompute))]
    return [*found, "--batch-size", str(mapping.sequences), "--update-freq", str(mapping.micro_batches)]


def reasons_of(candidate: Candidate, device: Device, shape: ModelShape) -> str:
    """Say in a few words what speaks for a mapping, and what it pays."""
    mapping, gib = candidate.mapping, 1 << 30
    said = [f"takes {candidate.peak_bytes / gib:.1f} of {device.memory_bytes / gib:.1f} GiB"]
    if mapping.grid.pipe > 1:
        said.append(f"idles {idle_frac(mapping):.1%}")
    if mapping.grid.expert > 1:
        crosses = spans_nodes(mapping, ("expert", "expert_tensor"), device.ranks_per_node)
        said.append("experts' rows leave the node" if crosses else "experts' rows stay in the node")
    said.append(
        f"computes {', '.join(sorted(mapping.recompute))} again"
        if mapping.recompute
        else "computes nothing twice"
    )
    return "; ".join(said)
