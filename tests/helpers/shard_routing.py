"""Route micro-batches whose tokens are spread over ranks, and keep all that a criterion or an optimizer would see."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_moe.distributed.collectives import all_reduce_sum
from fairseq_moe.modules import (
    BranchConfig,
    Experts,
    LocalDispatcher,
    MoELayer,
    Router,
    RouterMode,
    TokenInfo,
    TopKConfig,
    whole_auxes,
)
from fairseq_moe.modules.routing.bias import BiasConfig, BiasRule
from fairseq_moe.modules.routing.branch import SecondExpertPolicy
from fairseq_moe.modules.routing.capacity import CapacityConfig
from fairseq_moe.modules.routing.scores import ScoreFunction, ScoreRule
from fairseq_moe.modules.routing.stats import layer_stats
from fairseq_moe.modules.shards import LocalShards

__all__ = [
    "BATCH",
    "CASES",
    "DROPPING",
    "EXPERTS",
    "LAYERS",
    "LENGTHS",
    "TOLERANCE",
    "differs_by",
    "layers_of",
    "micro_batch",
    "own_tokens",
    "update_routers",
]

EXPERTS, WIDTH, BATCH, LAYERS = 8, 6, 3, 2
LENGTHS = (13, 9, 5)
TOLERANCE = 1e-12
ALL_LOSSES = frozenset({"aux", "seq_aux", "global_aux", "z"})
SIGMOID = ScoreRule(top_k=2, function=ScoreFunction.SIGMOID, num_groups=4, group_topk=2)
ALL = SecondExpertPolicy.ALL


def _topk(score: ScoreRule, bias: BiasRule | None = None, **options: Any) -> dict[str, Any]:
    config = TopKConfig(score=score, aux_losses=ALL_LOSSES, **options)
    return {"config": config, "balance": None if bias is None else BiasConfig(rule=bias, update_rate=0.05)}


# Options of a ``Router``, and what its tokens are for.
CASES: dict[str, tuple[dict[str, Any], RouterMode]] = {
    "branch, one expert": (
        {"config": BranchConfig(top_k=1, eval_capacity_token_fraction=1.0)},
        RouterMode.EVAL,
    ),
    "branch, two experts": (
        {"config": BranchConfig(second_expert_policy=ALL, eval_capacity_token_fraction=1.0)},
        RouterMode.EVAL,
    ),
    "softmax": (_topk(ScoreRule(top_k=2)), RouterMode.TRAIN),
    "softmax, evaluation": (_topk(ScoreRule(top_k=2)), RouterMode.EVAL),
    "softmax in groups": (_topk(ScoreRule(top_k=2, num_groups=4, group_topk=2)), RouterMode.TRAIN),
    "sigmoid in groups, bias by signs": (_topk(SIGMOID, BiasRule.SIGN), RouterMode.TRAIN),
    "softmax, bias by quantiles": (_topk(ScoreRule(top_k=2), BiasRule.QUANTILE), RouterMode.TRAIN),
}
DROPPING: dict[str, tuple[dict[str, Any], RouterMode]] = {
    "branch drops": ({"config": BranchConfig(second_expert_policy=ALL)}, RouterMode.TRAIN),
    "top k drops": (
        _topk(ScoreRule(top_k=2), BiasRule.SIGN, capacity=CapacityConfig(factor=0.8)),
        RouterMode.TRAIN,
    ),
}


def layers_of(options: dict[str, Any], shards: Any) -> nn.ModuleList:
    """Build float64 layers with all experts on each rank, the same on every call."""
    torch.manual_seed(3)
    sums = None if isinstance(shards, LocalShards) else all_reduce_sum
    layers = [
        MoELayer(
            router=Router(
                model_dim=WIDTH, num_experts=EXPERTS, shards=shards, sum_over_ranks=sums, **options
            ),
            experts=Experts(
                num_local_experts=EXPERTS,
                first_expert_id=0,
                model_dim=WIDTH,
                hidden_dim=4,
                activation=F.relu,
            ),
            dispatcher=LocalDispatcher(),
        )
        for _ in range(LAYERS)
    ]
    return nn.ModuleList(layers).double()


def micro_batch(length: int, padded: bool, seed: int) -> tuple[Tensor, Tensor | None]:
    """Draw tokens (B, S, D); padding ends one sequence early, and leaves nothing of another."""
    generator = torch.Generator().manual_seed(100 * length + seed)
    x_BSD = torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64)
    padding_BS = torch.zeros(BATCH, length, dtype=torch.bool)
    padding_BS[0, length - 2 :] = True
    padding_BS[2] = True
    return x_BSD, padding_BS if padded else None


def own_tokens(whole: Tensor, shards: Any) -> Tensor:
    """Take the tokens of a rank out of (B, S, ...), batch-major: those of its positions that are there."""
    part = shards.part_of(whole.shape[1])
    return part.own(whole, dim=1)[:, : part.num_present].flatten(0, 1)


def _weights(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.5


def update_routers(
    layers: nn.ModuleList, shards: Any, case: tuple[Any, ...], *, first_seed: int = 0
) -> dict[str, Any]:
    """Pass two micro-batches forward and back and update the biases; report what a criterion sees, and gradients.

    Args:
        layers: of ``layers_of``.
        shards: joins the ranks of a micro-batch.
        case: what tokens are for, the length of sequences, and whether some tokens are padding.
        first_seed: of the two micro-batches.
    """
    mode, length, padded = case
    found: dict[str, Any] = {"losses": [], "stats": [], "histograms": [], "tokens": [], "measures": []}
    layers.zero_grad()
    for layer in layers:
        layer.router.begin_update()
    for seed in range(first_seed, first_seed + 2):
        x_BSD, padding_BS = micro_batch(length, padded, seed)
        x_TD = own_tokens(x_BSD, shards)
        tokens = TokenInfo(
            mode=mode,
            padding_T=None if padding_BS is None else own_tokens(padding_BS, shards),
            num_sequences=BATCH,
        )
        auxes = whole_auxes([None, *[layer(x_TD, tokens=tokens)[1] for layer in layers]], shards)
        assert auxes.pop(0) is None
        losses = torch.stack([aux.losses for aux in auxes])
        # Not linear, as a criterion may be: the gradient then depends on the whole value.
        ((losses * _weights(*losses.shape)).sum() + losses.sum().square()).backward()
        histograms = torch.stack([aux.histogram_34E for aux in auxes])
        measures = torch.stack([aux.measures_4 for aux in auxes])
        found["losses"].append(losses.detach())
        found["histograms"].append(histograms)
        found["measures"].append(measures)
        found["stats"].append(layer_stats(histograms, measures))
        found["tokens"].append(len(x_TD))
    for layer in layers:
        layer.router.update_bias()
    routers = [layer.router for layer in layers]
    found["gradients"] = [router.weight.grad.clone() for router in routers]
    found["global"] = [router.global_counts_E.clone() for router in routers]
    found["local"] = [router.local_counts_E.clone() for router in routers]
    found["biases"] = [None if r.expert_bias is None else r.expert_bias.clone() for r in routers]
    return found


def differs_by(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Find the largest difference between tensors of two lists."""
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True))
