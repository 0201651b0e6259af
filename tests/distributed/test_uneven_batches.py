"""Ranks with different numbers of tokens, or none: right results, the same collectives, never a hang.

Run with ``pytest tests/distributed/test_uneven_batches.py``.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import USER_DIR, run_cli, run_ranks

DEADLINE_SEC = 20.0
WIDTH, HIDDEN = 6, 10


def _layer(num_experts: int, *, top_k: int, mesh: Any) -> Any:
    from fairseq_moe.flags.moe import MoEConfig
    from fairseq_moe.models.decoder_layer import build_moe_layer

    moe = MoEConfig(
        moe_freq=1, moe_expert_count=num_experts, moe_top1_expert=top_k == 1, moe_second_expert_policy="all"
    )
    torch.manual_seed(5)
    layer = build_moe_layer(
        moe,
        mesh,
        model_dim=WIDTH,
        hidden_dim=HIDDEN,
        activation=torch.nn.functional.gelu,
        activation_dropout=0.0,
        dropout=0.0,
    )
    return layer.double()


def _local_layer(num_experts: int, *, top_k: int) -> Any:
    """The same layer with all experts on this rank."""
    from fairseq_moe.distributed import local_experts_only, parallel_mesh

    with local_experts_only():
        return _layer(num_experts, top_k=top_k, mesh=parallel_mesh(num_experts))


def _run(layer: Any, x_TD: Tensor, padding_T: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
    """Output, gradient of the input, auxiliary outputs; the layer's gradients are left on its parameters."""
    from fairseq_moe.modules import RouterMode, TokenInfo

    x_TD = x_TD.clone().requires_grad_()
    y_TD, aux = layer(x_TD, tokens=TokenInfo(mode=RouterMode.TRAIN, padding_T=padding_T))
    layer.zero_grad()
    (y_TD.square().sum() + aux.balance_loss).backward()
    assert x_TD.grad is not None
    return y_TD.detach(), x_TD.grad, aux


def _assert_equals_local_layer(num_experts: int, top_k: int, x_TD: Tensor, padding_T: Tensor | None) -> None:
    from fairseq_moe.distributed import all_reduce_sum, parallel_mesh, rank
    from fairseq_moe.parallel.placement import EXPERT
    from tests.helpers.layer_stats import load_of, stats_of

    mesh = parallel_mesh(num_experts)
    layer, local = _layer(num_experts, top_k=top_k, mesh=mesh), _local_layer(num_experts, top_k=top_k)
    y_TD, grad_TD, aux = _run(layer, x_TD, padding_T)
    expected_y_TD, expected_grad_TD, expected_aux = _run(local, x_TD, padding_T)
    torch.testing.assert_close(y_TD, expected_y_TD)
    torch.testing.assert_close(grad_TD, expected_grad_TD)
    torch.testing.assert_close(stats_of(aux), stats_of(expected_aux))
    torch.testing.assert_close(load_of(aux), load_of(expected_aux))
    torch.testing.assert_close(layer.router.weight.grad, local.router.weight.grad)
    ids = mesh.layout.local_ids(rank())
    for own, whole in zip(layer.experts.parameters(), local.experts.parameters(), strict=True):
        everyones = all_reduce_sum(whole.grad.clone())
        torch.testing.assert_close(
            all_reduce_sum(own.grad.clone(), mesh.group_of_copies(EXPERT)), everyones[ids.start : ids.stop]
        )


def _random_shapes(rank: int, world_size: int, num_seeds: int) -> None:
    for seed in range(num_seeds):
        common, own = random.Random(seed), random.Random(1000 * seed + rank)
        num_experts = common.choice([world_size, 2 * world_size, 1 if world_size > 2 else 2])
        top_k = 1 if num_experts == 1 else common.choice([1, 2])
        num_tokens = own.choice([0, 1, own.randint(1, 3) * own.randint(1, 12)])
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        x_TD = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
        padding_T = None
        if own.random() < 0.5:
            padding_T = torch.rand(num_tokens, generator=generator) < own.choice([0.3, 1.0])
        _assert_equals_local_layer(num_experts, top_k, x_TD, padding_T)


@pytest.mark.parametrize("world_size", [3, 4])
def test_fifty_random_mixes_of_batch_shapes_equal_a_layer_with_all_experts(world_size: int) -> None:
    run_ranks(_random_shapes, world_size, world_size, 50, timeout=60)


def _everything_to_expert_0(rank: int, top_k: int, num_tokens: list[int]) -> dict[str, Any]:
    from fairseq_moe.distributed import parallel_mesh
    from tests.helpers.layer_stats import load_of, stats_of

    layer = _layer(4, top_k=top_k, mesh=parallel_mesh(4))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0] = 1.0
    _, grad_TD, aux = _run(layer, torch.rand(num_tokens[rank], WIDTH, dtype=torch.float64) + 0.5)
    gradients = [p.grad for p in layer.experts.parameters()]
    return {
        "kept": load_of(aux)[1].tolist(),
        "gradient exists": all(grad is not None for grad in gradients),
        "gradient is zero": all(bool((grad == 0).all()) for grad in gradients),
        "finite": all(
            bool(torch.isfinite(tensor).all()) for tensor in (grad_TD, stats_of(aux), aux.balance_loss)
        ),
    }


def test_all_tokens_to_one_expert_fill_its_capacity_and_leave_the_others_zero_gradients() -> None:
    num_tokens = [8, 1, 0, 5]  # capacity ceil(T / 4) with one choice
    for rank, found in enumerate(run_ranks(_everything_to_expert_0, 4, 1, num_tokens, timeout=DEADLINE_SEC)):
        assert found["kept"] == [-(-num_tokens[rank] // 4), 0, 0, 0]
        assert found["gradient exists"]
        assert found["gradient is zero"] is (rank != 0)
        assert found["finite"]


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_on_any_rank(top_k: int) -> None:
    for found in run_ranks(_everything_to_expert_0, 4, top_k, [0, 0, 0, 0], timeout=DEADLINE_SEC):
        expected = {"gradient exists": True, "gradient is zero": True, "finite": True}
        assert found == {"kept": [0, 0, 0, 0], **expected}


def _logits(rank: int, world_size: int, dummy_rank: int | None, dummy_tokens: int) -> Tensor | None:
    """The model's output for the batch that this rank has, if it is not the one with the dummy."""
    from fairseq_moe.stock.find_experts import moe_decoder
    from tests.helpers.tiny import build_trainer, make_batch

    trainer = build_trainer(["--moe-expert-count", 6])
    model = trainer.get_model().eval()
    assert moe_decoder(model) is not None
    if rank == dummy_rank:
        model(**make_batch(0, num_sequences=1, length=dummy_tokens)["net_input"], all_padding=True)
        return None
    index = rank if dummy_rank is None or rank < dummy_rank else rank - 1
    return model(**make_batch(index, num_sequences=1 + index)["net_input"])[0].detach()


def test_dummy_batch_leaves_other_ranks_output_as_it_is_without_the_rank_to_the_bit() -> None:
    without = run_ranks(_logits, 2, 2, None, 0)
    for dummy_tokens in (1, 13):
        first, _, third = run_ranks(_logits, 3, 3, 1, dummy_tokens, timeout=DEADLINE_SEC)
        assert torch.equal(first, without[0])
        assert torch.equal(third, without[1])


# Micro-batches of each of three ranks; None is what fairseq's iterator gives a rank that has run out of data.
ONE_UPDATE: dict[str, list[list[int | None]]] = {
    "one-rank-without-data": [[0], [None], [1]],
    "second-micro-batch-missing": [[0, 1], [2, None], [3, None]],
    "only-one-rank-with-data": [[None], [0], [None]],
}


def _report(flags: list[Any], batches: list[int | None]) -> tuple[dict[str, float], dict[str, Tensor]]:
    from tests.helpers.tiny import build_trainer, gradients, make_batch, update

    trainer = build_trainer(["--moe-expert-count", 6, "--update-freq", len(batches), *flags])
    trainer.reset_dummy_batch(make_batch(99, length=11))
    samples = [{} if seed is None else make_batch(seed, length=5 + seed) for seed in batches]
    return update(trainer, samples), gradients(trainer)


def _update_on_rank(rank: int, flags: list[Any], case: str, mutation: bool = False) -> Any:
    if mutation:
        import fairseq_moe.stock.step.training as training

        training._task_uses_stock_steps = lambda task: False  # the trainer handles dummies, as in stock
    return _report(flags, ONE_UPDATE[case][rank])


def _update_alone(rank: int, case: str) -> Any:
    seeds = [seed for own in ONE_UPDATE[case] for seed in own if seed is not None]
    return _report([], seeds)


def _assert_same_update(found: Any, expected: Any) -> None:
    (logged, gradients), (expected_logged, expected_gradients) = found, expected
    for name, value in expected_logged.items():
        if "time" not in name and name not in ("ups", "wps", "wall", "train_wall"):
            assert logged[name] == pytest.approx(value, rel=2e-6), name
    for name, gradient in expected_gradients.items():
        bound = 3e-6 * gradient.norm() + 1e-6 * expected_logged["gnorm"]
        assert (gradients[name] - gradient).norm() <= bound, name


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp", "fully_sharded"])
@pytest.mark.parametrize("case", ONE_UPDATE)
def test_update_with_dummies_equals_one_process_without_them(case: str, backend: str) -> None:
    [expected] = run_ranks(_update_alone, 1, case)
    for found in run_ranks(_update_on_rank, 3, ["--ddp-backend", backend], case, timeout=DEADLINE_SEC):
        _assert_same_update(found, expected)


def test_these_tests_see_stocks_way_with_dummies() -> None:
    case = "second-micro-batch-missing"
    [expected] = run_ranks(_update_alone, 1, case)
    found = run_ranks(_update_on_rank, 3, ["--ddp-backend", "legacy_ddp"], case, True, timeout=DEADLINE_SEC)[
        0
    ]
    with pytest.raises(AssertionError):
        _assert_same_update(found, expected)


def test_an_epoch_of_max_tokens_batches_on_three_ranks(text_data: Path, tmp_path: Path) -> None:
    """Batches of all sizes, a short last one and ranks that run out of data, in training and validation."""
    argv = [text_data, "--user-dir", USER_DIR, "--task", "language_modeling", "--sample-break-mode", "eos"]
    argv += ["--arch", "transformer_lm", "--decoder-layers", 2, "--decoder-embed-dim", 16]
    argv += ["--decoder-ffn-embed-dim", 16, "--decoder-attention-heads", 2, "--decoder-output-dim", 16]
    argv += ["--moe-freq", 2, "--moe-expert-count", 3, "--moe-eval-capacity-token-fraction", 1]
    argv += ["--criterion", "moe_cross_entropy", "--optimizer", "sgd", "--lr", 0, "--max-tokens", 130]
    argv += [
        "--max-epoch",
        1,
        "--update-freq",
        2,
        "--num-workers",
        0,
        "--cpu",
        "--no-save",
        "--log-format",
        "json",
    ]
    argv += ["--save-dir", tmp_path, "--required-batch-size-multiple", 1]
    three = run_cli("fairseq_cli.train", argv, world_size=3, timeout=60)
    one = run_cli("fairseq_cli.train", argv, timeout=60)
    assert three.exit_codes == [0, 0, 0], three.output
    assert one.exit_code == 0, one.output
    assert _logged(three.outputs[0], "valid_loss") == pytest.approx(
        _logged(one.output, "valid_loss"), abs=2e-3
    )
    assert _logged(three.outputs[0], "train_inner_loss") == pytest.approx(
        _logged(one.output, "train_inner_loss"), abs=0.02
    )


def _logged(output: str, name: str) -> float:
    records = [json.loads(line[line.index("{") :]) for line in output.splitlines() if f'"{name}"' in line]
    return float(records[-1][name])
