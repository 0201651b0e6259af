"""What a rank sends, counted at torch.distributed, is what ``parallel.traffic`` says, to the byte.

One update by fairseq's Trainer of tiny models in float32. Every token chooses all experts, so that the number of rows
does not depend on routing. Run with ``pytest tests/distributed/test_bytes_sent.py``.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from fairseq_moe.modules.routing.contract import LOSSES
from fairseq_moe.modules.shards import SequencePart
from fairseq_moe.parallel.experts import ExpertLayout
from fairseq_moe.parallel.placement import Placement
from fairseq_moe.parallel.ranks import BATCH_SHARDS, DENSE_AXES, RankGrid
from fairseq_moe.parallel.traffic import (
    ExpertRows,
    SplitPass,
    gathered_bytes,
    shared_bytes,
    summed_bytes,
)
from tests.helpers.block_models import MODELS
from tests.helpers.ranks import run_ranks

B, FLOAT_BYTES, EXPERTS, TOP_K = 2, 4, 4, 4
LOSS_NUMBERS = len(LOSSES) + 3  # with the entropy and two times
_EXCHANGE = ("expert", "expert_tensor")
_KINDS = {
    "all_gather_single": "tokens",
    "reduce_scatter_single": "tokens",
    "all_reduce": "sums",
    "all_to_all_single": "rows",
}
Key = tuple[str, str, tuple[int, ...]]  # phase, kind, ranks that take part


@dataclass(frozen=True)
class Model:
    """Flags of a tiny model, and its widths."""

    flags: tuple[Any, ...]
    dim: int
    moe_layers: int
    gathered: int  # width that attention gathers over tensor
    keys: int  # width of its keys and values, or latents
    latent: bool = False
    num_norms: int = 0  # over whole projections


_ALL = ("--moe-router-topk", TOP_K, "--moe-router-load-balancing-type", "aux_loss")
GPT = Model(
    ("--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
     "--num-experts", EXPERTS, "--moe-layer-freq", "[0,1]", *_ALL),
    dim=8, moe_layers=1, gathered=8, keys=16,
)  # fmt: skip
GROUPED = Model((*MODELS["grouped"], *_ALL), dim=12, moe_layers=2, gathered=12, keys=16)
FULL = Model((*GROUPED.flags, "--qk-norm", "full"), dim=12, moe_layers=2, gathered=12, keys=16, num_norms=2)
LATENT = Model(
    (*MODELS["latent"], *_ALL, "--mtp-layers", 0, "--mtp-loss-weight", 0, "--decoder-attention-heads", 4),
    dim=12, moe_layers=2, gathered=6 + 10 + 2, keys=10 + 2, latent=True,
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model on a grid of ranks, and how it is computed."""

    model: Model
    ranks: int = 2
    tensor: int = 1
    context: int = 1
    parts: int = 1
    length: int = 16
    recomputed: str = ""  # a flag
    allgather: bool = False

    @property
    def flags(self) -> tuple[Any, ...]:
        found = [*self.model.flags, "--expert-tensor-parallel-size", self.parts]
        if self.tensor > 1:
            found += ["--tensor-model-parallel-size", self.tensor, "--sequence-parallel"]
        if self.context > 1:
            found += ["--context-parallel-size", self.context]
        if self.allgather:
            found += ["--moe-token-dispatcher-type", "allgather"]
        return (*found, *([self.recomputed] if self.recomputed else []))

    @property
    def grid(self) -> RankGrid:
        return ExpertLayout(
            num_experts=EXPERTS, world_size=self.ranks, expert_tensor=self.parts, tensor=self.tensor,
            context=self.context,
        ).ranks  # fmt: skip


_LAYER, _MOE = "--checkpoint-activations", "--moe-layer-recompute"
ON_2 = [
    Case(GPT, tensor=2),
    Case(GPT, context=2),
    Case(GPT, tensor=2, parts=2),
    Case(GPT, tensor=2, allgather=True),
    Case(GPT, tensor=2, recomputed=_LAYER),
    Case(GROUPED, tensor=2),
    Case(GROUPED, context=2, recomputed=_LAYER),
    Case(FULL, tensor=2, recomputed=_MOE),
    Case(LATENT, tensor=2, recomputed=_LAYER),
    Case(LATENT, context=2),
]
ON_4 = [
    Case(GPT, 4, tensor=2, context=2),
    Case(GPT, 4, tensor=2, context=2, recomputed=_LAYER),
    Case(GROUPED, 4, tensor=2, context=2, length=13),
    Case(FULL, 4, tensor=2),
    Case(LATENT, 4, tensor=2, context=2),
    Case(LATENT, 4, context=2, parts=2, recomputed=_LAYER),
]
ZERO_FLAGS = ("--use-distributed-optimizer", "--use-torch-fsdp2")


def _report(rank: int, runs: list[tuple[tuple[Any, ...], int, int]]) -> list[tuple[Any, Any]]:
    """Run one update of each; give the bytes that were sent, and how many numbers lie how on the ranks."""
    import tests.helpers.tiny as tiny
    from fairseq_moe.parallel.placement import placement_of
    from fairseq_moe.stock.run import run_of

    found, sent, phase = [], Counter[Key](), ["passes"]
    _count_collectives(sent, phase)
    for flags, length, num_micro_batches in runs:
        trainer = tiny.build_trainer(flags)
        sum_gradients = trainer.optimizer.all_reduce_grads

        def watched(module: Any, sum_gradients: Any = sum_gradients) -> None:
            phase[0] = "gradients"
            sum_gradients(module)
            phase[0] = "norm"

        def logged(*args: Any, join_logs: Any = trainer._aggregate_logging_outputs, **options: Any) -> Any:
            phase[0] = "logs"
            return join_logs(*args, **options)

        trainer.optimizer.all_reduce_grads = watched
        trainer._aggregate_logging_outputs = logged
        trainer.begin_epoch(1)
        sent.clear()
        phase[0] = "passes"
        # Ranks that share a micro-batch read the same one.
        mesh = run_of(trainer).mesh
        data_rank = mesh.ranks.coordinate(rank, "data")
        seeds = (data_rank + 10 * index for index in range(num_micro_batches))
        tiny.update(trainer, [tiny.make_batch(seed, num_sequences=B, length=length) for seed in seeds])
        numbers = Counter[Placement]()
        for parameter in trainer.model.parameters():
            numbers[placement_of(parameter)] += parameter.numel()
        found.append((dict(sent), dict(numbers)))
    return found


def _count_collectives(sent: Counter[Key], phase: list[str]) -> None:
    """Let every collective of torch.distributed add what this rank sends, by the rule of ``parallel.traffic``."""
    import torch.distributed as dist

    def counting(name: str, real: Any) -> Any:
        def count(*args: Any, **options: Any) -> Any:
            given = args[0] if name == "all_reduce" else options["input"] if "input" in options else args[1]
            group = options.get("group") or dist.group.WORLD
            members, all_bytes = tuple(dist.get_process_group_ranks(group)), given.nbytes
            if name == "all_gather_single":
                num_bytes = gathered_bytes(all_bytes, len(members))
            elif name == "reduce_scatter_single":
                num_bytes = shared_bytes(all_bytes, len(members))
            elif name == "all_reduce":
                num_bytes = summed_bytes(all_bytes, len(members))
            else:
                splits = args[3] if len(args) > 3 else [len(given) // len(members)] * len(members)
                own = splits[dist.get_group_rank(group, dist.get_rank())]
                num_bytes = (len(given) - own) * (all_bytes // max(len(given), 1))
            kind = "counts" if name == "all_to_all_single" and not given.is_floating_point() else _KINDS[name]
            sent[phase[0], kind, members] += num_bytes
            return real(*args, **options)

        return count

    for name in _KINDS:
        setattr(dist, name, counting(name, getattr(dist, name)))


def _expected(case: Case, rank: int) -> dict[Key, int]:
    """Add up the formulas of the model's parts."""
    grid, model, found = case.grid, case.model, Counter[Key]()

    def add(kind: str, axes: tuple[str, ...], num_bytes: int) -> None:
        if grid.size(axes) > 1:
            found["passes", kind, tuple(grid.groups(axes)[grid.slot(rank, axes)])] += num_bytes

    part = SequencePart(
        length=case.length, context=case.context, tensor=case.tensor,
        context_index=grid.coordinate(rank, "context"), tensor_index=grid.coordinate(rank, "tensor"),
    )  # fmt: skip
    tokens = B * part.padded_length // case.context
    forwards = 2 if case.recomputed == _LAYER else 1
    split = SplitPass(
        tokens=tokens, value_bytes=FLOAT_BYTES, context=case.context, tensor=case.tensor, forwards=forwards
    )
    for _ in range(1 + model.moe_layers):
        add("tokens", ("tensor",), split.block(gathered=model.gathered, scattered=model.dim))
        add("sums", ("tensor",), split.squares(model.num_norms))
        add("tokens", ("context",), split.keys(model.keys if model.latent else model.keys // case.tensor))
    add("tokens", ("tensor",), split.block(gathered=model.dim, scattered=model.dim))  # the one dense network
    add("tokens", ("tensor",), split.ends(model.dim))
    add("sums", ("context",), split.loss())
    statistics = split.statistics(
        layers=model.moe_layers,
        experts=EXPERTS,
        counts=EXPERTS if model.latent else 0,  # its balance loss goes by choices without the expert bias
        losses=LOSS_NUMBERS,
    )
    add("sums", BATCH_SHARDS, statistics)
    rows = ExpertRows(
        tokens=B * part.num_present, top_k=TOP_K, dim=model.dim, value_bytes=FLOAT_BYTES, expert=grid.expert,
        expert_tensor=case.parts, forwards=2 if case.recomputed else 1,
    )  # fmt: skip
    for _ in range(model.moe_layers):
        if case.allgather:
            add("tokens", _EXCHANGE, rows.gathered())
            add("counts", _EXCHANGE, gathered_bytes(8, rows.ranks))
        else:
            add("rows", _EXCHANGE, rows.sent())
            add("counts", _EXCHANGE, rows.counted(EXPERTS))
    return dict(found)


def _of_phase(sent: dict[Key, int], phase: str) -> dict[Key, int]:
    return {key: num for key, num in sent.items() if key[0] == phase and key[1] != "rows" and num}


def _rows(sent: dict[Key, int]) -> int:
    return sum(num for (_, kind, _), num in sent.items() if kind == "rows")


@pytest.fixture(scope="module", params=[ON_2, ON_4], ids=["2 ranks", "4 ranks"])
def reports(
    request: pytest.FixtureRequest,
) -> list[tuple[Case, list[tuple[dict[Key, int], dict[Placement, int]]]]]:
    """Each case with what its ranks report."""
    cases: list[Case] = request.param
    found = run_ranks(
        _report, cases[0].ranks, [(case.flags, case.length, 1) for case in cases], timeout=200.0
    )
    return [(case, [report[index] for report in found]) for index, case in enumerate(cases)]


@pytest.mark.parallel
def test_a_forward_and_backward_pass_sends_what_the_formulas_say(reports: Any) -> None:
    for case, found in reports:
        sent = [of_rank for of_rank, _ in found]
        expected = [_expected(case, rank) for rank in range(case.ranks)]
        for rank in range(case.ranks):
            assert _of_phase(sent[rank], "passes") == _of_phase(expected[rank], "passes"), (
                f"{case}, rank {rank}"
            )
        # On its way back a row is sent by the rank that got it, which may have had fewer tokens itself.
        assert sum(map(_rows, sent)) == sum(map(_rows, expected)) and (
            case.allgather or _rows(sent[0]) > 0
        ), case


@pytest.mark.parallel
def test_gradients_are_sent_once_over_every_axis_that_does_not_cut_their_parameter(reports: Any) -> None:
    for case, found in reports:
        grid = case.grid
        for rank, (sent, numbers) in enumerate(found):
            expected = Counter[Key]()
            for placement, number in numbers.items():
                axes = tuple(axis for axis in placement.stage if axis not in placement.cut_over)
                members = tuple(grid.groups(axes)[grid.slot(rank, axes)])
                num_bytes = summed_bytes(number * FLOAT_BYTES, len(members))
                expected["gradients", "sums", members] += num_bytes
            assert _of_phase(sent, "gradients") == +expected, f"{case}, rank {rank}"


@pytest.mark.parallel
def test_what_ranks_agree_on_at_an_update_is_less_than_a_kilobyte(reports: Any) -> None:
    for case, found in reports:
        for sent, _ in found:
            assert 0 < sum(_of_phase(sent, "norm").values()) < 1024, case
            assert sum(_of_phase(sent, "logs").values()) < 1024, case


def test_sharded_states_gather_parameters_and_reduce_gradients_as_often_as_documented() -> None:
    """Two data ranks, two micro-batches, experts that one rank alone holds, which are never gathered."""
    reports = run_ranks(_report, 2, [((*GPT.flags, flag), 16, 2) for flag in ZERO_FLAGS])
    for index, num_gathers in enumerate((1, 2 * 2)):
        parts = [
            sum(number for placement, number in report[index][1].items() if placement.stage == DENSE_AXES)
            for report in reports
        ]
        sent = reports[0][index][0]
        largest = max(parts) * FLOAT_BYTES  # torch fills the others up to it
        expected = gathered_bytes(largest, 2) * num_gathers + shared_bytes(2 * largest, 2)
        assert sent["passes", "tokens", (0, 1)] == expected, ZERO_FLAGS[index]
