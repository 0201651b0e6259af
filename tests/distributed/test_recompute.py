"""Memory-saving and faster passes of the decoder under fairseq's Trainer: the numbers stay.

Run with ``pytest tests/distributed/test_recompute.py``. Single layers are in
``tests/unit/modules/test_recompute.py`` and ``tests/unit/models/test_attention.py``.
"""

import functools
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.router_family import GLOBAL, MEGATRON, router_batches, routers

NOISE = (
    "--dropout",
    0.3,
    "--activation-dropout",
    0.2,
    "--attention-dropout",
    0.1,
    "--moe-input-jitter-eps",
    0.2,
)
WRAP_ALL = ("--min-params-to-wrap", 1)


def _two_updates(rank: int, flags: list[Any]) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, gradients, parameters, update

    trainer = build_trainer(flags)
    logged = [update(trainer, router_batches(rank, 2, 2)) for _ in range(2)]
    timing = {"ups", "wps", "wall", "train_wall"}
    counters = {f"bias{index}": router.expert_bias for index, router in enumerate(routers(trainer))}
    return {
        "logged": [
            {name: value for name, value in entry.items() if name not in timing and "time" not in name}
            for entry in logged
        ],
        "tensors": gradients(trainer) | parameters(trainer) | counters,
    }


@functools.cache
def _plain(world_size: int, *flags: Any) -> dict[str, Any]:
    result: dict[str, Any] = run_ranks(_two_updates, world_size, list(flags))[0]
    return result


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
@pytest.mark.parametrize("modules", ["moe", "experts,shared_experts"])
def test_recomputing_changes_no_number_and_counts_once(modules: str, backend: str) -> None:
    """With dropout, jitter, drops, all losses and the expert bias, over two updates of two micro-batches."""
    flags = (*MEGATRON, *GLOBAL, *NOISE, *WRAP_ALL, "--update-freq", 2, "--ddp-backend", backend)
    expected = _plain(2, *flags)
    found = run_ranks(_two_updates, 2, [*flags, "--moe-recompute-modules", modules])[0]
    assert found["logged"] == expected["logged"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


@pytest.mark.parametrize("modules", ["moe", "experts"])
@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, ()),
        (2, ("--expert-model-parallel-size", 1)),
        (2, ("--moe-token-dispatcher-type", "allgather")),
    ],
    ids=["alone", "replicas", "allgather"],
)
def test_fully_sharded_layers_whose_last_step_are_the_experts(
    world_size: int, flags: tuple[Any, ...], modules: str
) -> None:
    """Nothing after the experts keeps a tensor, so nothing but the layer itself can start the recomputation."""
    flags = (*MEGATRON, *GLOBAL, *WRAP_ALL, "--update-freq", 2, "--ddp-backend", "fully_sharded", *flags)
    expected = _plain(world_size, *flags)
    found = run_ranks(_two_updates, world_size, [*flags, "--moe-recompute-modules", modules])[0]
    assert found["logged"] == expected["logged"]
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name


DENSE = ("--moe-freq", 0, "--moe-expert-count", 0, "--decoder-layers", 2)


def _one_update(rank: int, flags: list[Any]) -> dict[str, Any]:
    from tests.helpers.tiny import build_trainer, make_batch, update

    trainer = build_trainer(flags)
    logged = update(trainer, [make_batch(rank, length=9)])
    model = trainer.get_model()
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("self_attn")}
    state = model.state_dict()
    return {"logged": logged, "kinds": kinds, "names": list(state), "tensors": state}


@pytest.mark.parametrize("model", [DENSE, MEGATRON], ids=["dense", "moe"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded"])
def test_fused_attention_is_stocks_within_rounding(backend: str, model: tuple[Any, ...]) -> None:
    """In dense and MoE layers, also where FSDP has flattened the parameters; attention dropout included."""
    flags = (*model, *WRAP_ALL, "--attention-dropout", 0.2, "--ddp-backend", backend)
    stock = run_ranks(_one_update, 1, list(flags))[0]
    fused = run_ranks(_one_update, 1, [*flags, "--fused-attention"])[0]
    assert stock["kinds"] == {"MultiheadAttention"}
    assert fused["kinds"] == {"FusedSelfAttention"}
    assert fused["names"] == stock["names"]
    for name in ("loss", "gnorm"):
        assert fused["logged"][name] == pytest.approx(stock["logged"][name], rel=3e-6)
    for name, tensor in stock["tensors"].items():
        torch.testing.assert_close(fused["tensors"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def _decode(rank: int, flags: list[Any]) -> None:
    from tests.helpers.tiny import build_trainer, make_batch

    model = build_trainer(flags).get_model().eval()
    tokens = make_batch(0, num_sequences=3, length=12)["net_input"]["src_tokens"]
    with torch.no_grad():
        whole, _ = model(tokens)
        state: dict[str, Any] = {}
        steps = [model.decoder(tokens[:, :length], incremental_state=state)[0] for length in range(1, 13)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_fused_attention_decodes_one_token_at_a_time() -> None:
    run_ranks(_decode, 1, [*MEGATRON, "--moe-expert-capacity-factor", 8, "--fused-attention"])
