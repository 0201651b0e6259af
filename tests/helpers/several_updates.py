"""Do several updates of a tiny model, some of two micro-batches and one of a rank without data, on any ranks."""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ADAM",
    "NUM_UPDATES",
    "assert_close",
    "micro_batches",
    "run_updates",
    "train",
    "whole_optimizer_state",
]

# A large epsilon: otherwise Adam turns the rounding of vanishing gradients into whole steps.
ADAM = ["--optimizer", "adam", "--lr", "0.01", "--adam-eps", "1e-3"]
NUM_UPDATES = 3


def micro_batches(update: int, rank: int, *, may_be_missing: bool = True) -> list[Any]:
    """Two batches, longer ones on higher ranks; rank 1 has only one for its last update."""
    from tests.helpers.tiny import make_batch

    batches = [make_batch(100 * update + 10 * micro + rank, length=7 + rank) for micro in range(2)]
    is_missing = may_be_missing and rank == 1 and update == NUM_UPDATES - 1
    return [batches[0], None] if is_missing else batches


def run_updates(trainer: Any, ranks: list[int]) -> list[dict[str, float]]:
    """What each update logs when this process takes the batches of ``ranks``."""
    from tests.helpers.tiny import update

    trainer.reset_dummy_batch(micro_batches(0, ranks[0])[0])
    logged = []
    for number in range(NUM_UPDATES):
        batches = [batch for rank in ranks for batch in micro_batches(number, rank)]
        if len(ranks) > 1:
            batches = [batch for batch in batches if batch is not None]
        logged.append(update(trainer, batches))
    return logged


def whole_optimizer_state(trainer: Any) -> dict[str, Tensor]:
    """``name/kind`` -> state of the whole model, experts in their global order."""
    from fairseq_moe.distributed import gather_values
    from fairseq_moe.stock.run import run_of

    run = run_of(trainer)
    assert run is not None
    layout = run.mesh.layout
    own = {
        f"{name}/{kind}": torch.as_tensor(value)
        for name, state in run.state.optimizer_values().items()
        for kind, value in state.items()
    }
    by_rank = gather_values(own)
    whole = dict(by_rank[0])
    for key in (key for key in whole if ".experts." in key and whole[key].dim() > 0):
        for rank, state in enumerate(by_rank):
            assert torch.equal(state[key], by_rank[rank % layout.ep_size][key]), f"replica of {key}"
        whole[key] = torch.cat([state[key] for state in by_rank[: layout.ep_size]])
    return whole


def train(rank: int, flags: list[str], ranks: list[int] | None = None) -> Any:
    from tests.helpers.tiny import build_trainer, parameters

    trainer = build_trainer(flags)
    logged = run_updates(trainer, [rank] if ranks is None else ranks)
    return logged, parameters(trainer), whole_optimizer_state(trainer)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each difference is within 3e-6 of the tensor's norm, or within 1e-6 of the norm of all together."""
    assert sorted(found) == sorted(expected)
    total = torch.stack([tensor.double().norm() for tensor in expected.values()]).norm().item()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).double().norm().item()
        bound = 3e-6 * tensor.double().norm().item() + 1e-6 * total
        assert difference <= bound, f"{name} differs by {difference:.3g}, allowed {bound:.3g}"
