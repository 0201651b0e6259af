"""A decoder over tensor and context ranks is the decoder of one process: loss, statistics and every gradient.

One micro-batch, forward and backward, without fairseq's Trainer: gradients are summed here as the placement of each
parameter says. Run with ``pytest tests/distributed/test_sharded_decoder.py``.
"""

from typing import Any

import pytest
import torch

from tests.helpers.block_models import MODELS
from tests.helpers.ranks import run_ranks

GPT = (
    "--moe-freq", 0, "--moe-expert-count", 0, "--moe-second-expert-policy", "sampling", "--moe-gate-loss-wt", 1,
    "--num-experts", 8, "--moe-layer-freq", "[0,1]", "--moe-aux-loss-coeff", "0.2 0.1 0.3", "--moe-z-loss-coeff", 0.1,
    "--moe-router-load-balancing-type", "aux_loss seq_aux_loss global_aux_loss",
)  # fmt: skip
LATENT = (
    *MODELS["latent"], "--moe-router-dtype", "fp64", "--mtp-layers", 0, "--mtp-loss-weight", 0,
    "--decoder-attention-heads", 4,
)  # fmt: skip
FULL_NORM = (*MODELS["grouped"], "--qk-norm", "full", "--clip-qkv", 0.7)
T2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--expert-tensor-parallel-size", 1)
T2X2 = (*T2[:-1], 2)
C2 = ("--context-parallel-size", 2)
LENGTHS = (13, 9, 5)


def _report(rank: int, flags: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Compute micro-batches of several lengths, which do not divide by the number of ranks, one after the other."""
    from fairseq import tasks

    import tests.helpers.tiny as tiny
    from fairseq_moe.distributed import broadcast_value

    cfg = broadcast_value(tiny._config(flags) if rank == 0 else None)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(cfg.common.seed)
    model = task.build_model(cfg.model).double()
    criterion = task.build_criterion(cfg.criterion)
    batches = (tiny.make_batch(length, num_sequences=3, length=length, num_padded=2) for length in LENGTHS)
    return [_of_batch(model, criterion, sample) for sample in batches]


def _of_batch(model: Any, criterion: Any, sample: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    from fairseq_moe.distributed import world_size
    from fairseq_moe.distributed.joining import join_parts
    from fairseq_moe.parallel.placement import is_expert, num_copies, placement_of

    model.zero_grad()
    for router in model.decoder.routers():
        router.begin_update()
    model.eval()
    with torch.no_grad():
        evaluated = float(criterion(model, sample)[0])
    model.train()
    loss, _, logged = criterion(model, sample)
    loss.backward()
    mesh, gradients = model.decoder.mesh, {}
    for name, p in model.named_parameters():
        gradient, placement = torch.zeros_like(p) if p.grad is None else p.grad, placement_of(p)
        if num_copies(placement, mesh.ranks) > 1:
            dist.all_reduce(gradient, group=mesh.group_of_copies(placement))
        whole = join_parts(gradient, placement, mesh)
        if is_expert(p):
            ids = mesh.layout.local_ids(mesh.rank)
            gradients.update({f"{name}[{expert}]": row for expert, row in zip(ids, whole, strict=True)})
        else:
            gradients[name] = whole
    assert world_size() == mesh.ranks.world_size
    numbers = {key: torch.as_tensor(value).double() for key, value in logged.items()}
    return {"evaluated": evaluated, "loss": float(loss), "logged": numbers, "gradients": gradients}


def _assert_equal(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    norm = torch.stack([gradient.norm() for gradient in expected["gradients"].values()]).norm()
    seen = set()
    for report in found:
        assert report["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert report["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-12)
        assert report["logged"].keys() == expected["logged"].keys()
        for name, number in report["logged"].items():
            torch.testing.assert_close(number, expected["logged"][name], rtol=2e-6, atol=2e-6, msg=name)
        for name, gradient in report["gradients"].items():
            reference = expected["gradients"][name]
            difference = float((gradient - reference).norm())
            assert difference <= 1e-12 * float(reference.norm()) + 1e-15 * float(norm), name
            seen.add(name)
    assert seen == expected["gradients"].keys()


@pytest.mark.parametrize(
    ("model", "layout", "num_ranks"),
    [
        (GPT, T2, 2),
        (GPT, C2, 2),
        (LATENT, T2X2, 2),
        (LATENT, C2, 2),
        (FULL_NORM, T2X2, 2),
        (FULL_NORM, (*C2, *T2), 4),
        (LATENT, (*C2, *T2X2), 4),
        (GPT, (*C2, *T2), 4),
    ],
)  # fmt: skip
def test_shards_equal_one_process(model: tuple[Any, ...], layout: tuple[Any, ...], num_ranks: int) -> None:
    (expected,) = run_ranks(_report, 1, model)
    found = run_ranks(_report, num_ranks, (*model, *layout))
    for index, reference in enumerate(expected):
        _assert_equal([reports[index] for reports in found], reference)


def _refusal(rank: int, flags: tuple[Any, ...]) -> str:
    from fairseq import tasks

    import tests.helpers.tiny as tiny
    from fairseq_moe.distributed import broadcast_value
    from fairseq_moe.errors import ConfigError

    cfg = broadcast_value(tiny._config(flags) if rank == 0 else None)
    task = tasks.setup_task(cfg.task)
    task.dictionary.symbols, task.dictionary.indices = ["<s>"], {"<s>": 0}
    with pytest.raises(ConfigError) as refused:
        task.build_model(cfg.model)
    return str(refused.value)


def test_fewer_words_than_tensor_ranks_are_refused() -> None:
    flags = (*MODELS["grouped"], *T2)
    found = run_ranks(_refusal, 2, flags)
    assert (
        found
        == [
            "--tensor-model-parallel-size is 2, but the dictionary has 1 words, of which each rank needs at least one; "
            "lower it."
        ]
        * 2
    )
